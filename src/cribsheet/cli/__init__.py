"""The command line: `cribsheet build`, `ask`, `chat`, `inspect`, `serve`, `compare`, `bench`, `demo`, and more.

Answers and results go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 misuse (wrong arguments or
unusable input), 130 and 143 interrupted. torch is imported inside commands only, so that `--help` is instant.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Annotated

import typer

from cribsheet import __version__
from cribsheet.cli.ask import ask, chat
from cribsheet.cli.build import build
from cribsheet.cli.compare import compare
from cribsheet.cli.console import Debug, Verbose, calm_threads, guarded, misuse
from cribsheet.cli.demo import demo
from cribsheet.cli.edit import extend, merge, remove, replace, study
from cribsheet.cli.inspect import inspect
from cribsheet.cli.registry import export, pull, push
from cribsheet.cli.serve import serve

app = typer.Typer(
    name="cribsheet",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for _command in (
    build,
    ask,
    chat,
    inspect,
    extend,
    replace,
    remove,
    merge,
    study,
    compare,
    serve,
    push,
    pull,
    export,
    demo,
):
    app.command()(_command)


def add_bench(commands: typer.Typer) -> None:
    """Give it the benches, which stand beside the library and not in its wheel, or a command that says where."""
    if find_spec("cribsheet_bench") is None:
        anything = {"allow_extra_args": True, "ignore_unknown_options": True}
        commands.command("bench", context_settings=anything, add_help_option=False)(_bench_elsewhere)
        return
    from cribsheet_bench.cli import bench

    commands.add_typer(bench, name="bench")


def _bench_elsewhere() -> None:
    """Measure this library on this machine (in a clone)."""
    misuse(
        "the benches are not in the installed package: clone cribsheet's repository and there run "
        "pip install -e ./src/cribsheet_pocket -e ., or make"
    )


add_bench(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"cribsheet {__version__}\n")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Condense documents into a sheet that a local model answers from."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, `sys.argv` by default, and return its exit code."""
    return guarded(lambda: app(args=arguments, prog_name="cribsheet", standalone_mode=False))


def main() -> None:
    """The entry point."""
    calm_threads()
    sys.exit(run())
