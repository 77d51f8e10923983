"""What is kept of all that was read so far: by one layer, and by a build after some chunk."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cribsheet.attention.rope import turned


@dataclass(frozen=True, slots=True)
class Kept:
    """What one layer keeps: keys (K, P, D) *before* rotation in float32, values (K, P, D), indices and scores (K, P).

    Scores of N needs are (N, K, P). Unrotated keys can be given any position without adding up rounding errors from
    chunk to chunk. A head that keeps fewer than P tokens has them at the end, behind indices `ABSENT` with a score of
    minus infinity. `counts` are how many each head keeps, where that is known without asking a GPU.
    """

    keys: Tensor
    values: Tensor
    indices: Tensor
    scores: Tensor
    counts: tuple[int, ...] | None = None

    def at(self, turn: tuple[Tensor, Tensor]) -> Tensor:
        """Keys (K, P, D) rotated by cosines and sines (P, R/2), in the dtype of the values."""
        return turned(self.keys, turn).to(self.values.dtype)


@dataclass(frozen=True, slots=True)
class State:
    """A build after some chunk: how many tokens were read, and what every layer keeps of them."""

    done: int
    kept: list[Kept]
