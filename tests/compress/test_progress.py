"""How far a build is: told within a chunk too, and shown where somebody asked for a bar and nothing else."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest
from corpus import DOCUMENTS, FEW_SHOT

from cribsheet import CompressedKnowledgeLLM
from cribsheet.build import build_sheet
from cribsheet.compress.progress import Speed, Steps, shown
from cribsheet.errors import BudgetError
from cribsheet.living import edits


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def at_once(monkeypatch):
    """Every step is told of, however fast."""
    monkeypatch.setattr("cribsheet.compress.progress.WITHIN_SECONDS", -1.0)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"correction": "refit"},
        {"mode": "independent"},
        {"rate": 1},
        {"chunk_tokens": 60, "allocation": "uniform"},
    ],
    ids=str,
)
def test_a_bar_moves_before_the_first_chunk_is_read(tiny, at_once, how):
    told, how = [], {"rate": 2, **how}
    build_sheet(tiny, DOCUMENTS, FEW_SHOT, **how, progress=lambda read, total: told.append((read, total)))
    read, totals = [each for each, _ in told], {total for _, total in told}
    assert read[0] == 0 and read == sorted(read) and len(totals) == 1 and read[-1] in totals
    first = how.get("chunk_tokens", read[-1])
    assert len({each for each in read if 0 < each < first}) >= 2 * tiny.num_layers - 1


def test_a_document_that_comes_later_is_told_of_within_it_too(tiny, at_once):
    sheet, told = build_sheet(tiny, DOCUMENTS[:2], FEW_SHOT, rate=2, mode="independent"), []
    edits.extend(tiny, sheet, DOCUMENTS[2], progress=lambda read, total: told.append(read))
    assert told == sorted(told) and len(set(told)) > 3


def test_chunks_that_are_read_fast_are_told_of_when_they_are_done(tiny):
    told = []
    build_sheet(tiny, DOCUMENTS, FEW_SHOT, rate=2, chunk_tokens=60, progress=lambda read, total: told.append(read))
    assert told == [0, 60, 120, 180, told[-1]]


def test_a_step_waits_for_what_was_launched_before_it_tells(at_once):
    said = []
    step = Steps(lambda read: said.append(read), 100, 40, 4, lambda: said.append("waited"))
    for _ in range(6):
        step()
    assert said == ["waited", 110, "waited", 120, "waited", 130]  # the last one is the chunk's own


@pytest.mark.parametrize("how", [{}, {"mode": "independent"}, {"check": True}, {"retain": 0.9, "rate": None}])
def test_true_shows_a_bar_on_a_terminal_and_no_more(monkeypatch, tiny, capfd, how, at_once):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=tiny, **{"rate": 2, **how}, progress=True)
    assert "reading" in sys.stderr.getvalue() and "tokens/s" in sys.stderr.getvalue()
    assert capfd.readouterr().out == ""


def test_true_writes_lines_into_a_log_and_false_nothing(monkeypatch, tiny, capfd, at_once):
    monkeypatch.setattr("cribsheet.compress.progress._SECONDS_BETWEEN_LINES", 0)
    build_sheet(tiny, DOCUMENTS, FEW_SHOT, rate=2, progress=True)
    said = capfd.readouterr().err
    assert said.startswith("read ") and "tokens/s" in said and "\x1b" not in said
    build_sheet(tiny, DOCUMENTS, FEW_SHOT, rate=2, progress=False)
    assert capfd.readouterr() == ("", "")


def test_a_notebook_shows_a_bar_below_its_cell(monkeypatch, tiny, capfd, at_once):
    pieces = []

    def display(piece, display_id):
        pieces.append(piece)
        return SimpleNamespace(update=pieces.append)

    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object())))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    sheet = build_sheet(tiny, DOCUMENTS, FEW_SHOT, rate=2, progress=True)
    total = sheet.manifest.corpus_tokens
    assert all("<progress" in piece._repr_html_() for piece in pieces)
    assert f'value="{total}" max="{total}"' in pieces[-1]._repr_html_() and f"{total:,} of {total:,}" in repr(
        pieces[-1]
    )
    assert len(pieces) > 4 and capfd.readouterr() == ("", "")


def test_an_interpreter_in_a_terminal_is_no_notebook(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace()))
    monkeypatch.setattr(sys, "stderr", Terminal())
    with shown(True) as update:
        update(0, 10)
    assert "reading" in sys.stderr.getvalue()


@pytest.mark.parametrize("progress", ["yes", 1, 0, {}])
def test_what_is_neither_a_function_nor_a_truth_value_is_refused(tiny, progress):
    with pytest.raises(BudgetError, match="pass True for a bar"):
        CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=tiny, progress=progress)


def test_speed_counts_from_where_a_build_went_on():
    seconds = iter([0.0, 2.0])
    speed = Speed(clock=lambda: next(seconds))
    assert speed(500, 1000) is None
    assert speed(600, 1000) == (50.0, 8.0)
