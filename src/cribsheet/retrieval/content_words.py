"""What an answer says in words: those that its question does not have, and whether a text has them."""

from __future__ import annotations

from collections.abc import Iterable

from cribsheet.retrieval.retriever import words

_STEM = 3  # letters of the shortest stem, and of the longest ending
SMALL = frozenset(
    words(
        "a an and are as at be by for from had has have he her his in is it its of on or she that the their they this "
        "to was were with"
    )
)  # words that say nothing of their own


def new_in(answer: str, question: str) -> list[str]:
    """The words of an answer that say something, and are not the question's, be it with another ending ("lives")."""
    asked = words(question)
    return [word for word in words(answer) if word not in SMALL and not any(_are_one(word, own) for own in asked)]


def told_by(texts: Iterable[str], answer: str, question: str) -> float:
    """Share of what an answer says beyond its question that stands in texts, 0 to 1; 0 if it says nothing more.

    A letter alone, as of options to choose from, stands in a text by chance, and counts as not told.
    """
    new, told = new_in(answer, question), {word for text in texts for word in words(text)}
    return sum(word in told and not _is_letter(word) for word in new) / max(1, len(new))


def _is_letter(word: str) -> bool:
    return len(word) == 1 and word.isascii() and word.isalpha()


def _are_one(first: str, second: str) -> bool:
    """Whether two words are one, but for an ending of a few letters."""
    short, long = sorted((first, second), key=len)
    return short == long or (
        len(short) >= _STEM and short.isalpha() and long.startswith(short) and len(long) - len(short) <= _STEM
    )
