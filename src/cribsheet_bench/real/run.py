"""Real models asked about real documents: every way to answer at equal budgets, before anything is claimed.

    cribsheet bench real CORPORA --model Qwen/Qwen2.5-0.5B-Instruct --json real.json

CORPORA is a folder of corpora (`corpora.py`), which `real_sets.py` makes from public data sets. A budget is the tokens
before the question, the template's preamble and the guide included. The guide stays in every prompt, or forms of
answers would be compared instead of what a prompt knows; only `zero-shot` leaves out its examples. What was measured is
in `real_page.py`: full context first, and differences on the same questions.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cribsheet.compare.compare import CLOSED, FULL, Corpus
from cribsheet.compare.journal import Journal, write_rows, write_whole
from cribsheet.compare.versions import versions
from cribsheet.engine.pool import LoadedModel
from cribsheet.errors import CribsheetError, RequestError
from cribsheet.model.fingerprint import fingerprint
from cribsheet.prompt.template import ChatLayout
from cribsheet.retrieval.dense import require_dense
from cribsheet_bench.command import tell_progress
from cribsheet_bench.real.case import Case, Means
from cribsheet_bench.real.corpora import find_corpora, group_of, read_corpus
from cribsheet_bench.real.page import Result, Row, joined, merged, page, print_table, read_result, result_of
from cribsheet_bench.real.ways import KVZIP, NAMES, USUAL, WAYS, Way

logger = logging.getLogger(__name__)

RATES = (2.0, 4.0, 8.0, 16.0, 32.0)


@dataclass(frozen=True)
class Options:
    """What a run measures, and with what.

    `only` are beginnings of corpora's names; `cases` and `questions` bound the corpora of each group and the questions
    about each. `shard` (i, n) is the i-th of n parts, from 1. Nothing new is begun after `limit` seconds.
    """

    data: Path
    models: tuple[str, ...]
    methods: tuple[str, ...] = USUAL
    rates: tuple[float, ...] = RATES
    only: tuple[str, ...] = ()
    cases: int | None = None
    questions: int | None = None
    means: Means = field(default_factory=Means)
    shard: tuple[int, int] = (1, 1)
    limit: float = float("inf")
    threads: int | None = None
    device: str | None = None
    dtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what makes no sense, with `RequestError`."""
        for name in self.methods:
            if name not in NAMES:
                raise RequestError(f"There is no method {name!r}; use {', '.join(NAMES)}.")
        for rate in self.rates:
            if not 1 <= rate < float("inf"):
                raise RequestError(f"The rate is {rate:g}; give at least 1.")
        part, of = self.shard
        if not 1 <= part <= of:
            raise RequestError(f"The shard is {part}/{of}; give I/N with I from 1 to N.")
        if not self.models:
            raise RequestError("No model was given; name a folder or a hub id with --model.")

    @property
    def terms(self) -> dict[str, Any]:
        """What decides answers beside model, corpus, method and rate: rows of other terms do not go into one file."""
        dense = self.means.dense
        named = Path(dense).name if dense and Path(dense).is_dir() else dense  # where it lies says nothing elsewhere
        return {"seed": self.seed, "dense": named, **versions()}

    def ways(self) -> list[Way]:
        """The ways that can be had, in an order in which sheets are shared."""
        missing = self.missing()
        return [way for way in WAYS if way.name in self.methods and way.name not in missing]

    def missing(self) -> dict[str, str]:
        """The methods that cannot be had here, and why."""
        missing: dict[str, str] = {}
        try:
            require_dense()
        except RequestError as error:
            missing |= dict.fromkeys((way.name for way in WAYS if way.retriever == "dense"), str(error))
        if self.means.peers is None:
            missing[KVZIP] = "no --peers was given, a python that has kvpress"
        return {name: why for name, why in missing.items() if name in self.methods}


def run(options: Options, *, file: Path | None = None, console: Console | None = None) -> Result:
    """Ask, show a table, and write every row to `file`, with a page beside it.

    A run that was killed goes on, and so does one with more of anything: what `file` has is not asked again. Of a
    shard, `file` gets the shard's number into its name. Raises `RequestError` if `file` was made on other terms.
    """
    tell_progress()
    if options.threads:
        torch.set_num_threads(options.threads)
    file = file and shard_file(file, options.shard)
    before = _before(file, options.terms)
    journal = Journal(file, options.terms, Row)
    known = [*before.rows, *journal.rows]
    for name, why in options.missing().items():
        logger.info("%s is left out: %s", name, why)
    work = _Work(options, {row.key for row in known}, journal.add, dict(before.models))
    for place in options.models:
        work.ask_model(place)
    result = result_of(Result(options.terms, work.models, [*before.rows, *journal.rows]))
    if work.is_late:
        logger.info("time is up; run it again to go on")
    if not result.rows:
        raise RequestError("Nothing could be asked: every method was left out, for the reasons above.")
    write(result, file)
    journal.remove()
    print_table(result, console or Console(width=150))
    return result


def merge(files: Sequence[Path], *, file: Path | None = None, console: Console | None = None) -> Result:
    """One result and page of the files of several runs, finished or not."""
    result = result_of(merged([read_result(each) for each in files]))
    write(result, file)
    print_table(result, console or Console(width=150))
    return result


def write(result: Result, file: Path | None) -> None:
    """JSON with a row a line, and the page beside it."""
    if file:
        write_rows(file, {"setup": result.setup, "models": result.models, "rows": result.rows})
        write_whole(file.with_suffix(".md"), page(result))


def shard_file(file: Path, shard: tuple[int, int]) -> Path:
    """Where a shard's rows go: shards never write to one file."""
    part, of = shard
    return file if of == 1 else file.with_name(f"{file.stem}.{part}-of-{of}{file.suffix}")


def _before(file: Path | None, terms: dict[str, Any]) -> Result:
    if file is None or not file.exists():
        return Result(terms, {}, [])
    found = read_result(file)
    if found.setup != json.loads(json.dumps(terms)):
        raise RequestError(
            f"{str(file)!r} was made on other terms: {found.setup} there, {terms} here; "
            "give another --json, or remove it."
        )
    return found


@dataclass(eq=False)
class _Work:
    """A run on its way: which rows are known, where new ones go, what each model is, and when it began."""

    options: Options
    known: set[tuple[Any, ...]]
    add: Callable[[Iterable[Row]], None]
    models: dict[str, Any]
    began: float = field(default_factory=time.monotonic)

    @property
    def is_late(self) -> bool:
        """Whether nothing new is to be begun."""
        return time.monotonic() - self.began > self.options.limit

    def ask_model(self, place: str) -> None:
        """Ask a model about every corpus; it is loaded only if something is left to ask."""
        name = name_of(place)
        model = None if name in self.models else self._loaded(place)
        try:
            for case, folder in self._own_corpora():
                corpus = read_corpus(folder, case)
                points = self._points(name, corpus)
                if points and not self.is_late:
                    model = model or self._loaded(place)
                    self._ask_case(Case(name, model, corpus, self.options.means), points)
        finally:
            if model:
                model.leave(self)

    def _loaded(self, place: str) -> LoadedModel:
        """The model; its engine stays, with all that it has compiled, from one sheet to the next."""
        model, name = LoadedModel.get(place, device=self.options.device, dtype=self.options.dtype), name_of(place)
        told = _about(model)
        before = self.models.get(name, told)
        if before["weights"] != told["weights"]:
            raise RequestError(f"Another model was called {name!r} in this file; give another --json.")
        self.models[name] = joined([before, told])  # it may go on where another machine, or type, began
        model.enter(self)
        return model

    def _own_corpora(self) -> list[tuple[str, Path]]:
        """Those of the shard."""
        part, of = self.options.shard
        return list(chosen_corpora(self.options).items())[part - 1 :: of]

    def _points(self, model: str, corpus: Corpus) -> list[tuple[Way, float, list[int]]]:
        """Each way and rate, with the numbers of the questions that are not answered yet; nothing if all are."""
        numbers = range(len(corpus.questions))[: self.options.questions]
        points = []
        for way, rate in _plan(self.options.ways(), self.options.rates):
            left = [number for number in numbers if (model, corpus.name, way.name, rate, number) not in self.known]
            points += [(way, rate, left)] if left else []
        return points

    def _ask_case(self, case: Case, points: Sequence[tuple[Way, float, list[int]]]) -> None:
        for way, rate, numbers in points:
            if way.name != KVZIP:
                self._take(case, f"{way.name} at {rate:g}x", partial(case.answers, way, rate, numbers))
        case.close()
        theirs = [(rate, numbers) for way, rate, numbers in points if way.name == KVZIP]
        if theirs:
            self._take(case, KVZIP, partial(case.kvzip, theirs))

    def _take(self, case: Case, what: str, ask: Callable[[], list[Row]]) -> None:
        """Ask, unless it is late, and remember the rows; what cannot be asked is left out."""
        if self.is_late:
            return
        try:
            rows = ask()
        except (CribsheetError, ImportError, torch.OutOfMemoryError) as error:
            logger.warning("%s: %s is left out: %s", case.corpus.name, what, error)
            return
        self.add(rows)
        score = 100 * sum(row.score for row in rows) / max(1, len(rows))
        seconds = time.monotonic() - self.began
        logger.info("%s, %s, %s: %.1f of %d (%.0f s)", case.name, case.corpus.name, what, score, len(rows), seconds)


def name_of(model: str) -> str:
    """What a model is called in results: a folder by its last part, anything else as it is."""
    place = Path(model).expanduser()
    return place.resolve().name if place.is_dir() else model


def chosen_corpora(options: Options) -> dict[str, Path]:
    """The folders of the corpora that options ask for, by name. Raises `RequestError` if there are none."""
    counts: dict[str, int] = {}
    found = {}
    for name, folder in find_corpora(options.data).items():
        if options.only and not name.startswith(options.only):
            continue
        counts[group_of(name)] = counts.get(group_of(name), 0) + 1
        if options.cases is None or counts[group_of(name)] <= options.cases:
            found[name] = folder
    if not found:
        raise RequestError(f"{options.data} has no corpus whose name begins with {' or '.join(options.only)}.")
    return found


def _plan(ways: Sequence[Way], rates: Sequence[float]) -> Iterator[tuple[Way, float]]:
    yield from ((way, 1.0) for way in ways if way.name in (FULL, CLOSED))
    for rate in dict.fromkeys(rates):
        yield from ((way, rate) for way in ways if way.name not in (FULL, CLOSED))


def _about(model: LoadedModel) -> dict[str, str]:
    backbone = model.backbone
    return {
        "weights": fingerprint(backbone, ChatLayout(backbone.tokenizer)).weights,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(backbone.device) if backbone.device.type == "cuda" else "cpu",
    }
