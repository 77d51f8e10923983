"""Where an answer looked: the attention of its tokens on the sheet, traced back to the documents.

The question and its answer are read once more on top of the prefix, and the attention of the answer's rows on each
kept token is summed over layers and heads. It shows what the model read, not a proof that the answer follows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cribsheet.answer import Source
from cribsheet.attention import column_mass
from cribsheet.backbone import Backbone
from cribsheet.prefix import Prefix
from cribsheet.sheet import Sheet

_CONTEXT = 40  # characters shown on each side of the most attended place


def attention_per_origin(backbone: Backbone, prefix: Prefix, sheet: Sheet, asked: Tensor, answered: Tensor) -> Tensor:
    """Attention mass (U,) of the answer's tokens (A,) on each token of `sheet.origins`, after question tokens (T,)."""
    layers = backbone.read(prefix.layers, prefix.tokens, asked, answered)
    mass = torch.zeros(len(sheet.origins))
    places = sheet.places
    for number, read, layer in ((n, layers[at], prefix.layers[at]) for n, at in enumerate(backbone.full)):
        on_prefix = column_mass(
            read.guide_queries, layer.keys, read.guide_lse, scale=backbone.scale, softcap=backbone.softcap
        )
        per_head = on_prefix.reshape(backbone.kv_heads, -1, on_prefix.shape[1]).sum(1).cpu()  # (K, P)
        from_corpus = sheet.indices[number] >= 0
        mass.index_add_(0, places[number][from_corpus], per_head[from_corpus])
    return mass


def find_sources(sheet: Sheet, mass: Tensor, limit: int) -> list[Source]:
    """The `limit` documents that were looked at most, each with its most attended stretch."""
    number, inside = sheet.origins[:, 1].long(), sheet.origins[:, 1] >= 0
    if not inside.any():
        return []
    per_document = torch.zeros(len(sheet.manifest.documents)).index_add_(0, number[inside], mass[inside])
    best = per_document.topk(min(limit, len(per_document)))
    found = []
    for weight, document in zip((best.values / mass[inside].sum()).tolist(), best.indices.tolist(), strict=True):
        if weight <= 0:
            continue
        token = int(mass.where(number == document, -1.0).argmax())
        start, stop = sheet.origins[token, 2:].tolist()
        text = sheet.texts[document] if sheet.texts else ""
        if text:
            start, stop = _widened(text, start, stop)
        found.append(Source(sheet.manifest.documents[document].id, start, stop, weight, text[start:stop]))
    return found


def _widened(text: str, start: int, stop: int) -> tuple[int, int]:
    """A stretch grown to whole words, about `_CONTEXT` characters on each side."""
    start, stop = max(0, start - _CONTEXT), min(len(text), stop + _CONTEXT)
    while start > 0 and not text[start - 1].isspace():
        start -= 1
    while stop < len(text) and not text[stop].isspace():
        stop += 1
    return start, stop
