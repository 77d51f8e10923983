"""The door to writing: from documents and a task to a sheet."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Unpack

import torch

from cribsheet.compress.loop import read_through
from cribsheet.compress.progress import Listener
from cribsheet.corpus.documents import Document
from cribsheet.corpus.task import Task
from cribsheet.errors import BudgetError
from cribsheet.living.independent import SegmentReader, build_independent
from cribsheet.model.backbone import Backbone
from cribsheet.plan.assemble import archive_writer, finish
from cribsheet.plan.describe import checkpoint_of
from cribsheet.plan.options import BuildKeywords, BuildOptions
from cribsheet.plan.plan import plan, warn_without_task
from cribsheet.retention.retention import build_retaining, checked, make_checker
from cribsheet.sheet.sheet import Sheet


@contextlib.contextmanager
def _memory_told() -> Iterator[None]:
    """Torch and Python say in many ways that memory ran out; callers hear it in one, with the way out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not known:
            raise
        raise BudgetError(
            f"Memory ran out while the corpus was read ({' '.join(str(error).split())[:200]}); lower chunk_tokens or "
            "the budget, or build on a larger machine. With a checkpoint, the build goes on where it was."
        ) from error


@_memory_told()
def build_sheet(
    backbone: Backbone,
    documents: Sequence[Document],
    task: Task,
    *,
    progress: Listener = None,
    checkpoint: str | Path | None = None,
    archive_folder: str | Path | None = None,
    read: SegmentReader | None = None,
    **options: Unpack[BuildKeywords],
) -> Sheet:
    """Condense `documents` for `task` into a sheet; `options` are the fields of `BuildOptions`.

    progress
        `True` shows a bar. A function is called as `progress(tokens_read, tokens)` before the first and after each
        chunk, and now and then within one that takes long.
    checkpoint
        a file that remembers each finished chunk; if it exists, the build goes on from there. An archive is then begun
        beside it, under its name and `.archive.part`, or in `archive_folder` under a name of its own.
    archive_folder
        where an archive lies until the sheet is saved; by default beside the checkpoint, or where temporary files go.
        A build that goes on must be told the same.
    read
        who reads the documents of an independent sheet, if not this process: see `independent.SegmentReader`.

    Raises `BudgetError`, `TemplateError` or `DocumentError` before any work starts. A general task, which is what
    stands for none, is warned of.
    """
    how = BuildOptions.of(options)
    if how.archive and read is not None:
        raise BudgetError("What other processes read is in no archive; build in this one, or with archive=False.")
    layout = how.layout(backbone)
    warn_without_task(task, how)
    checker = None
    if how.retain is not None or how.check:
        checker = make_checker(backbone, layout, documents, task, how)
        task = checker.task
        if how.retain is not None:
            return build_retaining(checker, progress=progress, checkpoint=checkpoint, archive_folder=archive_folder)
    if how.mode == "independent":
        sheet = build_independent(
            backbone,
            layout,
            documents,
            task,
            how,
            progress=progress,
            checkpoint=checkpoint,
            archive_folder=archive_folder,
            read=read,
        )
    else:
        planned = plan(backbone, layout, documents, task, how)
        began, saved = time.perf_counter(), checkpoint_of(planned, backbone, checkpoint)
        archive = archive_writer(backbone, planned, checkpoint, archive_folder)
        state = read_through(
            backbone, planned.corpus, planned.reading, progress=progress, checkpoint=saved, archive=archive
        )
        sheet = finish(backbone, planned, state, began, archive)
    return sheet if checker is None else checked(checker, sheet)
