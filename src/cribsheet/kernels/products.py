"""Products on a CPU by oneDNN, by the operators that PyTorch's compiler uses, and attention made of them.

They take the widest instructions of any maker's processor: twice as fast as PyTorch's own products in float32 where
those do not, and in bfloat16 weights need not be laid out anew at every call. For each form of a product oneDNN makes
code, up to half a megabyte of it, which stays: so rows and keys come in few numbers.

Letters as in `attention/attend.py`; `R` rows of each key/value head, `S` keys of a span.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_MOST_ROWS = 256  # of one product
_FEW_ROWS, _ROW_STEPS = 64, (16, 32)  # steps by which rows of a product differ, up to so many and beyond
_LEAST_STEP = 256  # keys by which the shortest spans differ


class Span(NamedTuple):
    """Keys and values (S, D) of a head among those of its neighbours, and what hides these: (S,) in float32, or none.

    The head's own stand from `first` to `last`. Where there are fewer than are hidden or not, zeros are to follow.
    """

    keys: Tensor
    values: Tensor
    hidden: Tensor | None
    first: int
    last: int


class Weights(NamedTuple):
    """What rows of the heads of a prefix gave its keys: (R, S) in float32 for each head, which add up to one.

    `spans` say which columns are a head's own; `lse` (K, R) is that of the prefix alone.
    """

    heads: list[Tensor]
    spans: Sequence[Span]
    lse: Tensor


def laid_out(weight: Tensor) -> Any:
    """A weight (N, K) as products want it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)


def times(rows: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    """Products (R, N) of rows (R, K) with a weight (N, K), laid out or not."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


def padded_rows(rows: int, least_step: int = 1) -> int:
    """Rows of the product that is made for so many: at most an eighth more, or a step, of few numbers."""
    step = max(least_step, 1 << max(0, rows.bit_length() - 4))
    return -(-rows // step) * step


@functools.cache
def are_there(dtype: torch.dtype) -> bool:
    """Whether this processor has such products of a type."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def spans_of(keys: Tensor, values: Tensor, counts: Sequence[int]) -> list[Span]:
    """Spans of heads that hold so many keys and values (N, D), one head behind the other.

    Their lengths are few numbers: neighbours' keys fill them up, and are hidden. Nothing is copied: where all heads
    hold too little together, `attend` fills up.
    """
    spans: list[Span] = []
    first = 0
    for count in counts:
        size = padded_rows(count, _LEAST_STEP)
        start = max(0, min(first, len(keys) - size))
        k, v, own = keys[start : start + size], values[start : start + size], first - start
        hidden = None if count == size else _hidden(size, own, own + count, keys.device)
        spans.append(Span(k, v, hidden, own, own + count))
        first += count
    return spans


def _hidden(size: int, first: int, last: int, device: torch.device) -> Tensor:
    hidden = torch.full((size,), float("-inf"), device=device)
    hidden[first:last] = 0.0
    return hidden


def parts_of(rows: int) -> tuple[int, int]:
    """In how many products so many rows look at a span, and how many there are in each: one of nine numbers.

    Each number is made code for with every length of a span.
    """
    parts = -(-rows // _MOST_ROWS)
    each = -(-rows // parts)
    return parts, padded_rows(each, _ROW_STEPS[each > _FEW_ROWS])


def _filled(half: Tensor, hidden: Tensor | None) -> Tensor:
    """Keys or values (S, D) of a span, with zeros behind them for as long as somebody looks at them."""
    missing = 0 if hidden is None else len(hidden) - len(half)
    return F.pad(half, (0, 0, 0, missing)) if missing else half


def attend(rows: Tensor, spans: Sequence[Span], scale: float, *, noted: bool) -> tuple[Tensor, Tensor, Weights | None]:
    """Attention (K, R, D) of rows (K, R, D) over the spans of K heads, log-sum-exps (K, R), and weights if `noted`."""
    count = rows.shape[1]
    parts, at_once = parts_of(count)
    wide = rows.float() * scale
    if more := parts * at_once - count:
        wide = F.pad(wide, (0, 0, 0, more))
    out = rows.new_empty(wide.shape)
    peaks, shares = wide.new_empty(2, *wide.shape[:2])  # the largest logit of each row, and its weight
    kept: list[Tensor] = []
    for head, span in enumerate(spans):
        keys, values = _filled(span.keys, span.hidden).float(), _filled(span.values, span.hidden)
        if noted and parts > 1:
            kept.append(wide.new_empty(parts * at_once, len(keys)))
        for first in range(0, parts * at_once, at_once):
            block = slice(first, first + at_once)
            logits = times(wide[head, block], keys, span.hidden)
            torch.amax(logits, -1, out=peaks[head, block])
            # in place, which rows of their own allow, unless it is kept: what does not stay in the cache is slow
            weights = torch.softmax(logits, -1, out=kept[head][block] if noted and parts > 1 else logits)
            torch.amax(weights, -1, out=shares[head, block])
            _weigh(weights.to(rows.dtype), values, out[head, block])
        if noted and parts == 1:
            kept.append(weights)
    lse = peaks.sub_(shares.log_())[:, :count]  # what the largest lost is what all come to
    return out[:, :count], lse, Weights([each[:count] for each in kept], spans, lse) if noted else None


def _weigh(weights: Tensor, values: Tensor, out: Tensor) -> None:
    """Sums (R, D) of values by their weights."""
    if weights.dtype == torch.float32:
        out.copy_(times(weights, values.t(), None))
    else:
        torch.mm(weights, values, out=out)
