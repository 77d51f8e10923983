"""A kernel of our own for reading many tokens at once, in Triton: queries and keys of one product, rotated.

Only `model/llama_step.py` imports this file, because importing it needs Triton. Its slow reference is the model itself.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_TOKENS = 16  # of a program's block


@triton.jit
def _turned(
    qkv: tl.tensor, cos: tl.tensor, sin: tl.tensor, q_gain: tl.tensor, k_gain: tl.tensor, eps: tl.tensor,
    q: tl.tensor, keys: tl.tensor, values: tl.tensor, tokens: tl.tensor,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, NORM: tl.constexpr,
) -> None:  # fmt: skip
    """One head of a block of tokens: a query or a key is rotated, a value is moved."""
    head = tl.program_id(1)
    t, d = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BD)
    real = (t[:, None] < tokens) & (d[None, :] < D)
    half: tl.constexpr = D // 2
    other = tl.where(d < half, d + half, d - half)
    source = qkv + (t.to(tl.int64)[:, None] * (H + 2 * KV) + head) * D
    if head >= H + KV:
        place = values + ((head - H - KV).to(tl.int64) * tokens + t[:, None]) * D + d[None, :]
        tl.store(place, tl.load(source + d[None, :], mask=real, other=0.0), mask=real)
    else:
        own = tl.load(source + d[None, :], mask=real, other=0.0).to(tl.float32)
        across = tl.load(source + other[None, :], mask=real, other=0.0).to(tl.float32)
        if NORM:
            root = tl.sqrt(tl.sum(own * own, 1) / D + eps)[:, None]
            asks, told = (d < D) & (head < H), (d < D) & (head >= H)
            gain = tl.load(q_gain + d, mask=asks, other=0.0) + tl.load(k_gain + d, mask=told, other=0.0)
            there = tl.load(q_gain + other, mask=asks, other=0.0) + tl.load(k_gain + other, mask=told, other=0.0)
            own = own / root * gain.to(tl.float32)[None, :]
            across = across / root * there.to(tl.float32)[None, :]
        turn = t[:, None] * D + d[None, :]
        turned = own * tl.load(cos + turn, mask=real, other=0.0).to(tl.float32)
        across = tl.where(d[None, :] < half, -across, across)
        turned += across * tl.load(sin + turn, mask=real, other=0.0).to(tl.float32)
        if head < H:
            place = q + (head.to(tl.int64) * tokens + t[:, None]) * D + d[None, :]
            tl.store(place, turned.to(q.dtype.element_ty), mask=real)
        else:
            place = keys + ((head - H).to(tl.int64) * tokens + t[:, None]) * D + d[None, :]
            tl.store(place, turned.to(keys.dtype.element_ty), mask=real)


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
    _turned[(triton.cdiv(tokens, _TOKENS), heads + 2 * kv_heads)](
        qkv, *turn, q_gain, k_gain, eps, q, keys, values, tokens,
        H=heads, KV=kv_heads, D=size, BD=triton.next_power_of_2(size), BT=_TOKENS, NORM=norms is not None,
        num_warps=4,
    )  # fmt: skip
    return q, keys, values
