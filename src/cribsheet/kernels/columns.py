"""Kernels of our own for CUDA, in Triton: what keys are looked at, a step's suffix with its merge, and any merge.

Counts are not compiled in (`do_not_specialize`), nor tiles made to fit them: a kernel that is compiled for one length
or batch serves all others, and nobody waits for a compiler because a question has another length.

Only `attention/dispatch.py` and `step_attention.py` beside it import this file, because importing it needs Triton.
Their slow references are in `attention/plain.py`. Letters as in `attention/attend.py`; `G` query heads of a key/value
head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_KEYS, _FEW_ROWS, _MANY_ROWS, _MERGED = 128, 16, 64, 16  # a program's block


@triton.jit(do_not_specialize=["batch", "rows", "width"])
def _columns(
    q: tl.tensor, seen: tl.tensor, keys: tl.tensor, starts: tl.tensor, out: tl.tensor, scale: tl.tensor,
    batch: tl.tensor, rows: tl.tensor, width: tl.tensor,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, FEW: tl.constexpr, PEAK: tl.constexpr,
) -> None:  # fmt: skip
    """A block of columns of one head against all rows, which pass by: no weight is ever written down.

    A sequence of at most FEW rows shares a pass with others, as many as fit into BM rows.
    """
    block, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    first = tl.load(starts + head)
    count = tl.load(starts + head + 1) - first
    column, d = block * BN + tl.arange(0, BN), tl.arange(0, BD)
    n = column - (width - count)  # negative: columns before the head's keys
    inside = (n[:, None] >= 0) & (n[:, None] < count) & (d[None, :] < D)
    k = tl.load(keys + (first + n)[:, None] * D + d[None, :], mask=inside, other=0.0)
    if FEW > 0:
        TOGETHER: tl.constexpr = BM // FEW
        m = tl.arange(0, BM)
        for b in range(0, batch, TOGETHER):
            line = (head * batch + b + m // FEW) * rows + m % FEW
            real = (b + m // FEW < batch) & (m % FEW < rows)
            row = tl.load(q + line[None, :] * D + d[:, None], mask=real[None, :] & (d[:, None] < D), other=0.0)
            offset = tl.load(seen + line, mask=real, other=float("inf"))
            logits = tl.dot(k, row, input_precision="ieee") * scale - offset[None, :]
            logits = tl.reshape(logits, (BN, TOGETHER, FEW))
            found = tl.exp(tl.max(logits, 2)) if PEAK else tl.sum(tl.exp(logits), 2)
            one = b + tl.arange(0, TOGETHER)
            place = (one[None, :] * heads + head) * width + column[:, None]
            kept = tl.where(n[:, None] >= 0, found, 0.0)
            tl.store(out + place, kept, mask=(column[:, None] < width) & (one[None, :] < batch))
    else:
        for b in range(batch):
            base = (head * batch + b) * rows
            found = tl.full((BN,), float("-inf") if PEAK else 0.0, tl.float32)
            for r in range(0, rows, BM):
                m = r + tl.arange(0, BM)
                there = (m[None, :] < rows) & (d[:, None] < D)
                row = tl.load(q + (base + m)[None, :] * D + d[:, None], mask=there, other=0.0)
                offset = tl.load(seen + base + m, mask=m < rows, other=float("inf"))
                logits = tl.dot(k, row, input_precision="ieee") * scale - offset[None, :]
                if PEAK:
                    found = tl.maximum(found, tl.max(logits, 1))
                else:
                    found += tl.sum(tl.exp(logits), 1)
            if PEAK:
                found = tl.exp(found)
            kept = tl.where(n >= 0, found, 0.0)
            tl.store(out + (b * heads + head) * width + column, kept, mask=column < width)


def columns(
    q: Tensor, seen: Tensor, keys: Tensor, starts: Tensor, longest: int, width: int, scale: float, *, peak: bool
) -> Tensor:
    """Weights (B, K, width) in float32 of each key, summed over the rows of a batch, or the largest of them.

    `q` is (K, B, R, D), `seen` (K, B, R) the log-sum-exp of each row less the logarithm of its weight, `keys` (N, D)
    those of all heads one behind the other, `starts` (K + 1,) int32 where each begins, `longest` the most of a head.
    Keys stand at the end of the width, and zeros before them.
    """
    heads, batch, rows, size = q.shape
    if not longest or not rows:
        return torch.zeros(batch, heads, width, device=q.device)
    out = torch.empty(batch, heads, width, device=q.device)
    few = triton.next_power_of_2(rows) if rows <= _FEW_ROWS and not peak else 0
    block = _FEW_ROWS if few and batch * few <= _FEW_ROWS else _MANY_ROWS
    _columns[triton.cdiv(width, _KEYS), heads](
        q.contiguous(), seen.contiguous(), keys.contiguous(), starts, out, scale, batch, rows, width,
        D=size, BD=max(16, triton.next_power_of_2(size)), BN=_KEYS, BM=block, FEW=few, PEAK=peak,
        num_warps=4 if block == _FEW_ROWS else 8,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["tokens", "margin"])
def _around(
    q: tl.tensor, seen: tl.tensor, keys: tl.tensor, out: tl.tensor, scale: tl.tensor, tokens: tl.tensor,
    margin: tl.tensor, q_head: tl.tensor, key_head: tl.tensor,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
) -> None:  # fmt: skip
    """A block of tokens of one query head against the rows about it, so many more on either side."""
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n, d = block * BN + tl.arange(0, BN), tl.arange(0, BD)
    first, last = tl.maximum(block * BN - margin, 0), tl.minimum(block * BN + BN + margin, tokens)
    mine, theirs = q + head * q_head, keys + head // GROUP * key_head
    k = tl.load(theirs + n[:, None] * D + d[None, :], mask=(n[:, None] < tokens) & (d[None, :] < D), other=0.0)
    found = tl.full((BN,), float("-inf"), tl.float32)
    for begin in range(first, last, BM):
        m = begin + tl.arange(0, BM)
        there = (m[None, :] < last) & (d[:, None] < D)
        row = tl.load(mine + m[None, :] * D + d[:, None], mask=there, other=0.0)
        offset = tl.load(seen + head * tokens + m, mask=m < last, other=float("inf"))
        logits = tl.dot(k, row, input_precision="ieee") * scale - offset[None, :]
        found = tl.maximum(found, tl.max(logits, 1))
    tl.store(out + head * tokens + n, tl.exp(found), mask=n < tokens)


def around(q: Tensor, lse: Tensor, keys: Tensor, block: int, margin: int, scale: float) -> Tensor:
    """Largest weight (H, R) of each of R keys (K, R, D) from the rows q (H, R, D) about its block.

    A block is of a power of two of tokens, and a `margin` of rows more is looked at on either side; `lse` (H, R) are
    the rows' log-sum-exps.
    """
    heads, tokens, size = q.shape
    out = torch.empty(heads, tokens, device=q.device)
    if tokens:
        q, keys = (each if each.stride()[1:] == (size, 1) else each.contiguous() for each in (q, keys))
        _around[(triton.cdiv(tokens, block), heads)](
            q, lse.contiguous(), keys, out, scale, tokens, margin, q.stride(0), keys.stride(0),
            GROUP=heads // len(keys), D=size, BD=max(16, triton.next_power_of_2(size)), BN=block, BM=32, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _taken(
    row: tl.tensor, k: tl.tensor, v: tl.tensor, inside: tl.tensor, found: tl.tensor, top: tl.tensor, total: tl.tensor,
    scale: tl.tensor, ALL: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """One block of keys (D, BN) and values (BN, D) more of a softmax to base 2; those `inside`, or ALL."""
    logits = tl.dot(row, k, input_precision="ieee") * scale
    if not ALL:
        logits = tl.where(inside[None, :], logits, float("-inf"))
    higher = tl.maximum(top, tl.max(logits, 1))
    shrink, weights = tl.exp2(top - higher), tl.exp2(logits - higher[:, None])
    found = tl.dot(weights.to(v.dtype), v, found * shrink[:, None], input_precision="ieee")
    return found, higher, total * shrink + tl.sum(weights, 1)


@triton.jit
def over(
    row: tl.tensor, keys: tl.tensor, values: tl.tensor, low: tl.tensor, high: tl.tensor, scale: tl.tensor,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Attention (BM, BD) of some rows over keys and values from `low` to `high`, and its log-sum-exp (BM,).

    Whole blocks are read without a mask, where the head fits its block.
    """
    d, column = tl.arange(0, BD), tl.arange(0, BN)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    found = tl.zeros((BM, BD), tl.float32)
    scale = scale * 1.4426950408889634  # of logits to base 2
    whole = low + tl.maximum(high - low, 0) // BN * BN
    for first in range(low, whole, BN):
        n = first + column
        if D == BD:
            k = tl.load(keys + n[None, :] * D + d[:, None])
            v = tl.load(values + n[:, None] * D + d[None, :])
        else:
            k = tl.load(keys + n[None, :] * D + d[:, None], mask=d[:, None] < D, other=0.0)
            v = tl.load(values + n[:, None] * D + d[None, :], mask=d[None, :] < D, other=0.0)
        found, top, total = _taken(row, k, v, n < high, found, top, total, scale, True)
    if whole < high:
        n = whole + column
        inside = n < high
        k = tl.load(keys + n[None, :] * D + d[:, None], mask=inside[None, :] & (d[:, None] < D), other=0.0)
        v = tl.load(values + n[:, None] * D + d[None, :], mask=inside[:, None] & (d[None, :] < D), other=0.0)
        found, top, total = _taken(row, k, v, inside, found, top, total, scale, False)
    there = total > 0  # parts of a short head may be empty
    seen = (top + tl.log2(total)) * 0.6931471805599453
    return found / tl.where(there, total, 1.0)[:, None], tl.where(there, seen, float("-inf"))


@triton.jit
def of_suffix(
    q: tl.tensor, keys: tl.tensor, values: tl.tensor, index: tl.tensor, scale: tl.tensor, pair: tl.tensor,
    heads: tl.tensor, tokens: tl.tensor,
    GROUP: tl.constexpr, BG: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """What the query heads of one sequence and key/value head, a `pair`, see of its suffix, as far as that goes."""
    g, d = tl.arange(0, BG), tl.arange(0, BD)
    real = (g[:, None] < GROUP) & (d[None, :] < D)
    row = tl.load(q + (pair * GROUP + g)[:, None] * D + d[None, :], mask=real, other=0.0)
    base = pair.to(tl.int64) * tokens * D
    high = tl.load(index + pair // heads).to(tl.int32) + 1
    found, seen = over(row, keys + base, values + base, 0, high, scale, D, BD, BG, BN)
    return found, seen


@triton.jit(do_not_specialize=["tokens"])
def _newest(
    q: tl.tensor, keys: tl.tensor, values: tl.tensor, index: tl.tensor, before: tl.tensor, before_lse: tl.tensor,
    out: tl.tensor, lse: tl.tensor, scale: tl.tensor, tokens: tl.tensor,
    GROUP: tl.constexpr, BG: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    PREFIX: tl.constexpr,
) -> None:  # fmt: skip
    """One sequence and key/value head: its suffix as far as it goes, then the merge with what the prefix gave."""
    heads = tl.num_programs(1)
    pair = tl.program_id(0) * heads + tl.program_id(1)
    g, d = tl.arange(0, BG), tl.arange(0, BD)
    rows, real = pair * GROUP + g, (g[:, None] < GROUP) & (d[None, :] < D)
    found, own = of_suffix(q, keys, values, index, scale, pair, heads, tokens, GROUP, BG, D, BD, BN)
    if PREFIX:
        shared = tl.load(before_lse + rows, mask=g < GROUP, other=0.0)
        given = tl.load(before + rows[:, None] * D + d[None, :], mask=real, other=0.0).to(tl.float32)
        higher = tl.maximum(own, shared)
        both = higher + tl.log(tl.exp(own - higher) + tl.exp(shared - higher))
        found = found * tl.exp(own - both)[:, None] + given * tl.exp(shared - both)[:, None]
        own = both
    tl.store(out + rows[:, None] * D + d[None, :], found.to(out.dtype.element_ty), mask=real)
    tl.store(lse + rows, own, mask=g < GROUP)


def newest(
    q: Tensor, keys: Tensor, values: Tensor, index: Tensor, scale: float, before: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Attention (B, H, 1, D) and log-sum-exp (B, H, 1) of the newest token of each sequence over prefix and suffix.

    `q` is (B, H, 1, D); `keys` and `values` (slots, K, tokens, D) are whole buffers, of which sequence b sees the
    tokens up to `index[b]` (B,); `before` is what the prefix gave, in the shapes of the result, or none.
    """
    batch, heads, _, size = q.shape
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3], dtype=torch.float32)
    given, given_lse = (out, lse) if before is None else (each.contiguous() for each in before)
    shared_by = heads // keys.shape[1]
    rows = max(16, triton.next_power_of_2(shared_by))
    _newest[(batch, keys.shape[1])](
        q.contiguous(), keys, values, index, given, given_lse, out, lse, scale, keys.shape[2],
        GROUP=shared_by, BG=rows, D=size, BD=max(16, triton.next_power_of_2(size)),
        BN=64, PREFIX=before is not None, num_warps=4,
    )  # fmt: skip
    return out, lse


@triton.jit(do_not_specialize=["count", "heads", "rows"])  # strides are multiples of 16, always
def _merge(
    first: tl.tensor, first_lse: tl.tensor, second: tl.tensor, second_lse: tl.tensor, out: tl.tensor, lse: tl.tensor,
    count: tl.tensor, heads: tl.tensor, rows: tl.tensor,
    b1: tl.tensor, h1: tl.tensor, t1: tl.tensor, b2: tl.tensor, h2: tl.tensor, t2: tl.tensor,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
) -> None:  # fmt: skip
    """A block of rows of two parts of one softmax; the result lies as (B, T, H, D)."""
    row, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BD)
    t, h, b = row % rows, row // rows % heads, row // (rows * heads)
    inside, real = row < count, (row[:, None] < count) & (d[None, :] < D)
    one = tl.load(first_lse + row, mask=inside, other=0.0)
    two = tl.load(second_lse + row, mask=inside, other=0.0)
    higher = tl.maximum(one, two)
    higher = tl.where(higher == float("-inf"), 0.0, higher)  # a row that saw nothing in either part
    both = higher + tl.log(tl.exp(one - higher) + tl.exp(two - higher))
    base = tl.where(both == float("-inf"), 0.0, both)
    left = tl.load(first + (b * b1 + h * h1 + t * t1)[:, None] + d[None, :], mask=real, other=0.0).to(tl.float32)
    right = tl.load(second + (b * b2 + h * h2 + t * t2)[:, None] + d[None, :], mask=real, other=0.0).to(tl.float32)
    found = left * tl.exp(one - base)[:, None] + right * tl.exp(two - base)[:, None]
    place = ((b * rows + t) * heads + h) * D
    tl.store(out + place[:, None] + d[None, :], found.to(out.dtype.element_ty), mask=real)
    tl.store(lse + row, both, mask=inside)


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`attention.merge`."""
    (one, one_lse), (two, two_lse) = (
        (out if out.stride(-1) == 1 else out.contiguous(), lse) for out, lse in (first, second)
    )
    batch, heads, rows, size = one.shape
    out = one.new_empty(batch, rows, heads, size).transpose(1, 2)
    lse = torch.empty(batch, heads, rows, device=one.device)
    _merge[(triton.cdiv(lse.numel(), _MERGED),)](
        one, one_lse.contiguous(), two, two_lse.contiguous(), out, lse, lse.numel(), heads, rows,
        *one.stride()[:3], *two.stride()[:3],
        D=size, BD=triton.next_power_of_2(size), BM=_MERGED, num_warps=4,
    )  # fmt: skip
    return out, lse
