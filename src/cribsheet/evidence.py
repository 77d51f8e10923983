"""Where an answer looked: the attention of its tokens on the sheet, traced back to the documents.

The question and its answer are read once more on top of the prefix, and the attention of the answer's rows on each
kept token is summed over layers and heads. It shows what the model read, not a proof that the answer follows.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def find_passages(sheet: Sheet, mass: Tensor, limit: int, characters: int) -> list[Source]:
    """The `limit` passages of about `characters` that were looked at most; none overlap.

    Passages grow around the most attended places. One of a sheet without texts has a place, but no text.
    """
    number, starts, stops = (sheet.origins[:, column].long() for column in (1, 2, 3))
    left = mass.where(number >= 0, 0.0)
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
