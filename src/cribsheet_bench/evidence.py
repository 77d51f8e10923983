"""Do an answer's sources name the documents that hold the answer? Held-out worlds with gold documents, against BM25.

    python -m cribsheet_bench.evidence --worlds 12 --rates 1 4 8 --json evidence.json

Recall at k is the share of a question's gold documents among the first k sources; precision at k the share of gold
documents among them. "answered" counts only questions that the sheet answered right: what a sheet has not kept, no
attention can find. BM25 ranks the documents' texts by the question alone.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cribsheet.compare.journal import write_rows
from cribsheet.compare.metrics import clustered_interval, exact_match
from cribsheet.corpus.documents import Document, read_documents
from cribsheet.corpus.task import Task
from cribsheet.engine.pool import LoadedModel
from cribsheet.llm import CompressedKnowledgeLLM
from cribsheet.retrieval.retriever import bm25s_without_jax
from cribsheet.vocabulary import SheetKind
from cribsheet_bench.command import begin, options
from cribsheet_bench.quality.run import setup

logger = logging.getLogger(__name__)

DIRECT = ("direct", "fill", "needle")
_EACH = {"direct": 8, "other": 4}  # questions of a world
_SIZES = (600, 1000, 1500)  # tokens of the worlds, in turn
_DOCUMENTS = range(6, 80)  # fewer are found by chance
_DEPTHS = (1, 3)
_COSTED = 2  # corpora on which the cost of evidence is measured


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, its answer, and the ids of the documents that hold it; `kind` is "direct" or "other"."""

    question: str
    answers: tuple[str, ...]
    gold: frozenset[str]
    kind: str


@dataclass(frozen=True, slots=True)
class Case:
    """One corpus with questions."""

    name: str
    documents: list[Document]
    task: Task
    asked: list[Asked]


@dataclass(frozen=True, slots=True)
class Row:
    """The sources of one answer: by which method, the ids in order, and how good they are."""

    method: str
    case: str
    kind: str
    right: bool
    precision: dict[int, float]
    recall: dict[int, float]


def held_out_cases(count: int, seed: int) -> Iterator[Case]:
    """Worlds that the pocket model was not trained on, each under a task that covers all of its questions."""
    from cribsheet_pocket_training.worlds import make_world

    found = number = 0
    while found < count and number < 50 * count:
        world = make_world(f"evidence/{seed}/{number}", tokens=_SIZES[number % len(_SIZES)], questions=60)
        number += 1
        if len(world.documents) not in _DOCUMENTS:
            continue
        found += 1
        asked: list[Asked] = []
        for q in world.questions:
            kind = "direct" if q.kind in DIRECT else "other"
            if q.documents and sum(each.kind == kind for each in asked) < _EACH[kind]:
                asked.append(Asked(q.text, (q.answer,), frozenset(q.documents), kind))
        documents = [Document(text=each.text, id=each.id) for each in world.documents]
        yield Case(f"{world.seed} ({world.kind})", documents, Task(world.tasks[-1].description), asked)


def demo_case() -> Case:
    """The demo's documents: real text, long, with boilerplate; a question names its PEP, or is about the chapter."""
    from cribsheet.demo import read_script

    script = read_script("papers")
    documents = read_documents(list(script.files))
    asked = []
    for each in script.questions:
        named = [d.id for d in documents if _number(d.id) in each.text.rstrip("?").split()]
        gold = frozenset(named or [d.id for d in documents if not _number(d.id)])
        asked.append(Asked(each.text, each.expected, gold, "demo"))
    return Case("demo", documents, script.task, asked)


def measure(model: LoadedModel, case: Case, rate: float, mode: SheetKind) -> Iterator[Row]:
    """Ask every question of a case on a sheet of that rate and mode."""
    options = {"scorer": "recent"} if rate == 1 and mode == "sequential" else {}
    with CompressedKnowledgeLLM.build(case.documents, case.task, model=model, rate=rate, mode=mode, **options) as kb:  # type: ignore[arg-type]
        answers = [kb.ask(each.question, max_tokens=32) for each in case.asked]
    for asked, answer in zip(case.asked, answers, strict=True):
        right = bool(exact_match(answer.text, asked.answers))
        if asked.kind == "demo":
            right = any(text.casefold() in answer.text.casefold() for text in asked.answers)
        ids = [source.document_id for source in answer.sources]
        yield judged(f"{mode} {rate:g}×", case, asked, right, ids)


def cost(model: LoadedModel, case: Case, rate: float, rounds: int) -> dict[str, Any]:
    """Seconds of all of a case's questions with evidence and without, in turn, so that both see the same machine."""
    spent: dict[bool, list[float]] = {True: [], False: []}
    with CompressedKnowledgeLLM.build(case.documents, case.task, model=model, rate=rate) as kb:
        for number in range(rounds + 1):
            for wanted in (True, False) if number % 2 else (False, True):
                began = time.perf_counter()
                for each in case.asked:
                    kb.ask(each.question, max_tokens=32, evidence=wanted)
                if number:  # the first round warms up
                    spent[wanted].append(time.perf_counter() - began)
    ratios = [on / off for on, off in zip(spent[True], spent[False], strict=True)]
    return {
        "case": case.name,
        "rate": rate,
        "questions": len(case.asked),
        "rounds": rounds,
        "with": round(statistics.median(spent[True]), 4),
        "without": round(statistics.median(spent[False]), 4),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(each, 3) for each in sorted(ratios)],
    }


def by_bm25(case: Case) -> Iterator[Row]:
    """The documents that BM25 ranks first for each question."""
    bm25s = bm25s_without_jax()  # with its own way to cut words
    index = bm25s.BM25()
    index.index(bm25s.tokenize([each.text for each in case.documents], show_progress=False), show_progress=False)
    for asked in case.asked:
        (terms,) = bm25s.tokenize(asked.question, return_ids=False, show_progress=False)
        ranked = torch.from_numpy(index.get_scores(terms)).argsort(descending=True)[: max(_DEPTHS)]
        yield judged("BM25", case, asked, True, [case.documents[int(place)].id for place in ranked])


def judged(method: str, case: Case, asked: Asked, right: bool, ids: Sequence[str]) -> Row:
    """Precision and recall of the ids in order."""
    hits = {k: len(asked.gold & set(ids[:k])) for k in _DEPTHS}
    precision = {k: hits[k] / max(1, min(k, len(ids))) for k in _DEPTHS}
    recall = {k: hits[k] / len(asked.gold) for k in _DEPTHS}
    return Row(method, case.name, asked.kind, right, precision, recall)


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One line for each method and kind of question."""
    lines = []
    for method, kind in dict.fromkeys((row.method, row.kind) for row in rows):
        group = [row for row in rows if (row.method, row.kind) == (method, kind)]
        answered = [row for row in group if row.right]
        low, high = clustered_interval([row.recall[3] for row in group], [row.case for row in group])
        line: dict[str, Any] = {"method": method, "kind": kind, "n": len(group), "answered": len(answered)}
        for k in _DEPTHS:
            line |= {f"precision{k}": _mean([row.precision[k] for row in group]), f"recall{k}": _recall(group, k)}
        lines.append(line | {"ci_low": low, "ci_high": high, "recall3_answered": _recall(answered, 3)})
    return lines


def page(result: dict[str, Any]) -> str:
    """The page of the docs that shows a result."""
    rows = [
        "| {kind} | {method} | {n} | {precision1:.2f} | {recall1:.2f} | {precision3:.2f} | {recall3:.2f} "
        "[{ci_low:.2f}, {ci_high:.2f}] | {answered} | {recall3_answered:.2f} |".format(**line)
        for line in sorted(result["lines"], key=lambda line: line["kind"] == "demo")
    ]
    made = ", ".join(f"{key} {value}" for key, value in result["setup"].items())
    costs = [
        "| {case} | {rate:g}× | {questions} | {without:.2f} | {with:.2f} | {ratio:.3f} "
        "({low:.3f} to {high:.3f}) |".format(low=each["ratios"][0], high=each["ratios"][-1], **each)
        for each in result["cost"]
    ]
    return _PAGE.format(rows="\n".join(rows), costs="\n".join(costs), setup=made, **result["setup"])


_PAGE = """# Evidence

Do an answer's `sources` name the documents that hold the answer? {worlds} held-out worlds of 600 to 1,500 tokens with 6
to 80 documents each, and the demo's three PEPs; one sheet for each world, mode and rate. *direct* questions have their
answer in one place, *other* ones are joins, lists, inversions and yes/no. BM25 ranks whole texts by the question.

```sh
make evidence
```

| questions | method | n | precision@1 | recall@1 | precision@3 | recall@3 | answered right | recall@3 of these |
|---|---|---|---|---|---|---|---|---|
{rows}

What evidence costs: all questions of a corpus, answered with `evidence=True` and `False` in turn; medians of {rounds} rounds, and the least and largest ratio of a round.

| corpus | rate | questions | seconds without | seconds with | ratio |
|---|---|---|---|---|---|
{costs}

Setup: {setup}.
"""  # noqa: E501


def main(argv: Sequence[str] | None = None) -> None:
    """Run the bench from the command line."""
    parser = options(__doc__, written="write the result there, and a page of the docs beside it")
    parser.add_argument("--worlds", type=int, default=12)
    parser.add_argument("--rates", type=float, nargs="*", default=[1.0, 4.0, 8.0])
    parser.add_argument("--modes", nargs="*", default=["sequential", "independent"])
    parser.add_argument("--rounds", type=int, default=7, help="of measuring what evidence costs")
    arguments = parser.parse_args(argv)
    model = begin(arguments)
    rows: list[Row] = []
    costs: list[dict[str, Any]] = []
    for number, case in enumerate([demo_case(), *held_out_cases(arguments.worlds, arguments.seed)]):
        if number < _COSTED:
            costs += [cost(model, case, rate, arguments.rounds) for rate in arguments.rates if rate > 1]
        rows += by_bm25(case)
        for mode in arguments.modes:
            for rate in arguments.rates:
                rows += measure(model, case, rate, mode)
        logger.info("%s: %d documents", case.name, len(case.documents))
        result: dict[str, Any] = {"setup": setup(model, arguments), "lines": summary(rows), "cost": costs, "rows": rows}
        if arguments.json:
            write_rows(arguments.json, result)
            arguments.json.with_suffix(".md").write_text(page(result), encoding="utf-8")
    logger.info("%s", page(result))


def _number(document_id: str) -> str:
    """The number of "pep-0020.rst" as a question names it; empty where there is none."""
    return "".join(filter(str.isdigit, document_id)).lstrip("0")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _recall(rows: Sequence[Row], k: int) -> float:
    return _mean([row.recall[k] for row in rows])


if __name__ == "__main__":
    main()
