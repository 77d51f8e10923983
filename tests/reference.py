"""Slow references, written from the formulas: the full context, and answers by re-reading everything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cribsheet.model.backbone import Backbone


@torch.no_grad()
def full_context_logits(backbone: Backbone, ids: Tensor) -> Tensor:
    """Logits (N, V) of a plain forward pass by stock transformers."""
    return backbone.model(input_ids=ids.unsqueeze(0)).logits[0]


def stock_cache(backbone: Backbone, ids: Tensor) -> Any:
    """Keys and values of a plain forward pass by stock transformers."""
    found = backbone.model(input_ids=ids.unsqueeze(0), use_cache=True)
    (name,) = backbone.cached(None)
    return found[name]


@torch.no_grad()
def full_context_answer(backbone: Backbone, ids: Tensor, max_tokens: int) -> list[int]:
    """Greedy continuation by stock `generate`, up to and without the end token."""
    out = backbone.model.generate(
        ids.unsqueeze(0),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=max_tokens,
        do_sample=False,
        pad_token_id=0,
    )[0, len(ids) :].tolist()
    ends = [at for at, token in enumerate(out) if token in backbone.eos_ids]
    return out[: ends[0]] if ends else out


def attention_weights(q: Tensor, k: Tensor, scale: float, first_row_sees: int) -> Tensor:
    """Softmax weights (H, T, S) of rows that see `first_row_sees`, then one more key each, by loops in float64."""
    heads, rows, _ = q.shape
    group = heads // k.shape[0]
    weights = torch.zeros(heads, rows, k.shape[1], dtype=torch.float64)
    for head in range(heads):
        for row in range(rows):
            seen = first_row_sees + row
            logits = (k[head // group, :seen].double() @ q[head, row].double()) * scale
            weights[head, row, :seen] = logits.softmax(0)
    return weights
