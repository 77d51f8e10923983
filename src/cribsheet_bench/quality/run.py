"""How much of what full context answers survives compression: families of tasks, one sheet per case and method.

    cribsheet bench quality --families worlds needle --rates 4 8 16 --json quality.json

A guide's examples name other people and things than the questions do. Only questions that full context answers are
counted in "retained"; the other columns count all. Budgets include whatever a method keeps of its guide. With
`--peers`, the presses of kvpress answer the same questions in an environment of their own (`peers.py`).
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cribsheet.compare.journal import write_rows
from cribsheet.compare.versions import versions
from cribsheet.compress.scoring import Scorer
from cribsheet.corpus.documents import Document
from cribsheet.corpus.task import Task
from cribsheet.engine.pool import LoadedModel
from cribsheet.errors import BudgetError, RequestError
from cribsheet.llm import CompressedKnowledgeLLM
from cribsheet.model.fingerprint import fingerprint
from cribsheet.prompt.template import ChatLayout
from cribsheet.vocabulary import Allocation, Correction, GuideKept, StorageDtype
from cribsheet_bench.command import tell_progress
from cribsheet_bench.quality import peers
from cribsheet_bench.quality.case import Case, Row, judged
from cribsheet_bench.quality.families import FAMILIES, Wanted, held_out_cases, make_cases
from cribsheet_bench.quality.page import page, print_table, summary
from cribsheet_bench.quality.peers_runner import WAYS
from cribsheet_bench.quality.several import Sheets
from cribsheet_bench.quality.task_peak import TaskPeak

__all__ = ["METHODS", "Case", "Method", "Options", "Row", "held_out_cases", "measure", "run", "setup"]

logger = logging.getLogger(__name__)

FULL, CLOSED = "full context", "closed book"
_FLAGS = {
    "model": "model", "family": "families", "cases": "cases", "questions": "questions", "tokens": "tokens",
    "rate": "rates", "method": "methods", "seed": "seeds", "text": "text", "peers": "peers", "press": "presses",
    "threads": "threads", "jobs": "jobs",
}  # fmt: skip
_FREE = ("families", "cases", "tokens", "seeds", "jobs")  # what names a case, and processes: a run goes on with others
RATES = (4.0, 8.0, 16.0, 32.0, 64.0)


@dataclass(frozen=True, slots=True)
class Method:
    """A way to condense: which scorer, with which guide, and whether the guide stays.

    Without a scorer it is what the library does by default. A `query_aware` one is guided by the very questions and
    answers: no user can, so it is a ceiling. One in int8 or int4 keeps as many tokens as fit the bytes that its rate
    leaves of a 16-bit cache. One `for_engines` can be exported.
    """

    name: str
    scorer: str | Scorer | None = None
    examples: bool = True
    guide: GuideKept = "dropped"
    allocation: Allocation | None = None
    query_aware: bool = False
    correction: Correction = "none"
    dtype: StorageDtype | None = None
    chunk_tokens: int | None = None
    archive: bool = False
    for_engines: bool = False

    def task(self, case: Case) -> Task:
        """The task as this method tells it."""
        if self.query_aware:
            return Task(case.task.description, tuple(zip(case.questions, case.answers, strict=True)))
        return case.task if self.examples else Task(case.task.description)


METHODS = (
    Method("default", guide="auto"),
    Method("default, 16-bit", guide="auto", dtype="bfloat16"),
    Method("default, chunks of 512", guide="auto", chunk_tokens=512),
    Method("default, chunks of 1024", guide="auto", chunk_tokens=1024),
    Method("default, one chunk", guide="auto", chunk_tokens=0),
    Method("default, int8", guide="auto", dtype="int8"),
    Method("default, int4", guide="auto", dtype="int4"),
    Method("zero-effort", examples=False, guide="auto"),
    Method("zero-effort, int4", examples=False, guide="auto", dtype="int4"),
    Method("query-aware", TaskPeak(), allocation="adaptive", query_aware=True),
    Method("few-shot, recall", "recall", allocation="adaptive"),
    Method("few-shot, recall, uniform", "recall", allocation="uniform"),
    Method("few-shot, recall, refit", "recall", allocation="adaptive", correction="refit"),
    Method("zero-shot, recall", "recall", examples=False, allocation="adaptive"),
    Method("reconstruction, adaptive", "reconstruction", allocation="adaptive"),
    Method("few-shot", "task"),
    Method("few-shot, peak", TaskPeak()),
    Method("zero-shot", "task", examples=False),
    Method("finch", "finch"),
    Method("reconstruction", "reconstruction"),
    Method("start + recent", "recent"),
    Method("random", "random"),
)


NAMES = tuple(method.name for method in METHODS)
USUAL = (
    "default", "default, 16-bit", "default, int8", "default, int4", "zero-effort", "zero-effort, int4", "query-aware",
    "reconstruction, adaptive", "few-shot", "finch", "start + recent", "random",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What a run measures: `cases` of each family for each length and seed, by each method at each rate."""

    model: str = "pocket"
    families: tuple[str, ...] = tuple(FAMILIES)
    cases: int = 1
    tokens: tuple[int, ...] = (1000,)
    rates: tuple[float, ...] = RATES
    methods: tuple[str, ...] = USUAL
    seeds: tuple[int, ...] = (0, 1)
    questions: int = 4
    text: Path | None = None
    peers: Path | None = None
    presses: tuple[str, ...] = tuple(WAYS)
    threads: int = 1
    jobs: int = 1


def command(options: Options) -> str:
    """The command line of a run, without what it does anyway."""
    words = ["cribsheet bench quality"]
    for flag, name in _FLAGS.items():
        value = getattr(options, name)
        if value != getattr(Options(), name):
            words += [f"--{flag} {shlex.quote(str(each))}" for each in (value if isinstance(value, tuple) else [value])]
    return " ".join(words)


def run(options: Options, *, file: Path | None = None, console: Console | None = None) -> dict[str, Any]:
    """Measure, show a table, and write setup, lines and every row to `file`, with a page beside it.

    A run that was interrupted, or one of fewer cases, goes on with those that `file` does not have.
    """
    for name in options.methods:
        if name not in NAMES:
            raise RequestError(f"There is no method {name!r}; use {', '.join(NAMES)}.")
    for name in options.presses:
        if name not in WAYS:
            raise RequestError(f"There is no press {name!r}; use {', '.join(WAYS)}.")
    tell_progress()
    torch.set_num_threads(options.threads)
    model = LoadedModel.get(options.model)
    text = options.text.read_text(encoding="utf-8") if options.text else None
    cases = [
        case
        for tokens in options.tokens
        for seed in options.seeds
        for case in make_cases(options.families, options.cases, Wanted(tokens, seed, text, options.questions))
    ]
    result = _before(file, setup(model, options), {case.name for case in cases})
    rows = [Row(**row) for row in result["rows"]]
    began = time.perf_counter()
    for case, more, told in _measured([case for case in cases if case.name not in result["done"]], options):
        rows += more
        result["peers"]["failed"] += told["failed"]
        result["peers"]["same"] += told["same"]
        result["done"].append(case.name)
        logger.info("%d of %d cases done", len(result["done"]), len(cases))
        result["seconds"] += round(time.perf_counter() - began, 1)
        began = time.perf_counter()
        kept = {key: result[key] for key in ("setup", "seconds", "done", "peers")}
        _write(file, {**kept, "rows": rows})
    order = {case.name: number for number, case in enumerate(cases)}
    rows.sort(key=lambda row: order[row.case])
    if options.peers:
        result["peers"] |= peers.report(options.peers, model, cases, options.rates)
    result |= {"command": command(options), "lines": summary(rows), "rows": [asdict(row) for row in rows]}
    print_table(result, console or Console(width=150))
    _write(file, result)
    if file:
        file.with_suffix(".md").write_text(page(result), encoding="utf-8")
    return result


def _measured(cases: Sequence[Case], options: Options) -> Iterator[tuple[Case, list[Row], dict[str, Any]]]:
    """Rows of each case by our methods and by the peers, whose failures are told; in processes if there are several."""
    if options.jobs == 1:
        yield from ((case, *_case_rows(case, options)) for case in cases)
        return
    spawning = multiprocessing.get_context("spawn")  # a fork would share the model's threads
    with ProcessPoolExecutor(options.jobs, mp_context=spawning) as pool:
        waiting = {pool.submit(_case_rows, case, options): case for case in cases}
        for done in as_completed(waiting):
            yield (waiting[done], *done.result())


def _case_rows(case: Case, options: Options) -> tuple[list[Row], dict[str, Any]]:
    torch.set_num_threads(options.threads)
    model = LoadedModel.get(options.model)
    rows = list(measure(model, [case], [m for m in METHODS if m.name in options.methods], options.rates))
    full = [row for row in rows if row.method == FULL]
    if not options.peers or not any(row.retained for row in full):
        return rows, {"failed": [], "same": []}
    found = peers.ask(options.peers, model, case, options.rates, full, options.presses)
    return rows + found.rows, {"failed": found.failed, "same": found.same}


def _before(file: Path | None, made: dict[str, Any], cases: set[str]) -> dict[str, Any]:
    """What an earlier run has done, if it was interrupted or had some of these cases; else nothing."""
    fresh = {"setup": made, "seconds": 0.0, "done": [], "peers": {"failed": [], "same": []}, "rows": []}
    if file is None or not file.exists():
        return fresh
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    before, now = found["setup"], json.loads(json.dumps(made))
    finished = "lines" in found and before == now
    alike = cases.issuperset(found["done"]) and all(
        before.get(key) == value for key, value in now.items() if key not in _FREE
    )
    return {**found, "setup": made} if alike and not finished else fresh


def _write(file: Path | None, result: dict[str, Any]) -> None:
    if file:
        write_rows(file, result)


def measure(
    model: LoadedModel, cases: Iterable[Case], methods: Sequence[Method], rates: Sequence[float]
) -> Iterator[Row]:
    """Answer every question of every case from full context, without documents, and by each method at each rate.

    Where full context answers nothing, there is nothing to retain: methods are not asked.
    """
    for case in cases:
        sheets = Sheets(model.backbone, case.documents)
        full = _answers(model, sheets, case, Method(FULL, "recent", guide="dropped"), rate=1.0)
        right = [bool(row.exact) for row in full]
        yield from full
        bare = Sheets(model.backbone, [Document(text="There are no documents.", id="none")])
        yield from _answers(model, bare, case, Method(CLOSED, "recent", guide="dropped"), rate=1.0, right=right)
        logger.info("%s: %d of %d right with full context", case.name, sum(right), len(right))
        for method in methods if any(right) else ():
            for rate in rates:
                try:
                    yield from _answers(model, sheets, case, method, rate, right)
                except BudgetError as error:  # a guide that is longer than the budget cannot be resident
                    logger.info("%s at %gx skips %s: %s", method.name, rate, case.name, error)


def setup(model: LoadedModel, arguments: object) -> dict[str, Any]:
    """What a reader needs to make the same numbers; `arguments` are those of a command line."""
    return {
        **{key: value for key, value in vars(arguments).items() if key not in ("json", "text", "peers")},
        "model": model.backbone.name,
        "weights": fingerprint(model.backbone, ChatLayout(model.backbone.tokenizer)).weights,
        "dtype": str(model.backbone.dtype),
        "device": str(model.backbone.device),
        **versions(),
    }


def _answers(
    model: LoadedModel, sheets: Sheets, case: Case, method: Method, rate: float, right: Sequence[bool] | None = None
) -> list[Row]:
    how = {name: getattr(method, name) for name in ("scorer", "guide", "allocation", "correction", "chunk_tokens")}
    if method.dtype in ("int8", "int4"):
        sheet = sheets.fitted(method.task(case), rate, dtype=method.dtype, **how)
    else:
        sheet = sheets.build(method.task(case), rate=rate, dtype=method.dtype, **how)
    kb = CompressedKnowledgeLLM(model, sheet)
    most = case.most_tokens(model.backbone.tokenizer)
    streams = [kb.stream(question, max_tokens=most, evidence=False) for question in case.questions]
    answers = ["".join(stream) for stream in streams]
    kb.close()
    return judged(case, method.name, rate, answers, (sheet.tokens, sheet.nbytes, sheet.nbytes), right)
