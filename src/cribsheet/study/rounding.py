"""What four bits make of keys and values, so that a study is measured as it will be stored."""

from __future__ import annotations

import torch
from torch import Tensor

from cribsheet.attention.prefix import LayerPrefix, end_positions
from cribsheet.attention.rope import rotate
from cribsheet.sheet.int4 import block_sizes, pack_blocks, pack_groups, unpack_blocks, unpack_groups


class Rounding:
    """Rounds keys and values (N, D) of a layer of a sheet of `length` positions as `Int4Layer` does.

    Keys are packed before rotation, so they are turned back for it and forth again.
    """

    def __init__(self, layer: LayerPrefix, length: int, inv_freq: Tensor) -> None:
        counts, device = layer.counts or (layer.longest,) * layer.heads, layer.keys.device
        self._sizes = block_sizes(counts).to(device)
        each = end_positions(layer, length)
        self._positions = (each if layer.counts else each.repeat(layer.heads)).to(device)
        self._inv_freq = inv_freq

    @torch.no_grad()
    def lost(self, keys: Tensor, values: Tensor) -> list[Tensor]:
        """What is to be added to keys and values (N, D) in float32 to have them as they are read from a file."""
        plain = rotate(keys, -self._positions, self._inv_freq)
        kept = rotate(unpack_blocks(pack_blocks(plain, self._sizes), self._sizes), self._positions, self._inv_freq)
        return [kept - keys, unpack_groups(pack_groups(values)) - values]
