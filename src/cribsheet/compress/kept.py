"""What one layer keeps of all that was read so far."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cribsheet.attention.rope import rotate


@dataclass(frozen=True, slots=True)
class Kept:
    """What one layer keeps: keys (K, P, D) *before* rotation in float32, values (K, P, D), indices and scores (K, P).

    Scores of N needs are (N, K, P). Unrotated keys can be given any position without adding up rounding errors from
    chunk to chunk. A head that keeps fewer than P tokens has them at the end, behind indices `ABSENT` with a score of
    minus infinity.
    """

    keys: Tensor
    values: Tensor
    indices: Tensor
    scores: Tensor

    def at(self, positions: Tensor, inv_freq: Tensor) -> Tensor:
        """Keys (K, P, D) rotated for `positions` (P,), in the dtype of the values."""
        return rotate(self.keys, positions, inv_freq).to(self.values.dtype)
