"""Aggregates in the manner of RULER (arXiv 2404.06654): which words are the most common, or the most frequent.

Several lists stand in one corpus, so that examples ask about other lists than the questions do; no two lists share a
word. Answers are in order of appearance, as the pocket model gives lists.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count
from typing import Literal

from cribsheet.corpus.documents import Document
from cribsheet.corpus.task import Task
from cribsheet_bench.quality.case import Case

_LISTS, _EXAMPLES, _TOP = 6, 2, 3
_COMMON, _RARE = 6, 1  # how often a common word stands in a list, and any other
_TOKENS_PER_ENTRY = {"common": 5, "frequent": 3}  # of a number, a point and a word; of a made-up word alone
_NAMES = ("amber", "basalt", "cobalt", "dune", "ember", "fjord")
_TASK = {
    "common": "Find the words that a list has most often.",
    "frequent": "Find the words that a coded text has most often.",
}
_QUESTION = {
    "common": "Which three words are the most common in list {}?",
    "frequent": "Which three words appear most often in coded text {}?",
}


def lists(form: Literal["common", "frequent"], tokens: int, seed: int) -> Iterator[Case]:
    """Cases of six lists: of numbered words, three of them common; or of words with frequencies that fall by a law."""
    entries = max(20, tokens // _LISTS // _TOKENS_PER_ENTRY[form])
    for number in count():
        r = random.Random(f"{form}:{seed}:{number}")
        words = _words(r, _LISTS * entries)
        documents, asked = [], []
        for at, name in enumerate(_NAMES):
            own = words[at * entries : (at + 1) * entries]
            listed = _common(own, entries, r) if form == "common" else _frequent(own, entries, r)
            documents.append(Document(_written(form, name, listed), f"list-{name}"))
            asked.append((_QUESTION[form].format(name), ", ".join(_most(listed)), form))
        examples = tuple((text, gold) for text, gold, _ in asked[:_EXAMPLES])
        yield Case.of(f"{seed}/{number}", documents, Task(_TASK[form], examples), asked[_EXAMPLES:])


def _common(words: list[str], entries: int, r: random.Random) -> list[str]:
    listed = words[:_TOP] * _COMMON + words[_TOP : _TOP + (entries - _TOP * _COMMON) // _RARE]
    r.shuffle(listed)
    return listed


def _frequent(words: list[str], entries: int, r: random.Random) -> list[str]:
    """Word n is there about 1 / n² of the time; the three first are told apart by at least one occurrence."""
    shares = [1 / (n + 1) ** 2 for n in range(len(words))]
    listed = r.choices(words, shares, k=entries)
    while len({listed.count(word) for word in words[: _TOP + 1]}) <= _TOP or set(_most(listed)) != set(words[:_TOP]):
        listed = r.choices(words, shares, k=entries)
    return listed


def _most(listed: list[str]) -> list[str]:
    """The three words that are there most often, in order of appearance."""
    best = sorted(dict.fromkeys(listed), key=listed.count, reverse=True)[:_TOP]
    return sorted(best, key=listed.index)


def _written(form: str, name: str, listed: list[str]) -> str:
    if form == "common":
        return f"List {name}: " + " ".join(f"{n}. {word}" for n, word in enumerate(listed, 1))
    return f"Coded text {name}: " + " ".join(listed)


def _words(r: random.Random, amount: int) -> list[str]:
    """Different made-up words of two or three syllables."""
    found: dict[str, None] = {}
    while len(found) < amount:
        syllables = ("".join(map(r.choice, ("bdfgklmnprstvz", "aeiou"))) for _ in range(r.choice((2, 3))))
        found["".join(syllables)] = None
    return list(found)
