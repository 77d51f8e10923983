"""`cribsheet bench`: the benches, which stand beside the library and not in its wheel."""

from __future__ import annotations

from importlib.util import find_spec

import typer

from cribsheet.cli.console import misuse


def add_bench(app: typer.Typer) -> None:
    """Give `app` the commands of `cribsheet_bench`, or one that says where they are."""
    if find_spec("cribsheet_bench") is None:
        anything = {"allow_extra_args": True, "ignore_unknown_options": True}
        app.command("bench", context_settings=anything, add_help_option=False)(elsewhere)
        return
    from cribsheet_bench.cli import bench

    app.add_typer(bench, name="bench")


def elsewhere() -> None:
    """Measure this library on this machine (in a clone)."""
    misuse(
        "the benches are not in the installed package: clone cribsheet's repository and there run "
        "pip install -e ./src/cribsheet_pocket -e ., or make"
    )
