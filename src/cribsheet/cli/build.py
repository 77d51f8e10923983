"""`cribsheet build`: documents and a task to a sheet file."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from cribsheet.cli.console import (
    AsJson,
    Debug,
    Device,
    Revision,
    Verbose,
    build_progress,
    misuse,
    note,
    quiet_libraries,
    say,
    say_json,
)
from cribsheet.cli.inspect import positions, studied
from cribsheet.cli.options import MOST_OF_ONE, number, whole
from cribsheet.corpus.printable import in_line
from cribsheet.corpus.task import Task
from cribsheet.vocabulary import MOST_MINUTES, Allocation, Correction, GuideKept, SheetKind, StorageDtype

if TYPE_CHECKING:
    from cribsheet.plan.options import BuildKeywords

COMPUTED_IN = ("float32", "bfloat16", "float16")


def _computed_in(text: str) -> str:
    """Reads --dtype, which is easily taken for --storage-dtype."""
    if text not in COMPUTED_IN:
        stored = f"; what the sheet stores is --storage-dtype {text}" if text in get_args(StorageDtype) else ""
        misuse(f"it is {text!r}; give {', '.join(COMPUTED_IN)}{stored}")
    return text


Paths = Annotated[list[str], typer.Argument(metavar="PATHS", help="Files, folders or glob patterns.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="The sheet file to write; only --dry-run needs none."),
]
TaskText = Annotated[str | None, typer.Option(metavar="TEXT", help="What will be asked, in a sentence.")]
Example = Annotated[
    list[str] | None, typer.Option(metavar="'Q => A'", help="An example question with its answer; repeatable.")
]
TaskFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The task as TOML or JSON, instead of --task and --example.")
]
Model = Annotated[
    str | None, typer.Option(metavar="MODEL", help="pocket, a model folder, or a hub id.  [default: pocket]")
]
Rate = Annotated[
    float | None,
    typer.Option(metavar="N", parser=number(), help="How many times shorter than the corpus.  [default: 4, in int4]"),
]
Budget = Annotated[
    int | None, typer.Option(metavar="N", parser=whole(), help="Kept tokens per layer and head, instead of --rate.")
]
Retain = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        parser=number(),
        help="Instead of a rate: the share of what the model answers with everything before it that the sheet must "
        "answer too, such as 0.95, of questions that it asks itself.",
    ),
]
Check = Annotated[
    bool, typer.Option("--check", help="Ask the finished sheet such questions, and warn if it has lost many.")
]
ScorerName = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="recall (default), reconstruction, task, finch, recent or random."),
]
Guide = Annotated[
    GuideKept,
    typer.Option(help="What stays of the task: all, the form of its examples' answers, nothing, or what is small."),
]
ChunkTokens = Annotated[
    int | None,
    typer.Option(
        metavar="N", parser=whole(), help="Tokens read at once; 0 reads everything at once.  [default: by device]"
    ),
]
System = Annotated[str, typer.Option(metavar="TEXT", help="A system text, which becomes part of the sheet.")]
Dtype = Annotated[
    str | None,
    typer.Option(metavar=f"<{'|'.join(COMPUTED_IN)}>", parser=_computed_in, help="Type the model computes in."),
]
Stored = Annotated[
    StorageDtype | None,
    typer.Option(help="Type of the stored keys and values.  [default: the model's, or int4 without a rate]"),
]
Seed = Annotated[int, typer.Option(metavar="N", parser=whole(), help="For what is random in a build.")]
Shared = Annotated[
    Allocation | None,
    typer.Option(
        help="How heads share the budget: alike, by the model's profile, or by scores.  "
        "[default: profiled with the default scorer]"
    ),
]
Corrected = Annotated[Correction, typer.Option(help="refit: what is kept is made to stand for what was dropped.")]
Archived = Annotated[
    bool, typer.Option("--archive", help="Keep all that is read too, in FILE.archive, so that it can be recalled.")
]
ArchiveDtype = Annotated[
    StorageDtype | None, typer.Option(help="Type of the archive's keys and values.  [default: int4]")
]
Mode = Annotated[
    SheetKind,
    typer.Option(help="independent: read every document alone, so that it can be replaced or removed later."),
]
ForEngines = Annotated[
    bool,
    typer.Option(
        "--for-engines", help="A sheet that llama.cpp and other engines can read too: see `cribsheet export`."
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Remember each finished chunk in FILE.partial: run a killed build again and it goes on."
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Build nothing; say what it would take: tokens, bytes, memory and seconds.")
]
StudyMinutes = Annotated[
    float | None,
    typer.Option(
        "--study",
        metavar="MINUTES",
        parser=number(0, MOST_MINUTES, above=True),
        help="Let the sheet practise on its documents, as `study` does.",
    ),
]
StudySteps = Annotated[
    int | None,
    typer.Option(metavar="N", parser=whole(1), help="Steps of such training, instead of --study or at most."),
]
NoTexts = Annotated[bool, typer.Option("--no-texts", help="Leave the documents' texts out of the file.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")]
OnRay = Annotated[bool, typer.Option("--ray", help="Build by tasks on a Ray cluster, which survive their workers.")]
RayAddress = Annotated[str | None, typer.Option(metavar="ADDRESS", help="The cluster; one on this machine by default.")]
TaskCpus = Annotated[
    float, typer.Option(metavar="N", parser=number(0, MOST_OF_ONE), help="With --ray, processors of a task.")
]
TaskGpus = Annotated[
    float, typer.Option(metavar="N", parser=number(0, MOST_OF_ONE), help="With --ray, accelerators of a task.")
]


def build(
    paths: Paths,
    output: Output = None,
    task: TaskText = None,
    example: Example = None,
    task_file: TaskFile = None,
    model: Model = None,
    rate: Rate = None,
    budget: Budget = None,
    retain: Retain = None,
    check: Check = False,
    study: StudyMinutes = None,
    study_steps: StudySteps = None,
    scorer: ScorerName = None,
    guide: Guide = "auto",
    chunk_tokens: ChunkTokens = None,
    system: System = "",
    device: Device = None,
    dtype: Dtype = None,
    storage_dtype: Stored = None,
    revision: Revision = None,
    seed: Seed = 0,
    allocation: Shared = None,
    correction: Corrected = "none",
    mode: Mode = "sequential",
    archive: Archived = False,
    archive_dtype: ArchiveDtype = None,
    for_engines: ForEngines = False,
    resume: Resume = False,
    dry_run: DryRun = False,
    no_texts: NoTexts = False,
    force: Force = False,
    ray: OnRay = False,
    ray_address: RayAddress = None,
    task_cpus: TaskCpus = 1,
    task_gpus: TaskGpus = 0,
    as_json: AsJson = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Condense documents for a task into one sheet file."""
    archived = archive_dtype or archive
    checkpoint = _checked_files(output, resume=resume, force=force or dry_run, dry_run=dry_run, archived=bool(archived))
    purpose = make_task(task, example or [], task_file)
    if dry_run and (ray or check or retain is not None):
        misuse("--dry-run knows what a build without questions takes here; leave --ray, --check and --retain out")
    if ray and archived:
        misuse("what a cluster reads is in no archive; leave --ray or --archive out")
    _check_study(study, study_steps, elsewhere=ray or dry_run)
    _check_sizes(rate, budget, retain)
    quiet_libraries()
    from cribsheet.corpus.documents import read_documents

    documents = read_documents([Path(path) for path in paths])
    model = _chosen(model, quietly=as_json)
    options: BuildKeywords = {"rate": rate, "budget": budget, "scorer": scorer or None, "guide": guide}
    options |= {"chunk_tokens": chunk_tokens, "system": system, "dtype": storage_dtype, "seed": seed, "mode": mode}
    options |= {"allocation": allocation, "correction": correction, "retain": retain, "check": check}
    options |= {"archive": archived, "for_engines": for_engines}
    loading = {"device": device, "dtype": dtype, "revision": revision}
    if dry_run or output is None:
        _foretell(documents, purpose, model, loading, options, as_json=as_json, texts=not no_texts)
        return
    if not as_json:
        _tell_of_questions()
    place = {"model": model, "model_options": {name: value for name, value in loading.items() if value is not None}}
    began = time.perf_counter()
    with build_progress(hidden=as_json) as progress:
        how: dict[str, Any] = {**place, "progress": progress, "checkpoint": checkpoint}
        if ray:
            from cribsheet.cli.ray import build_on_ray

            needs = (task_cpus, task_gpus)
            sheet = build_on_ray(documents, purpose, options, address=ray_address, needs=needs, **how)
        else:
            from cribsheet.llm import CompressedKnowledgeLLM

            how |= {"study": study, "study_steps": study_steps}
            folder = output.absolute().parent  # there is room, if anywhere, and from there it need not be copied
            sheet = CompressedKnowledgeLLM.build(documents, purpose, archive_folder=folder, **how, **options).sheet
    from cribsheet.sheet.archive.writer import unfinished_archive

    written = _save(sheet, output, texts=not no_texts, force=force)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
        unfinished_archive(checkpoint).unlink(missing_ok=True)
    if written != output:
        from cribsheet.errors import SheetError

        raise SheetError(
            f"{str(output)!r} was written by another process meanwhile, and stays as it is; this sheet was kept in "
            f"{str(written)!r}: rename it, or delete it."
        )
    _report(sheet, output, time.perf_counter() - began, as_json=as_json)


def _chosen(model: str | None, *, quietly: bool) -> str:
    """The model that was asked for, or the one that ships; who asked for none may not know how small that is."""
    if model is not None:
        return model
    if not quietly:
        note(
            "cribsheet: no --model was given, so this is made with the pocket model that ships, which is for trying "
            "things out; for your own documents give a folder or hub id"
        )
    return "pocket"


def _checked_files(output: Path | None, *, resume: bool, force: bool, dry_run: bool, archived: bool) -> Path | None:
    """The checkpoint, if there is one; refuses files that can never be written, before any work."""
    if output is None and not dry_run:
        misuse("no file was named for the sheet; give one with --output (-o), or ask with --dry-run what it would take")
    if output is not None:
        check_output(output, force=force)
        if archived:
            check_output(output.with_name(f"{output.name}.archive"), force=force)
    if output is None or not resume:
        return None
    checkpoint = output.with_name(f"{output.name}.partial")
    check_output(checkpoint, force=True)
    return checkpoint


def _check_sizes(rate: float | None, budget: int | None, retain: float | None) -> None:
    given = {"--rate": rate, "--budget": budget, "--retain": retain}
    sizes = [name for name, value in given.items() if value is not None]
    if len(sizes) > 1:
        misuse(f"{' and '.join(sizes)} were given together; leave all but one out")


def _check_study(minutes: float | None, steps: int | None, *, elsewhere: bool) -> None:
    """Refuse a study where the sheet is not built here, before a model is loaded."""
    if elsewhere and (minutes is not None or steps is not None):
        misuse("--study is for a build here; build without it, and `cribsheet study` the sheet, or its --dry-run")


def _foretell(
    documents: Any,
    task: Task,
    model: str,
    loading: dict[str, Any],
    options: BuildKeywords,
    *,
    as_json: bool,
    texts: bool,
) -> None:
    """Say what a build would take."""
    from cribsheet.engine.pool import LoadedModel
    from cribsheet.forecast import forecast

    found = forecast(LoadedModel.get(model, **loading).backbone, documents, task, texts=texts, **options)
    if as_json:
        say_json(dataclasses.asdict(found))
        return
    archive = f" and archive {found.archive_bytes / 1e6:,.1f} MB" if found.archive_bytes else ""
    say(
        f"{found.corpus_tokens:,} tokens of {found.documents} documents would become {found.tokens:,} (rate "
        f"{found.rate:.1f}) in {found.chunks} chunk{'s' * (found.chunks > 1)} of at most {found.chunk_tokens:,}\n"
        f"file about {found.sheet_bytes / 1e6:,.1f} MB{archive}; memory at most about {found.peak_bytes / 1e6:,.0f} MB "
        f"besides Python and its libraries\n"
        f"about {found.seconds:.1f} s here, as the first {found.probe_tokens:,} tokens took {found.probe_seconds:.2f} s"
    )


def _tell_of_questions() -> None:
    """A check or a study asks many after the corpus was read; how far it is stands on stderr."""
    for name in ("retention", "study"):
        logging.getLogger(f"cribsheet.{name}").setLevel(logging.INFO)


def check_output(output: Path, *, force: bool) -> None:
    """Refuse a file that exists, unless `force`, or that can never be written; before any work."""
    if output.is_dir():
        misuse(f"{str(output)!r} is a folder; name a file in it")
    if output.exists() and not output.is_file():
        misuse(f"{str(output)!r} is no regular file; name one, or a new one")
    folder = Path(os.path.realpath(output)).parent if output.is_symlink() else output.parent
    if not folder.is_dir():
        misuse(f"the folder {str(folder)!r} does not exist; create it first")
    if not os.access(folder, os.W_OK):
        misuse(f"the folder {str(folder)!r} cannot be written to; choose another")
    if output.exists() and not force:
        misuse(f"{str(output)!r} exists; pass --force to overwrite it, or another name")


def make_task(text: str | None, examples: list[str], file: Path | None) -> Task:
    """The task of the flags, or of the file; a general one without either."""
    if file is not None:
        if text is not None or examples:
            misuse("--task-file was given together with --task or --example; put everything into the file")
        return Task.from_file(file)
    pairs = tuple(Task.parse_example(example) for example in examples)
    return Task(text if text is not None else Task.of(None).description, pairs)


def _save(sheet: Any, output: Path, *, texts: bool, force: bool) -> Path:
    """Where the sheet was written: beside the file that was named if one came to lie there during the build."""
    from cribsheet.errors import SheetError
    from cribsheet.sheet.atomic import Seen
    from cribsheet.sheet.file import save

    nothing = Seen(output)
    try:
        return save(sheet, output, texts=texts, seen=None if force else nothing)
    except SheetError:
        if force or nothing.is_there:
            raise
    beside = output.with_name(f"{output.stem}-{os.getpid()}{output.suffix}")
    return save(sheet, beside, texts=texts, seen=Seen(beside))


def _report(sheet: Any, output: Path, seconds: float, *, as_json: bool) -> None:
    size, made = output.stat().st_size, sheet.manifest
    if as_json:
        say_json(
            {
                "sheet": str(output),
                "documents": len(made.documents),
                "corpus_tokens": made.corpus_tokens,
                "tokens": sheet.tokens,
                "rate": round(sheet.rate, 3),
                "positions": sheet.length,
                "window": sheet.window,
                "guide": made.guide,
                "scorer": made.scorer,
                "file_bytes": size,
                "archive_bytes": made.archive.bytes if made.archive else None,
                "retention": made.retention.model_dump() if made.retention else None,
                "study": made.build.get("study"),
                "build_seconds": made.build["seconds"],
                "seconds": round(seconds, 3),
            }
        )
        return
    archive = f" and an archive of {made.archive.bytes / 1e6:,.1f} MB" if made.archive else ""
    say(
        f"{in_line(str(output))}: {made.corpus_tokens:,} tokens of {len(made.documents)} documents became "
        f"{sheet.tokens:,} (rate {sheet.rate:.1f}), {size / 1e6:,.1f} MB{archive}, {positions(sheet)} of the window, "
        f"in {seconds:.1f} s"
        + (f"; {made.retention}" if made.retention else "")
        + (f"; studied: {told}" if (told := studied(made)) else "")
    )
