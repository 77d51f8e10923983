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
def near_turns(
    turns: tl.tensor, d: tl.tensor, dtype: tl.constexpr, D: tl.constexpr, BN: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Cosines and sines (BH, BN) of the turns within a block."""
    HALF: tl.constexpr = D // 2
    turn = turns + tl.arange(0, BN)[None, :] * D + d[:, None]
    cos = tl.load(turn, mask=d[:, None] < HALF, other=0.0).to(dtype)
    sin = tl.load(turn + HALF, mask=d[:, None] < HALF, other=0.0).to(dtype)
    return cos, sin


@triton.jit
def turned_keys(
    pairs: tl.tensor, ranges: tl.tensor, tile: tl.tensor, d: tl.tensor, cos: tl.tensor, sin: tl.tensor,
    dtype: tl.constexpr, D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Both halves (BH, BN) of the keys of a block, turned as if it began at position 0."""
    k, upper = numbers(pairs, dtype)
    s, o, upper_s, upper_o = key_ranges(ranges, tile, d, dtype, D)
    k = k * s[:, None] + o[:, None]
    upper = upper * upper_s[:, None] + upper_o[:, None]
    return k * cos - upper * sin, upper * cos + k * sin


@triton.jit
def over_codes(
    lower: tl.tensor, upper: tl.tensor, keys: tl.tensor, values: tl.tensor, ranges: tl.tensor,
    values_ranges: tl.tensor, tiles: tl.tensor, turns: tl.tensor, low: tl.tensor, high: tl.tensor,
    scale: tl.tensor, dtype: tl.constexpr, D: tl.constexpr, BH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    GROUPS: tl.constexpr, TILE: tl.constexpr, CARRY: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Attention of some rows, given and found as two halves (BM, BH), and its log-sum-exp (BM,).

    It goes over blocks of BN slots from `low` to `high`, of which there are TILE / BN in each tile. What a block needs
    that is not read through shared memory is loaded while the one before it is worked on. Scales of values go to the
    weights, LIFT times as large so that float16 holds small ones, and offsets to sums of their own.
    """
    HALF: tl.constexpr = D // 2
    BLOCKS: tl.constexpr = TILE // BN
    LIFT: tl.constexpr = 256.0
    d, n = tl.arange(0, BH), tl.arange(0, BN)
    real = d < HALF
    near_cos, near_sin = near_turns(turns, d, dtype, D, BN)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM, BN), tl.float32)
    shift, upper_shift = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    found, upper_found = tl.zeros((BM, BH), tl.float32), tl.zeros((BM, BH), tl.float32)
    scale = scale * 1.4426950408889634  # of logits to base 2
    here = tl.maximum(tl.minimum(low, high - 1), 0)  # a part may be empty
    place, held = tl.load(tiles + here // BLOCKS * 3), tl.load(tiles + here // BLOCKS * 3 + 1)
    cos, sin = turned_by(turns, place + tl.minimum(here % BLOCKS * BN, held), d, D, TILE)
    lower, upper = lower * cos[None, :] + upper * sin[None, :], upper * cos[None, :] - lower * sin[None, :]
    v_s, v_o, upper_v_s, upper_v_o = value_ranges(
        values_ranges, here // BLOCKS, here % BLOCKS * BN + n, tl.float32, GROUPS, TILE
    )
    count = held - here % BLOCKS * BN
    if CARRY:
        pairs = tl.load(keys + here * (BN * HALF) + n[None, :] * HALF + d[:, None], mask=real[:, None], other=0)
        k, upper_k = turned_keys(pairs, ranges, here // BLOCKS, d, near_cos, near_sin, dtype, D)
    for block in range(low, high):
        after = tl.minimum(high - 1, block + 1)
        next_count = tl.load(tiles + after // BLOCKS * 3 + 1) - after % BLOCKS * BN
        next_s, next_o, next_upper_s, next_upper_o = value_ranges(
            values_ranges, after // BLOCKS, after % BLOCKS * BN + n, tl.float32, GROUPS, TILE
        )
        base = (after if CARRY else block) * (BN * HALF)
        if HALF == BH:
            pairs = tl.load(keys + base + n[None, :] * HALF + d[:, None])
        else:
            pairs = tl.load(keys + base + n[None, :] * HALF + d[:, None], mask=real[:, None], other=0)
        there = values + block * (BN * HALF) + n[:, None] * HALF + d[None, :]
        if HALF == BH:
            value_pairs = tl.load(there)
        else:
            value_pairs = tl.load(there, mask=real[None, :], other=0)
        if not CARRY:
            k, upper_k = turned_keys(pairs, ranges, block // BLOCKS, d, near_cos, near_sin, dtype, D)
        logits = tl.dot(lower.to(dtype), k, input_precision="ieee")
        logits = tl.dot(upper.to(dtype), upper_k, logits, input_precision="ieee") * scale
        logits = tl.where(n[None, :] < count, logits, float("-inf"))
        step = tl.maximum(tl.minimum(count, BN), 0).to(tl.int32)  # to the position of the next block
        turn = turns + (step + step // TILE) * D + d
        on_cos = tl.load(turn, mask=real, other=0.0)[None, :]
        on_sin = tl.load(turn + HALF, mask=real, other=0.0)[None, :]
        lower, upper = lower * on_cos + upper * on_sin, upper * on_cos - lower * on_sin
        higher = tl.maximum(top, tl.max(logits, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # a block of a short tile may be empty
        shrink, weights = tl.exp2(top - level)[:, None], tl.exp2(logits - level[:, None])
        v, upper_v = numbers(value_pairs, dtype)
        scaled = (weights * (v_s * LIFT)[None, :]).to(dtype)
        upper_scaled = (weights * (upper_v_s * LIFT)[None, :]).to(dtype)
        found = tl.dot(scaled, v, found * shrink, input_precision="ieee")
        upper_found = tl.dot(upper_scaled, upper_v, upper_found * shrink, input_precision="ieee")
        total = total * shrink + weights
        shift = shift * shrink + weights * v_o[None, :]
        upper_shift = upper_shift * shrink + weights * upper_v_o[None, :]
        if CARRY:
            k, upper_k = turned_keys(pairs, ranges, after // BLOCKS, d, near_cos, near_sin, dtype, D)
        top, count = higher, next_count
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
    parts: tl.tensor, dtype: tl.constexpr, D: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    FEW: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """A part of one head's keys against all rows: what the FEW rows of each sequence look at together."""
    HALF: tl.constexpr = D // 2
    BLOCKS: tl.constexpr = TILE // BN
    TOGETHER: tl.constexpr = BM // FEW
    part, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    d, n, m = tl.arange(0, BH), tl.arange(0, BN), tl.arange(0, BM)
    first = tl.load(spans + 2 * head).to(tl.int64) * BLOCKS
    last = tl.load(spans + 2 * head + 1).to(tl.int64) * BLOCKS
    share = tl.cdiv(last - first, parts)
    near_cos, near_sin = near_turns(turns, d, dtype, D, BN)
    for block in range(first + part * share, tl.minimum(first + part * share + share, last)):
        tile = block // BLOCKS
        place = tl.load(tiles + tile * 3) + block % BLOCKS * BN
        count = tl.load(tiles + tile * 3 + 1) - block % BLOCKS * BN
        there = keys + block * (BN * HALF) + n[None, :] * HALF + d[:, None]
        pairs = tl.load(there, mask=d[:, None] < HALF, other=0)
        k, upper_k = turned_keys(pairs, ranges, tile, d, near_cos, near_sin, dtype, D)
        cos, sin = turned_by(turns, tl.where(count > 0, place, 0), d, D, TILE)
        for b in range(0, batch, TOGETHER):
            line = (head * batch + b + m // FEW) * rows + m % FEW
            real = (b + m // FEW < batch) & (m % FEW < rows)
            own = real[:, None] & (d[None, :] < HALF)
            lower = tl.load(q + line[:, None] * D + d[None, :], mask=own, other=0.0).to(tl.float32)
            upper = tl.load(q + line[:, None] * D + HALF + d[None, :], mask=own, other=0.0).to(tl.float32)
            offset = tl.load(seen + line, mask=real, other=float("inf"))
            row = (lower * cos[None, :] + upper * sin[None, :]).to(dtype)
            upper = (upper * cos[None, :] - lower * sin[None, :]).to(dtype)
            logits = tl.dot(row, k, input_precision="ieee")
            logits = tl.dot(upper, upper_k, logits, input_precision="ieee") * scale - offset[:, None]
            found = tl.sum(tl.reshape(tl.exp(logits), (TOGETHER, FEW, BN)), 1)
            one = b + tl.arange(0, TOGETHER)
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
    parts = min(-(-1056 // heads), 2 * codes.most)
    _glances[parts, heads](
        q.contiguous(), seen.contiguous(), codes.keys, codes.key_ranges, codes.tiles, codes.spans, codes.turns, out,
        scale, batch, rows, width, parts, dtype=tl.float32 if q.dtype == torch.float32 else tl.float16,
        D=size, BH=half_block(size), BN=64, BM=at_once, FEW=few, TILE=TILE, num_warps=4,
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
