"""Attention that also returns its log-sum-exp, and the merge of two parts of one softmax.

One identity serves building and answering: attention over `[prefix, new tokens]` is attention over the prefix
(non-causal: every new token sees all of it) and attention over the new tokens (causal), merged by their
log-sum-exps. It needs no rectangular mask, reads a prefix once for a whole batch, and leaves the log-sum-exp from
which attention weights of any row can be recomputed later. The split is that of Hydragen (arXiv 2402.05099).

Letters: `B` sequences, `H` query heads, `K` key/value heads (`H` a multiple of `K`), `T` query rows, `S` keys,
`D` head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cribsheet.attention import backends, dispatch
from cribsheet.attention.plain import attend_plain, capped, plain_mass, plain_merge, plain_peak, rows_at_once
from cribsheet.kernels import products
from cribsheet.kernels.products import Span, Weights

_LONG, _BLOCK = 1024, 4096  # rows from which blocks of keys may pay, and keys of a block


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention output (B, H, T, D) and its log-sum-exp (B, H, T) in float32.

    `q` is (B, H, T, D); `k` and `v` are (B, K, S, D). `causal` aligns the first row with the first key and needs
    `T == S`; `mask` is boolean, broadcastable to (B, 1, T, S), true where a row may look. A row that may look at
    nothing yields zeros and a log-sum-exp of minus infinity. `softcap` bounds the logits smoothly, as
    `c * tanh(logits / c)` (Gemma 2).
    """
    if k.shape[2] == 0:
        return torch.zeros_like(q), q.new_full(q.shape[:3], float("-inf"), dtype=torch.float32)
    if softcap is None and backends.on_cpu(q):
        return backends.flash_cpu(q, k, v, scale, causal, mask)
    if softcap is None and mask is None and backends.on_cuda(q):
        if backends.is_planned(q, k, v, scale, causal):
            return backends.cudnn_cuda(q, k, v, scale, causal)
        if causal and dispatch.can_flash(q, k):
            return dispatch.causal(q, k, v, scale)
        return backends.flash_cuda(q, k, v, scale, causal)
    return attend_plain(q, k, v, scale=scale, causal=causal, mask=mask, softcap=softcap)


def attend_shared(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """`attend` of B sequences over one prefix that they share: `k` and `v` are (1, K, S, D).

    Query heads of one key/value head and all sequences are rows of one product, so the prefix is read once
    however many sequences ask. `mask` (B or 1, T, S) is true where a row may look.
    """
    b, h, t, d = q.shape
    if b == 1 and t >= _LONG and mask is None and backends.on_cuda(q) and softcap is None:
        return _attend_long(q, k, v, scale)
    kv_heads = k.shape[1]
    shared_by = h // kv_heads
    if b == 1 and mask is None:  # rows of a head lie together as they are
        out, lse = attend(q.reshape(1, kv_heads, shared_by * t, d), k, v, scale=scale, softcap=softcap)
        return out.reshape(q.shape), lse.reshape(q.shape[:3])
    rows = q.reshape(b, kv_heads, shared_by, t, d).permute(1, 0, 2, 3, 4).reshape(1, kv_heads, b * shared_by * t, d)
    if mask is not None:
        mask = mask.unsqueeze(1).expand(b, shared_by, t, -1).reshape(1, 1, b * shared_by * t, -1)
    out, lse = attend(rows, k, v, scale=scale, mask=mask, softcap=softcap)
    out = out.reshape(kv_heads, b, shared_by, t, d).permute(1, 0, 2, 3, 4).reshape(b, h, t, d)
    lse = lse.reshape(kv_heads, b, shared_by, t).permute(1, 0, 2, 3).reshape(b, h, t)
    return out, lse


def _attend_long(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`attend` of many rows on CUDA, in blocks of keys of one shape if the faster kernel is used for that shape."""
    blocks = (
        (k[:, :, n : n + _BLOCK].contiguous(), v[:, :, n : n + _BLOCK].contiguous())
        for n in range(0, k.shape[2], _BLOCK)
    )
    first = next(blocks)
    if not backends.is_planned(q, *first, scale, False):
        return attend(q, k, v, scale=scale)
    found = attend(q, *first, scale=scale)
    for block in blocks:
        found = merge(found, attend(q, *block, scale=scale))
    return found


def attend_ragged(
    q: Tensor,
    heads: Callable[[], Sequence[tuple[Tensor, Tensor]]],
    ragged: tuple[Tensor, Tensor, Tensor],
    counts: Sequence[int],
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend_shared` over a prefix whose K heads hold different numbers of tokens.

    `ragged` are keys and values (N, D) of all heads, one behind the other, and where each begins (K + 1,), as
    `flash_ragged` takes them; `counts` how many each holds, and `heads` makes keys and values (P, D) of each.
    """
    rows = _by_head(q, len(counts))
    if softcap is None and backends.on_cuda(q):
        out, lse = backends.flash_ragged(rows, *ragged, max(counts), scale)
    else:
        found = [
            attend(own[None, None], keys[None, None], values[None, None], scale=scale, softcap=softcap)
            for own, (keys, values) in zip(rows, heads(), strict=True)
        ]
        out, lse = torch.cat([each for each, _ in found]), torch.cat([each for _, each in found])
    return _by_sequence(out, lse, q)


def attend_spans(
    q: Tensor, spans: Sequence[Span], *, scale: float, noted: bool = False
) -> tuple[Tensor, Tensor, Weights | None]:
    """`attend_ragged` on a CPU by few products of few shapes, and the weights of each head's rows if they are `noted`.

    Weights come with their rows as those of `q` lie for each key/value head: sequences, query heads, tokens.
    """
    out, lse, weights = products.attend(_by_head(q, len(spans)), spans, scale, noted=noted)
    return (*_by_sequence(out, lse, q), weights)


def _by_head(q: Tensor, kv_heads: int) -> Tensor:
    """Rows (K, B * H/K * T, D) of each key/value head."""
    b, h, t, d = q.shape
    shared_by = h // kv_heads
    return q.reshape(b, kv_heads, shared_by, t, d).transpose(0, 1).reshape(kv_heads, b * shared_by * t, d)


def _by_sequence(out: Tensor, lse: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and log-sum-exps of rows `_by_head`, as the queries lie."""
    b, h, t, d = q.shape
    split = len(out), b, h // len(out), t
    out = out.reshape(*split, d).transpose(0, 1).reshape(b, h, t, d)
    return out, lse.reshape(split).transpose(0, 1).reshape(b, h, t)


def attend_each(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, bias: Tensor | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """`attend` of the one newest token (T = 1) of each of B sequences, by two small matrix products or one kernel.

    `bias` (B, 1, 1, S) in float32 is minus infinity where a row may not look; every row sees something.
    """
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])  # (B, K, H/K, D)
    if bias is None and softcap is None and backends.on_cpu(q):
        out, lse = backends.flash_cpu(grouped, k, v, scale, False, None)
        return out.reshape(q.shape), lse.reshape(q.shape[:3])
    logits = capped((grouped @ k.transpose(-1, -2)).float() * scale, softcap)
    if bias is not None:
        logits = logits + bias
    peak = logits.amax(-1, keepdim=True)
    weights = (logits - peak).exp_()
    total = weights.sum(-1, keepdim=True)
    out = (weights.to(v.dtype) @ v) / total
    return out.to(q.dtype).reshape(q.shape), (peak + total.log()).reshape(q.shape[:3])


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint key sets, from the (output, log-sum-exp) of each.

    Outputs are (B, H, T, D), log-sum-exps (B, H, T). Either part may be empty for a row (minus infinity), not both.
    """
    return dispatch.merge(first, second) if dispatch.can_merge(first[0]) else plain_merge(first, second)


def column_mass(
    q: Tensor, k: Tensor, lse: Tensor, *, scale: float, row_weight: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """How much attention each key gets, summed over rows, for one sequence: (H, S) in float32.

    Recomputes the weights `exp(q·k·scale - lse)` of rows whose log-sum-exp is known, a block of rows at a time, so
    that nothing of size rows x keys x heads is ever held whole. `q` is (H, T, D), `k` (K, S, D), `lse` (H, T) over
    *all* keys that the rows saw (also those not in `k`); `row_weight` (T,) multiplies each row.
    """
    if dispatch.usable(q, k.shape[0], softcap):
        return dispatch.columns(q, k, lse, scale, row_weight, peak=False)
    return plain_mass(q, k, lse, scale, row_weight, softcap)


def column_peak(
    q: Tensor, k: Tensor, lse: Tensor, *, scale: float, row_weight: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """As `column_mass`, but the largest weight over rows instead of their sum: (H, S) in float32."""
    if dispatch.usable(q, k.shape[0], softcap):
        return dispatch.columns(q, k, lse, scale, row_weight, peak=True)
    if softcap is None:
        return _peak_of_products(q, k, lse, scale, row_weight)
    return plain_peak(q, k, lse, scale, row_weight, softcap)


def _peak_of_products(q: Tensor, k: Tensor, lse: Tensor, scale: float, row_weight: Tensor | None) -> Tensor:
    """`column_peak` without a soft cap: the largest logit wins, so only that one goes through the exponential.

    A row's log-sum-exp and weight are one more dimension of the dot product: nothing of size rows x keys is gone
    over but by the product itself and the search for its largest.
    """
    h, t, d = q.shape
    kv_heads, s, _ = k.shape
    offset = -lse if row_weight is None else row_weight.log() - lse
    left = torch.cat([q.float() * scale, offset.unsqueeze(-1)], -1).reshape(kv_heads, h // kv_heads, t, d + 1)
    right = torch.cat([k.float(), k.new_ones(kv_heads, s, 1, dtype=torch.float32)], -1).transpose(1, 2)
    peak = q.new_full((kv_heads, h // kv_heads, s), float("-inf"), dtype=torch.float32)
    rows = rows_at_once(q.device, h * s)
    for start in range(0, t, rows):
        block = left[:, :, start : start + rows]
        logits = (block.reshape(kv_heads, -1, d + 1) @ right).reshape(*block.shape[:3], s)
        torch.maximum(peak, logits.amax(2), out=peak)
    return peak.exp_().reshape(h, s)
