"""Keys and values of one layer in four bits, as kernels read them; this file needs no Triton.

Tokens lie in tiles of `TILE` slots, filled or not. Tokens of a tile are neighbours of one head and share the ranges of
their key's channels.

A word of 32 bits holds eight codes of one token's key, or of one channel of a tile's values, where products take them:
bits 4 j to 4 j + 3 of either half belong to the j-th quarter of the channels, or of the slots (`order`). A code c is
read as 1 + c / 16, because these are four bits of a float16's mantissa: no arithmetic makes it a number.

Keys are not rotated yet. A turn by p + j is one by p, the position of a tile's first slot, and one by j, which is the
same in all tiles. The first goes along with the ranges: channel d and its partner d + D / 2 are a and b, then

    A1 (1 + a / 16) + A2 (1 + b / 16) + A0    and    B1 (1 + b / 16) + B2 (1 + a / 16) + B0

are the two numbers turned by p; kernels turn them by j.

Letters: `K` key/value heads, `S` tiles, `D` head size, `G` groups of a value's channels, 1 or 2.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

TILE = 64

# Bytes in 16 bits from which a sheet in int4 stays in it on CUDA: below, that saves no time, and there is room.
PACKS_FROM = 1 << 30


def order(size: int) -> list[tuple[int, int, int]]:
    """Of each channel of so many, or slot, its word and the half of it, and its quarter."""
    quarter = size // 4
    found = []
    for place in range(size):
        own = place % quarter
        found.append((own % 8 // 2 * (size // 32) + own // 8, own % 2, place // quarter))
    return found


@dataclass(frozen=True, slots=True)
class Codes:
    """One layer on the device.

    keys
        (S * TILE, D / 8) int32, words of each token.
    values
        (S, D / 2, 4, 2, TILE / 32) int32, words of each channel and its partner, a fourth of them at a time.
    key_ranges
        (S, 6, D / 2) float16, or float32 for models in it: A1, A2, A0, B1, B2, B0 of the channels of a tile's keys, in
        the order of their words and halves.
    value_ranges
        (S, 2 * G, TILE) float16: scales of each group, then offsets, of each slot in the order of words and halves.
    tiles
        (S, 3) int32: position of a tile's first token, how many there are, and the row of the first where all tokens of
        all heads stand one behind the other.
    spans
        (K, 2) int32: the first tile of each head, and the one behind its last.
    freqs
        (D / 2,) float32, radians a token.
    turns
        (TILE, 2, D / 2) of the type of `key_ranges`: cosine and sine of the turns of a tile's slots, in their order.
    most
        tiles of the head that has most.
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

    @property
    def head_size(self) -> int:
        """D."""
        return 8 * self.keys.shape[1]

    @property
    def groups(self) -> int:
        """G."""
        return self.value_ranges.shape[1] // 2

    @property
    def nbytes(self) -> int:
        """Bytes on the device, of what no other layer shares."""
        own = self.keys, self.values, self.key_ranges, self.value_ranges, self.tiles, self.spans
        return sum(each.nbytes for each in own)
