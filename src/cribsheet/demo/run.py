"""What `cribsheet demo` does, without showing it: the same questions by a sheet, by passages, and with everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cribsheet.asking.answer import Answer, Source
from cribsheet.corpus.documents import read_documents
from cribsheet.demo import DemoQuestion, Script
from cribsheet.engine.pool import LoadedModel
from cribsheet.errors import BudgetError
from cribsheet.llm import CompressedKnowledgeLLM
from cribsheet.model.backbone import Backbone

PASSAGES = 5  # of BM25, of at most 400 characters each: what chains commonly take
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question with the sheet's answer, that from passages, and the full context's, if there is one."""

    question: DemoQuestion
    answer: Answer
    passages: Answer
    full: Answer | None

    @property
    def sources(self) -> tuple[Source, ...]:
        """Where the sheet's answer looked."""
        return self.answer.sources

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        told: dict[str, Any] = {"question": self.question.text, "expected": list(self.question.expected)}
        told["places"] = self.question.places
        for prefix, answer in (("", self.answer), ("passages_", self.passages), ("full_context_", self.full)):
            told[f"{prefix}answer"] = answer.text if answer else None
            told[f"{prefix}right"] = self.question.is_answered_by(answer.text) if answer else None
            told[f"{prefix}seconds"] = round(answer.seconds, 4) if answer else None
        return told | {"sources": [asdict(source) for source in self.sources]}


class Demo:
    """A sheet, and a cache that keeps every token to compare with, over the same documents.

    Passages are the best `PASSAGES` that BM25 finds, and are read for each question.
    """

    def __init__(
        self, script: Script, *, model: str | Path | Backbone = "pocket", progress: Progress | None = None
    ) -> None:
        """Load the model and read everything twice, once to condense and once to keep all of it.

        Without room for the whole corpus in the model's window there is nothing to compare with.
        """
        self.script = script
        documents = read_documents(list(script.files))
        loaded = LoadedModel.get(model)
        self.kb = CompressedKnowledgeLLM.build(
            documents, script.task, model=loaded, rate=script.rate, progress=progress
        )
        self.full: CompressedKnowledgeLLM | None = None
        self.no_full_reason = ""
        try:
            self.full = CompressedKnowledgeLLM.build(documents, script.task, model=loaded, rate=1, progress=progress)
        except BudgetError as error:
            self.no_full_reason = str(error)

    def warm_up(self) -> None:
        """Ask each way an example of the task, so that no way's first question pays for what is made once."""
        question, answer = self.script.task.examples[0]
        self.ask(DemoQuestion(question, (answer,)))

    def ask(self, question: DemoQuestion) -> Exchange:
        """Ask the sheet, passages and the full context."""
        most = self.script.max_tokens
        answer = self.kb.ask(question.text, max_tokens=most)
        passages = self.kb.ask(question.text, max_tokens=most, mode="retrieval", top_k=PASSAGES)
        full = self.full.ask(question.text, max_tokens=most) if self.full else None
        return Exchange(question, answer, passages, full)

    def figures(self, exchanges: Sequence[Exchange]) -> dict[str, Any]:
        """What a person compares: right answers, seconds and sizes of each way.

        The full context twice: kept in memory as it was read, or read again for each question, which takes as long as
        it took once.
        """
        sheet, made = self.kb.sheet, self.kb.sheet.manifest
        each = sheet.nbytes / sheet.tokens
        questions = [exchange.question for exchange in exchanges]
        told = [x.passages.usage.prompt_tokens - self.kb.count_tokens(x.question.text) for x in exchanges]
        kept = {
            **_asked(questions, [x.full for x in exchanges if x.full]),
            "tokens": made.corpus_tokens,
            "bytes": int(each * made.corpus_tokens),
            "build_seconds": self.full.sheet.manifest.build["seconds"] if self.full else None,
        }
        return {
            "model": self.kb.backbone.name,
            "device": str(self.kb.backbone.device),
            "threads": made.build["threads"],
            "rate": round(sheet.rate, 2),
            "sheet": {
                **_asked(questions, [x.answer for x in exchanges]),
                "tokens": sheet.tokens,
                "bytes": sheet.nbytes,
                "build_seconds": made.build["seconds"],
            },
            "passages": {
                **_asked(questions, [x.passages for x in exchanges]),
                "tokens": round(sum(told) / len(told)),
                "bytes": 0,
                "build_seconds": 0.0,
            },
            "full_context": kept,
            "full_context_read_again": kept | _read_again(kept),
        }


def _asked(questions: Sequence[DemoQuestion], answers: Sequence[Answer]) -> dict[str, Any]:
    """How many answers were right, those of questions about two places apart, and how long they took."""
    if not answers:
        return dict.fromkeys(("right", "right_about_two_places", "seconds_per_answer"))
    pairs = list(zip(questions, answers, strict=True))
    right = [question for question, answer in pairs if question.is_answered_by(answer.text)]
    return {
        "right": len(right),
        "right_about_two_places": sum(question.places > 1 for question in right),
        "seconds_per_answer": round(sum(answer.seconds for answer in answers) / len(answers), 4),
    }


def _read_again(kept: dict[str, Any]) -> dict[str, Any]:
    seconds, read = kept["seconds_per_answer"], kept["build_seconds"]
    total = None if seconds is None else round(seconds + read, 4)
    return {"seconds_per_answer": total, "bytes": 0, "build_seconds": 0.0}
