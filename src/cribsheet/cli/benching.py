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
