"""Kernels of our own, in Triton, that read keys and values in four bits (`kernels/codes.py`).

Codes become numbers in registers, and keys are rotated there: a turn by p + j is one by p, which the query takes over
backwards, once for a block of keys, and one by j, which is the same in all blocks. Only `attention/packed` and the
kernels beside it import this file, because importing it needs Triton. Their slow reference is `PackedPrefix.keys` and
`values`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cribsheet.kernels.codes import TILE, Codes


@triton.jit
def numbers(pairs: tl.tensor, dtype: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Codes of the lower and of the upper halves of bytes, exact in any float type.

    In float16 they are the last bits of 1024 and more: no conversion, and two at once.
    """
    if dtype == tl.float16:
        lower = ((pairs & 15).to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1024.0
        upper = ((pairs & 240).to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) * 0.0625 - 64.0
        return lower.to(tl.float16), upper.to(tl.float16)
    else:
        return (pairs & 15).to(dtype), (pairs >> 4).to(dtype)


@triton.jit
def key_ranges(
    ranges: tl.tensor, tile: tl.tensor, d: tl.tensor, dtype: tl.constexpr, D: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Scales and offsets of the lower channels, then of the upper ones, of the keys of a `tile`, in 64 bits."""
    HALF: tl.constexpr = D // 2
    place, real = ranges + tile * (2 * D) + d, d < HALF
    scale = tl.load(place, mask=real, other=0.0)
    upper_scale = tl.load(place + HALF, mask=real, other=0.0)
    offset = tl.load(place + D, mask=real, other=0.0)
    upper_offset = tl.load(place + D + HALF, mask=real, other=0.0)
    return scale.to(dtype), offset.to(dtype), upper_scale.to(dtype), upper_offset.to(dtype)


@triton.jit
def value_ranges(
    ranges: tl.tensor, tile: tl.tensor, n: tl.tensor, dtype: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The same of the values in slots `n` of a tile."""
    place = ranges + tile * (2 * GROUPS * TILE) + n
    scale, upper_scale = tl.load(place), tl.load(place + (GROUPS - 1) * TILE)
    offset, upper_offset = tl.load(place + GROUPS * TILE), tl.load(place + (2 * GROUPS - 1) * TILE)
    return scale.to(dtype), offset.to(dtype), upper_scale.to(dtype), upper_offset.to(dtype)


@triton.jit
def turned_by(
    turns: tl.tensor, place: tl.tensor, d: tl.tensor, D: tl.constexpr, TILE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Cosine and sine of the turns of one position, which are those of two that add up to it."""
    HALF: tl.constexpr = D // 2
    near = turns + place % TILE * D + d
    far = turns + (TILE + place // TILE) * D + d
    a, b = tl.load(near, mask=d < HALF, other=0.0), tl.load(near + HALF, mask=d < HALF, other=0.0)
    c, e = tl.load(far, mask=d < HALF, other=0.0), tl.load(far + HALF, mask=d < HALF, other=0.0)
    return a * c - b * e, a * e + b * c


@triton.jit
def over_codes(
    lower: tl.tensor, upper: tl.tensor, keys: tl.tensor, values: tl.tensor, ranges: tl.tensor,
    values_ranges: tl.tensor, tiles: tl.tensor, turns: tl.tensor, low: tl.tensor, high: tl.tensor,
    scale: tl.tensor, dtype: tl.constexpr, D: tl.constexpr, BH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    GROUPS: tl.constexpr, TILE: tl.constexpr, AHEAD: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Attention of some rows, given and found as two halves (BM, BH), and its log-sum-exp (BM,).

    It goes over blocks of BN slots from `low` to `high`, of which there are TILE / BN in each tile.
    """
    HALF: tl.constexpr = D // 2
    BLOCKS: tl.constexpr = TILE // BN
    d, n = tl.arange(0, BH), tl.arange(0, BN)
    real = d < HALF
    turn = turns + n[None, :] * D + d[:, None]
    near_cos = tl.load(turn, mask=real[:, None], other=0.0).to(dtype)
    near_sin = tl.load(turn + HALF, mask=real[:, None], other=0.0).to(dtype)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    found = tl.zeros((BM, BH), tl.float32)
    upper_found = tl.zeros((BM, BH), tl.float32)
    scale = scale * 1.4426950408889634  # of logits to base 2
    if AHEAD:
        here = tl.maximum(tl.minimum(low, high - 1), 0)  # a part may be empty
        cos, sin = turned_by(turns, tl.load(tiles + here // BLOCKS * 3) + here % BLOCKS * BN, d, D, TILE)
    for block in range(low, high):
        tile, first = block // BLOCKS, block % BLOCKS * BN
        if AHEAD:
            after = tl.minimum(high - 1, block + 1)
            place = tl.load(tiles + after // BLOCKS * 3) + after % BLOCKS * BN
            next_cos, next_sin = turned_by(turns, place, d, D, TILE)
        else:
            place = tl.load(tiles + tile * 3) + first
            cos, sin = turned_by(turns, place, d, D, TILE)
        count = tl.load(tiles + tile * 3 + 1) - first
        base = block * (BN * HALF)
        if HALF == BH:
            pairs = tl.load(keys + base + n[None, :] * HALF + d[:, None])
            value_pairs = tl.load(values + base + n[:, None] * HALF + d[None, :])
        else:
            pairs = tl.load(keys + base + n[None, :] * HALF + d[:, None], mask=real[:, None], other=0)
            value_pairs = tl.load(values + base + n[:, None] * HALF + d[None, :], mask=real[None, :], other=0)
        row = (lower * cos[None, :] + upper * sin[None, :]).to(dtype)
        upper_row = (upper * cos[None, :] - lower * sin[None, :]).to(dtype)
        k, upper_k = numbers(pairs, dtype)
        s, o, upper_s, upper_o = key_ranges(ranges, tile, d, dtype, D)
        k = k * s[:, None] + o[:, None]
        upper_k = upper_k * upper_s[:, None] + upper_o[:, None]
        logits = tl.dot(row, k * near_cos - upper_k * near_sin, input_precision="ieee")
        turned = upper_k * near_cos + k * near_sin
        logits = tl.dot(upper_row, turned, logits, input_precision="ieee") * scale
        logits = tl.where(n[None, :] < count, logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # a block of a short tile may be empty
        shrink, weights = tl.exp2(top - level), tl.exp2(logits - level[:, None])
        total = total * shrink + tl.sum(weights, 1)
        v, upper_v = numbers(value_pairs, dtype)
        s, o, upper_s, upper_o = value_ranges(values_ranges, tile, first + n, dtype, GROUPS, TILE)
        v = v * s[:, None] + o[:, None]
        upper_v = upper_v * upper_s[:, None] + upper_o[:, None]
        weights = weights.to(dtype)
        found = tl.dot(weights, v, found * shrink[:, None], input_precision="ieee")
        upper_found = tl.dot(weights, upper_v, upper_found * shrink[:, None], input_precision="ieee")
        top = higher
        if AHEAD:
            cos, sin = next_cos, next_sin
    there = total > 0
    whole = tl.where(there, total, 1.0)[:, None]
    seen = tl.where(there, (top + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    return found / whole, upper_found / whole, seen


@triton.jit
def turned_keys(
    keys: tl.tensor, ranges: tl.tensor, turns: tl.tensor, tile: tl.tensor, place: tl.tensor,
    D: tl.constexpr, BH: tl.constexpr, TILE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Rotated keys (TILE, 2 * BH) of a tile in float32, BH columns for each half of their channels."""
    HALF: tl.constexpr = D // 2
    d, n = tl.arange(0, BH), tl.arange(0, TILE)
    real = d[None, :] < HALF
    pairs = tl.load(keys + tile * (TILE * HALF) + n[:, None] * HALF + d[None, :], mask=real, other=0)
    k, upper = numbers(pairs, tl.float32)
    s, o, upper_s, upper_o = key_ranges(ranges, tile, d, tl.float32, D)
    k = k * s[None, :] + o[None, :]
    upper = upper * upper_s[None, :] + upper_o[None, :]
    far_cos, far_sin = turned_by(turns, place, d, D, TILE)
    near = turns + n[:, None] * D + d[None, :]
    near_cos = tl.load(near, mask=real, other=0.0)
    near_sin = tl.load(near + HALF, mask=real, other=0.0)
    cos = far_cos[None, :] * near_cos - far_sin[None, :] * near_sin
    sin = far_sin[None, :] * near_cos + far_cos[None, :] * near_sin
    both = tl.join(k * cos - upper * sin, upper * cos + k * sin)  # (TILE, BH, 2)
    return tl.reshape(tl.permute(both, (0, 2, 1)), (TILE, 2 * BH))


@triton.jit
def _unpacked(
    keys: tl.tensor, values: tl.tensor, ranges: tl.tensor, values_ranges: tl.tensor, tiles: tl.tensor,
    freqs: tl.tensor, key_out: tl.tensor, value_out: tl.tensor,
    D: tl.constexpr, BH: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr, BN: tl.constexpr,
) -> None:  # fmt: skip
    """A block of a tile as numbers, its keys rotated."""
    HALF: tl.constexpr = D // 2
    BLOCKS: tl.constexpr = TILE // BN
    tile = (tl.program_id(0) // BLOCKS).to(tl.int64)
    d, n = tl.arange(0, BH), tl.program_id(0) % BLOCKS * BN + tl.arange(0, BN)
    place, count, row = (tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2))
    inside = (n[:, None] < count) & (d[None, :] < HALF)
    source = tile * (TILE * HALF) + n[:, None] * HALF + d[None, :]
    target = (row.to(tl.int64) + n)[:, None] * D + d[None, :]
    k, upper = numbers(tl.load(keys + source, mask=inside, other=0), tl.float32)
    s, o, upper_s, upper_o = key_ranges(ranges, tile, d, tl.float32, D)
    k = k * s[None, :] + o[None, :]
    upper = upper * upper_s[None, :] + upper_o[None, :]
    freq = tl.load(freqs + d, mask=d < HALF, other=0.0)
    angle = (place + n).to(tl.float32)[:, None] * freq[None, :]
    cos, sin = tl.cos(angle), tl.sin(angle)
    tl.store(key_out + target, (k * cos - upper * sin).to(key_out.dtype.element_ty), mask=inside)
    tl.store(key_out + target + HALF, (upper * cos + k * sin).to(key_out.dtype.element_ty), mask=inside)
    v, upper = numbers(tl.load(values + source, mask=inside, other=0), tl.float32)
    s, o, upper_s, upper_o = value_ranges(values_ranges, tile, n, tl.float32, GROUPS, TILE)
    v = v * s[:, None] + o[:, None]
    upper = upper * upper_s[:, None] + upper_o[:, None]
    tl.store(value_out + target, v.to(value_out.dtype.element_ty), mask=inside)
    tl.store(value_out + target + HALF, upper.to(value_out.dtype.element_ty), mask=inside)


def unpack(codes: Codes, keys: Tensor, values: Tensor) -> None:
    """Write rotated keys and values (N, D) of all heads, one behind the other, in their own type.

    They are what opening the layer in that type gives: nothing is fused that is not there.
    """
    size, block = codes.head_size, 32
    _unpacked[(len(codes.tiles) * (TILE // block),)](
        codes.keys, codes.values, codes.key_ranges, codes.value_ranges, codes.tiles, codes.freqs, keys, values,
        D=size, BH=half_block(size), GROUPS=codes.groups, TILE=TILE, BN=block, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def half_block(size: int) -> int:
    """Columns of a block that hold half of a head's channels: products take at least 16."""
    return max(16, 1 << (size // 2 - 1).bit_length())
