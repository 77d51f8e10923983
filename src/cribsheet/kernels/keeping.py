"""Kernels of our own for builds, in Triton: what a layer keeps is taken in one go, and turned to its place in another.

By PyTorch's operators it is thirty launches a layer, while a GPU that has just said what was chosen waits.

Only `compress/keeping.py` imports this file, because importing it needs Triton. Its slow references are there. Letters
as in `compress/loop.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cribsheet.vocabulary import ABSENT

_TOKENS = 16  # of a program's block


@triton.jit
def _turned(
    vectors: tl.tensor, line: tl.tensor, cos: tl.tensor, sin: tl.tensor, row: tl.tensor, real: tl.tensor,
    HALF: tl.constexpr, BD: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Vectors (BT, BD) at these lines, turned by row so many of cosines and sines (rows, HALF); the rest stays."""
    d = tl.arange(0, BD)
    turns = d < 2 * HALF
    angle = tl.where(d < HALF, d, tl.where(turns, d - HALF, 0))
    other = tl.where(d < HALF, d + HALF, tl.where(turns, d - HALF, d))
    own = tl.load(vectors + line[:, None] + d[None, :], mask=real, other=0.0).to(tl.float32)
    across = tl.load(vectors + line[:, None] + other[None, :], mask=real, other=0.0).to(tl.float32)
    place, moved = row[:, None] * HALF + angle[None, :], real & turns[None, :]
    c, s = tl.load(cos + place, mask=moved, other=1.0), tl.load(sin + place, mask=moved, other=0.0)
    return own * c + tl.where(d[None, :] < HALF, -across, across) * s


@triton.jit(do_not_specialize=["count", "stride", "before", "total", "needs"])
def _take(
    places: tl.tensor, old_keys: tl.tensor, old_values: tl.tensor, new_keys: tl.tensor, new_values: tl.tensor,
    cos: tl.tensor, sin: tl.tensor, indices: tl.tensor, scores: tl.tensor,
    keys: tl.tensor, values: tl.tensor, kept_indices: tl.tensor, kept_scores: tl.tensor,
    count: tl.tensor, stride: tl.tensor, before: tl.tensor, total: tl.tensor, needs: tl.tensor,
    key_head: tl.tensor, key_row: tl.tensor, value_head: tl.tensor, value_row: tl.tensor,
    D: tl.constexpr, BD: tl.constexpr, HALF: tl.constexpr, BT: tl.constexpr, NOWHERE: tl.constexpr,
) -> None:  # fmt: skip
    """A block of what one head keeps: old tokens as they are, new ones turned back."""
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    t, d = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BD)
    inside = t < count
    chosen = tl.load(places + head * stride + t, mask=inside, other=-1)
    place = tl.maximum(chosen, 0)
    is_old, is_new = inside & (place < before), inside & (place >= before)
    whole, fresh = is_old[:, None] & (d[None, :] < D), is_new[:, None] & (d[None, :] < D)
    known = ((head * before + place) * D)[:, None] + d[None, :]
    row = tl.maximum(place - before, 0)
    turned = _turned(new_keys, head * key_head + row * key_row, cos, sin, row, fresh, HALF, BD)
    there = ((head * count + t) * D)[:, None] + d[None, :]
    real = inside[:, None] & (d[None, :] < D)
    old = tl.load(old_keys + known, mask=whole, other=0.0).to(tl.float32)
    tl.store(keys + there, tl.where(is_new[:, None], turned, old), mask=real)
    old = tl.load(old_values + known, mask=whole, other=0.0)
    moved = (head * value_head + row * value_row)[:, None] + d[None, :]
    new = tl.load(new_values + moved, mask=fresh, other=0.0)
    tl.store(values + there, tl.where(is_new[:, None], new, old), mask=real)
    index = tl.load(indices + head * total + place, mask=inside, other=0)
    tl.store(kept_indices + head * count + t, tl.where(chosen < 0, NOWHERE, index), mask=inside)
    for n in range(needs):
        line = n * heads + head
        score = tl.load(scores + line * total + place, mask=inside, other=0.0)
        tl.store(kept_scores + line * count + t, tl.where(chosen < 0, float("-inf"), score), mask=inside)


def take(
    places: Tensor,
    old: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    turn: tuple[Tensor, Tensor],
    indices: Tensor,
    scores: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys (K, P, D) before rotation in float32, values, indices (K, P) and scores ([N,] K, P) at places (K, P).

    `old` are keys (K, O, D) before rotation and values, `new` rotated keys (K, c, D) and values of a chunk, which stand
    behind them; `turn` are cosines and sines (c, R/2) that turn those back. Indices are (K, S), scores ([N,] K, S).
    """
    (old_keys, old_values), (new_keys, new_values) = (
        tuple(half if half.stride(-1) == 1 else half.contiguous() for half in halves) for halves in (old, new)
    )
    heads, count, size = *places.shape, new_keys.shape[-1]
    keys = torch.empty(heads, count, size, device=places.device)
    values, kept = new_values.new_empty(heads, count, size), indices.new_empty(heads, count)
    lines = scores.contiguous().view(-1, heads, scores.shape[-1])
    kept_scores = torch.empty(len(lines), heads, count, device=places.device)
    _take[(triton.cdiv(count, _TOKENS), heads)](
        places, old_keys.contiguous(), old_values.contiguous(), new_keys, new_values, *turn,
        indices.contiguous(), lines, keys, values, kept, kept_scores,
        count, places.stride(0), old_keys.shape[1], indices.shape[1], len(lines),
        *new_keys.stride()[:2], *new_values.stride()[:2],
        D=size, BD=triton.next_power_of_2(size), HALF=turn[0].shape[-1], BT=_TOKENS, NOWHERE=ABSENT, num_warps=4,
    )  # fmt: skip
    return keys, values, kept, kept_scores.view(*scores.shape[:-1], count)


@triton.jit(do_not_specialize=["count", "first"])
def _place(
    keys: tl.tensor, values: tl.tensor, starts: tl.tensor, cos: tl.tensor, sin: tl.tensor,
    placed_keys: tl.tensor, placed_values: tl.tensor, count: tl.tensor, first: tl.tensor,
    D: tl.constexpr, BD: tl.constexpr, HALF: tl.constexpr, BT: tl.constexpr,
) -> None:  # fmt: skip
    """A block of one head's tokens, of which those are there that stand at its end."""
    head = tl.program_id(1).to(tl.int64)
    t, d = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BD)
    begins = tl.load(starts + head)
    missing = count - (tl.load(starts + head + 1) - begins)
    real = ((t >= missing) & (t < count))[:, None] & (d[None, :] < D)
    line = (head * count + t) * D
    there = (begins + t - missing).to(tl.int64)[:, None] * D + d[None, :]
    turned = _turned(keys, line, cos, sin, first + t, real, HALF, BD)
    tl.store(placed_keys + there, turned.to(placed_keys.dtype.element_ty), mask=real)
    moved = tl.load(values + line[:, None] + d[None, :], mask=real, other=0.0)
    tl.store(placed_values + there, moved, mask=real)


def place(
    keys: Tensor, values: Tensor, starts: Tensor, tokens: int, turn: tuple[Tensor, Tensor], first: int
) -> tuple[Tensor, Tensor]:
    """Keys and values (N, D) of all heads one behind the other, rotated, of keys (K, P, D) before rotation and values.

    Each head begins at `starts` (K + 1,) int32 of all N `tokens`, and has those at its end; `turn` are cosines and
    sines, of which that of the first of P is at `first`.
    """
    heads, count, size = keys.shape
    placed_keys, placed_values = (values.new_empty(tokens, size) for _ in "kv")
    if tokens:
        _place[(triton.cdiv(count, _TOKENS), heads)](
            keys.contiguous(), values.contiguous(), starts, *turn, placed_keys, placed_values, count, first,
            D=size, BD=triton.next_power_of_2(size), HALF=turn[0].shape[-1], BT=_TOKENS, num_warps=4,
        )  # fmt: skip
    return placed_keys, placed_values
