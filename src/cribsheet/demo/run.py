"""What `cribsheet demo` does, without showing it: build the sheet and a whole cache, ask both, measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cribsheet.asking.answer import Answer, Source
from cribsheet.corpus.documents import read_documents
from cribsheet.demo import DemoQuestion, Script
from cribsheet.errors import BudgetError
from cribsheet.llm import CompressedKnowledgeLLM
from cribsheet.model.backbone import Backbone
from cribsheet.sheet.sheet import Sheet

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question with the sheet's answer, where it looked, and the full context's answer, if there is one."""

    question: DemoQuestion
    answer: Answer
    sources: list[Source]
    full: Answer | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "question": self.question.text,
            "expected": list(self.question.expected),
            "answer": self.answer.text,
            "right": self.question.is_answered_by(self.answer.text),
            "seconds": round(self.answer.seconds, 4),
            "sources": [asdict(source) for source in self.sources],
            "full_context_answer": self.full.text if self.full else None,
            "full_context_right": self.question.is_answered_by(self.full.text) if self.full else None,
            "full_context_seconds": round(self.full.seconds, 4) if self.full else None,
        }


class Demo:
    """A sheet, and a cache that keeps every token to compare with, over the same documents."""

    def __init__(
        self, script: Script, *, model: str | Path | Backbone = "pocket", progress: Progress | None = None
    ) -> None:
        """Load the model and read everything twice, once to condense and once to keep all of it.

        Without room for the whole corpus in the model's window there is nothing to compare with.
        """
        self.script = script
        documents = read_documents(list(script.files))
        backbone = model if isinstance(model, Backbone) else Backbone.load(model)
        self.kb = CompressedKnowledgeLLM.build(
            documents, script.task, model=backbone, rate=script.rate, progress=progress
        )
        self.full: CompressedKnowledgeLLM | None = None
        self.no_full_reason = ""
        try:
            self.full = CompressedKnowledgeLLM.build(documents, script.task, model=backbone, rate=1, progress=progress)
        except BudgetError as error:
            self.no_full_reason = str(error)

    def ask(self, question: DemoQuestion) -> Exchange:
        """Ask the sheet and the full context."""
        most = self.script.max_tokens
        answer = self.kb.ask(question.text, max_tokens=most)
        full = self.full.ask(question.text, max_tokens=most) if self.full else None
        return Exchange(question, answer, list(answer.sources), full)

    def figures(self, exchanges: list[Exchange]) -> dict[str, Any]:
        """What a person compares: sizes, times and right answers of the sheet and of the full context."""
        sheet = self.kb.sheet
        full_bytes = sheet.nbytes / sheet.tokens * sheet.manifest.corpus_tokens
        return {
            "model": self.kb.backbone.name,
            "device": str(self.kb.backbone.device),
            "threads": sheet.manifest.build["threads"],
            "rate": round(sheet.rate, 2),
            "sheet": _side(sheet, sheet.tokens, sheet.nbytes, [x.answer for x in exchanges], exchanges),
            "full_context": _side(
                self.full.sheet if self.full else None,
                sheet.manifest.corpus_tokens,
                int(full_bytes),
                [x.full for x in exchanges if x.full],
                exchanges,
            ),
        }


def _side(
    sheet: Sheet | None, tokens: int, nbytes: int, answers: list[Answer], exchanges: list[Exchange]
) -> dict[str, Any]:
    right = sum(x.question.is_answered_by(a.text) for x, a in zip(exchanges, answers, strict=False))
    return {
        "tokens": tokens,
        "bytes": nbytes,
        "build_seconds": sheet.manifest.build["seconds"] if sheet else None,
        "seconds_per_answer": round(sum(a.seconds for a in answers) / len(answers), 4) if answers else None,
        "right": right if answers else None,
        "asked": len(exchanges),
    }
