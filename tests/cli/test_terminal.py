"""What documents, names and answers hold never commands the terminal that shows it."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from cribsheet import CompressedKnowledgeLLM
from cribsheet.compare.report import print_table
from cribsheet.corpus.printable import in_line, json_text, plain
from cribsheet.server.telemetry.logs import JsonLines
from cribsheet.testing import save_tiny_model

# a title, a line of its own, the other direction, C1, a carriage return, rich's markup, separators, a bell
HOSTILE = "a\x1b]0;owned\x07\x1b[2J\r\n 99%  trusted [0:3]\u202etxt.\u2066\x9b31m\x7f\u2028\x85[red]b[/red]\t\x00\u061c"
COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


SRC = Path(__file__).parents[2] / "src"


def is_quiet(text):
    return not COMMANDS.search(text)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def sheet(model, tmp_path_factory):
    """Of a document whose id, text and metadata command a terminal, and so do task and system text."""
    documents = [
        {"id": HOSTILE, "text": f"Bob lives in {HOSTILE} Oslo.", "metadata": {"title": HOSTILE}},
        {"id": "b", "text": "Alice lives in Lisbon."},
    ]
    task = {"description": f"Who {HOSTILE}?", "examples": [(f"Q {HOSTILE}", f"A {HOSTILE}")]}
    options = {"model": model, "rate": 1.5, "mode": "independent", "scorer": "task"}
    with CompressedKnowledgeLLM.build(documents, task, **options) as kb:
        return kb.save(tmp_path_factory.mktemp("sheet") / "a.sheet")


def test_texts_are_shown_without_commands():
    assert plain("a\x1b[31mb\x9b\u202e\u2028") == "a\\x1b[31mb\\x9b\\u202e\\u2028"
    assert plain("Zoë, 你好,\n\tעברית 👩‍👩‍👧 [red]") == "Zoë, 你好,\n\tעברית 👩‍👩‍👧 [red]"
    assert in_line("a\nb\tc\r") == "a\\nb\\tc\\x0d"
    assert is_quiet(plain(HOSTILE)) and len(in_line(HOSTILE).splitlines()) == 1
    assert json.loads(json_text({HOSTILE: [HOSTILE]})) == {HOSTILE: [HOSTILE]} and is_quiet(json_text(HOSTILE))


def test_a_sheet_is_inspected_without_them(cli, sheet):
    code, out, err = cli("inspect", sheet)
    assert (code, err) == (0, "") and is_quiet(out)
    assert sum(line.startswith("a\\x1b]0;owned\\x07") for line in out.splitlines()) == 1
    assert not any(line.lstrip().startswith("99%") for line in out.splitlines()) and "[red]b[/red]" in out
    code, out, _ = cli("inspect", sheet, "--json")
    assert code == 0 and is_quiet(out) and json.loads(out)["manifest"]["documents"][0]["id"] == HOSTILE


@pytest.mark.parametrize("more", [[], ["--stream"], ["--retriever", "bm25"], ["--json"]])
def test_answers_and_sources_are_shown_without_them(cli, sheet, model, more):
    code, out, err = cli("ask", sheet, "Where does Bob live?", "--model", model, "--sources", "--max-tokens", 9, *more)
    assert code == 0 and is_quiet(out + err), err
    if "--json" in more:
        assert HOSTILE in [source["document_id"] for source in json.loads(out)["sources"]]
    else:
        assert not any(line.lstrip().startswith("99%  trusted") for line in out.splitlines())
        assert any("a\\x1b]0;owned" in line for line in out.splitlines())


def test_what_the_model_writes_is_shown_without_them(cli, sheet, model, monkeypatch):
    """An answer of tokens that command: every one of the tiny model's is tried."""
    code, out, _ = cli("chat", sheet, "--model", model, "--temperature", 50, "--seed", 1, stdin="Who?\nWhere?\n")
    assert code == 0 and is_quiet(out)


def test_errors_and_warnings_are_shown_without_them(cli, sheet, model, tmp_path):
    (tmp_path / "ab\x1b[31m\u202e\n99%.txt").write_text("")
    (tmp_path / "c\x9b31m.txt").write_text("Zoe lives in Zagreb.")
    new = tmp_path / "new\x1b[31m\n.sheet"
    given = ["--model", model, "--task", "Who?"]
    for command in (
        ["inspect", tmp_path / "no\x1b[31m.sheet"],
        ["ask", "no\u202e.sheet", "Who?"],
        ["remove", sheet, "x\x1b]0;t\x07", "--model", model],
        ["replace", sheet, HOSTILE.replace("\x00", ""), tmp_path / "none\x1b.txt", "--model", model],
        ["build", tmp_path / "nothing\x1b[1m", "-o", new, *given],
        ["nosuch\x1b[31m"],
        ["--debug", "ask", "no\u202e.sheet", "Who?"],
    ):
        code, out, err = cli(*command)
        assert code and is_quiet(out + err) and err, command
    command = ["build", tmp_path, "-o", new, "--rate", "1", "--scorer", "recent", *given]
    environment = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "cribsheet", *map(str, command)], env=environment, capture_output=True, text=True
    )  # pytest has handlers of its own, where there would be ours
    assert done.returncode == 0 and is_quiet(done.stdout + done.stderr)
    assert "skipped documents without text" in done.stderr and len(done.stderr.split("\n")) == 2, done.stderr
    assert len(done.stdout.split("\n")) == 2 and new.is_file()


def test_a_table_shows_types_as_they_are():
    row = dict.fromkeys(("rate", "n", "em", "ci_low", "ci_high", "f1", "set_f1", "tokens", "bytes", "seconds"), 1)
    shown = io.StringIO()
    print_table(
        [{**row, "method": "sheet", "type": f"[red]x[/red]{HOSTILE}", "retrieved": 1}], Console(file=shown, width=500)
    )
    assert "[red]x[/red]a\\x1b]0;owned" in shown.getvalue() and is_quiet(shown.getvalue())


def test_log_lines_are_shown_without_them():
    record = logging.LogRecord("cribsheet", logging.INFO, "", 0, "path %s", (HOSTILE,), None)
    line = JsonLines().format(record)
    assert is_quiet(line) and json.loads(line)["message"] == f"path {HOSTILE}"
