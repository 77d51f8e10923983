"""Where an answer comes from: the attention of question and answer on the sheet, traced back to the documents.

A document counts by its most attended token of each head, not by the sum over its tokens: sums favour long documents
and those whose every comma attracts a little attention. It shows what the model looked at, not a proof that the
answer follows. How it was chosen, and what it finds: `bench/evidence.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    mass = mass_per_origin(sheet, looked)
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


def mass_per_origin(sheet: Sheet, looked: Tensor) -> Tensor:
    """Attention (U,) on each token of `sheet.origins`, of what was looked at (M, K, P)."""
    from_corpus = sheet.indices[-len(looked) :] >= 0
    places = sheet.places[-len(looked) :][from_corpus]
    return torch.zeros(len(sheet.origins)).index_add_(0, places, looked.float().cpu()[from_corpus])


def find_passages(sheet: Sheet, looked: Tensor, limit: int, characters: int) -> list[Source]:
    """The `limit` passages of about `characters` that were looked at most (M, K, P); none overlap.

    Passages grow around the most attended places. One of a sheet without texts has a place, but no text.
    """
    number, starts, stops = (sheet.origins[:, column].long() for column in (1, 2, 3))
    left = mass_per_origin(sheet, looked).where(number >= 0, 0.0)
    total = float(left.sum())
    found: list[Source] = []
    while len(found) < limit and (left > 0).any():
        token = int(left.argmax())
        document = int(number[token])
        entry, text = sheet.manifest.documents[document], sheet.texts[document] if sheet.texts else ""
        taken = [(each.start, each.stop) for each in found if each.document_id == entry.id]
        start, stop = _passage(int(starts[token]), int(stops[token]), entry.characters, characters, taken)
        if text and stop - start < len(text):
            start, stop = _whole_words(text, start, stop, int(starts[token]), int(stops[token]))
        inside = (number == document) & (starts < stop) & (stops > start)
        inside[token] = True
        found.append(Source(entry.id, start, stop, float(left[inside].sum()) / total, text[start:stop]))
        left[inside] = 0.0
    return sorted(found, key=lambda each: -each.weight)


def _passage(start: int, stop: int, end: int, characters: int, taken: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """A place grown to about `characters` on both sides, between 0, `end` and the passages that are taken."""
    low = max((b for _, b in taken if b <= start), default=0)
    high = min((a for a, _ in taken if a >= stop), default=end)
    first = min(start, max(low, min(start - (characters - (stop - start)) // 2, high - characters)))
    return first, max(stop, min(high, first + characters))


def _whole_words(text: str, start: int, stop: int, first: int, last: int) -> tuple[int, int]:
    """A passage shrunk to whole words, but never past the place from `first` to `last`."""
    while 0 < start < first and not text[start - 1].isspace():
        start += 1
    while last < stop < len(text) and not text[stop].isspace():
        stop -= 1
    return start, stop


def _widened(text: str, start: int, stop: int) -> tuple[int, int]:
    """A stretch grown to whole words, about `_CONTEXT` characters on each side."""
    start, stop = max(0, start - _CONTEXT), min(len(text), stop + _CONTEXT)
    while start > 0 and not text[start - 1].isspace():
        start -= 1
    while stop < len(text) and not text[stop].isspace():
        stop += 1
    return start, stop
