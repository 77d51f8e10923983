"""Exercises: what a sheet is to write, and what there is of them about some documents."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cribsheet.model.fingerprint import SAID_SINCE
from cribsheet.sheet.sheet import Sheet

_DECIDES = {"fingerprint", "system", "template_options", "head", "task", "guide", "form", "corpus_digest"}


@dataclass(frozen=True, slots=True)
class Exercise:
    """A user's turn and what to write after it, in tokens.

    `ids` (T,) are both, `asked` those of the turn; `tops` (n, k) and `weights` (n, k) are the teacher's best
    continuations and their probabilities for each of the n tokens to write.
    """

    ids: Tensor
    asked: int
    tops: Tensor
    weights: Tensor
    question: str = ""
    answer: str = ""


@dataclass(frozen=True, slots=True)
class Practice:
    """Questions with answers, and texts to go on with; `tried` and `left_out` say what became of the questions.

    `asides` have nothing to do with the documents: their answers are to stay as they are without them.

    `of` tells documents, guide and model (`practice_of`); whatever a sheet of them keeps, it may practise on this.
    `seconds` are those that it took.
    """

    questions: Sequence[Exercise]
    texts: Sequence[Exercise]
    tried: int
    left_out: Counter[str]
    of: str
    seconds: float
    asides: Sequence[Exercise] = ()

    @property
    def digest(self) -> str:
        """What tells two of them apart."""
        digest = hashlib.sha256(self.of.encode())
        for row in (*self.questions, *self.texts, *self.asides):
            digest.update(row.ids.numpy().tobytes() + row.weights.numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Draft:
    """A practice that is half made, to go on from to the same end.

    `taken` are the words of questions that are not to be asked again, `gave` how much each finished round gave, by
    question tried; `counts` are questions found and tried when the round began, of which so many `stretches` are done.
    `chance` is the state of the random numbers; the rest is as in `Practice`.
    """

    questions: Sequence[Exercise]
    tried: int
    left_out: Counter[str]
    seconds: float
    taken: Sequence[str]
    gave: Sequence[float]
    counts: tuple[int, int]
    stretches: int
    chance: Any


def practice_of(sheet: Sheet, documents: Collection[str] = ()) -> str:
    """What decides whether a practice is one for a sheet: documents, task, guide, template and model.

    `documents` are the ids of those that alone are practised on, if not all are.
    """
    where = {"fingerprint": {"model", "revision"} | SAID_SINCE}  # where the model was loaded from says nothing
    told = sheet.manifest.model_dump_json(include=_DECIDES, exclude=where)
    told += "".join(f"\n{each}" for each in sorted(documents))
    return hashlib.sha256(told.encode()).hexdigest()


def padded(rows: Sequence[Tensor]) -> Tensor:
    """Token ids (B, T) of rows of different lengths, with anything behind the shorter ones, which nobody looks at."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
