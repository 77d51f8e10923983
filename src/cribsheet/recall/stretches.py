"""Which stretches of the corpus are recalled: passages to places in documents, and these to tokens, within a budget."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from cribsheet.errors import RequestError
from cribsheet.retrieval.passages import SHORTEST_CUT, flattened
from cribsheet.retrieval.quoted import Known
from cribsheet.retrieval.retriever import Passage
from cribsheet.sheet.archive.archive import Archive
from cribsheet.sheet.manifest import DocumentEntry
from cribsheet.sheet.sheet import Sheet

_GAP = 2  # tokens between two stretches that are recalled with them: a blank line
_MARK = re.compile(r"\[recall ([0-9a-f]{8}):(\d{1,9})-(\d{1,9})\]")
_TAG = 8  # of a document's digest, by which a mark knows it


@dataclass(frozen=True, slots=True)
class Stretch:
    """Characters of a document, by its number, and the tokens [first, last) of the corpus that hold them."""

    document: int
    start: int
    stop: int
    first: int = 0
    last: int = 0

    @property
    def tokens(self) -> int:
        """How many."""
        return self.last - self.first


def located(sheet: Sheet, known: Callable[[], Known], passage: Passage) -> Stretch | None:
    """Where a passage stands in the sheet's documents, its tokens not known yet; nowhere if it is not in them.

    Texts that are `known` are those of the sheet, searched if a retriever does not say where its passages stand.
    """
    numbers = {entry.id: number for number, entry in enumerate(sheet.manifest.documents)}
    number, text, start = numbers.get(passage.document_id), passage.text, passage.start
    if number is not None and start is not None:
        stop = start + len(text) if passage.stop is None else passage.stop
        if not sheet.texts or flattened(sheet.texts[number][start:stop]) == flattened(text):
            return Stretch(number, start, min(stop, sheet.manifest.documents[number].characters))
    if marked := named(sheet, text):  # a marker stands in the place of a passage
        return marked[0]
    if not sheet.texts or not text.strip():
        return None
    if number is not None and (at := sheet.texts[number].find(text)) >= 0:
        return Stretch(number, at, at + len(text))
    return _quoted(sheet.texts, known(), flattened(text))


def mark(document: DocumentEntry, start: int, stop: int) -> str:
    """What names characters of a document in a prompt: a few tokens in the place of the text.

    Where documents come and go it names the same one, or none if that is gone or has changed.
    """
    return f"[recall {document.digest[:_TAG]}:{start}-{stop}]"


def named(sheet: Sheet, text: str) -> list[Stretch]:
    """Stretches that marks in a text name, as far as they are in the sheet's documents; their tokens not known yet."""
    entries, found = sheet.manifest.documents, []
    numbers = {entry.digest[:_TAG]: number for number, entry in enumerate(entries)}
    for each in dict.fromkeys(_MARK.findall(text)):
        number, start, stop = numbers.get(each[0]), int(each[1]), int(each[2])
        if number is not None and start < (stop := min(stop, entries[number].characters)):
            found.append(Stretch(number, start, stop))
    return found


def choose_stretches(
    archive: Archive, places: Iterable[Stretch], texts: Sequence[str], *, tokens: int, top_k: int | None = None
) -> list[Stretch]:
    """The first of `places` that fit into `tokens`, at most `top_k`, no token twice, in reading order.

    Those that overlap or touch become one. The first that does not fit is cut, where there are `texts` at a word, and
    the rest is left out.
    """
    chosen: list[Stretch] = []
    left, told = tokens, 0
    for place in places:
        if told == top_k:
            break
        added = _added(archive, chosen, place)
        if added > left:
            place = _cut(archive, chosen, place, texts, left)
            added = _added(archive, chosen, place) if place.stop > place.start else 0
            if added >= SHORTEST_CUT:
                chosen = _with(archive, chosen, place)
            break
        if added:
            chosen, told, left = _with(archive, chosen, place), told + 1, left - added
    return chosen


def as_passages(sheet: Sheet, stretches: Iterable[Stretch]) -> list[Passage]:
    """Stretches as they are named in answers; without texts, by their places."""
    found = []
    for each in stretches:
        entry = sheet.manifest.documents[each.document]
        text = sheet.texts[each.document][each.start : each.stop] if sheet.texts else ""
        found.append(Passage(text, entry.id, each.start, each.stop, metadata=entry.metadata))
    return found


def _added(archive: Archive, chosen: Sequence[Stretch], place: Stretch) -> int:
    """Tokens that a place adds to those that were chosen."""
    return sum(each.tokens for each in _with(archive, chosen, place)) - sum(each.tokens for each in chosen)


def _with(archive: Archive, chosen: Sequence[Stretch], place: Stretch) -> list[Stretch]:
    """Stretches and one more, in reading order; what overlaps or touches in a document is one."""
    try:
        first, last = archive.places(place.document, place.start, place.stop)
    except RequestError:  # blanks, of which some tokenizers make no tokens
        return list(chosen)
    joined: list[Stretch] = []
    for each in sorted([*chosen, replace(place, first=first, last=last)], key=lambda stretch: stretch.first):
        before = joined[-1] if joined else None
        if before is None or before.document != each.document or each.first > before.last + _GAP:
            joined.append(each)
            continue
        joined[-1] = replace(
            before,
            start=min(before.start, each.start),
            stop=max(before.stop, each.stop),
            last=max(before.last, each.last),
        )
    return joined


def _cut(archive: Archive, chosen: Sequence[Stretch], place: Stretch, texts: Sequence[str], left: int) -> Stretch:
    """As much of a place's beginning as adds no more than the tokens that are left."""
    fits, exceeds = place.start, place.stop
    while exceeds - fits > 1:
        middle = (fits + exceeds) // 2
        if _added(archive, chosen, replace(place, stop=middle)) <= left:
            fits = middle
        else:
            exceeds = middle
    if texts:
        text = texts[place.document]
        while fits > place.start and not text[fits].isspace():
            fits -= 1
    return replace(place, stop=fits)


def _quoted(texts: Sequence[str], known: Known, part: str) -> Stretch | None:
    """Where a flat text stands in documents, however their lines are broken."""
    at = known.find(part)
    if at < 0:
        return None
    number = known.text.count("\n", 0, at) - 1  # each document is a line, behind an empty one
    begin = at - (known.text.rfind("\n", 0, at) + 1)
    end, place, start, stop = begin + len(part), 0, None, None
    for word in re.finditer(r"\S+", texts[number]):
        size = word.end() - word.start()
        if start is None and place + size > begin:
            start = word.start() + max(0, begin - place)
        if place + size >= end:
            stop = word.start() + end - place
            break
        place += size + 1
    return None if start is None or stop is None else Stretch(number, start, stop)
