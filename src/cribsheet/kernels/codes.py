"""Keys and values of one layer in four bits, as kernels read them; this file needs no Triton.

Tokens lie in tiles of at most `TILE`, all slots of a tile one behind the other, filled or not. Tokens of a tile are
neighbours of one head and share the ranges of their key's channels. As in a sheet (`sheet/int4.py`), a byte holds the
code of channel d in its lower half and that of channel d + D / 2 in its upper one, which are the two that are rotated
together, and keys are not rotated yet: kernels do that with numbers that they have in registers.

Letters: `K` key/value heads, `S` tiles, `D` head size, `G` groups of a value's channels, 1 or 2.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

TILE = 128


@dataclass(frozen=True, slots=True)
class Codes:
    """One layer on the device.

    keys, values
        (S * TILE, D / 2) uint8, pairs of codes.
    key_ranges
        (S, 2, D) float16: scales, then offsets, of the channels of a tile's keys.
    value_ranges
        (S, 2 * G, TILE) float16: scales of each group, then offsets, of each slot.
    tiles
        (S, 3) int32: position of a tile's first token, how many there are, and the row of the first where all tokens of
        all heads stand one behind the other.
    spans
        (K, 2) int32: the first tile of each head, and the one behind its last.
    freqs
        (D / 2,) float32, radians a token.
    turns
        (P + TILE, 2, D / 2) float16, or float32 for models in it: cosine and sine of the turns of all P positions, and
        of those that slots without a token seem to have.
    most
        tiles of the head that has most.
    even
        whether all tiles are full but the last one of each head.
    """

    keys: Tensor
    values: Tensor
    key_ranges: Tensor
    value_ranges: Tensor
    tiles: Tensor
    spans: Tensor
    freqs: Tensor
    turns: Tensor
    most: int
    even: bool

    @property
    def head_size(self) -> int:
        """D."""
        return 2 * self.keys.shape[1]

    @property
    def groups(self) -> int:
        """G."""
        return self.value_ranges.shape[1] // 2

    @property
    def nbytes(self) -> int:
        """Bytes on the device, of what no other layer shares."""
        own = self.keys, self.values, self.key_ranges, self.value_ranges, self.tiles, self.spans
        return sum(each.nbytes for each in own)
