"""`cribsheet compare`: ways to answer questions about a corpus, side by side at equal budgets."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cribsheet.cli.build import check_output, make_task
from cribsheet.cli.console import Device, Revision, misuse, note, quiet_libraries, say
from cribsheet.cli.options import TaskOptions, flat, whole
from cribsheet.corpus.printable import in_line
from cribsheet.vocabulary import SEEDS, GuideKept

if TYPE_CHECKING:
    from cribsheet.compare.compare import Corpus
    from cribsheet.corpus.task import Task


# What a row of the JSON file holds; the page shows more.
_REPORTED = (
    "method", "rate", "budget", "type", "n", "em", "f1", "ci_low", "ci_high", "tokens", "bytes", "seconds",
)  # fmt: skip


@flat
def compare(
    corpus: Annotated[list[str], typer.Argument(metavar="CORPUS", help="Files, folders or glob patterns.")],
    *,
    questions: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help='JSON lines {"question", "answers", "type", "documents"}.', show_default=False
        ),
    ],
    methods: Annotated[
        str | None, typer.Option(metavar="A,B", help="Only these, comma-separated.  [default: all]")
    ] = None,
    rates: Annotated[str, typer.Option(metavar="N,N", help="How many times shorter than the corpus.")] = "8,16,32",
    top_k: Annotated[
        int | None,
        typer.Option(metavar="N", parser=whole(1), help="At most so many passages.  [default: as the budget allows]"),
    ] = None,
    purpose: TaskOptions,
    examples: Annotated[
        int,
        typer.Option(
            metavar="N", parser=whole(0), help="Without examples of yours, take so many questions away as examples."
        ),
    ] = 3,
    scorer: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What makes our sheets.  [default: that of build]", show_default=False),
    ] = None,
    guide: Annotated[
        GuideKept,
        typer.Option(help="Whether task and examples, or their form, stay."),
    ] = "auto",
    model: Annotated[str, typer.Option(metavar="MODEL", help="pocket, a model folder, or a hub id.")] = "pocket",
    device: Device = None,
    revision: Revision = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", parser=whole(1), help="Longest answer in tokens.")] = 64,
    seed: Annotated[
        int, typer.Option(metavar="N", parser=whole(SEEDS[0], SEEDS[-1]), help="Draws examples and intervals.")
    ] = 0,
    as_json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write setup and rows there.")] = None,
    answers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write every answer there, as JSON lines.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with the curves there.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
) -> None:
    """Compare ways to answer at equal budgets: accuracy, tokens, bytes and seconds.

    Killed, it goes on where it was when run again with the same --json FILE.
    """
    for file in (as_json, answers, html):
        if file is not None:
            check_output(file, force=force)
    named, wanted = _names(methods), _rates(rates)
    task = make_task(purpose.task, purpose.example or [], purpose.task_file)
    quiet_libraries()
    from cribsheet.compare.compare import NAMES, Record, Settings, summary
    from cribsheet.compare.compare import compare as run
    from cribsheet.compare.journal import Journal, write_whole
    from cribsheet.compare.report import page, print_table, setup_of
    from cribsheet.engine.pool import LoadedModel

    chosen = named or list(NAMES)
    if unknown := [name for name in chosen if name not in NAMES]:
        misuse(f"there is no method {unknown[0]!r}; use {', '.join(NAMES)}")
    settings = Settings(guide, scorer, top_k, max_tokens=max_tokens, seed=seed)
    asked = _corpus(corpus, questions, task, examples, seed)
    loaded = LoadedModel.get(model, device=device, revision=revision)
    setup = setup_of(loaded, asked, chosen, wanted, settings)
    journal = Journal(as_json, setup, Record, told=note)
    records = journal.rows

    def progress(name: str, rate: float) -> None:
        note(f"{name}, rate {rate:g}")

    before = list(records)
    for record in run(loaded, asked, methods=chosen, rates=wanted, settings=settings, done=before, progress=progress):
        journal.add([record])
    if not records:
        misuse("nothing could be compared: every method was left out (--verbose says why)")
    result: dict[str, Any] = {"setup": setup, "rows": summary(records, seed=seed)}
    print_table(result["rows"])
    if as_json is not None:
        rows = [{key: row[key] for key in _REPORTED} for row in result["rows"]]
        write_whole(as_json, json.dumps({"setup": setup, "rows": rows}, indent=1) + "\n")
    if answers is not None:
        write_whole(answers, "".join(json.dumps(asdict(each)) + "\n" for each in records))
    if html is not None:
        write_whole(html, page(result))
        say(f"\n{in_line(str(html))}")
    journal.remove()


def _corpus(paths: list[str], questions: Path, task: Task, examples: int, seed: int) -> Corpus:
    from cribsheet.compare.compare import Corpus
    from cribsheet.compare.questions import draw_examples, read_questions
    from cribsheet.corpus.documents import read_documents
    from cribsheet.corpus.task import Task

    documents, asked = read_documents([Path(path) for path in paths]), read_questions(questions)
    known = {document.id for document in documents}
    missing = {name for question in asked for name in question.documents} - known
    if missing:
        note(f"cribsheet: {len(missing)} documents that questions name are not in the corpus, {min(missing)!r} for one")
    if not task.few_shot:
        drawn, asked = draw_examples(asked, examples, seed)
        task = Task(task.description, tuple((each.text, each.golds[0]) for each in drawn), task.instruction)
        note(f"{len(drawn)} questions serve as examples, {len(asked)} are asked")
    return Corpus(paths[0], documents, task, asked)


def _names(methods: str | None) -> list[str] | None:
    return [name.strip() for name in methods.split(",")] if methods else None


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        misuse(f"--rates {text!r} are no numbers; write 8,16,32")
    if not all(1 <= rate < float("inf") for rate in rates):
        misuse(f"--rates {text!r}: each must be at least 1")
    return rates
