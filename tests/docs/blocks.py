"""Runs the code blocks of a documentation page, and can write down what they really print.

A page is one session, from top to bottom, in an empty folder:

    ```python      examples with `>>>` run as in doctest, anything else is executed; what it prints stands behind it in
                   a block ```text
    ```console     lines after `$ ` run in a shell, `cribsheet` in this process; what follows is the output
    ```{code-block} with a `:caption:` writes a file of that name
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cribsheet.cli import run

SRC = Path(__file__).parents[2] / "src"
_BLOCK = re.compile(
    r"^```(?P<kind>python|console|\{code-block\}[^\n]*)\n(?P<body>.*?)^```$"
    r"(?:\n\n```text\n(?P<output>.*?)^```$)?",
    re.M | re.S,
)
_BETWEEN = "```\n\n```text\n"  # a block and what it prints
_CAPTION = re.compile(r"\A:caption: (?P<name>\S+)\n+")
_PROGRESS = re.compile(r"^read [\d,]+ of [\d,]+ tokens.*\n", re.M)  # shown by slow machines only
_VOLATILE = [  # what differs from run to run and from machine to machine
    (re.compile(r"\d{4}-\d\d-\d\dT[\d:]+\+00:00"), "<time>"),
    (re.compile(r"\b[0-9a-f]{16}\b"), "<digest>"),
    (re.compile(r"^(seconds.*?) [\d. -]+$", re.M), r"\1 #"),
    (re.compile(r"[\d,.]+ (bytes|MB|s|threads|tokens/s)\b"), r"# \1"),
    (re.compile(r"[\d,]+ (of [\d,]+ positions)"), r"# \1"),  # of the longest head, which is decided by last digits
    (re.compile(r"\d+\.\d+|\d+%"), "#"),
    (re.compile("[█#]+"), "#"),  # bars, of what takes longer elsewhere
    (re.compile(r" +"), " "),
]


@dataclass
class Step:
    """A piece of a block: what is run, what should be printed, and what was."""

    source: str
    wanted: str
    printed: str = ""

    @property
    def is_right(self) -> bool:
        """Whether the output is what the page shows; `...` on the page stands for anything."""
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        return doctest.OutputChecker().check_output(_steady(self.wanted), _steady(self.printed), flags)

    @property
    def updated(self) -> str:
        """Source with its true output."""
        return self.source + (self.wanted if self.is_right else self.printed)


@dataclass
class Session:
    """What the blocks of one page share."""

    folder: Path
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__page__"})

    def run(self, kind: str, body: str, output: str | None = None) -> list[Step]:
        """The steps of a block, with what they printed; `output` is that of a plain block, as the page shows it."""
        with contextlib.chdir(self.folder):
            if kind == "python":
                return self._python(body, output)
            if kind == "console":
                return self._console(body)
            return self._file(body)

    def _python(self, body: str, output: str | None) -> list[Step]:
        if not body.lstrip().startswith(">>>"):
            printed = self._execute(body, "exec")
            return [Step(body if output is None and not printed else body + _BETWEEN, output or "", printed)]
        steps = []
        for piece in doctest.DocTestParser().parse(body):
            if isinstance(piece, str):
                continue
            source = "".join(
                f"{'>>>' if n == 0 else '...'} {line}" for n, line in enumerate(piece.source.splitlines(keepends=True))
            )
            steps.append(Step(source, piece.want, self._execute(piece.source, "single")))
        return steps

    def _execute(self, source: str, mode: str) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            try:
                exec(compile(source, "<page>", mode, dont_inherit=True), self.names)
            except Exception as error:
                printed.write(f"Traceback (most recent call last):\n    ...\n{type(error).__name__}: {error}\n")
        return printed.getvalue()

    def _console(self, body: str) -> list[Step]:
        steps = []
        for part in re.split(r"^(?=\$ )", body, flags=re.M):
            if part:
                command, output = re.match(r"(\$ (?:[^\n]*\\\n)*[^\n]*\n)(.*)", part, re.S).groups()  # type: ignore[union-attr]
                steps.append(Step(command, output, _shell(command[2:])))
        return steps

    def _file(self, body: str) -> list[Step]:
        caption = _CAPTION.match(body)
        if caption:
            file = self.folder / caption["name"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(body[caption.end() :], encoding="utf-8")
        return [Step(body, "")]


def run_page(text: str, session: Session) -> Iterator[tuple[str, list[Step]]]:
    """Run the blocks of a page in order: each block as it stands on the page, and its steps."""
    for block in _BLOCK.finditer(text):
        plain = block["kind"] == "python" and not block["body"].lstrip().startswith(">>>")
        output = block["output"] if plain else None
        shown = block["body"] if output is None else block["body"] + _BETWEEN + output
        yield shown, session.run(block["kind"], block["body"], output)


def _shell(command: str) -> str:
    before, _, last = command.replace("\\\n", " ").strip().rpartition(" | ")
    if not last.startswith("cribsheet "):
        return _bash(command)
    given = _bash(before)
    printed, stdin = io.StringIO(), sys.stdin
    sys.stdin = io.StringIO(given)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            run(shlex.split(last)[1:])
    finally:
        sys.stdin = stdin
    return _PROGRESS.sub("", printed.getvalue())


def _bash(command: str) -> str:
    places = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(SRC)}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env={**os.environ, **places})
    assert done.returncode == 0, done.stderr
    return done.stdout


def _steady(text: str) -> str:
    for pattern, replacement in _VOLATILE:
        text = pattern.sub(replacement, text)
    return text
