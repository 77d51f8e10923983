"""The commands of `cribsheet bench`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cribsheet.cli.console import Device, misuse, quiet_libraries
from cribsheet.cli.options import MOST_OF_ONE, flat, number, whole

Peers = Annotated[Path | None, typer.Option(metavar="PYTHON", help="A python that has kvpress, which is asked too.")]
Rows = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write setup and rows there, and a page beside it.")
]

bench = typer.Typer(no_args_is_help=True, help="Measure this library on this machine.")


class Where(StrEnum):
    """Devices with parts of their own."""

    cpu = "cpu"
    cuda = "cuda"


@bench.callback()
def _several() -> None:
    """Measure this library on this machine."""


@bench.command()
@flat
def speed(
    device: Annotated[Where, typer.Option(help="Where to run.")] = Where.cpu,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="tiny, 50m, 0.5b, 1.5b or 8b with random weights, or a model; repeatable.  "
            "[default: pocket and 50m, or 8b]",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="End within a minute on a CPU.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PART", help='Run this part, such as build or "first token"; repeatable.  [default: all]'),
    ] = None,
    seconds: Annotated[
        float, typer.Option(metavar="N", parser=number(0, above=True), help="Start no part after so long.")
    ] = 3600.0,
    as_json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write setup and rows there.")] = None,
    page: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with tables there.")] = None,
) -> int:
    """Building and answering against their limits and their peers: checked first, then timed in turns."""
    quiet_libraries()
    from cribsheet_bench.speed.run import run

    return run(device=device.value, shape=shape, quick=quick, only=only or (), seconds=seconds, json=as_json, page=page)


@bench.command()
@flat
def quality(
    model: Annotated[str, typer.Option(metavar="NAME", help="A folder, a hub id, or pocket.")] = "pocket",
    families: Annotated[
        list[str] | None, typer.Option("--family", metavar="NAME", help="Repeatable.  [default: all]")
    ] = None,
    cases: Annotated[int, typer.Option(metavar="N", parser=whole(1), help="Of each family, length and seed.")] = 1,
    questions: Annotated[int, typer.Option(metavar="N", parser=whole(1), help="About each case, at most.")] = 4,
    tokens: Annotated[
        list[int] | None,
        typer.Option(metavar="N", parser=whole(1), help="Length of a case's documents; repeatable.  [default: 1000]"),
    ] = None,
    rates: Annotated[
        list[float] | None,
        typer.Option("--rate", metavar="N", parser=number(1), help="Repeatable.  [default: 4 8 16 32 64]"),
    ] = None,
    methods: Annotated[
        list[str] | None, typer.Option("--method", metavar="NAME", help="Repeatable.  [default: those that tell most]")
    ] = None,
    seeds: Annotated[
        list[int] | None, typer.Option("--seed", metavar="N", parser=whole(), help="Repeatable.  [default: 0 1]")
    ] = None,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="Text that `reading` asks about.")] = None,
    peers: Peers = None,
    presses: Annotated[
        list[str] | None, typer.Option("--press", metavar="NAME", help="Of the peers; repeatable.  [default: all]")
    ] = None,
    threads: Annotated[int, typer.Option(metavar="N", parser=whole(1, MOST_OF_ONE), help="Of each process.")] = 1,
    jobs: Annotated[
        int, typer.Option(metavar="N", parser=whole(1), help="Processes, each with a case of its own.")
    ] = 1,
    as_json: Rows = None,
) -> int:
    """What survives compression: families of questions, by method and rate, with floors and ceilings."""
    quiet_libraries()
    from cribsheet_bench.quality.run import Options, run

    lists = {
        "families": families,
        "tokens": tokens,
        "rates": rates,
        "methods": methods,
        "seeds": seeds,
        "presses": presses,
    }
    given = {name: tuple(values) for name, values in lists.items() if values}
    counts = {"cases": cases, "questions": questions, "threads": threads, "jobs": jobs}
    run(Options(model=model, text=text, peers=peers, **counts, **given), file=as_json)  # type: ignore[arg-type]
    return 0


@bench.command()
@flat
def real(
    corpora: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folders of documents, task.toml and questions.jsonl.")
    ],
    models: Annotated[list[str], typer.Option("--model", metavar="NAME", help="A folder or a hub id; repeatable.")],
    methods: Annotated[
        list[str] | None, typer.Option("--method", metavar="NAME", help="Repeatable.  [default: all]")
    ] = None,
    rates: Annotated[
        list[float] | None,
        typer.Option("--rate", metavar="N", parser=number(1), help="Repeatable.  [default: 2 4 8 16 32]"),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Corpora whose names begin so, such as xquad/4000; repeatable."),
    ] = None,
    cases: Annotated[
        int | None, typer.Option(metavar="N", parser=whole(1), help="Corpora of each group.  [default: all]")
    ] = None,
    questions: Annotated[
        int | None, typer.Option(metavar="N", parser=whole(1), help="About each corpus.  [default: all]")
    ] = None,
    peers: Peers = None,
    dense_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The dense retriever's model.  [default: the library's]")
    ] = None,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Ask the I-th of N parts only; merge files with `bench real-page`.")
    ] = "1/1",
    seconds: Annotated[
        float | None,
        typer.Option(
            metavar="N", parser=number(0, above=True), help="Begin nothing new after so long.  [default: no limit]"
        ),
    ] = None,
    asking: Annotated[int, typer.Option(metavar="N", parser=whole(1), help="Questions asked at a time.")] = 16,
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", parser=whole(1, MOST_OF_ONE), help="Of the processor.  [default: torch's]"),
    ] = None,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(metavar="NAME", help="float32, bfloat16 or float16.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", parser=whole(), help="Of studies, and of the intervals.")] = 0,
    as_json: Rows = None,
) -> int:
    """Real models asked about real documents: full context first, then all ways to answer at equal budgets.

    What --json FILE has is not asked again, so a run that was killed goes on, and one with more rates adds to it.
    """
    part, of = _shard(shard)
    quiet_libraries()
    from cribsheet_bench.real.case import Means
    from cribsheet_bench.real.run import Options, run

    lists = {"methods": methods, "rates": rates, "only": only}
    given = {name: tuple(values) for name, values in lists.items() if values}
    options = Options(
        corpora,
        tuple(models),
        cases=cases,
        questions=questions,
        means=Means(asking, dense_model, peers, seed),
        shard=(part, of),
        limit=float("inf") if seconds is None else seconds,
        threads=threads,
        device=device,
        dtype=dtype,
        seed=seed,
        **given,  # type: ignore[arg-type]
    )
    run(options, file=as_json)
    return 0


@bench.command("real-page")
@flat
def real_page(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE", help="Files of `bench real`; of unfinished runs, too.")
    ],
    as_json: Rows = None,
) -> int:
    """One table and page of several runs of `bench real`, such as its shards."""
    quiet_libraries()
    from cribsheet_bench.real.run import merge

    merge(files, file=as_json)
    return 0


def _shard(text: str) -> tuple[int, int]:
    part, _, of = text.partition("/")
    if not (part.isdecimal() and of.isdecimal()):
        misuse(f"--shard {text!r} is no part of a whole; write I/N, such as 1/3")
    return int(part), int(of)
