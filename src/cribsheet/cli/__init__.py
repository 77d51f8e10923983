"""The command line: `cribsheet build`, `ask`, `chat`, `inspect`, `serve`, `compare`, `bench`, `demo`, and more.

Answers and results go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 misuse (wrong arguments or
unusable input), 130 and 143 interrupted. torch is imported inside commands only, so that `--help` is instant.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from cribsheet import __version__
from cribsheet.cli.ask import ask, chat
from cribsheet.cli.bench import add_bench
from cribsheet.cli.build import build
from cribsheet.cli.compare import compare
from cribsheet.cli.console import Debug, Verbose, guarded
from cribsheet.cli.demo import demo
from cribsheet.cli.edit import extend, merge, remove, replace
from cribsheet.cli.inspect import inspect
from cribsheet.cli.registry import pull, push
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
    compare,
    serve,
    push,
    pull,
    demo,
):
    app.command()(_command)
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
    sys.exit(run())
