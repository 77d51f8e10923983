"""Attention of a decoding step in two kernels of our own, in Triton: all parts of prefix and suffix, and their merge.

The prefix is keys and values, or codes of four bits (`kernels/packed.py`).

Only `model/llama_step.py` and `attention/packed` import this file, because importing it needs Triton. Its slow
reference is `SlotLayer.attend`. Letters as in `attention/attend.py`; `G` query heads of a key/value head, `S` parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cribsheet.kernels.codes import TILE, Codes
from cribsheet.kernels.columns import of_suffix, over
from cribsheet.kernels.packed import is_fast, parted_codes

_MOST_PARTS, _MOST_CODE_PARTS = 63, 127

Suffix = tuple[Tensor, Tensor, Tensor]
Floats = tuple[Tensor, Tensor, Tensor, int]


@dataclass(frozen=True)
class Cut:
    """How attention is cut: rows and keys of a block, warps, loads under way, and programs that share the prefix."""

    rows: int
    keys: int
    warps: int
    stages: int
    programs: int


# By the most rows that look at one head (`make step-gpu`, one H200).
CUTS = {16: Cut(16, keys=128, warps=4, stages=3, programs=132), 1 << 30: Cut(64, 64, warps=4, stages=3, programs=264)}
CODE_CUTS = {
    16: Cut(16, keys=TILE, warps=2, stages=1, programs=512),
    1 << 30: Cut(64, keys=TILE, warps=4, stages=3, programs=256),
}


@triton.jit(do_not_specialize=["batch", "tokens", "blocks", "parts"])
def _parted(
    q: tl.tensor, keys: tl.tensor, values: tl.tensor, starts: tl.tensor, newer: tl.tensor, newer_values: tl.tensor,
    index: tl.tensor, out: tl.tensor, lse: tl.tensor, scale: tl.tensor, batch: tl.tensor, tokens: tl.tensor,
    blocks: tl.tensor, parts: tl.tensor,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BG: tl.constexpr,
    BN: tl.constexpr,
) -> None:  # fmt: skip
    """A part of one head's prefix for a block of rows, or the suffix of one sequence and head."""
    GROUP: tl.constexpr = H // KV
    program, d = tl.program_id(0), tl.arange(0, BD)
    if program < parts * KV * blocks:
        part, head, block = program % parts, program // parts % KV, program // (parts * KV)
        begin = tl.load(starts + head).to(tl.int64)
        count = (tl.load(starts + head + 1) - begin).to(tl.int32)
        share = tl.cdiv(tl.cdiv(count, parts), BN) * BN
        r = block * BM + tl.arange(0, BM)
        line, real = r // GROUP * H + head * GROUP + r % GROUP, r < batch * GROUP
        row = tl.load(q + line[:, None] * D + d[None, :], mask=real[:, None] & (d[None, :] < D), other=0.0)
        low, high = part * share, tl.minimum(part * share + share, count)
        found, seen = over(row, keys + begin * D, values + begin * D, low, high, scale, D, BD, BM, BN)
        place = part * batch * H + line
        tl.store(out + place[:, None] * D + d[None, :], found, mask=real[:, None] & (d[None, :] < D))
        tl.store(lse + place, seen, mask=real)
    else:
        pair, g = program - parts * KV * blocks, tl.arange(0, BG)
        own, own_seen = of_suffix(q, newer, newer_values, index, scale, pair, KV, tokens, GROUP, BG, D, BD, BN)
        there = parts * batch * H + pair * GROUP + g
        tl.store(out + there[:, None] * D + d[None, :], own, mask=(g[:, None] < GROUP) & (d[None, :] < D))
        tl.store(lse + there, own_seen, mask=g < GROUP)


@triton.jit(do_not_specialize=["count", "rows"])
def _joined(
    parts: tl.tensor, lses: tl.tensor, out: tl.tensor, lse: tl.tensor, count: tl.tensor, rows: tl.tensor,
    BS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
) -> None:  # fmt: skip
    """One row of one head: all its parts of one softmax."""
    row, s, d = tl.program_id(0), tl.arange(0, BS), tl.arange(0, BD)
    seen = tl.load(lses + s * rows + row, mask=s < count, other=float("-inf"))
    real = (s[:, None] < count) & (d[None, :] < D)
    found = tl.load(parts + (s[:, None] * rows + row) * D + d[None, :], mask=real, other=0.0)
    top = tl.max(seen, 0)
    weights = tl.exp(seen - top)
    total = tl.sum(weights, 0)
    found = tl.sum(found * weights[:, None], 0) / total
    tl.store(out + row * D + d, found.to(out.dtype.element_ty), mask=d < D)
    tl.store(lse + row, top + tl.log(total))


def attend(
    q: Tensor, prefix: Floats | Codes, suffix: Suffix | None, scale: float, *, cut: Cut | None = None
) -> tuple[Tensor, Tensor]:
    """Attention (B, H, 1, D) and log-sum-exp (B, H, 1) of the newest token of each sequence, q (B, H, 1, D).

    `prefix` are keys and values (N, D) of all heads, one head behind the other, where each begins (K + 1,) int32, and
    the most tokens of a head, maybe none; or codes. `suffix` are whole buffers (slots, K, tokens, D) and how far each
    sequence sees (B,), or none, where somebody else looks there.
    """
    batch, heads, _, size = q.shape
    if isinstance(prefix, Codes):
        kv_heads, longest, cuts, most = len(prefix.spans), prefix.most * TILE, CODE_CUTS, _MOST_CODE_PARTS
    else:
        kv_heads, longest, cuts, most = len(prefix[2]) - 1, prefix[3], CUTS, _MOST_PARTS
    newer, newer_values, index = suffix or (q, q, q.new_empty(0, dtype=torch.int64))
    rows = batch * heads // kv_heads
    cut = cut or next(each for count, each in cuts.items() if rows <= count)
    blocks = -(-rows // cut.rows)
    parts = min(max(1, cut.programs // (kv_heads * blocks)), most, -(-longest // cut.keys))
    every = parts if suffix is None else parts + 1
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    found = q.new_empty(every, batch * heads, size, dtype=torch.float32)
    seen = q.new_empty(every, batch * heads, dtype=torch.float32)
    width = max(16, 1 << (size - 1).bit_length())
    shared_by = max(16, 1 << (heads // kv_heads - 1).bit_length())
    programs = parts * kv_heads * blocks + (0 if suffix is None else batch * kv_heads)
    behind = newer, newer_values, index, found, seen, scale, batch, newer.shape[2], blocks, parts
    if isinstance(prefix, Codes):
        parted_codes[(programs,)](
            q, prefix.keys, prefix.values, prefix.spans, prefix.key_ranges, prefix.value_ranges, prefix.tiles,
            prefix.turns, *behind, H=heads, KV=kv_heads, D=size, BM=cut.rows, BG=shared_by, GROUPS=prefix.groups,
            TILE=TILE, FAST=is_fast(prefix), num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip
    else:
        _parted[(programs,)](
            q, *prefix[:3], *behind, H=heads, KV=kv_heads, D=size, BD=width, BM=cut.rows, BG=shared_by, BN=cut.keys,
            num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip
    _joined[(batch * heads,)](
        found, seen, out, lse, every, batch * heads, BS=most + 1, D=size, BD=width, num_warps=4
    )  # fmt: skip
    return out, lse
