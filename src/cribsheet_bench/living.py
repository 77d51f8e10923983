"""What it costs to change one of many documents, and what independent sheets lose against sequential ones.

    python -m cribsheet_bench.living --documents 100 --worlds 8 --json living.json

Cost is processor time of building a sheet of so many documents, and of each change to it. Loss is measured on the
worlds of the quality bench: the share of the questions that full context answers that each mode still answers, at equal
budgets. A changed sheet is compared bit by bit with one that was built so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cribsheet.build import build_sheet
from cribsheet.compare.journal import write_rows
from cribsheet.compare.metrics import clustered_interval, exact_match, set_f1
from cribsheet.corpus.documents import Document
from cribsheet.corpus.task import Task
from cribsheet.engine.pool import LoadedModel
from cribsheet.errors import BudgetError
from cribsheet.living import edits
from cribsheet.llm import CompressedKnowledgeLLM
from cribsheet.model.backbone import Backbone
from cribsheet.sheet.sheet import Sheet
from cribsheet.vocabulary import Allocation, SheetKind
from cribsheet_bench.command import begin, options
from cribsheet_bench.quality.run import Case, held_out_cases, setup

logger = logging.getLogger(__name__)

FORMS: tuple[tuple[SheetKind, Allocation], ...] = (
    ("sequential", "adaptive"),
    ("independent", "adaptive"),
    ("independent", "uniform"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One answer by one form of sheet."""

    mode: SheetKind
    allocation: Allocation
    rate: float
    budget: int
    case: str
    exact: float
    retained: bool


def many_documents(count: int, seed: int) -> list[Document]:
    """So many documents of one held-out world."""
    from cribsheet_pocket_training.worlds import make_world

    for number in range(100):
        world = make_world(f"living/{seed}/{number}", tokens=60 * count, kind="person", questions=0)
        if len(world.documents) >= count:
            return [Document(text=each.text, id=each.id) for each in world.documents[:count]]
    raise ValueError(f"no world of 100 has {count} documents; ask for fewer")


def measure_cost(backbone: Backbone, documents: Sequence[Document], scorer: str) -> dict[str, Any]:
    """Processor seconds of a full build without the last document, and of each change, as shares of it."""
    *most, last = documents
    task, options = Task("Answer questions about people."), {"scorer": scorer, "mode": "independent"}
    place = len(most) // 2
    new = Document(text=last.text, id=most[place].id)

    def build(chosen: Sequence[Document]) -> Sheet:
        return build_sheet(backbone, chosen, task, **options)  # type: ignore[arg-type]

    seconds, sheet = _timed(lambda: build(most))
    changes = {
        "replace": lambda: edits.replace(backbone, sheet, new.id, new),
        "remove": lambda: edits.remove(backbone, sheet, new.id),
        "extend": lambda: edits.extend(backbone, sheet, [last]),
    }
    shares = {}
    for name, change in changes.items():
        took, changed = _timed(change)
        shares[name] = round(took / seconds, 4)
        logger.info("%s: %.2f s of %.1f s", name, took, seconds)
        if name == "remove":
            never = build([document for document in most if document.id != new.id])
            same = never.manifest.digest == changed.manifest.digest and all(
                torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
                for a, b in zip(never.layers, changed.layers, strict=True)
            )
    tokens = sheet.manifest.corpus_tokens
    return {"scorer": scorer, "documents": len(most), "corpus_tokens": tokens, "build_seconds": round(seconds, 2),
            "shares": shares, "removed_equals_never_had": same}  # fmt: skip


def measure_loss(model: LoadedModel, cases: Sequence[Case], rates: Sequence[float]) -> Iterator[Row]:
    """Answers of every form of sheet at equal budgets, the guide dropped."""
    for case in cases:
        with CompressedKnowledgeLLM.build(case.documents, case.task, model=model, rate=1, guide="dropped") as full:
            right = [bool(score) for score in _judged(full, case)]
            corpus = full.sheet.manifest.corpus_tokens
        for rate in rates:
            for mode, allocation in FORMS:
                try:
                    kb = CompressedKnowledgeLLM.build(
                        case.documents, case.task, model=model, budget=int(corpus / rate), guide="dropped", mode=mode,
                        allocation=allocation,
                    )  # fmt: skip
                except BudgetError as error:  # uniform sheets keep four tokens of every document, or cannot be
                    logger.info("%s, %s, %g: %s", mode, allocation, rate, error)
                    continue
                with kb:
                    for score, kept in zip(_judged(kb, case), right, strict=True):
                        yield Row(mode, allocation, rate, kb.sheet.tokens, case.name, score, kept)
        logger.info("world %s: %d of %d right with full context", case.name, sum(right), len(right))


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One line for each form and rate: the share of answerable questions retained, with its 95 % interval."""
    groups: dict[tuple[SheetKind, Allocation, float], list[Row]] = {}
    for row in rows:
        if row.retained:
            groups.setdefault((row.mode, row.allocation, row.rate), []).append(row)
    lines = []
    for (mode, allocation, rate), group in groups.items():
        exact = [row.exact for row in group]
        low, high = clustered_interval(exact, [row.case for row in group])
        budget = sum(row.budget for row in group) / len(group)
        lines.append({"mode": mode, "allocation": allocation, "rate": rate, "n": len(group), "budget": round(budget, 1),
                      "retained": sum(exact) / len(exact), "ci_low": low, "ci_high": high})  # fmt: skip
    return lines


def page(result: dict[str, Any]) -> str:
    """The page of the docs that shows a result."""
    costs = [
        f"| {each['scorer']} | {each['documents']} | {each['corpus_tokens']:,} | {each['build_seconds']:.1f} s | "
        + " | ".join(f"{each['shares'][name]:.1%}" for name in ("replace", "remove", "extend"))
        + f" | {'yes' if each['removed_equals_never_had'] else 'NO'} |"
        for each in result["costs"]
    ]
    losses = [
        f"| {line['mode']} | {line['allocation']} | {line['rate']:g}× | {line['budget']:.0f} | {line['retained']:.2f} "
        f"[{line['ci_low']:.2f}, {line['ci_high']:.2f}] |"
        for line in result["lines"]
    ]
    made = ", ".join(f"{key} {value}" for key, value in result["setup"].items())
    return _PAGE.format(costs="\n".join(costs), losses="\n".join(losses), setup=made, **result["setup"],
                        n=result["lines"][0]["n"] if result["lines"] else 0)  # fmt: skip


_PAGE = """# Living corpora

What it costs to change one document of an independent sheet, and what independent sheets lose.

```sh
make living
```

## Cost

Processor time of a change as a share of the full build. The last column compares a sheet from which a document was
removed with one that was built without it: every key, every value, and the manifest's digest.

| scorer | documents | tokens | full build | replace one | remove one | add one | the same bits |
|---|---|---|---|---|---|---|---|
{costs}

## Loss

Of {n} questions that full context answers ({worlds} held-out worlds of about {tokens} tokens), each form of sheet still
answers (95 % interval, drawn by world). Budgets are equal and the guide is dropped; scorers are the defaults. A uniform
sheet keeps at least four tokens of each document, so at high rates of short documents there is none.

| mode | allocation | rate | tokens | answers kept |
|---|---|---|---|---|
{losses}

Setup: {setup}.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the bench from the command line."""
    parser = options(__doc__, written="write the result there, and a page of the docs beside it")
    parser.add_argument("--documents", type=int, default=101, help="how many for the cost; 0 leaves it out")
    parser.add_argument("--scorers", nargs="*", default=["recall", "task"])
    parser.add_argument("--worlds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--rates", type=float, nargs="*", default=[4.0, 8.0, 16.0])
    arguments = parser.parse_args(argv)
    model = begin(arguments)
    documents = many_documents(arguments.documents, arguments.seed) if arguments.documents else []
    costs = [measure_cost(model.backbone, documents, scorer) for scorer in arguments.scorers if documents]
    rows = list(
        measure_loss(model, held_out_cases(arguments.worlds, arguments.tokens, arguments.seed), arguments.rates)
    )
    lines = summary(rows)
    result = {"setup": setup(model, arguments), "costs": costs, "lines": lines, "rows": rows}
    logger.info("%s", page(result))
    if arguments.json:
        write_rows(arguments.json, result)
        arguments.json.with_suffix(".md").write_text(page(result), encoding="utf-8")


def _timed(work: Callable[[], Sheet]) -> tuple[float, Sheet]:
    began = time.process_time()
    made = work()
    return time.process_time() - began, made


def _judged(kb: CompressedKnowledgeLLM, case: Case) -> list[float]:
    scores = []
    for question, gold in zip(case.questions, case.answers, strict=True):
        text = kb.ask(question, max_tokens=64).text
        scores.append(exact_match(text, [gold]) if "," not in gold else float(set_f1(text, [gold]) == 1))
    return scores


if __name__ == "__main__":
    main()
