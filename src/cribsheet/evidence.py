"""Where an answer comes from: the attention of question and answer on the sheet, traced back to the documents.

A document counts by its most attended token of each head, not by the sum over its tokens: sums favour long documents
and those whose every comma attracts a little attention. It shows what the model looked at, not a proof that the
answer follows. How it was chosen, and what it finds: `bench/evidence.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cribsheet.answer import Source
from cribsheet.backbone import Backbone
from cribsheet.glance import Glance, question_weights
from cribsheet.prefix import Prefix, prefix_cache
from cribsheet.sheet import Sheet

LIMIT = 3  # sources of an answer
_CONTEXT = 40  # characters shown on each side of the most attended place


def looked_at(backbone: Backbone, prefix: Prefix, asked: Tensor, answered: Tensor) -> Tensor:
    """What an answer of tokens (A,) to a question (T,) looks at, as the engine notes it while it writes: (M, K, P)."""
    ids = torch.cat([asked, answered[:-1]])  # the row of the last token would write the next one
    weights = torch.cat([question_weights(len(asked)), torch.ones(len(ids) - len(asked))])
    cache = prefix_cache(prefix.layers, prefix.tokens)
    glance = Glance(cache.layers, backbone.full, [weights])
    positions = torch.arange(prefix.tokens, prefix.tokens + len(ids))
    backbone.step(ids.unsqueeze(0), positions.unsqueeze(0), cache)
    return glance.masses[:, 0]


def find_sources(sheet: Sheet, looked: Tensor, limit: int = LIMIT) -> tuple[Source, ...]:
    """The `limit` documents that were looked at most (M, K, P), each with its most attended stretch."""
    looked = looked.float().cpu()
    documents = len(sheet.manifest.documents)
    places = sheet.places[-len(looked) :]
    number = sheet.origins[:, 1].long()[places].where(sheet.indices[-len(looked) :] >= 0, torch.tensor(-1))
    outside = torch.where(number < 0, documents, number)  # the head, the guide and what is between documents
    peaks = torch.zeros(*looked.shape[:2], documents + 1).scatter_reduce_(2, outside, looked, "amax")
    per_document = peaks.sum((0, 1))[:documents]
    mass = torch.zeros(len(sheet.origins)).index_add_(0, places[number >= 0], looked[number >= 0])
    best = per_document.topk(min(limit, documents))
    found = []
    for weight, document in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        if weight <= 0:
            continue
        token = int(mass.where(sheet.origins[:, 1] == document, -1.0).argmax())
        start, stop = sheet.origins[token, 2:].tolist()
        text = sheet.texts[document] if sheet.texts else ""
        if text:
            start, stop = _widened(text, start, stop)
        share = weight / float(per_document.sum())
        found.append(Source(sheet.manifest.documents[document].id, start, stop, share, text[start:stop]))
    return tuple(found)


def _widened(text: str, start: int, stop: int) -> tuple[int, int]:
    """A stretch grown to whole words, about `_CONTEXT` characters on each side."""
    start, stop = max(0, start - _CONTEXT), min(len(text), stop + _CONTEXT)
    while start > 0 and not text[start - 1].isspace():
        start -= 1
    while stop < len(text) and not text[stop].isspace():
        stop += 1
    return start, stop
