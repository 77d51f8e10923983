"""`cribsheet bench`: what the library costs on this machine."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cribsheet.cli.console import Debug, Verbose, quiet_libraries

bench = typer.Typer(no_args_is_help=True, help="Measure this library on this machine.")


class Where(StrEnum):
    """Devices with parts of their own."""

    cpu = "cpu"
    cuda = "cuda"


@bench.callback()
def _several() -> None:
    """Measure this library on this machine."""


@bench.command()
def speed(
    device: Annotated[Where, typer.Option(help="Where to run.")] = Where.cpu,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="pocket, tiny, 50m or 8b; repeatable.  [default: pocket and 50m, or 8b]"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="End within a minute on a CPU.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PART", help='Run this part, such as build or "first token"; repeatable.  [default: all]'),
    ] = None,
    seconds: Annotated[float, typer.Option(metavar="N", help="Start no part after so long.")] = 3600.0,
    as_json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write setup and rows there.")] = None,
    page: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with tables there.")] = None,
    verbose: Verbose = False,
    debug: Debug = False,
) -> int:
    """Building and answering against their limits and their peers: checked first, then timed in turns."""
    quiet_libraries()
    from cribsheet.bench.speed import run

    return run(device=device.value, shape=shape, quick=quick, only=only or (), seconds=seconds, json=as_json, page=page)


@bench.command()
def quality(
    model: Annotated[str, typer.Option(metavar="NAME", help="A folder, a hub id, or pocket.")] = "pocket",
    families: Annotated[
        list[str] | None, typer.Option("--family", metavar="NAME", help="Repeatable.  [default: all]")
    ] = None,
    cases: Annotated[int, typer.Option(metavar="N", help="Of each family, length and seed.")] = 1,
    questions: Annotated[int, typer.Option(metavar="N", help="About each case, at most.")] = 4,
    tokens: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Length of a case's documents; repeatable.  [default: 1000]")
    ] = None,
    rates: Annotated[
        list[float] | None, typer.Option("--rate", metavar="N", help="Repeatable.  [default: 4 8 16 32 64]")
    ] = None,
    methods: Annotated[
        list[str] | None, typer.Option("--method", metavar="NAME", help="Repeatable.  [default: those that tell most]")
    ] = None,
    seeds: Annotated[list[int] | None, typer.Option("--seed", metavar="N", help="Repeatable.  [default: 0 1]")] = None,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="Text that `reading` asks about.")] = None,
    peers: Annotated[
        Path | None, typer.Option(metavar="PYTHON", help="A python that has kvpress; its presses are asked too.")
    ] = None,
    presses: Annotated[
        list[str] | None, typer.Option("--press", metavar="NAME", help="Of the peers; repeatable.  [default: all]")
    ] = None,
    threads: Annotated[int, typer.Option(metavar="N", help="Of each process.")] = 1,
    jobs: Annotated[int, typer.Option(metavar="N", min=1, help="Processes, each with a case of its own.")] = 1,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write setup and rows there, and a page beside it.")
    ] = None,
    verbose: Verbose = False,
    debug: Debug = False,
) -> int:
    """What survives compression: families of questions, by method and rate, with floors and ceilings."""
    quiet_libraries()
    from cribsheet.bench.quality import Options, run

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
