"""Gaps: questions that plain rules make of the documents' sentences, where a model writes too few that may serve.

Something particular is left out of a sentence: a number, a date, or a name, which is a run of words with capitals that
does not begin the sentence. What it is, is known, so its answer needs no second opinion.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from typing import NamedTuple

from cribsheet.retrieval.content_words import SMALL
from cribsheet.retrieval.retriever import Passage, words

_ASKED = 'What is left out of this sentence of the documents: "{}"?'
_GAP = "___"
_BEFORE, _AFTER = 150, 50  # characters of a sentence that are shown on both sides of the gap
_CONTEXT = 5  # words that must stand around it
SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_MONTH = r"(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_NUMBER = (
    rf"(?<![\w.,-])(?:\d{{1,2}} )?(?:{_MONTH} (?:\d{{1,2}}, )?)?\d(?:[\d.,]*\d)?"
    r"(?:%| percent| per cent| (?:m|b)illion)?(?![\w-])"
)
_NAME = r"(?<=[a-z,;:)] )[A-Z][\w'’-]*(?: (?:(?:of|the|de|von|van) )?[A-Z][\w'’-]*){0,4}(?: \d+\b)?"
_PARTICULAR = re.compile(f"{_NUMBER}|{_NAME}")


class Gap(NamedTuple):
    """A question about what a sentence of a `stretch` says, and its answer."""

    question: str
    answer: str
    stretch: Passage


def gaps(stretch: Passage, rare: Set[str]) -> Iterator[Gap]:
    """Questions about a stretch, in its order.

    What is left out stands there only once and whole, and has a `rare` word of all documents, as has what is around it:
    by that the sentence can be told from others.
    """
    text = stretch.text
    for found in _PARTICULAR.finditer(text):
        answer = found[0]
        before, after = _around(text, *found.span())
        if len(answer) < 2 or text.count(answer) > 1 or _goes_on(before):
            continue
        left = words(before) + words(after)
        if len(left) >= _CONTEXT and not rare.isdisjoint(left) and not rare.isdisjoint(words(answer)):
            yield Gap(_ASKED.format(" ".join(f"{before}{_GAP}{after}".split())), answer, stretch)


def _goes_on(before: str) -> bool:
    """Whether what follows is the rest of a name ("Frederick William")."""
    last = before.split()[-1:]
    return bool(last) and last[0][0].isupper() and last[0].casefold() not in SMALL


def _around(text: str, start: int, stop: int) -> tuple[str, str]:
    """What the sentence says before and after a place, cut at words where it is long."""
    ends = [each.span() for each in SENTENCE.finditer(text)]
    first = max((end for _, end in ends if end <= start), default=0)
    last = min((begin for begin, _ in ends if begin >= stop), default=len(text))
    before, after = text[first:start], text[stop:last]
    if len(before) > _BEFORE:
        before = before[-_BEFORE:].partition(" ")[2]
    if len(after) > _AFTER:
        after = after[:_AFTER].rpartition(" ")[0]
    return before, after
