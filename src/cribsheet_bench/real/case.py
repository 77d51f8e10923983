"""One corpus asked by one model in every way, at equal budgets: what the bench on real models is made of."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cribsheet.asking.answer import Answer
from cribsheet.asking.session import Session
from cribsheet.asking.settings import POINTING
from cribsheet.compare.compare import CLOSED, FULL, Corpus, size_before
from cribsheet.compare.metrics import normalise
from cribsheet.compare.questions import CHOICE, SUMMARY, Asked
from cribsheet.engine.pool import LoadedModel
from cribsheet.errors import BudgetError, CribsheetError
from cribsheet.llm import CompressedKnowledgeLLM
from cribsheet.plan.options import ENGINE_BLOCK
from cribsheet.prompt.chunks import TokenizedCorpus
from cribsheet.prompt.template import ChatLayout
from cribsheet.retrieval.dense import DenseRetriever
from cribsheet.retrieval.retriever import BM25Retriever, Passage, as_retriever
from cribsheet.sheet.sheet import Sheet
from cribsheet.study.exercises import Practice, practice_of
from cribsheet.study.study import practise, study
from cribsheet_bench.quality import peers
from cribsheet_bench.quality.run import Method
from cribsheet_bench.quality.several import Sheets
from cribsheet_bench.real.page import Row
from cribsheet_bench.real.ways import KVZIP, Way

logger = logging.getLogger(__name__)

_MOST = {CHOICE: 6, SUMMARY: 110}  # tokens of an answer, by type
_MOST_WORDS = 24


@dataclass(frozen=True, slots=True)
class Means:
    """What cases are asked with: how many questions at a time, the dense retriever's model, a python with kvpress."""

    asking: int = 16
    dense: str | None = None
    peers: Path | None = None
    seed: int = 0  # of studies


class Found:
    """Passages for each question of a corpus: searched for once, told as often as they are asked for."""

    def __init__(self, retriever: Any) -> None:
        self._search, self._found = as_retriever(retriever), dict[str, list[Passage]]()

    def __call__(self, query: str) -> list[Passage]:
        """Passages for a query, best first."""
        if query not in self._found:
            self._found[query] = self._search.fetch(query)
        return self._found[query]


class Case:
    """One corpus on one model: what all ways to answer have in common, and the sheet that was built last."""

    def __init__(self, name: str, model: LoadedModel, corpus: Corpus, means: Means) -> None:
        self.name, self.model, self.corpus, self.means = name, model, corpus, means
        self.sheets = Sheets(model.backbone, corpus.documents)
        self.layout = ChatLayout(model.backbone.tokenizer)
        self.whole = TokenizedCorpus.build(
            corpus.documents, self.layout.preamble(corpus.task.instruction), self.layout.encoder
        )
        self.fixed = self.whole.preamble_tokens + len(self.sheets.guide(corpus.task))
        self._finders: dict[str, Found] = {}
        self._practices: dict[tuple[str, float], Practice] = {}
        self._last: tuple[Any, CompressedKnowledgeLLM] | None = None

    def answers(self, way: Way, rate: float, numbers: Sequence[int]) -> list[Row]:
        """Rows of the questions of these numbers; raises `BudgetError` if a budget does not hold preamble and guide."""
        budget = int(len(self.whole) / rate)
        asking: dict[str, Any] = {}
        if way.name == FULL:
            kb = self._opened(FULL, lambda: self.sheets.whole(self.corpus.task))
        elif way.sheet is None:
            kb, passages = self._bare, 1 if way.name == CLOSED else budget - self._bare.sheet.tokens
            if passages < 1:
                raise BudgetError(f"{budget} tokens are not more than the {self.fixed} of preamble and guide.")
            asking = {"mode": way.mode, "passage_tokens": passages, "retriever": self._finder(way.retriever)}
        else:
            made, size = way.sheet, min(int(budget * way.share), len(self.whole))
            size -= size % ENGINE_BLOCK if made.for_engines else 0
            if way.mode != "sheet":
                asking = {"mode": way.mode, "passage_tokens": budget - size, "retriever": self._finder(way.retriever)}
            kb = self._opened((made, size, way.minutes), lambda: self._build(made, size, way.minutes))
        return self._ask(kb, way.name, rate, numbers, asking)

    def _build(self, made: Method, budget: int, minutes: float = 0.0) -> Sheet:
        task = self.corpus.task if made.examples else replace(self.corpus.task, examples=())
        names = ("scorer", "guide", "allocation", "correction", "dtype", "archive", "for_engines")
        how = {name: getattr(made, name) for name in names}
        sheet = self.sheets.build(task, budget=budget, **how)
        return self._studied(sheet, minutes) if minutes else sheet

    def _studied(self, sheet: Sheet, minutes: float) -> Sheet:
        """After a study of so many minutes, those of practice among them, which all sheets of the corpus share."""
        session = Session.open(self.model, sheet)
        key = practice_of(sheet), minutes
        if key not in self._practices:
            self._practices[key] = practise(session, minutes=minutes, seed=self.means.seed)
        practice = self._practices[key]
        left = max(1.0, 60 * minutes - practice.seconds)
        return study(session, minutes=left / 60, practice=practice, seed=self.means.seed)[0]

    @cached_property
    def _bare(self) -> CompressedKnowledgeLLM:
        """A sheet of preamble, guide and hardly anything else: passages alone take the place of documents."""
        sheet = self.sheets.build(self.corpus.task, budget=self.fixed + 1, scorer="recent", guide="resident")
        return CompressedKnowledgeLLM(self.model, sheet)

    def _opened(self, key: Any, build: Callable[[], Sheet]) -> CompressedKnowledgeLLM:
        """The sheet of a key: that which was used last, or a new one in its place."""
        if self._last is None or self._last[0] != key:
            self._let_go()
            self._last = key, CompressedKnowledgeLLM(self.model, build())
        return self._last[1]

    def _let_go(self) -> None:
        if self._last is not None:
            self._last[1].close()
        self._last = None

    def close(self) -> None:
        """Let go of all sheets, and of what was read for them."""
        self._let_go()
        if "_bare" in vars(self):
            self._bare.close()
            del self._bare
        self.sheets = Sheets(self.model.backbone, self.corpus.documents)

    def _finder(self, name: str) -> Callable[[str], list[Passage]] | str:
        if name == POINTING:
            return name
        if not name:
            return lambda query: []
        if name not in self._finders:
            documents = self.corpus.documents
            dense = name == "dense"
            made = DenseRetriever(documents, model=self.means.dense) if dense else BM25Retriever(documents)
            self._finders[name] = Found(made)
        return self._finders[name]

    def _ask(
        self, kb: CompressedKnowledgeLLM, method: str, rate: float, numbers: Sequence[int], asking: dict[str, Any]
    ) -> list[Row]:
        """Ask all at once: they are answered as one batch. A question that does not fit the window is left out."""

        def ask(number: int) -> Answer | CribsheetError:
            question = self.corpus.questions[number]
            try:
                return kb.ask(question.text, max_tokens=most_tokens(question), evidence=False, **asking)
            except CribsheetError as error:
                return error

        with ThreadPoolExecutor(self.means.asking) as pool:
            answers = list(pool.map(ask, numbers))
        rows = []
        for number, answer in zip(numbers, answers, strict=True):
            if isinstance(answer, CribsheetError):
                logger.warning(
                    "%s: %s at %gx leaves out question %d: %s", self.corpus.name, method, rate, number, answer
                )
                continue
            size = size_before(kb, self.corpus.questions[number].text, answer)
            rows.append(self._row(method, rate, number, answer.text, size, answer.mode))
        return rows

    def _row(self, method: str, rate: float, number: int, text: str, size: tuple[int, int], mode: str = "sheet") -> Row:
        question = self.corpus.questions[number]
        exact, score, included = (round(mark, 4) for mark in question.marks(text))
        return Row(
            self.name, self.corpus.name, method, rate, number, question.type, exact, score, included,
            self._is_leaked(question, text), *size, mode, text,
        )  # fmt: skip

    def _is_leaked(self, question: Asked, text: str) -> bool:
        """Whether an example's answer comes out instead of the question's."""
        if question.type == CHOICE:
            return False
        said, golds = normalise(text.strip().partition("\n")[0]), {normalise(gold) for gold in question.golds}
        return bool(said) and said in {normalise(answer) for _, answer in self.corpus.task.examples} - golds

    def kvzip(self, wanted: Sequence[tuple[float, list[int]]]) -> list[Row]:
        """Rows of kvpress's KVzip, in its own interpreter; the guide is read after what it keeps, within the budget.

        Raises `CribsheetError` if that interpreter ends badly.
        """
        assert self.means.peers is not None
        task, encode = self.corpus.task, self.layout.encoder.after
        guide = self.sheets.guide(task).tolist()
        numbers = sorted({number for _, left in wanted for number in left})
        asked = [self.corpus.questions[number] for number in numbers]
        texts = [self.layout.question([{"role": "user", "content": each.text}], task, True) for each in asked]
        budgets = [(rate, int(len(self.whole) / rate) - len(guide)) for rate, _ in wanted]
        told = {
            "name": self.corpus.name,
            "context": self.whole.ids.tolist(),
            "guide": guide,
            "questions": [[*guide, *encode(text).tolist()] for text in texts],
            "most": max(map(most_tokens, asked)),
            "budgets": [each for each in budgets if each[1] > self.whole.preamble_tokens],
        }
        job = {**peers.job_of(self.model), "full": False, "presses": ["KVzip"], "cases": [told]}
        rows, left = [], dict(wanted)
        for line in peers.run(self.means.peers, job):
            if "error" in line:
                logger.warning("%s: %s at %gx failed: %s", self.corpus.name, KVZIP, line["rate"], line["error"])
            elif "press" in line:
                size = round(line["tokens"]) + len(guide), round(line["bytes"] * (1 + len(guide) / line["tokens"]))
                for number, ids in zip(numbers, line["answers"], strict=True):
                    text = self.model.backbone.tokenizer.decode(ids, skip_special_tokens=True)
                    if number in left[line["rate"]]:
                        rows.append(self._row(KVZIP, line["rate"], number, text, size))
        return rows


def most_tokens(question: Asked) -> int:
    """So long may an answer be."""
    return _MOST.get(question.type, _MOST_WORDS)
