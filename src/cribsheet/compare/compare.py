"""Ways to answer questions about a corpus, side by side at equal budgets of tokens.

Every method may put the same number of tokens before the question: all of them the sheet's, all of them retrieved
passages', or half and half. `cribsheet compare` runs it from the command line; the same from Python:

    corpus = Corpus("staff", documents, Task("Who lives where?"), read_questions("questions.jsonl"))
    records = list(compare(LoadedModel.get("pocket"), corpus, rates=[8, 16]))
    rows = summary(records)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cribsheet.asking.answer import Answer
from cribsheet.asking.settings import SURE
from cribsheet.compare.metrics import clustered_interval
from cribsheet.compare.questions import Asked
from cribsheet.corpus.documents import Document
from cribsheet.corpus.task import Task
from cribsheet.engine.pool import LoadedModel
from cribsheet.errors import BudgetError, RequestError
from cribsheet.llm import CompressedKnowledgeLLM
from cribsheet.prompt.chunks import TokenizedCorpus
from cribsheet.prompt.template import ChatLayout
from cribsheet.vocabulary import GuideKept, Mode

logger = logging.getLogger(__name__)

FULL, CLOSED = "full context", "closed book"
RATES = (8.0, 16.0, 32.0)
ALL = "all"  # the type that stands for every type


@dataclass(frozen=True, slots=True)
class Method:
    """A way to answer: which scorer makes the sheet, with examples or without, and how passages join in.

    Without a scorer it is the library's default, or that of `Settings`.
    """

    name: str
    scorer: str | None = None
    examples: bool = False
    mode: Mode = "sheet"


METHODS = (
    Method(FULL, "recent", examples=True),
    Method(CLOSED, "recent", mode="retrieval"),
    Method("start+recent", "recent"),
    Method("task-agnostic", "reconstruction"),
    Method("published zero-shot", "task"),
    Method("published few-shot", "task", examples=True),
    Method("zero-shot"),
    Method("few-shot", examples=True),
    Method("retrieval", "recent", examples=True, mode="retrieval"),
    Method("hybrid", examples=True, mode="hybrid"),
    Method("auto", examples=True, mode="auto"),
    Method("recall", examples=True, mode="recall"),
)
NAMES = tuple(method.name for method in METHODS)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents with a task and questions about them. `task` has the examples of few-shot methods."""

    name: str
    documents: Sequence[Document]
    task: Task
    questions: Sequence[Asked]


@dataclass(frozen=True, slots=True)
class Settings:
    """What all methods of a comparison share. `scorer` replaces the library's default in methods that use it."""

    guide: GuideKept = "auto"
    scorer: str | None = None
    top_k: int | None = None
    sure: float = SURE
    max_tokens: int = 64
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """One answer: where, how, how good, and what it took.

    `tokens` are those before the question: kept ones per layer and head, and those of passages; `nbytes` are the keys
    and values of these, `mode` is what `auto` chose.
    """

    corpus: str
    method: str
    rate: float
    budget: int
    number: int
    type: str
    cluster: str
    answer: str
    em: float
    f1: float
    set_f1: float
    tokens: int
    nbytes: int
    seconds: float
    mode: str

    @property
    def key(self) -> tuple[str, str, float, int]:
        """What tells it apart in one comparison."""
        return self.corpus, self.method, self.rate, self.number


def compare(
    model: LoadedModel,
    corpus: Corpus,
    *,
    methods: Sequence[str] = NAMES,
    rates: Sequence[float] = RATES,
    settings: Settings | None = None,
    done: Iterable[Record] = (),
    progress: Callable[[str, float], None] | None = None,
) -> Iterator[Record]:
    """Answers to every question by each method at each rate, those of `done` left out; greedy, so always the same.

    Full context and closed book are asked once, at rate 1. A method whose budget is too small for it, or larger than
    the window, is left out with a note. `progress(method, rate)` is called before each.
    """
    settings = settings or Settings()
    known = {record.key for record in done}
    sheets = _Sheets(model, corpus, settings)
    for name, rate in _plan(methods, rates):
        method = METHODS[NAMES.index(name)]
        if method.mode != "retrieval" and method.examples and name != FULL and not corpus.task.few_shot:
            logger.info("%s is left out: the task has no examples", name)
            continue
        try:
            if progress:
                progress(name, rate)
            yield from _answers(sheets, method, rate, known)
        except (BudgetError, RequestError) as error:
            logger.warning("%s at %gx is left out: %s", name, rate, error)


def _plan(methods: Sequence[str], rates: Sequence[float]) -> Iterator[tuple[str, float]]:
    """What to run; rate by rate and in an order that shares sheets."""
    for name in methods:
        if name not in NAMES:
            raise RequestError(f"There is no method {name!r}; use {', '.join(NAMES)}.")
    for name in (FULL, CLOSED):
        if name in methods:
            yield name, 1.0
    for rate in dict.fromkeys(rates):
        yield from ((name, rate) for name in NAMES if name in methods and name not in (FULL, CLOSED))


class _Sheets:
    """The sheets of one corpus; the last one is kept, as methods share it."""

    def __init__(self, model: LoadedModel, corpus: Corpus, settings: Settings) -> None:
        self.model, self.corpus, self.settings = model, corpus, settings
        self._last: tuple[tuple[Any, ...], CompressedKnowledgeLLM] | None = None
        layout = ChatLayout(model.backbone.tokenizer)
        whole = TokenizedCorpus.build(corpus.documents, layout.preamble(corpus.task.instruction), layout.encoder)
        self.corpus_tokens, self.preamble_tokens = len(whole), whole.preamble_tokens

    def get(self, method: Method, budget: int) -> CompressedKnowledgeLLM:
        """The sheet of a method with so many tokens; of everything, with the guide on top as sheets have it."""
        scorer = method.scorer or self.settings.scorer
        archive = method.mode == "recall"
        key = scorer, method.examples, budget, archive
        if self._last is None or self._last[0] != key:
            if self._last is not None:
                self._last[1].close()
            self._last = None
            task = self.corpus.task
            made = CompressedKnowledgeLLM.build(
                list(self.corpus.documents),
                task if method.examples else Task(task.description, instruction=task.instruction),
                model=self.model,
                scorer=scorer,
                guide=self.settings.guide,
                seed=self.settings.seed,
                rate=1 if budget >= self.corpus_tokens else None,
                budget=None if budget >= self.corpus_tokens else budget,
                archive=archive,
            )
            self._last = key, made
        return self._last[1]


def _answers(sheets: _Sheets, method: Method, rate: float, known: set[Any]) -> Iterator[Record]:
    corpus, settings = sheets.corpus, sheets.settings
    left = [n for n in range(len(corpus.questions)) if (corpus.name, method.name, rate, n) not in known]
    if not left:
        return
    budget, passages = int(sheets.corpus_tokens / rate), 0
    asking: dict[str, Any] = {"max_tokens": settings.max_tokens}
    if method.name == CLOSED:
        budget = sheets.preamble_tokens
        asking |= {"mode": "retrieval", "retriever": _nothing}
    elif method.mode != "sheet":
        passages = 1 if method.mode == "retrieval" else budget // 2
        asking |= {"mode": method.mode, "passage_tokens": passages, "sure": settings.sure, "top_k": settings.top_k}
    if budget <= passages:
        raise BudgetError(f"{sheets.corpus_tokens} tokens of corpus are {budget} at this rate; lower it.")
    kb = sheets.get(method, budget - passages if method.name != CLOSED else min(2 * budget, sheets.corpus_tokens))
    for number in left:
        question = corpus.questions[number]
        answer = kb.ask(question.text, **asking)
        em, f1, items = question.judge(answer.text)
        tokens, nbytes = size_before(kb, question.text, answer)
        yield Record(
            corpus.name, method.name, rate, budget, number, question.type, _cluster(corpus, number), answer.text,
            em, f1, items, tokens, nbytes, round(answer.seconds, 4), answer.mode,
        )  # fmt: skip


def size_before(kb: CompressedKnowledgeLLM, question: str, answer: Answer) -> tuple[int, int]:
    """Tokens before a question that was answered, per layer and head, and the bytes of their keys and values."""
    tokens = answer.usage.prompt_tokens - kb.count_tokens(question)
    tokens += kb.sheet.tokens - kb.sheet.length if answer.mode != "retrieval" else 0  # prompts count positions
    return tokens, round(tokens * kb.sheet.nbytes / kb.sheet.tokens)


def _nothing(query: str) -> list[str]:
    return []


def _cluster(corpus: Corpus, number: int) -> str:
    """Questions about the same documents stand or fall together; one about none stands alone."""
    documents = corpus.questions[number].documents
    return f"{corpus.name}/{documents[0] if documents else f'question {number}'}"


def summary(records: Sequence[Record], *, seed: int = 0) -> list[dict[str, Any]]:
    """One row for each method, rate and type of question, and for all types together.

    `ci_low` and `ci_high` are the 95 % interval of `em`, drawn by document; `tokens`, `bytes` and `seconds` are means;
    `retrieved` is the share of answers that read passages.
    """
    types = sorted({record.type for record in records})
    groups: dict[tuple[str, float, str], list[Record]] = {}
    for record in records:
        for kind in (record.type, ALL) if types != [ALL] else (ALL,):
            groups.setdefault((record.method, record.rate, kind), []).append(record)
    order = {name: number for number, name in enumerate(NAMES)}
    rows = []
    for (method, rate, kind), group in sorted(groups.items(), key=lambda each: (order[each[0][0]], *each[0][1:])):
        low, high = clustered_interval([each.em for each in group], [each.cluster for each in group], seed=seed)
        rows.append(
            {
                "method": method,
                "rate": rate,
                "budget": round(_mean(each.budget for each in group)),
                "type": kind,
                "n": len(group),
                "em": round(_mean(each.em for each in group), 4),
                "f1": round(_mean(each.f1 for each in group), 4),
                "set_f1": round(_mean(each.set_f1 for each in group), 4),
                "ci_low": round(low, 4),
                "ci_high": round(high, 4),
                "tokens": round(_mean(each.tokens for each in group), 1),
                "bytes": round(_mean(each.nbytes for each in group)),
                "seconds": round(_mean(each.seconds for each in group), 4),
                "retrieved": round(_mean(each.mode != "sheet" for each in group), 4),
            }
        )
    return rows


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
