"""What the answers to come look like, told from a task's examples without a word of theirs.

A model that has lost the place of an answer gives an example's instead, if it has read one. How long answers are and of
what kind can be said without giving any away.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_YEAR = re.compile(r"(?:1\d|20)\d\d")
_SENTENCE_ENDS = (".", "!", "?", "。", "！", "？")
_SHORT = 4  # words of a name, a number or a date at most
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]")  # scripts that do not set words apart
_SAID_TWICE = 2  # so often does each answer of a closed set come, on average


def form_of(answers: Sequence[str]) -> str:
    """A sentence on how to answer, in the form of these answers, of which there is at least one.

    Answers that come again and again are no examples but all that there are, labels: these are named.
    """
    labels = list(dict.fromkeys(answers))
    if _SAID_TWICE * len(labels) <= len(answers):
        return f"Answer with {' or '.join(labels)}, nothing else."
    if all(_is_sentence(answer) for answer in answers):
        return f"Answer with {_sizes(answers)}, in sentences."
    kinds = list(dict.fromkeys(kind for answer in answers if (kind := _kind(answer))))
    such = f", such as {', '.join(kinds)}" if kinds else ""
    return f"Answer with {_sizes(answers)}{such}; nothing else."


def _sizes(answers: Sequence[str]) -> str:
    """How long the answers are, in words, or in characters where words are not set apart."""
    if any(map(_UNSPACED.search, answers)):
        return _span([len(answer) for answer in answers], "character")
    return _span([len(answer.split()) for answer in answers], "word")


def _span(sizes: Sequence[int], unit: str) -> str:
    """A span, and a little more where all are of one size: the next answer need not be."""
    least, most = min(sizes), max(sizes)
    return f"{least} to {max(most, least + 1)} {unit}s"


def _is_sentence(answer: str) -> bool:
    return answer.endswith(_SENTENCE_ENDS) and len(answer.split()) > _SHORT


def _kind(answer: str) -> str:
    """What an answer is, or nothing if that cannot be told."""
    bare = answer.rstrip(".")
    if bare.lower() in ("yes", "no"):
        return "yes or no"
    if len(bare) == 1 and bare.isalpha():
        return "a letter"
    if _YEAR.fullmatch(bare):
        return "a year"
    if len(bare.split()) > _SHORT:
        return ""
    if any(character.isdigit() for character in bare):
        return "a number"
    return "a name" if bare[:1].isupper() else ""
