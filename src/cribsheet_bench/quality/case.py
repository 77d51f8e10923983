"""One corpus with a task and questions: what the quality bench measures on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from cribsheet.compare.questions import Asked
from cribsheet.corpus.documents import Document
from cribsheet.corpus.task import Task

MOST_QUESTIONS = 8
_MARGIN = 8  # tokens that an answer may be longer than the longest gold
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Case:
    """One corpus with a task and questions about it; `kinds` are types of question, `answers` the gold."""

    name: str
    documents: list[Document]
    task: Task
    questions: list[str]
    answers: list[str]
    kinds: list[str]
    family: str = "worlds"

    @classmethod
    def of(cls, name: str, documents: list[Document], task: Task, asked: Sequence[tuple[str, str, str]]) -> Self:
        """A case of the first questions, each with answer and kind."""
        texts, golds, kinds = (list(column) for column in zip(*asked[:MOST_QUESTIONS], strict=True))
        return cls(name, documents, task, texts, golds, kinds)

    def most_tokens(self, tokenizer: Any) -> int:
        """So long may an answer be: what is longer than every gold by a few tokens is wrong, however it goes on."""
        return _MARGIN + max(len(tokenizer(gold, add_special_tokens=False)["input_ids"]) for gold in self.answers)


def divided(
    questions: Sequence[T], examples: int, entity: Callable[[T], str], said: Callable[[T], str]
) -> tuple[list[T], list[T]]:
    """The first questions as examples, and those of the rest whose entity no example is about or names."""
    shown = list(questions[:examples])
    named, text = {entity(q) for q in shown}, " ".join(map(said, shown))
    return shown, [q for q in questions[examples:] if entity(q) not in named and entity(q) not in text]


@dataclass(frozen=True, slots=True)
class Row:
    """One answer: where, how, and how good.

    `tokens` are kept per layer and head, on average and with what is kept of the guide; `nbytes` are their keys and
    values, `held` those that the process really holds, which is more where a cache only hides what it drops.
    """

    method: str
    rate: float
    tokens: float
    nbytes: int
    held: int
    family: str
    case: str
    kind: str
    exact: float
    set_f1: float
    retained: bool


def judged(
    case: Case,
    method: str,
    rate: float,
    answers: Sequence[str],
    size: tuple[float, int, int],
    right: Sequence[bool] | None = None,
) -> list[Row]:
    """A row for each answer; `size` is tokens, bytes and bytes held, `right` which ones full context answers."""
    rows = []
    for number, (question, gold, answer) in enumerate(zip(case.questions, case.answers, answers, strict=True)):
        exact, _, items = Asked(question, (gold,)).judge(answer)
        retained = bool(exact) if right is None else right[number]
        kind = case.kinds[number]
        rows.append(Row(method, rate, *size, case.family, case.name, kind, exact, items, retained))
    return rows
