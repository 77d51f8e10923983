"""From what an answer looked at, in the sheet and in passages that were told, back to the documents it comes from.

A document counts by its most attended token of each head, not by the sum over its tokens: sums favour long documents
and those whose every comma attracts a little attention. It shows what the model looked at, not a proof that the
answer follows. How it was chosen, and what it finds: `cribsheet_bench/evidence.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cribsheet.asking.answer import Source
from cribsheet.retrieval.retriever import PASSAGE_CHARACTERS, Passage
from cribsheet.sheet.sheet import Sheet

LIMIT = 3  # sources of an answer
_LONGEST = 2**31  # stretches of a document, at most
_CONTEXT = 40  # characters shown on each side of the most attended place


def find_sources(
    sheet: Sheet,
    looked: Tensor,
    limit: int = LIMIT,
    *,
    passages: Sequence[Passage] = (),
    places: Sequence[tuple[int, int]] = (),
) -> tuple[Source, ...]:
    """The `limit` documents that were looked at most (M, K, p + N), each with its most attended stretch; by weight.

    The last N columns are tokens of `passages`, which are at `places` of the question; all passages are sources too.
    """
    kept, told = _parted(sheet, looked.float().cpu(), places)
    first = places[0][0] if places else 0
    per_passage = [float(told[..., a - first : b - first].amax(2).sum()) for a, b in places]
    per_document = _per_document(sheet, kept) if kept.shape[2] else torch.zeros(0)
    total = float(per_document.sum()) + sum(per_passage) or 1.0
    found = _documents(sheet, kept, per_document, limit, total)
    found += [_retrieved(sheet, each, weight / total) for each, weight in zip(passages, per_passage, strict=False)]
    return tuple(sorted(found, key=lambda each: -each.weight))


def of_sheet(sheet: Sheet, looked: Tensor, places: Sequence[tuple[int, int]]) -> Tensor:
    """What of (M, K, p + N) was looked at in the sheet, (M, K, P), where passages are at `places` of the question."""
    return _parted(sheet, looked, places)[0]


def _parted(sheet: Sheet, looked: Tensor, places: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """What was looked at (M, K, p + N) in the sheet (M, K, P), or (M, K, 0) without one, and in passages (M, K, N).

    `p` is less than P where the guide was read with the question (`placing.beside_documents`); nothing of it counts.
    """
    size = places[-1][1] - places[0][0] if places else 0
    kept, told = looked.split([looked.shape[2] - size, size], 2)
    return F.pad(kept, (0, sheet.length - kept.shape[2])) if kept.shape[2] else kept, told


def _per_document(sheet: Sheet, looked: Tensor) -> Tensor:
    """What each document was looked at (D,): its most attended token (M, K, P) of each head, summed."""
    documents = len(sheet.manifest.documents)
    places = sheet.places[-len(looked) :]
    number = sheet.origins[:, 1].long()[places].where(sheet.indices[-len(looked) :] >= 0, torch.tensor(-1))
    outside = torch.where(number < 0, documents, number)  # the preamble, the guide and what is between documents
    peaks = torch.zeros(*looked.shape[:2], documents + 1).scatter_reduce_(2, outside, looked, "amax")
    return peaks.sum((0, 1))[:documents]


def _retrieved(sheet: Sheet, passage: Passage, weight: float) -> Source:
    """A passage as a source; where it stands is looked up in the sheet if its retriever does not say."""
    start = passage.start
    if start is None:
        numbers = (n for n, each in enumerate(sheet.manifest.documents) if each.id == passage.document_id)
        number = next(numbers, None) if sheet.texts else None
        start = -1 if number is None else sheet.texts[number].find(passage.text)
    start = max(0, start)
    stop = start + len(passage.text)
    return Source(passage.document_id, start, stop, weight, passage.text, retrieved=True, metadata=passage.metadata)


def _documents(sheet: Sheet, looked: Tensor, per_document: Tensor, limit: int, total: float) -> list[Source]:
    """The `limit` documents of most weight (D,), with their most attended stretches (M, K, P)."""
    best = per_document.topk(min(limit, len(per_document)))
    most = _most_of_a_head(sheet, looked) if len(per_document) else torch.zeros(0)
    found = []
    for weight, document in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        if weight <= 0:
            continue
        token = int(most.where(sheet.origins[:, 1] == document, -1.0).argmax())
        start, stop = sheet.origins[token, 2:].tolist()
        text = sheet.texts[document] if sheet.texts else ""
        if text:
            start, stop = _widened(text, start, stop)
        found.append(Source(sheet.manifest.documents[document].id, start, stop, weight / total, text[start:stop]))
    return found


def per_stretch(sheet: Sheet, looked: Tensor) -> Tensor:
    """What each stretch of a document was looked at (S,), as `_per_document` counts documents.

    Stretches are as long as the passages of a search, so that it does not matter how a text is cut into documents.
    """
    number, start = sheet.origins[:, 1].long(), sheet.origins[:, 2].long()
    _, stretches = (number * _LONGEST + start // PASSAGE_CHARACTERS).unique(return_inverse=True)
    places = sheet.places[-len(looked) :]
    inside = (number[places] >= 0) & (sheet.indices[-len(looked) :] >= 0)
    count = int(stretches.max()) + 1 if len(stretches) else 0
    peaks = torch.zeros(*looked.shape[:2], count + 1)
    peaks.scatter_reduce_(2, torch.where(inside, stretches[places], count), looked.float().cpu(), "amax")
    return peaks.sum((0, 1))[:count]


def pointed(sheet: Sheet, looked: Tensor, *, limit: int) -> tuple[Source, ...]:
    """The `limit` stretches that were looked at most (M, K, P), as `per_stretch` counts; they are what is recalled."""
    number, start = sheet.origins[:, 1].long(), sheet.origins[:, 2].long()
    _, stretches = (number * _LONGEST + start // PASSAGE_CHARACTERS).unique(return_inverse=True)
    weights = per_stretch(sheet, looked)
    best = weights.topk(min(limit, len(weights)))
    found = []
    for weight, stretch in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        if weight <= 0:
            break
        row = int((stretches == stretch).nonzero()[0])
        entry = sheet.manifest.documents[int(number[row])]
        first = int(start[row]) // PASSAGE_CHARACTERS * PASSAGE_CHARACTERS
        last = min(first + PASSAGE_CHARACTERS, entry.characters)
        text = sheet.texts[int(number[row])][first:last] if sheet.texts else ""
        found.append(Source(entry.id, first, last, weight, text))
    return tuple(found)


def _most_of_a_head(sheet: Sheet, looked: Tensor) -> Tensor:
    """The largest attention (U,) that any head pays to each token of `sheet.origins` (M, K, P).

    A token that every head attends to a little, as where a chapter's key terms begin, has the largest sum for any
    question; what answers it has the largest weight of one head.
    """
    return _per_origin(sheet, looked, "amax")


def mass_per_origin(sheet: Sheet, looked: Tensor) -> Tensor:
    """Attention (U,) on each token of `sheet.origins`, of what was looked at (M, K, P)."""
    return _per_origin(sheet, looked, "sum")


def _per_origin(sheet: Sheet, looked: Tensor, reduce: str) -> Tensor:
    """What was looked at (M, K, P), put together for each token of `sheet.origins`: (U,)."""
    from_corpus = sheet.indices[-len(looked) :] >= 0
    places = sheet.places[-len(looked) :][from_corpus]
    return torch.zeros(len(sheet.origins)).scatter_reduce_(0, places, looked.float().cpu()[from_corpus], reduce)


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
