"""Kernels of our own, in Triton, that read keys and values in four bits as `kernels/codes.py` puts them.

Words become numbers in the registers where products take them. On a device that is done two numbers at a time by
instructions of its own, where Triton would take them one by one (`FAST`); what these do stands beside them as Triton
says it, which is used for float32 and by Triton's interpreter.

Only `attention/packed` and the kernels beside it import this file, because importing it needs Triton. Their slow
reference is `layout.keys` and `layout.values`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from cribsheet.kernels.codes import TILE, Codes
from cribsheet.kernels.columns import of_suffix

_FEW_ROWS, _MANY_ROWS = 16, 64  # a program's block

# Of a word's quarter 0 or 1, of lower channels, and of quarter 2 or 3, of upper ones, to two turned numbers of each:
# $3 to $8 are the ranges, $9 and $10 the cosines and sines.
_TURN = """{
.reg .b32 a, b, c, d;
shl.b32 a, $2, %d;
shr.u32 b, $2, %d;
lop3.b32 a, a, 0x03C003C0, 0x3C003C00, 0xEA;
lop3.b32 b, b, 0x03C003C0, 0x3C003C00, 0xEA;
fma.rn.f16x2 c, $4, b, $5;
fma.rn.f16x2 c, $3, a, c;
fma.rn.f16x2 d, $7, a, $8;
fma.rn.f16x2 d, $6, b, d;
neg.f16x2 b, $10;
mul.rn.f16x2 a, d, b;
fma.rn.f16x2 a, c, $9, a;
mul.rn.f16x2 b, c, $10;
fma.rn.f16x2 $1, d, $9, b;
mov.b32 $0, a;
}"""
_FIRST, _SECOND = tl.constexpr(_TURN % (6, 2)), tl.constexpr(_TURN % (2, 6))
# Of a quarter, shifted, with scales and what is left of offsets, to two values: 16 + c is four bits of a mantissa, too.
_VALUES = tl.constexpr("{\n.reg .b32 a;\nlop3.b32 a, $1, 0x03C003C0, 0x4C004C00, 0xEA;\nfma.rn.f16x2 $0, a, $2, $3;\n}")
_LEFT = tl.constexpr(
    "{\n.reg .b32 a;\nmov.b32 a, 0xCC00CC00;\nfma.rn.f16x2 $0, $1, a, $2;\n}"
)  # an offset less 16 scales


@triton.jit
def _halves(words: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The float16 in the lower half of each word, and the one in the upper half."""
    lower = (words & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    return lower, (words >> 16).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def _in_order(
    first: tl.tensor, second: tl.tensor, third: tl.tensor, fourth: tl.tensor, ROWS: tl.constexpr, SIZE: tl.constexpr,
    FAST: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Numbers (SIZE, ROWS) of quarters as they lie in words (ROWS, SIZE / 8) of two: nothing moves for that."""
    lower, upper = _halves(tl.join(tl.join(first, third), tl.join(second, fourth)))
    found = tl.reshape(tl.join(lower, upper), (ROWS, 4, SIZE // 32, 2, 2, 2))
    found = tl.reshape(tl.permute(found, (3, 4, 2, 1, 5, 0)), (SIZE, ROWS))
    if FAST:  # this does nothing, but Triton does not see past it, and reads the other factor as products take it
        found = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [found], dtype=tl.float16, is_pure=False, pack=2)
    return found


@triton.jit
def _shifted(words: tl.tensor, QUARTER: tl.constexpr) -> tl.tensor:
    """Words whose bits 6 to 9 and 22 to 25 are codes of a quarter."""
    return words << (6 - 4 * QUARTER) if QUARTER < 2 else words >> (4 * QUARTER - 6)


@triton.jit
def _numbers_of(words: tl.tensor, dtype: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr) -> tl.tensor:
    """Numbers (SIZE, ROWS), 1 to 2, of words (ROWS, SIZE / 8)."""
    MASK: tl.constexpr = 0x03C003C0
    ONE: tl.constexpr = 0x3C003C00
    first, second = (_shifted(words, 0) & MASK) | ONE, (_shifted(words, 1) & MASK) | ONE
    third, fourth = (_shifted(words, 2) & MASK) | ONE, (_shifted(words, 3) & MASK) | ONE
    return _in_order(first, second, third, fourth, ROWS, SIZE, False).to(dtype)


@triton.jit
def _place(c: tl.tensor, SIZE: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The word of each of SIZE channels or slots, and where in it the code begins: `codes.order`."""
    QUARTER: tl.constexpr = SIZE // 4
    own = c % QUARTER
    return own % 8 // 2 * (SIZE // 32) + own // 8, own % 2 * 16 + c // QUARTER * 4


@triton.jit
def _turned(numbers: tl.tensor, ranges: tl.tensor, turns: tl.tensor, D: tl.constexpr, TILE: tl.constexpr) -> tl.tensor:
    """What numbers (D, TILE), 1 to 2, stand for, turned."""
    HALF: tl.constexpr = D // 2
    n, d = tl.arange(0, TILE), tl.arange(0, HALF)
    word, bits = _place(d, D)
    own = d // (D // 4) * (D // 4) + 2 * word + bits // 16
    lower, upper = tl.split(tl.permute(tl.reshape(numbers, (2, HALF, TILE)), (1, 2, 0)))
    c = ranges + own[:, None]
    a = tl.load(c) * lower + (tl.load(c + HALF) * upper + tl.load(c + 2 * HALF))
    c += 3 * HALF
    b = tl.load(c) * upper + (tl.load(c + HALF) * lower + tl.load(c + 2 * HALF))
    place = turns + n[None, :] * D + own[:, None]
    cos, sin = tl.load(place), tl.load(place + HALF)
    found = tl.join(a * cos - b * sin, b * cos + a * sin)
    return tl.reshape(tl.permute(found, (2, 0, 1)), (D, TILE))


@triton.jit
def _turned_at_once(
    words: tl.tensor, ranges: tl.tensor, cos: tl.tensor, sin: tl.tensor, SECOND: tl.constexpr, D: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The same of words (TILE, D / 8), as pairs of float16 in words, for quarters 0 and 2, or 1 and 3 (SECOND)."""
    QUARTER: tl.constexpr = D // 4
    c = ranges + tl.arange(0, D // 8)
    a1, a2, a0 = tl.load(c)[None, :], tl.load(c + QUARTER)[None, :], tl.load(c + 2 * QUARTER)[None, :]
    b1, b2, b0 = tl.load(c + 3 * QUARTER)[None, :], tl.load(c + 4 * QUARTER)[None, :], tl.load(c + 5 * QUARTER)[None, :]
    lower, upper = tl.inline_asm_elementwise(
        _SECOND if SECOND else _FIRST, "=&r,=&r,r,r,r,r,r,r,r,r,r", [words, a1, a2, a0, b1, b2, b0, cos, sin],
        dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    return lower, upper


@triton.jit
def _small_turns(turns: tl.tensor, D: tl.constexpr, TILE: tl.constexpr, FAST: tl.constexpr) -> tl.tuple:
    """Cosines and sines of a tile's slots for both quarters, as words of two, to be held in registers; or nothing."""
    if FAST:
        QUARTER: tl.constexpr = D // 4
        n, w = tl.arange(0, TILE), tl.arange(0, D // 8)
        place = turns.to(tl.pointer_type(tl.int32)) + n[:, None] * (D // 2) + w[None, :]
        half: tl.constexpr = D // 8
        return tl.load(place), tl.load(place + QUARTER), tl.load(place + half), tl.load(place + QUARTER + half)
    else:
        return turns, turns, turns, turns


@triton.jit
def _keys_of(
    words: tl.tensor, ranges: tl.tensor, turns: tl.tensor, tile: tl.tensor, small: tl.tuple,
    D: tl.constexpr, TILE: tl.constexpr, FAST: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The rotated keys (D, TILE) of a tile's words (TILE, D / 8)."""
    if FAST:
        own = ranges.to(tl.pointer_type(tl.int32)) + tile * (3 * D // 2)
        first, third = _turned_at_once(words, own, small[0], small[1], False, D)
        second, fourth = _turned_at_once(words, own + D // 8, small[2], small[3], True, D)
        return _in_order(first, second, third, fourth, TILE, D, True)
    else:
        numbers = _numbers_of(words, turns.dtype.element_ty, TILE, D)
        return _turned(numbers, ranges + tile * (3 * D), turns, D, TILE)


@triton.jit
def _values_at_once(
    words: tl.tensor, ranges: tl.tensor, QUARTER: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr
) -> tl.tensor:
    """A quarter of the values of words (ROWS, TILE / 8), as pairs of float16 in words."""
    n = ranges + QUARTER * (TILE // 8) + tl.arange(0, TILE // 8)
    scale, offset = tl.load(n)[None, :], tl.load(n + GROUPS * TILE // 2)[None, :]
    left = tl.inline_asm_elementwise(_LEFT, "=r,r,r", [scale, offset], dtype=tl.int32, is_pure=True, pack=1)
    given = [_shifted(words, QUARTER), scale, left]
    return tl.inline_asm_elementwise(_VALUES, "=r,r,r,r", given, dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _values_of(
    words: tl.tensor, ranges: tl.tensor, dtype: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
    TILE: tl.constexpr, FAST: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Values (TILE, ROWS) of words (ROWS, TILE / 8) of channels that share `ranges`."""
    if FAST:
        own = ranges.to(tl.pointer_type(tl.int32))
        return _in_order(
            _values_at_once(words, own, 0, GROUPS, TILE), _values_at_once(words, own, 1, GROUPS, TILE),
            _values_at_once(words, own, 2, GROUPS, TILE), _values_at_once(words, own, 3, GROUPS, TILE),
            ROWS, TILE, True,
        )  # fmt: skip
    else:
        word, bits = _place(tl.arange(0, TILE), TILE)
        n = ranges + (bits % 16 // 4 * (TILE // 4) + 2 * word + bits // 16)[:, None]
        codes = (_numbers_of(words, dtype, ROWS, TILE) - 1.0) * 16.0
        return (codes * tl.load(n) + tl.load(n + GROUPS * TILE)).to(dtype)


@triton.jit
def _over_codes(
    rows: tl.tensor, keys: tl.tensor, values: tl.tensor, ranges: tl.tensor, values_ranges: tl.tensor,
    tiles: tl.tensor, turns: tl.tensor, low: tl.tensor, high: tl.tensor, scale: tl.tensor,
    D: tl.constexpr, BM: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr, FAST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Attention of some rows (BM, D) over tiles from `low` to `high`, in two halves (BM, D / 2), and its log-sum-exp.

    Weights are 2 ** LIFT times as large, so that float16 holds small ones; of few rows they are added up over slots at
    the end only (LAZY).
    """
    HALF: tl.constexpr = D // 2
    LIFT: tl.constexpr = 8.0
    LAZY: tl.constexpr = BM < 64
    n, h = tl.arange(0, TILE), tl.arange(0, HALF)
    w, nw = tl.arange(0, D // 8), tl.arange(0, TILE // 4)
    small = _small_turns(turns, D, TILE, FAST)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM, TILE if LAZY else 1), tl.float32)
    found, upper_found = tl.zeros((BM, HALF), tl.float32), tl.zeros((BM, HALF), tl.float32)
    scale = scale * 1.4426950408889634  # of logits to base 2
    for tile in range(low, high):
        words = tl.load(keys + tile * (TILE * D // 8) + n[:, None] * (D // 8) + w[None, :])
        value_words = tl.load(values + tile * (TILE * D // 8) + h[:, None] * (TILE // 4) + nw[None, :])
        value_words = tl.permute(tl.reshape(value_words, (HALF, 4, 2, TILE // 32)), (0, 1, 3, 2))
        value_words, upper_words = tl.split(tl.reshape(value_words, (HALF, TILE // 8, 2)))
        count = tl.load(tiles + tile * 3 + 1)
        k = _keys_of(words, ranges, turns, tile, small, D, TILE, FAST)
        logits = tl.dot(rows, k, input_precision="ieee")
        if count < TILE:
            logits = tl.where(n[None, :] < count, logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher) * scale
        shrink, weights = tl.exp2(top * scale - level)[:, None], tl.exp2(logits * scale - (level - LIFT)[:, None])
        total = total * shrink + (weights if LAZY else tl.sum(weights, 1)[:, None])
        given = weights.to(rows.dtype)
        own = values_ranges + tile * (2 * GROUPS * TILE)
        v = _values_of(value_words, own, rows.dtype, HALF, GROUPS, TILE, FAST)
        found = tl.dot(given, v, found * shrink, input_precision="ieee")
        v = _values_of(upper_words, own + (GROUPS - 1) * TILE, rows.dtype, HALF, GROUPS, TILE, FAST)
        upper_found = tl.dot(given, v, upper_found * shrink, input_precision="ieee")
        top = higher
    sums = tl.sum(total, 1)
    there = sums > 0  # a part may be empty
    whole = tl.where(there, sums, 1.0)[:, None]
    seen = tl.where(there, (top * scale + tl.log2(sums) - LIFT) * 0.6931471805599453, float("-inf"))
    return found / whole, upper_found / whole, seen


@triton.jit
def _share(spans: tl.tensor, head: tl.tensor, part: tl.tensor, parts: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The tiles of one of a head's parts, which differ by no more than one."""
    first = tl.load(spans + 2 * head).to(tl.int64)
    count = tl.load(spans + 2 * head + 1) - first
    return first + count * part // parts, first + count * (part + 1) // parts


@triton.jit(do_not_specialize=["batch", "tokens", "blocks", "parts"])
def parted_codes(
    q: tl.tensor, keys: tl.tensor, values: tl.tensor, spans: tl.tensor, ranges: tl.tensor, values_ranges: tl.tensor,
    tiles: tl.tensor, turns: tl.tensor, newer: tl.tensor, newer_values: tl.tensor, index: tl.tensor, out: tl.tensor,
    lse: tl.tensor, scale: tl.tensor, batch: tl.tensor, tokens: tl.tensor, blocks: tl.tensor, parts: tl.tensor,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BG: tl.constexpr, GROUPS: tl.constexpr,
    TILE: tl.constexpr, FAST: tl.constexpr,
) -> None:  # fmt: skip
    """`step_attention._parted` over codes."""
    GROUP: tl.constexpr = H // KV
    HALF: tl.constexpr = D // 2
    program = tl.program_id(0)
    if program < parts * KV * blocks:
        part, head, block = program % parts, program // parts % KV, program // (parts * KV)
        d, h, r = tl.arange(0, D), tl.arange(0, HALF), block * BM + tl.arange(0, BM)
        line, real = r // GROUP * H + head * GROUP + r % GROUP, r < batch * GROUP
        rows = tl.load(q + line[:, None] * D + d[None, :], mask=real[:, None], other=0.0).to(turns.dtype.element_ty)
        low, high = _share(spans, head, part, parts)
        found, upper_found, seen = _over_codes(
            rows, keys, values, ranges, values_ranges, tiles, turns, low, high, scale, D, BM, GROUPS, TILE, FAST
        )
        place = part * batch * H + line
        tl.store(out + place[:, None] * D + h[None, :], found, mask=real[:, None])
        tl.store(out + place[:, None] * D + HALF + h[None, :], upper_found, mask=real[:, None])
        tl.store(lse + place, seen, mask=real)
    else:
        pair, d, g = program - parts * KV * blocks, tl.arange(0, D), tl.arange(0, BG)
        own, own_seen = of_suffix(q, newer, newer_values, index, scale, pair, KV, tokens, GROUP, BG, D, D, 64)
        there = parts * batch * H + pair * GROUP + g
        tl.store(out + there[:, None] * D + d[None, :], own, mask=g[:, None] < GROUP)
        tl.store(lse + there, own_seen, mask=g < GROUP)


@triton.jit(do_not_specialize=["batch", "rows", "width", "parts"])
def _glances(
    q: tl.tensor, seen: tl.tensor, keys: tl.tensor, ranges: tl.tensor, tiles: tl.tensor, spans: tl.tensor,
    turns: tl.tensor, out: tl.tensor, scale: tl.tensor, batch: tl.tensor, rows: tl.tensor, width: tl.tensor,
    parts: tl.tensor, D: tl.constexpr, BM: tl.constexpr, FEW: tl.constexpr, TILE: tl.constexpr, FAST: tl.constexpr,
) -> None:  # fmt: skip
    """A part of one head's keys against all rows: what the FEW rows of each sequence look at together."""
    TOGETHER: tl.constexpr = BM // FEW
    dtype: tl.constexpr = turns.dtype.element_ty
    part, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    d, n, m, w = tl.arange(0, D), tl.arange(0, TILE), tl.arange(0, BM), tl.arange(0, D // 8)
    low, high = _share(spans, head, part, parts)
    small = _small_turns(turns, D, TILE, FAST)
    for b in range(0, batch, TOGETHER):
        line = (head * batch + b + m // FEW) * rows + m % FEW
        real = (b + m // FEW < batch) & (m % FEW < rows)
        row = tl.load(q + line[:, None] * D + d[None, :], mask=real[:, None], other=0.0).to(dtype)
        offset = tl.load(seen + line, mask=real, other=float("inf"))
        one = b + tl.arange(0, TOGETHER)
        for tile in range(low, high):
            place, count = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1)
            words = tl.load(keys + tile * (TILE * D // 8) + n[:, None] * (D // 8) + w[None, :])
            k = _keys_of(words, ranges, turns, tile, small, D, TILE, FAST)
            logits = tl.dot(row, k, input_precision="ieee") * scale - offset[:, None]
            found = tl.sum(tl.reshape(tl.exp(logits), (TOGETHER, FEW, TILE)), 1)
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
    _glances[min(-(-264 // heads), codes.most), heads](
        q.contiguous(), seen.contiguous(), codes.keys, codes.key_ranges, codes.tiles, codes.spans, codes.turns, out,
        scale, batch, rows, width, min(-(-264 // heads), codes.most),
        D=size, BM=_FEW_ROWS if batch * few <= _FEW_ROWS else _MANY_ROWS, FEW=few, TILE=TILE, FAST=is_fast(codes),
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


@triton.jit
def _unpacked(
    keys: tl.tensor, values: tl.tensor, ranges: tl.tensor, values_ranges: tl.tensor, tiles: tl.tensor,
    freqs: tl.tensor, key_out: tl.tensor, value_out: tl.tensor,
    D: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """A tile as numbers, its keys rotated."""
    HALF: tl.constexpr = D // 2
    tile = tl.program_id(0).to(tl.int64)
    d, n = tl.arange(0, HALF), tl.arange(0, TILE)
    count, row = tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
    target = (row.to(tl.int64) + n)[:, None] * D + d[None, :]
    inside = n[:, None] < count
    word, bits = _place(d, D)
    pair = tl.load(keys + tile * (TILE * D // 8) + n[:, None] * (D // 8) + word[None, :]) >> bits[None, :]
    a = 1.0 + (pair & 15).to(tl.float32) / 16.0
    b = 1.0 + ((pair >> 8) & 15).to(tl.float32) / 16.0  # a channel's partner is two quarters further
    own = ranges + tile * (3 * D) + d // (D // 4) * (D // 4) + 2 * word + bits // 16
    a1, a2, a0 = tl.load(own).to(tl.float32), tl.load(own + HALF).to(tl.float32), tl.load(own + 2 * HALF).to(tl.float32)
    own += 3 * HALF
    b1, b2, b0 = tl.load(own).to(tl.float32), tl.load(own + HALF).to(tl.float32), tl.load(own + 2 * HALF).to(tl.float32)
    low, high = a * a1 + b * a2 + a0, b * b1 + a * b2 + b0
    angle = n.to(tl.float32)[:, None] * tl.load(freqs + d)[None, :]
    cos, sin = tl.cos(angle), tl.sin(angle)
    tl.store(key_out + target, (low * cos - high * sin).to(key_out.dtype.element_ty), mask=inside)
    tl.store(key_out + target + HALF, (high * cos + low * sin).to(key_out.dtype.element_ty), mask=inside)
    word, bits = _place(n, TILE)
    within = bits % 16 // 4 * (TILE // 4) + 2 * word + bits // 16
    for upper in tl.static_range(2):
        base = values + tile * (TILE * D // 8) + upper * (TILE // 32) + d[None, :] * (TILE // 4)
        lane = word + word // (TILE // 32) * (TILE // 32)
        code = ((tl.load(base + lane[:, None]) >> bits[:, None]) & 15).to(tl.float32)
        range_at = values_ranges + tile * (2 * GROUPS * TILE) + upper * (GROUPS - 1) * TILE + within
        scale, offset = tl.load(range_at).to(tl.float32), tl.load(range_at + GROUPS * TILE).to(tl.float32)
        v = code * scale[:, None] + offset[:, None]
        tl.store(value_out + target + upper * HALF, v.to(value_out.dtype.element_ty), mask=inside)


def unpack(codes: Codes, keys: Tensor, values: Tensor) -> None:
    """Write rotated keys and values (N, D) of all heads, one behind the other, in their own type.

    They are what `layout` gives: nothing is fused that is not there.
    """
    _unpacked[(len(codes.tiles),)](
        codes.keys, codes.values, codes.key_ranges, codes.value_ranges, codes.tiles, codes.freqs, keys, values,
        D=codes.head_size, GROUPS=codes.groups, TILE=TILE, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip


def is_fast(codes: Codes) -> bool:
    """Whether numbers are taken apart by instructions of the device."""
    return codes.turns.dtype == torch.float16 and not knobs.runtime.interpret
