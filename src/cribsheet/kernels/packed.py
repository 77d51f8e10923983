"""Kernels of our own, in Triton, that read keys and values in four bits (`kernels/codes.py`).

Codes become numbers in registers, and keys are rotated there: a turn by p + j is one by p, which the query takes over
backwards, once for a block of keys, and one by j, which is the same in all blocks. Only `attention/packed` and the
kernels beside it import this file, because importing it needs Triton. Their slow reference is `PackedPrefix.keys` and
`values`.
"""

from __future__ import annotations

import torch
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
        wide = pairs.to(tl.uint16)
        lower = ((wide & 15) | 0x6400).to(tl.float16, bitcast=True) - 1024.0
        upper = ((wide & 240) | 0x6400).to(tl.float16, bitcast=True) * 0.0625 - 64.0
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
def turned_keys(
    pairs: tl.tensor, ranges: tl.tensor, tile: tl.tensor, d: tl.tensor, turn: tl.tensor, D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Both halves (BH, BN) of the keys of a block, rotated, in the type of the cosines and sines at `turn`."""
    HALF: tl.constexpr = D // 2
    dtype: tl.constexpr = turn.dtype.scalar.element_ty
    cos = tl.load(turn, mask=d[:, None] < HALF, other=0.0)
    sin = tl.load(turn + HALF, mask=d[:, None] < HALF, other=0.0)
    k, upper = numbers(pairs, dtype)
    s, o, upper_s, upper_o = key_ranges(ranges, tile, d, dtype, D)
    k = k * s[:, None] + o[:, None]
    upper = upper * upper_s[:, None] + upper_o[:, None]
    return k * cos - upper * sin, upper * cos + k * sin


@triton.jit
def ends(
    tiles: tl.tensor, first: tl.tensor, last: tl.tensor, BN: tl.constexpr, BLOCKS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The position of a block's first slot, and the one behind the tokens of the tile that holds the `last` block."""
    begin = tl.load(tiles + first // BLOCKS * 3) + first % BLOCKS * BN
    return begin, tl.load(tiles + last // BLOCKS * 3) + tl.load(tiles + last // BLOCKS * 3 + 1)


@triton.jit
def over_codes(
    lower: tl.tensor, upper: tl.tensor, keys: tl.tensor, values: tl.tensor, ranges: tl.tensor,
    values_ranges: tl.tensor, tiles: tl.tensor, turns: tl.tensor, low: tl.tensor, high: tl.tensor,
    scale: tl.tensor, D: tl.constexpr, BH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUPS: tl.constexpr,
    TILE: tl.constexpr, EVEN: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Attention of some rows, given and found as two halves (BM, BH), and its log-sum-exp (BM,).

    It goes over blocks of BN slots from `low` to `high`, of which there are TILE / BN in each tile; if tiles are EVEN,
    positions need not be loaded before turns are. Ranges of values
    are loaded while the block before is worked on: they do not pass through shared memory. Scales go to the weights,
    LIFT times as large so that float16 holds small ones, and offsets to sums of their own.
    """
    HALF: tl.constexpr = D // 2
    BLOCKS: tl.constexpr = TILE // BN
    LIFT: tl.constexpr = 256.0
    d, n = tl.arange(0, BH), tl.arange(0, BN)
    top = tl.full((BM,), float("-inf"), tl.float32)
    LAZY: tl.constexpr = BM < 64  # sums over slots are added up at the end, where there are registers for that
    total = tl.zeros((BM, BN if LAZY else 1), tl.float32)
    shift, upper_shift = tl.zeros((BM, BN if LAZY else 1), tl.float32), tl.zeros((BM, BN if LAZY else 1), tl.float32)
    found, upper_found = tl.zeros((BM, BH), tl.float32), tl.zeros((BM, BH), tl.float32)
    scale = scale * 1.4426950408889634  # of logits to base 2
    here = tl.maximum(tl.minimum(low, high - 1), 0)  # a part may be empty
    v_s, v_o, upper_v_s, upper_v_o = value_ranges(
        values_ranges, here // BLOCKS, here % BLOCKS * BN + n, tl.float32, GROUPS, TILE
    )
    begin, end = ends(tiles, here, tl.maximum(high - 1, 0), BN, BLOCKS)
    for block in range(low, high):
        tile, first = block // BLOCKS, block % BLOCKS * BN
        if EVEN:
            place = begin + (block - low) * BN
            count = end - place
        else:
            place = tl.load(tiles + tile * 3) + first
            count = tl.load(tiles + tile * 3 + 1) - first
        after = tl.minimum(high - 1, block + 1)
        next_s, next_o, next_upper_s, next_upper_o = value_ranges(
            values_ranges, after // BLOCKS, after % BLOCKS * BN + n, tl.float32, GROUPS, TILE
        )
        base = block * (BN * HALF)
        if HALF == BH:
            pairs = tl.load(keys + base + n[None, :] * HALF + d[:, None])
            value_pairs = tl.load(values + base + n[:, None] * HALF + d[None, :])
        else:
            pairs = tl.load(keys + base + n[None, :] * HALF + d[:, None], mask=d[:, None] < HALF, other=0)
            value_pairs = tl.load(values + base + n[:, None] * HALF + d[None, :], mask=d[None, :] < HALF, other=0)
        turn = turns + (place + n)[None, :] * D + d[:, None]
        k, upper_k = turned_keys(pairs, ranges, tile, d, turn, D)
        logits = tl.dot(lower, k, input_precision="ieee")
        logits = tl.dot(upper, upper_k, logits, input_precision="ieee") * scale
        logits = tl.where(n[None, :] < count, logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # a block of a short tile may be empty
        shrink, weights = tl.exp2(top - level)[:, None], tl.exp2(logits - level[:, None])
        v, upper_v = numbers(value_pairs, lower.dtype)
        scaled = (weights * (v_s * LIFT)[None, :]).to(lower.dtype)
        upper_scaled = (weights * (upper_v_s * LIFT)[None, :]).to(lower.dtype)
        found = tl.dot(scaled, v, found * shrink, input_precision="ieee")
        upper_found = tl.dot(upper_scaled, upper_v, upper_found * shrink, input_precision="ieee")
        lower_part, upper_part = weights * v_o[None, :], weights * upper_v_o[None, :]
        if LAZY:
            total = total * shrink + weights
            shift = shift * shrink + lower_part
            upper_shift = upper_shift * shrink + upper_part
        else:
            total = total * shrink + tl.sum(weights, 1)[:, None]
            shift = shift * shrink + tl.sum(lower_part, 1)[:, None]
            upper_shift = upper_shift * shrink + tl.sum(upper_part, 1)[:, None]
        top = higher
        v_s, v_o, upper_v_s, upper_v_o = next_s, next_o, next_upper_s, next_upper_o
    total = tl.sum(total, 1)
    there = total > 0
    whole = tl.where(there, total, 1.0)[:, None]
    seen = tl.where(there, (top + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    found = found / LIFT + tl.sum(shift, 1)[:, None]
    upper_found = upper_found / LIFT + tl.sum(upper_shift, 1)[:, None]
    return found / whole, upper_found / whole, seen


@triton.jit
def _glances(
    q: tl.tensor, seen: tl.tensor, keys: tl.tensor, ranges: tl.tensor, tiles: tl.tensor, spans: tl.tensor,
    turns: tl.tensor, out: tl.tensor, scale: tl.tensor, batch: tl.tensor, rows: tl.tensor, width: tl.tensor,
    parts: tl.tensor, D: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, FEW: tl.constexpr,
    TILE: tl.constexpr, EVEN: tl.constexpr,
) -> None:  # fmt: skip
    """A part of one head's keys against all rows: what the FEW rows of each sequence look at together."""
    HALF: tl.constexpr = D // 2
    BLOCKS: tl.constexpr = TILE // BN
    TOGETHER: tl.constexpr = BM // FEW
    dtype: tl.constexpr = turns.dtype.element_ty
    part, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    d, n, m = tl.arange(0, BH), tl.arange(0, BN), tl.arange(0, BM)
    low = tl.load(spans + 2 * head).to(tl.int64) * BLOCKS
    high = tl.load(spans + 2 * head + 1).to(tl.int64) * BLOCKS
    share = tl.cdiv(high - low, parts)
    low, high = low + part * share, tl.minimum(low + part * share + share, high)
    begin, end = ends(tiles, tl.maximum(tl.minimum(low, high - 1), 0), tl.maximum(high - 1, 0), BN, BLOCKS)
    for b in range(0, batch, TOGETHER):
        line = (head * batch + b + m // FEW) * rows + m % FEW
        real = (b + m // FEW < batch) & (m % FEW < rows)
        own = real[:, None] & (d[None, :] < HALF)
        lower = tl.load(q + line[:, None] * D + d[None, :], mask=own, other=0.0).to(dtype)
        upper = tl.load(q + line[:, None] * D + HALF + d[None, :], mask=own, other=0.0).to(dtype)
        offset = tl.load(seen + line, mask=real, other=float("inf"))
        one = b + tl.arange(0, TOGETHER)
        for block in range(low, high):
            tile = block // BLOCKS
            if EVEN:
                place = begin + (block - low) * BN
                count = end - place
            else:
                place = tl.load(tiles + tile * 3) + block % BLOCKS * BN
                count = tl.load(tiles + tile * 3 + 1) - block % BLOCKS * BN
            base = block * (BN * HALF)
            if HALF == BH:
                pairs = tl.load(keys + base + n[None, :] * HALF + d[:, None])
            else:
                pairs = tl.load(keys + base + n[None, :] * HALF + d[:, None], mask=d[:, None] < HALF, other=0)
            turn = turns + (place + n)[None, :] * D + d[:, None]
            k, upper_k = turned_keys(pairs, ranges, tile, d, turn, D)
            logits = tl.dot(lower, k, input_precision="ieee")
            logits = tl.dot(upper, upper_k, logits, input_precision="ieee") * scale - offset[:, None]
            found = tl.sum(tl.reshape(tl.exp(logits), (TOGETHER, FEW, BN)), 1)
            target = (one[:, None] * heads + head) * width + place + n[None, :]
            tl.store(out + target, found, mask=(one[:, None] < batch) & (n[None, :] < count))


def glances(codes: Codes, q: Tensor, seen: Tensor, width: int, scale: float) -> Tensor:
    """Weights (B, K, width) in float32 of each key, summed over the rows of a batch, at the positions of the keys.

    `q` is (K, B, R, D) of at most 16 rows, `seen` (K, B, R) the log-sum-exp of each row less the logarithm of its
    weight.
    """
    heads, batch, rows, size = q.shape
    out = torch.zeros(batch, heads, width, device=q.device)
    few = triton.next_power_of_2(rows)
    at_once = min(64, max(16, triton.next_power_of_2(batch) * few))
    parts = min(-(-528 // heads), 2 * codes.most)
    _glances[parts, heads](
        q.contiguous(), seen.contiguous(), codes.keys, codes.key_ranges, codes.tiles, codes.spans, codes.turns, out,
        scale, batch, rows, width, parts,
        D=size, BH=half_block(size), BN=64, BM=at_once, FEW=few, TILE=TILE, EVEN=codes.even,
        num_warps=4,
    )  # fmt: skip
    return out


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
