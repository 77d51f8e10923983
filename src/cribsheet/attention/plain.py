"""Attention written from its formulas: what the faster paths must give, and what devices without any use.

In float32, on any device, a block of rows at a time. Letters as in `attention/attend.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_MAX_SCORES = 1 << 24  # attention logits held at once: 64 MiB in float32
_CACHED_SCORES = 1 << 20  # as many as stay in a CPU's cache until they are looked at again


def attend_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend` written from the formula, in float32, a block of rows at a time; any device, any dtype.

    The reference of the faster paths, and the path for devices that have none.
    """
    b, h, t, d = q.shape
    kv_heads, s = k.shape[1], k.shape[2]
    k32, v32 = k.float().unsqueeze(2), v.float().unsqueeze(2)  # (B, K, 1, S, D)
    rows = max(1, _MAX_SCORES // (b * h * s))
    outs, lses = [], []
    for start in range(0, t, rows):
        q32 = q[:, :, start : start + rows].float().reshape(b, kv_heads, h // kv_heads, -1, d)
        logits = (q32 @ k32.transpose(-1, -2) * scale).reshape(b, h, -1, s)  # (B, H, rows, S)
        logits = capped(logits, softcap)
        if causal:
            row = torch.arange(start, start + logits.shape[2], device=q.device)
            logits.masked_fill_(torch.arange(s, device=q.device) > row[:, None], float("-inf"))
        if mask is not None:
            block = mask if mask.shape[-2] == 1 else mask[:, :, start : start + rows]
            logits.masked_fill_(~block, float("-inf"))
        lse = logits.logsumexp(-1)
        weights = (logits - lse.nan_to_num(neginf=0.0).unsqueeze(-1)).exp()
        out = weights.reshape(b, kv_heads, h // kv_heads, -1, s) @ v32
        outs.append(out.reshape(b, h, -1, d).to(q.dtype))
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits bounded smoothly by `softcap`, or as they are."""
    return logits if softcap is None else (logits / softcap).tanh() * softcap


def plain_merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`merge` on any device."""
    (out_1, lse_1), (out_2, lse_2) = first, second
    lse = torch.logaddexp(lse_1, lse_2)
    weight = (lse_1 - lse).exp().unsqueeze(-1)
    return torch.lerp(out_2.float(), out_1.float(), weight).to(out_1.dtype), lse


def plain_mass(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, row_weight: Tensor | None, softcap: float | None
) -> Tensor:
    """`column_mass` on any device."""
    total = torch.zeros(q.shape[0], k.shape[1], device=q.device)
    for weights in _weight_blocks(q, k, lse, scale, row_weight, softcap):
        total += weights.sum(1)
    return total


def plain_peak(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, row_weight: Tensor | None, softcap: float | None
) -> Tensor:
    """`column_peak` on any device."""
    peak = torch.zeros(q.shape[0], k.shape[1], device=q.device)
    for weights in _weight_blocks(q, k, lse, scale, row_weight, softcap):
        peak = torch.maximum(peak, weights.amax(1))
    return peak


def _weight_blocks(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, row_weight: Tensor | None, softcap: float | None
) -> Iterator[Tensor]:
    """Attention weights (H, rows, S) in float32, for blocks of rows of bounded size.

    Query heads of one key/value head are rows of one product, so keys are not repeated for them; a row's weight goes
    into its log-sum-exp, so what is of size rows x keys is gone over only twice.
    """
    h, t, d = q.shape
    kv_heads, s, _ = k.shape
    k32 = k.float().transpose(-1, -2)  # (K, D, S)
    offset = (lse if row_weight is None else weighted(lse, row_weight)).unsqueeze(-1)
    rows = rows_at_once(q.device, h * s)
    for start in range(0, t, rows):
        q32 = (q[:, start : start + rows].float() * scale).reshape(kv_heads, -1, d)
        logits = (q32 @ k32).reshape(h, -1, s)
        yield capped(logits, softcap).sub_(offset[:, start : start + rows]).exp_()


def weighted(lse: Tensor, weight: Tensor) -> Tensor:
    """Log-sum-exps of rows less the logarithm of their weights; plus infinity for rows that weigh nothing."""
    return torch.where(weight > 0, lse - weight.log(), float("inf"))


def rows_at_once(device: torch.device, scores: int) -> int:
    """Rows of so many scores that are held at once."""
    most = min(_CACHED_SCORES, _MAX_SCORES) if device.type == "cpu" else _MAX_SCORES
    return max(1, most // max(1, scores))
