"""A kernel of our own, in Triton: queries, keys and values of one product, rotated, to where they belong.

Only `model/llama_step.py` and `model/llama_read.py` import this file, because importing it needs Triton. Its slow
reference is the model itself.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_TOKENS = 16  # of a program's block, where many are read at once


@triton.jit(do_not_specialize=["rows", "q_row", "q_head", "kv_row", "kv_head"])
def _rotated(
    qkv: tl.tensor, cos: tl.tensor, sin: tl.tensor, q_gain: tl.tensor, k_gain: tl.tensor, eps: tl.tensor,
    index: tl.tensor, q: tl.tensor, keys: tl.tensor, values: tl.tensor, rows: tl.tensor,
    q_row: tl.tensor, q_head: tl.tensor, kv_row: tl.tensor, kv_head: tl.tensor,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, NORM: tl.constexpr,
    INDEX: tl.constexpr,
) -> None:  # fmt: skip
    """One head of a block of rows: a query or a key is rotated, a value is moved.

    Rows and heads lie so many vectors apart in `q`, and in `keys` and `values`, there maybe at a place of each row.
    """
    head = tl.program_id(1)
    t, d = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BD)
    real = (t[:, None] < rows) & (d[None, :] < D)
    half: tl.constexpr = D // 2
    other = tl.where(d < half, d + half, d - half)
    line = t.to(tl.int64)
    source = qkv + (line[:, None] * (H + 2 * KV) + head) * D
    place = line * kv_row
    if INDEX:
        place += tl.load(index + t, mask=t < rows, other=0)
    if head >= H + KV:
        there = (place + (head - H - KV) * kv_head)[:, None] * D + d[None, :]
        tl.store(values + there, tl.load(source + d[None, :], mask=real, other=0.0), mask=real)
    else:
        own = tl.load(source + d[None, :], mask=real, other=0.0).to(tl.float32)
        across = tl.load(source + other[None, :], mask=real, other=0.0).to(tl.float32)
        if NORM:
            root = tl.sqrt(tl.sum(own * own, 1) / D + eps)[:, None]
            asks, told = (d < D) & (head < H), (d < D) & (head >= H)
            gain = tl.load(q_gain + d, mask=asks, other=0.0) + tl.load(k_gain + d, mask=told, other=0.0)
            gain_across = tl.load(q_gain + other, mask=asks, other=0.0) + tl.load(k_gain + other, mask=told, other=0.0)
            own = own / root * gain.to(tl.float32)[None, :]
            across = across / root * gain_across.to(tl.float32)[None, :]
        turn = line[:, None] * D + d[None, :]
        turned = own * tl.load(cos + turn, mask=real, other=0.0).to(tl.float32)
        across = tl.where(d[None, :] < half, -across, across)
        turned += across * tl.load(sin + turn, mask=real, other=0.0).to(tl.float32)
        if head < H:
            there = (line * q_row + head * q_head)[:, None] * D + d[None, :]
            tl.store(q + there, turned.to(q.dtype.element_ty), mask=real)
        else:
            there = (place + (head - H) * kv_head)[:, None] * D + d[None, :]
            tl.store(keys + there, turned.to(keys.dtype.element_ty), mask=real)


def turned(
    qkv: Tensor, turn: tuple[Tensor, Tensor], kv_heads: int, size: int, norms: tuple[Tensor, Tensor, float] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries (1, H, T, D), rotated keys (1, K, T, D) and values of `qkv` (T, (H + 2 K) * D).

    `turn` are cosine and sine (T, D); `norms` the gains (D,) and epsilon of queries and keys that are normalised
    before they are rotated.
    """
    tokens, heads = len(qkv), qkv.shape[1] // size - 2 * kv_heads
    q, keys, values = (qkv.new_empty(1, count, tokens, size) for count in (heads, kv_heads, kv_heads))
    q_gain, k_gain, eps = norms or (qkv, qkv, 0.0)
    _rotated[(triton.cdiv(tokens, _TOKENS), heads + 2 * kv_heads)](
        qkv, *turn, q_gain, k_gain, eps, qkv, q, keys, values, tokens, 1, tokens, 1, tokens,
        H=heads, KV=kv_heads, D=size, BD=triton.next_power_of_2(size), BT=_TOKENS, NORM=norms is not None,
        INDEX=False, num_warps=4,
    )  # fmt: skip
    return q, keys, values


def placed(
    qkv: Tensor,
    turn: tuple[Tensor, Tensor],
    index: Tensor,
    keys: Tensor,
    values: Tensor,
    norms: tuple[Tensor, Tensor, float] | None,
) -> Tensor:
    """Rotated queries (B, H, 1, D) of `qkv` (B, (H + 2 K) * D); rotated keys and values go to place `index` (B,).

    `turn` are cosine and sine (B, D), `keys` and `values` whole buffers (slots, K, tokens, D), and `norms` as in
    `turned`.
    """
    _, kv_heads, tokens, size = keys.shape
    count = len(qkv)
    heads = qkv.shape[1] // size - 2 * kv_heads
    q = qkv.new_empty(count, heads, 1, size)
    q_gain, k_gain, eps = norms or (qkv, qkv, 0.0)
    _rotated[(count, heads + 2 * kv_heads)](
        qkv, *turn, q_gain, k_gain, eps, index, q, keys, values, count, heads, 1, kv_heads * tokens, tokens,
        H=heads, KV=kv_heads, D=size, BD=triton.next_power_of_2(size), BT=1, NORM=norms is not None,
        INDEX=True, num_warps=1,
    )  # fmt: skip
    return q
