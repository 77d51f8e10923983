"""How much of what full context answers survives compression: held-out worlds, one sheet per world and method.

    python -m cribsheet.bench.quality --worlds 40 --rates 4 8 16 --json quality.json

Questions are those of one task; the guide's examples name other people and things than the questions do. Only
questions that full context answers are counted in "retained"; the other columns count all. Budgets include whatever
a method keeps of its guide.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from cribsheet import __version__
from cribsheet.bench.metrics import clustered_interval, exact_match, set_f1
from cribsheet.build import GuideMode
from cribsheet.documents import Document
from cribsheet.errors import BudgetError
from cribsheet.llm import CompressedKnowledgeLLM
from cribsheet.loaded import LoadedModel
from cribsheet.selection import Allocation
from cribsheet.task import Task

logger = logging.getLogger(__name__)

_EXAMPLES, _QUESTIONS, _MOST_QUESTIONS = 3, 3, 8


@dataclass(frozen=True, slots=True)
class Case:
    """One corpus with a task and questions about it; `kinds` are types of question, `answers` the gold."""

    name: str
    documents: list[Document]
    task: Task
    questions: list[str]
    answers: list[str]
    kinds: list[str]


@dataclass(frozen=True, slots=True)
class Method:
    """A way to condense: which scorer, with which guide, and whether the guide stays."""

    name: str
    scorer: str
    examples: bool = True
    guide: GuideMode = "dropped"
    allocation: Allocation = "uniform"


METHODS = (
    Method("few-shot, recall", "recall", allocation="adaptive"),
    Method("zero-shot, recall", "recall", examples=False, allocation="adaptive"),
    Method("few-shot, notes, adaptive", "notes-peak", allocation="adaptive"),
    Method("reconstruction, adaptive", "reconstruction", allocation="adaptive"),
    Method("few-shot, notes", "notes"),
    Method("zero-shot, notes", "notes", examples=False),
    Method("few-shot", "task"),
    Method("few-shot, peak", "task-peak"),
    Method("zero-shot", "task", examples=False),
    Method("finch", "finch"),
    Method("reconstruction", "reconstruction"),
    Method("key norm", "key-norm"),
    Method("start + recent", "recent"),
    Method("random", "random"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One answer: where, how, and how good."""

    method: str
    rate: float
    budget: int
    nbytes: int
    case: str
    kind: str
    exact: float
    set_f1: float
    retained: bool


def held_out_cases(count: int, tokens: int, seed: int) -> list[Case]:
    """Worlds that the pocket model was not trained on, each with a task that has examples and questions to spare."""
    from cribsheet_pocket.worlds import make_world

    cases: list[Case] = []
    number = 0
    while len(cases) < count and number < 50 * count:
        number += 1
        world = make_world(f"bench/{seed}/{number}", tokens=tokens, questions=80)
        for task in world.tasks:
            if len(task.families) > 1:  # "anything about the staff" tells no token from another
                continue
            chosen = [q for q in world.questions_of(task) if q.kind != "absent"]
            examples, named = chosen[:_EXAMPLES], {q.entity for q in chosen[:_EXAMPLES]}
            shown = " ".join(f"{q.text} {q.answer}" for q in examples)
            asked = [q for q in chosen[_EXAMPLES:] if q.entity not in named and q.entity not in shown]
            if len(examples) == _EXAMPLES and len(asked) >= _QUESTIONS:
                asked = asked[:_MOST_QUESTIONS]
                documents = [Document(text=d.text, id=d.id) for d in world.documents]
                purpose = Task(task.description, examples=tuple((q.text, q.answer) for q in examples))
                texts, golds = [q.text for q in asked], [q.answer for q in asked]
                cases.append(Case(str(world.seed), documents, purpose, texts, golds, [q.kind for q in asked]))
                break
    return cases


def measure(
    model: LoadedModel, cases: Iterable[Case], methods: Sequence[Method], rates: Sequence[float]
) -> Iterator[Row]:
    """Answer every question of every case from full context, without documents, and by each method at each rate."""
    for case in cases:
        full = _answers(model, case, Method("full context", "recent"), rate=1.0)
        right = [bool(row.exact) for row in full]
        yield from full
        bare = Case(case.name, [Document(text="There are no documents.", id="none")], *_rest(case))
        yield from _answers(model, bare, Method("closed book", "recent"), rate=1.0, right=right)
        for method in methods:
            for rate in rates:
                try:
                    yield from _answers(model, case, method, rate, right)
                except BudgetError as error:  # a guide that is longer than the budget cannot be resident
                    logger.info("%s at %gx skips world %s: %s", method.name, rate, case.name, error)
        logger.info("world %s: %d of %d right with full context", case.name, sum(right), len(right))


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One line per method and rate: accuracy of all questions, and of those that full context answers."""
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.method, row.rate), []).append(row)
    lines = []
    for (method, rate), group in groups.items():
        kept = [row for row in group if row.retained]
        low, high = clustered_interval([r.exact for r in kept], [r.case for r in kept]) if kept else (0.0, 0.0)
        lines.append(
            {
                "method": method,
                "rate": rate,
                "n": len(group),
                "em": _mean(row.exact for row in group),
                "f1": _mean(row.set_f1 for row in group),
                "retained_n": len(kept),
                "retained": _mean(row.exact for row in kept),
                "ci_low": low,
                "ci_high": high,
                "budget": _mean(row.budget for row in group),
                "bytes": _mean(row.nbytes for row in group),
            }
        )
    return lines


def page(result: dict[str, Any]) -> str:
    """The page of the docs that shows a result of this bench, setup included."""
    lines, made = result["lines"], result["setup"]
    rates = sorted({line["rate"] for line in lines if line["rate"] > 1})
    by_method: dict[str, dict[float, dict[str, Any]]] = {}
    for line in lines:
        by_method.setdefault(line["method"], {})[line["rate"]] = line
    rows = []
    for method, own in by_method.items():
        if any(rate in own for rate in rates):
            cells = [f"{own[r]['retained']:.2f} [{own[r]['ci_low']:.2f}, {own[r]['ci_high']:.2f}]" for r in rates]
            rows.append(f"| {method} | " + " | ".join(cells) + " |")
    head = f"| method | {' | '.join(f'{rate:g}×' for rate in rates)} |\n|---|{'---|' * len(rates)}"
    full, closed = by_method["full context"][1.0], by_method["closed book"][1.0]
    return _PAGE.format(
        head=head,
        rows="\n".join(rows),
        full=full["em"],
        closed=closed["em"],
        n=full["n"],
        kept=full["retained_n"],
        setup=", ".join(f"{key} {value}" for key, value in made.items() if key not in ("methods", "threads")),
        **made,
    )


_PAGE = """# Quality

How much of what full context answers survives compression, on held-out worlds of about {tokens} tokens with the
pocket model. One sheet for each world and method; the task of a world covers one kind of question, and its three
examples name other people and things than the questions do. The guide is dropped.

```sh
make quality
```

{worlds} worlds, {n} questions; full context answers {full:.0%} of them, no documents {closed:.0%}. Of the {kept}
questions that full context answers, each method still answers (95 % interval, drawn by world)

{head}
{rows}

Setup: {setup}.

The page is written from `quality.json`, which holds every answer's judgement.
"""


def print_table(lines: Sequence[dict[str, Any]], console: Console) -> None:
    """Methods down, rates across; share of answerable questions retained, with its 95 % interval."""
    rates = sorted({line["rate"] for line in lines if line["rate"] > 1})
    table = Table("method", "all questions", *(f"{rate:g}×" for rate in rates))
    for method in dict.fromkeys(line["method"] for line in lines):
        own = {line["rate"]: line for line in lines if line["method"] == method}
        whole = f"{own[1.0]['em']:.3f}" if 1.0 in own else ""
        cells = [
            f"{own[rate]['retained']:.3f} [{own[rate]['ci_low']:.2f}, {own[rate]['ci_high']:.2f}]"
            if rate in own
            else ""
            for rate in rates
        ]
        table.add_row(method, whole, *cells)
    console.print(table)


def setup(model: LoadedModel, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to make the same numbers."""
    return {
        **{key: value for key, value in vars(arguments).items() if key != "json"},
        "model": model.backbone.name,
        "dtype": str(model.backbone.dtype),
        "device": str(model.backbone.device),
        "cribsheet": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the bench from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--worlds", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=600, help="length of a world's documents")
    parser.add_argument("--rates", type=float, nargs="+", default=[4.0, 8.0, 16.0])
    parser.add_argument("--methods", nargs="+", choices=[m.name for m in METHODS], default=[m.name for m in METHODS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write setup, lines and every row here, and the page beside it")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    torch.set_num_threads(arguments.threads)
    began = time.perf_counter()
    model = LoadedModel.get(arguments.model)
    cases = held_out_cases(arguments.worlds, arguments.tokens, arguments.seed)
    chosen = [method for method in METHODS if method.name in arguments.methods]
    rows = list(measure(model, cases, chosen, arguments.rates))
    lines = summary(rows)
    print_table(lines, Console())
    if arguments.json:
        took = {"seconds": round(time.perf_counter() - began, 1)}
        result = {"setup": {**setup(model, arguments), **took}, "lines": lines, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        arguments.json.with_suffix(".md").write_text(page(result), encoding="utf-8")


def _answers(
    model: LoadedModel, case: Case, method: Method, rate: float, right: Sequence[bool] | None = None
) -> list[Row]:
    task = case.task if method.examples else Task(case.task.description)
    kb = CompressedKnowledgeLLM.build(
        case.documents,
        task,
        model=model,
        rate=rate,
        scorer=method.scorer,
        guide=method.guide,
        allocation=method.allocation,
        seed=0,
    )
    rows = []
    streams = [kb.stream(question, max_tokens=64) for question in case.questions]
    for number, stream in enumerate(streams):
        text, gold = "".join(stream), [case.answers[number]]
        exact = exact_match(text, gold) if "," not in gold[0] else float(set_f1(text, gold) == 1)
        retained = bool(exact) if right is None else right[number]
        rows.append(
            Row(
                method.name,
                rate,
                kb.sheet.tokens,
                kb.sheet.nbytes,
                case.name,
                case.kinds[number],
                exact,
                set_f1(text, gold),
                retained,
            )
        )
    return rows


def _rest(case: Case) -> tuple[Task, list[str], list[str], list[str]]:
    return case.task, case.questions, case.answers, case.kinds


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0


if __name__ == "__main__":
    main()
