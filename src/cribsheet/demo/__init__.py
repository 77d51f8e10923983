"""The demo: documents that ship with the package, tasks, and questions with known answers (`demo.toml`)."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cribsheet.corpus.task import Task

FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class DemoQuestion:
    """A question and what a right answer contains: any of `expected`, whatever the case.

    What it asks stands in one place of the documents, or in several `places`, of which each leads to the next.
    """

    text: str
    expected: tuple[str, ...]
    places: int = 1

    def is_answered_by(self, answer: str) -> bool:
        """Whether `answer` contains one of the expected texts."""
        return any(text.casefold() in answer.casefold() for text in self.expected)


@dataclass(frozen=True, slots=True)
class Script:
    """What a demo does: files to condense, for which task, at which rate, and what to ask."""

    files: tuple[Path, ...]
    task: Task
    rate: float
    max_tokens: int
    questions: tuple[DemoQuestion, ...]


def read_script(name: Literal["companies", "fast", "papers"] = "companies") -> Script:
    """A script of `demo.toml`."""
    data = tomllib.loads((FOLDER / "demo.toml").read_text(encoding="utf-8"))[name]
    return Script(
        files=tuple(FOLDER / file for file in data["files"]),
        task=Task.from_dict(data["task"]),
        rate=data["rate"],
        max_tokens=data["max_tokens"],
        questions=tuple(_question(row) for row in data["questions"]),
    )


def _question(row: dict[str, Any]) -> DemoQuestion:
    return DemoQuestion(row["question"], tuple(row["expected"]), row.get("places", 1))
