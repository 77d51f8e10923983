"""Where recalled tokens stand: moved together, in reading order, behind the sheet's documents; then the guide.

A resident guide that stood there moves on, as it was read: only the question is read behind it. Another placement is
another `placed`; why this one: decisions/0030.

Letters: `L` layers, `K` key/value heads, `n` tokens, `D` head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cribsheet.attention.prefix import Prefix
from cribsheet.attention.rope import rotate
from cribsheet.engine.request import Suffix

Piece = tuple[Tensor, Tensor]  # keys before rotation, and values (L, K, n, D)


@dataclass(frozen=True, slots=True, eq=False)
class Recalled:
    """Stretches as they were read: keys before rotation and values, (L, K, n, D) of each, on the model's device.

    `sizes` are the tokens of each stretch, which may be in several `pieces`; behind them may be one that is no stretch,
    the guide. `inv_freqs` (R/2,) are those of each layer. The tensors are shared and never written to.
    """

    pieces: Sequence[Piece]
    sizes: Sequence[int]
    inv_freqs: Sequence[Tensor]

    @property
    def tokens(self) -> int:
        """How many, the guide's included."""
        return sum(keys.shape[2] for keys, _ in self.pieces)

    def placed(self, start: int) -> Suffix:
        """Keys and values (K, n, D) of each layer, one piece behind the other, keys at positions from `start` on."""
        keys, values = (torch.cat(halves, 2) for halves in zip(*self.pieces, strict=True))
        positions = torch.arange(start, start + self.tokens, device=keys.device)
        alike: dict[tuple[int, int], list[int]] = {}  # layers that turn alike are turned at once, as they share memory
        for layer, inv_freq in enumerate(self.inv_freqs):  # whose numbers would be waited for on a GPU, layer by layer
            alike.setdefault((inv_freq.data_ptr(), len(inv_freq)), []).append(layer)
        turned = torch.empty_like(keys)
        for layers in alike.values():
            turned[layers] = rotate(keys[layers], positions, self.inv_freqs[layers[0]].to(keys.device)).to(keys.dtype)
        return list(zip(turned, values, strict=True))


def taken_off(prefix: Prefix, tokens: int, inv_freqs: Sequence[Tensor]) -> Piece:
    """The last tokens of a prefix, to be placed elsewhere."""
    positions = torch.arange(prefix.tokens - tokens, prefix.tokens, device=prefix.layers[0].device)
    ends = [layer.last(tokens) for layer in prefix.layers]
    turned = [
        rotate(keys, -positions, inv_freq.to(keys.device)).to(keys.dtype)
        for (keys, _), inv_freq in zip(ends, inv_freqs, strict=True)
    ]
    return torch.stack(turned), torch.stack([values for _, values in ends])
