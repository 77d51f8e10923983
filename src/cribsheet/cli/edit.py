"""`cribsheet extend`, `replace`, `remove` and `merge`: sheet files whose documents change; `study`: one that learns.

The file is replaced whole when everything is done; until then, and if anything fails, the old one stays. One command at
a time changes a file, and none writes over what another process has put there since it was read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cribsheet.cli.build import check_output
from cribsheet.cli.console import AsJson, build_progress, in_flags, misuse, note, quiet_libraries, say, say_json
from cribsheet.cli.options import ModelOptions, SheetFile, flat, given, number, whole
from cribsheet.corpus.printable import in_line

if TYPE_CHECKING:
    from cribsheet.compress.progress import Progress
    from cribsheet.llm import CompressedKnowledgeLLM
    from cribsheet.sheet.atomic import Seen
    from cribsheet.study.study import StudyOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class EditOptions:
    """What all four commands take beside the change."""

    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write there and leave the sheet as it is.")
    ] = None
    model: ModelOptions
    as_json: AsJson = False


@flat
def extend(
    file: SheetFile,
    paths: Annotated[list[str], typer.Argument(metavar="PATHS...", help="Files, folders or glob patterns.")],
    options: EditOptions,
) -> None:
    """Add documents to an independent sheet; only these are read."""
    from cribsheet.corpus.documents import read_documents

    documents = read_documents([Path(path) for path in paths])
    _change(file, options, lambda kb, p: kb.extend(documents, progress=p))


@flat
def replace(
    file: SheetFile,
    document_id: Annotated[str, typer.Argument(metavar="ID", help="The document, as `inspect` lists it.")],
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A file with its new text.")],
    options: EditOptions,
) -> None:
    """Put a new text in the place of one document of an independent sheet; only that is read."""
    from cribsheet.corpus.documents import read_documents

    document = read_documents(path)
    _change(file, options, lambda kb, p: kb.replace(document_id, document, progress=p))


@flat
def remove(
    file: SheetFile,
    document_ids: Annotated[list[str], typer.Argument(metavar="IDS...", help="Documents, as `inspect` lists them.")],
    options: EditOptions,
) -> None:
    """Take documents out of an independent sheet; nothing of them is left in the file."""
    _change(file, options, lambda kb, p: kb.remove(*document_ids))


@flat
def merge(
    file: SheetFile,
    others: Annotated[list[str], typer.Argument(metavar="FILES...", help="Sheets of the same model and task.")],
    options: EditOptions,
) -> None:
    """Add the documents of other independent sheets; none is read again."""

    def take_over(kb: CompressedKnowledgeLLM, progress: Progress | None) -> None:
        from cribsheet import load_sheet

        for other in others:
            kb.merge(load_sheet(other))

    _change(file, options, take_over)


@flat
def study(
    file: SheetFile,
    options: EditOptions,
    minutes: Annotated[
        float | None, typer.Option(metavar="N", parser=number(), help="How long to study, with all that belongs to it.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", parser=whole(), help="Steps of training, instead or at most.")
    ] = None,
    learning_rate: Annotated[
        float, typer.Option(metavar="N", parser=number(), help="How far a step of training goes.")
    ] = 0.02,
    seed: Annotated[int, typer.Option(metavar="N", parser=whole(), help="For what is random in it.")] = 0,
    practice: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What it practises on, for all sheets of the same documents, task, guide and model: read if it "
            "exists, else written.",
        ),
    ] = None,
    document: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="Study this document alone, as `inspect` lists it; repeatable."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Study nothing; say what it would take: seconds, steps and memory.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Remember how far it is in FILE.study: run it again after a kill and it goes on."
        ),
    ] = False,
) -> None:
    """Let a sheet practise on its documents until it answers more of what they say, at the same size."""
    target = _target(file, options.output)
    if dry_run and (document or practice is not None):
        misuse("--dry-run tells of all documents and of practice not made yet; leave --document and --practice out")
    if practice is not None:
        check_output(practice, force=True)
    quiet_libraries()
    from cribsheet.llm import CompressedKnowledgeLLM
    from cribsheet.sheet.file import save

    began = time.perf_counter()
    notebook = target.with_name(f"{target.name}.study") if resume else None
    if dry_run:
        with contextlib.closing(CompressedKnowledgeLLM.load(file, **given(options.model))) as kb:
            forecast = kb.forecast_study(minutes=minutes, steps=steps)
        say_json(dataclasses.asdict(forecast)) if options.as_json else say(in_flags(str(forecast)))
        return
    with (
        _held(target, options.output) as seen,
        contextlib.closing(CompressedKnowledgeLLM.load(file, **given(options.model))) as kb,
    ):
        how: StudyOptions = {"minutes": minutes, "steps": steps, "learning_rate": learning_rate, "seed": seed}
        how |= {"practice": practice, "documents": document or (), "resume": notebook, "progress": _tenths()}
        came = kb.study(**how)
        if came.learnt or options.output is not None:
            save(kb.sheet, target, seen=seen)
    done = {"sheet": str(target), "learnt": came.learnt, **dataclasses.asdict(came)}
    done["seconds"] = round(time.perf_counter() - began, 3)
    if options.as_json:
        say_json(done)
    else:
        copied = "" if came.learnt or options.output is None else f"; what was written is the sheet of {in_line(file)}"
        say(f"{in_line(str(target))}: {in_flags(str(came))}{copied}")


def _tenths() -> Callable[[str, float], None]:
    """Tells on stderr when another tenth of something is done."""
    last = ""

    def tell(what: str, share: float) -> None:
        nonlocal last
        line = f"{what}: {10 * int(10 * share)} %"
        if line != last:
            note(line)
        last = line

    return tell


def _target(file: str, output: Path | None) -> Path:
    """The file to write; refused before any work."""
    if output is None and ("://" in file or "#" in file) and not Path(file).exists():
        misuse(f"{file} is not a file here that could be replaced; say with --output where to write")
    target = output or Path(file)
    check_output(target, force=output is None)
    return target


@contextlib.contextmanager
def _held(target: Path, output: Path | None) -> Iterator[Seen]:
    """What lies where the sheet is to be written: the sheet itself, held while it is changed, or nothing yet."""
    from cribsheet.sheet.atomic import Seen, changing

    if output is not None:
        yield Seen(target)
        return
    with changing(target) as seen:
        yield seen


def _change(
    file: str,
    options: EditOptions,
    change: Callable[[CompressedKnowledgeLLM, Progress | None], object],
) -> None:
    target = _target(file, options.output)
    quiet_libraries()
    from cribsheet.llm import CompressedKnowledgeLLM
    from cribsheet.sheet.file import save

    began = time.perf_counter()
    with _held(target, options.output) as seen:
        with build_progress(hidden=options.as_json) as progress:
            kb = CompressedKnowledgeLLM.load(file, **given(options.model))
            change(kb, progress)
        save(kb.sheet, target, seen=seen)
    done = {
        "sheet": str(target),
        "documents": len(kb.sheet.documents),
        "corpus_tokens": kb.sheet.manifest.corpus_tokens,
        "tokens": kb.sheet.tokens,
        "change": kb.sheet.manifest.history[-1].operation,
        "seconds": round(time.perf_counter() - began, 3),
    }
    if options.as_json:
        say_json(done)
        return
    say(
        f"{in_line(str(target))}: {done['change']}, now {done['documents']} documents, {done['corpus_tokens']:,} "
        f"tokens in {done['tokens']:,}, in {done['seconds']:.1f} s"
    )
