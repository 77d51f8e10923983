"""Builds as Ray tasks: one for each corpus or, for an independent sheet, one for each of its documents.

A task whose worker dies is done again by another worker. A sequential build then goes on from its checkpoint, which is
written after every chunk; of an independent one only the documents that were being read are read again. Sheets are put
together here, by whoever asked for them, and are the same bits as those of `build_sheet`.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Unpack

import ray
from ray.exceptions import RayTaskError, WorkerCrashedError

from cribsheet.build import build_sheet
from cribsheet.compress.progress import Listener, shown
from cribsheet.corpus.documents import Document
from cribsheet.corpus.task import Task
from cribsheet.engine.pool import LoadedModel
from cribsheet.errors import BudgetError, EngineError
from cribsheet.living.independent import Terms
from cribsheet.living.segments import Segment, read_segment
from cribsheet.plan.options import BuildKeywords, BuildOptions
from cribsheet.plan.plan import Plan, warn_without_task
from cribsheet.sheet.manifest import Manifest
from cribsheet.sheet.sheet import Sheet

logger = logging.getLogger(__name__)
_LOOK_SECONDS = 0.5  # between two looks at the progress of workers
_AHEAD = 2  # tasks in flight for each processor or accelerator that they need


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """What one task needs, and how often it is done again when its worker dies."""

    cpus: float = 1
    gpus: float = 0
    retries: int = 3

    @property
    def options(self) -> dict[str, Any]:
        """As Ray takes them."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_retries": self.retries}

    def at_once(self) -> int:
        """How many tasks to have in flight, so that nobody waits and little is kept."""
        have = ray.cluster_resources()
        wanted = (("CPU", self.cpus), ("GPU", self.gpus))
        return max(1, _AHEAD * int(min(have.get(name, 0) / need for name, need in wanted if need)))


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents of one sheet; `checkpoint` is a file that every machine of the cluster sees at that path.

    Without one, a build that is killed goes on from where it was on the same machine, and from its beginning on others.
    """

    documents: Sequence[Document]
    checkpoint: Path | None = None


def build_each(
    corpora: Mapping[str, Corpus],
    task: Task,
    *,
    model: str | Path = "pocket",
    model_options: Mapping[str, Any] | None = None,
    workers: Workers | None = None,
    progress: Listener = None,
    **options: Unpack[BuildKeywords],
) -> Iterator[tuple[str, Sheet]]:
    """Build one sheet for each corpus, as many at once as there is room for; yields each with its name when ready.

    `options` are the fields of `BuildOptions`. `progress` counts the tokens of all corpora that were begun. Raises what
    the first build that fails raises, and `EngineError` when workers die more often than `Workers.retries`.
    """
    how = BuildOptions.of(options)
    if how.archive:
        raise BudgetError("What other processes read is in no archive; build in this one, or with archive=False.")
    warn_without_task(task, how)  # here, as workers warn where nobody looks
    needs = workers or Workers()
    board = ray.remote(_Board).options(num_cpus=0).remote()
    build = ray.remote(_build).options(**needs.options)
    running = {}
    for name, corpus in corpora.items():
        checkpoint = corpus.checkpoint or Path(f"{uuid.uuid4().hex}.partial")
        told = [list(corpus.documents), task, str(model), dict(model_options or {}), options, checkpoint, board, name]
        running[build.remote(*told)] = name
    try:
        with shown(progress) as tell:
            while running:
                ready, _ = ray.wait(list(running), num_returns=1, timeout=_LOOK_SECONDS)
                if tell is not None and (told := _result(board.total.remote())):
                    tell(*told)
                for reference in ready:
                    yield running.pop(reference), _result(reference)
    finally:
        _drop(running)
        ray.kill(board)


def build_independent(
    documents: Sequence[Document],
    task: Task,
    *,
    model: str | Path = "pocket",
    model_options: Mapping[str, Any] | None = None,
    workers: Workers | None = None,
    progress: Listener = None,
    checkpoint: str | Path | None = None,
    **options: Unpack[BuildKeywords],
) -> Sheet:
    """`build_sheet(mode="independent")` whose documents are read by Ray tasks and put together here.

    The model is loaded here too: it plans, and reads preamble and resident guide. `checkpoint` is a file here, for the
    case that this process dies. Raises as `build_each`.
    """
    loaded = LoadedModel.get(model, **dict(model_options or {}))
    read = partial(_read, str(model), dict(model_options or {}), workers or Workers())
    options["mode"] = "independent"
    return build_sheet(loaded.backbone, documents, task, progress=progress, checkpoint=checkpoint, read=read, **options)


def _read(
    model: str,
    model_options: Mapping[str, Any],
    workers: Workers,
    terms: Terms,
    base: Manifest,
    plans: Sequence[Plan],
) -> Iterator[Segment]:
    """The segments of these plans in order; a few of them are always being read ahead."""
    read = ray.remote(_segment).options(**workers.options)
    scorer = None if isinstance(terms.scorer, str) else terms.scorer
    common = ray.put((model, dict(model_options), base, scorer))
    waiting = [plan.corpus.documents[0] for plan in reversed(plans)]
    running: list[Any] = []
    try:
        while waiting or running:
            while waiting and len(running) < workers.at_once():
                running.append(read.remote(common, waiting.pop()))
            yield _result(running.pop(0))
    finally:
        _drop(running)


def _build(
    documents: Sequence[Document],
    task: Task,
    model: str,
    model_options: Mapping[str, Any],
    options: BuildKeywords,
    checkpoint: Path,
    board: Any,
    name: str,
) -> Sheet:
    """In a worker: one sequential build, from its checkpoint if there is one."""
    if checkpoint.parent == Path():  # nobody named a place, so it is this machine's own
        checkpoint = Path(tempfile.gettempdir()) / checkpoint

    def tell(read: int, total: int) -> None:
        board.tell.remote(name, read, total)

    backbone = _model(model, tuple(sorted(model_options.items()))).backbone
    sheet = build_sheet(backbone, documents, task, checkpoint=checkpoint, progress=tell, **options)
    checkpoint.unlink(missing_ok=True)
    return sheet


def _segment(common: tuple[str, Mapping[str, Any], Manifest, Any], document: Document) -> Segment:
    """In a worker: one document, on the terms of the sheet."""
    model, model_options, base, scorer = common
    backbone = _model(model, tuple(sorted(model_options.items()))).backbone
    terms = Terms.of(backbone, base).with_scorer(scorer)
    return read_segment(backbone, terms.plan(backbone, document))


@lru_cache(maxsize=1)
def _model(name: str, options: tuple[tuple[str, Any], ...]) -> LoadedModel:
    """The model of this worker, which stays for its next task."""
    return LoadedModel.get(name, **dict(options))


class _Board:
    """Where workers write how far they are; an actor."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[int, int]] = {}

    def tell(self, name: str, read: int, total: int) -> None:
        self._told[name] = read, total

    def total(self) -> tuple[int, int] | None:
        """Tokens read and tokens of all builds that were begun; none before the first."""
        read, total = (sum(each) for each in zip(*self._told.values(), strict=True)) if self._told else (0, 0)
        return (read, total) if total else None


def _result(reference: Any) -> Any:
    """What a task returned. Raises what it raised, as itself."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from None
    except WorkerCrashedError as error:
        raise EngineError(
            "The workers of a build died again and again, perhaps for want of memory; lower chunk_tokens or give each "
            "more room, and build again: with a checkpoint it goes on where it was."
        ) from error


def _drop(running: Any) -> None:
    """Nobody waits for these any more."""
    for reference in running:
        with contextlib.suppress(Exception):
            ray.cancel(reference, force=True)
