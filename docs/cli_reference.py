"""Write `reference/cli.md` from the command line's own help: `python docs/cli_reference.py`."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from unittest.mock import patch

from cribsheet.cli import app, run

PAGE = Path(__file__).parent / "reference" / "cli.md"
_TOP = """\
# Command line

<!-- Written by `python docs/cli_reference.py`; a test fails when it is stale. -->

Answers and results go to stdout, progress and errors to stderr.
With `--json`, stdout holds one JSON object and nothing else.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | failed: a damaged or foreign sheet, a full disk, an unexpected error |
| 2 | misuse: wrong arguments, or documents, task, model or question that cannot be used |
| 130, 143 | interrupted by Ctrl-C, by SIGTERM; no unfinished file is left behind |
"""


def render() -> str:
    """The page as it should be."""
    names = [
        command.name or command.callback.__name__ for command in app.registered_commands if command.callback is not None
    ]
    parts = [_TOP, _section("cribsheet", [])]
    parts += [_section(f"cribsheet {name}", [name]) for name in names]
    for group in app.registered_groups:
        inner = group.typer_instance.registered_commands if group.typer_instance else []
        within = [command.name or command.callback.__name__ for command in inner if command.callback is not None]
        parts += [_section(f"cribsheet {group.name} {name}", [str(group.name), name]) for name in within]
    return "\n".join(parts)


def _section(title: str, arguments: list[str]) -> str:
    shown = io.StringIO()
    with patch.dict(os.environ, {"COLUMNS": "100"}), contextlib.redirect_stdout(shown):
        run([*arguments, "--help"])
    return f"## {title}\n\n```text\n{shown.getvalue().strip()}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
