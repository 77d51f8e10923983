"""The demo: real documents that ship with the package, a task, and questions with known answers (`demo.toml`)."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from cribsheet.corpus.task import Task

FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class DemoQuestion:
    """A question and what a right answer contains: any of `expected`, whatever the case."""

    text: str
    expected: tuple[str, ...]

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


def read_script(*, fast: bool = False) -> Script:
    """The script of `demo.toml`; `fast` takes only what is marked so there."""
    data = tomllib.loads((FOLDER / "demo.toml").read_text(encoding="utf-8"))
    chosen = {name: [row for row in data[name] if row.get("fast") or not fast] for name in ("documents", "questions")}
    return Script(
        files=tuple(FOLDER / "documents" / row["file"] for row in chosen["documents"]),
        task=Task.from_dict(data["task_fast" if fast else "task"]),
        rate=data["rate"],
        max_tokens=data["max_tokens"],
        questions=tuple(DemoQuestion(row["question"], tuple(row["expected"])) for row in chosen["questions"]),
    )
