"""Tables: which character separates their cells, and what their quotation marks mean."""

from __future__ import annotations

import csv
import io
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

_SEPARATORS = "\t;|,"  # of two that fit alike, the one that prose and numbers have less often
_SEEN, _FIRST = 1000, 1 << 22  # rows, and characters, by which a separator is judged
_NONE = "\x1f"  # separates nothing: no text has it
_SAID = re.compile(r'"?sep=([^\w\r\n"])"?\1*[^\S\r\n]*(?=[\r\n]|$)', re.I)  # what Excel reads in a first line
_NUMBER = re.compile(r"[-+(]?[^\w\s]?\s?\d[\d.,'\s]*\s?\S?\)?")
_JOINED = re.compile(r"[\t;|,]\S")  # two cells in one, as it seems
_LARGEST = 2**31 - 1  # characters, which is what a C long holds everywhere
_limit = threading.Lock()

Rows = list[list[str]]


def rows_of(text: str, *, tabs: bool) -> Rows:
    """All rows that are not empty; `tabs` for a file that says it is separated by tabs.

    Raises `csv.Error`, with the reason and the line as its arguments, for quotation marks that make no sense.
    """
    said = _SAID.match(text)
    if said:
        text, separator = text[said.end() :], said[1]  # with its line end, so that lines are counted as they stand
    else:
        separator = "\t" if tabs and "\t" in text else _evenest(text)
    return _with_tabs(text) if separator == "\t" else _parsed(text, separator)


def _evenest(text: str) -> str:
    """The separator by which most rows have as many cells as the first one."""
    best, chosen = (0.0, 0.0), _NONE
    for separator in _SEPARATORS:
        rows = _first_rows(text, separator)
        separates = rows and len(rows[0]) > 1 and (len(rows) == 1 or any(len(row) > 1 for row in rows[1:]))
        if separates and (fit := (_evenness(rows), _cleanness(rows))) > best:
            best, chosen = fit, separator
    return chosen


def _first_rows(text: str, separator: str) -> Rows:
    with _any_size(text):
        lines = csv.reader(io.StringIO(text[:_FIRST], newline=""), delimiter=separator, skipinitialspace=True)
        return list(islice(filter(_is_filled, lines), _SEEN))


def _evenness(rows: Rows) -> float:
    """Which share of the rows has as many cells as the header, which a table of a header only has."""
    return (sum(len(row) == len(rows[0]) for row in rows[1:]) + 1) / len(rows)


def _cleanness(rows: Rows) -> float:
    """Which share of the cells looks like one cell: "London, UK" and "3,50" do, "50;1" does not."""
    cells = [cell.strip() for row in rows for cell in row]
    return sum(not _JOINED.search(cell) or bool(_NUMBER.fullmatch(cell)) for cell in cells) / len(cells)


def _with_tabs(text: str) -> Rows:
    """Programs that write tabs quote no cell; spreadsheets quote those that hold a quotation mark or a line break.

    So quotation marks are meant where the rows come out as even with them as without.
    """
    plain = _parsed(text, "\t", quotes=False)
    if '"' not in text:
        return plain
    try:
        quoted = _parsed(text, "\t")
    except csv.Error:
        return plain
    if _evenness(plain) == 1 and len(plain) != len(quoted):  # a quotation mark that swallowed lines
        return plain
    return quoted if _evenness(quoted) >= _evenness(plain) else plain


def _parsed(text: str, separator: str, *, quotes: bool = True) -> Rows:
    # strict, because a quotation mark that never closes would otherwise swallow the rest of the file into one cell
    with _any_size(text):
        lines = csv.reader(
            io.StringIO(text, newline=""),
            delimiter=separator,
            quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
            skipinitialspace=True,
            strict=True,
        )
        try:
            return [line for line in lines if _is_filled(line)]
        except csv.Error as error:
            raise csv.Error(str(error), lines.line_num) from error


def _is_filled(line: list[str]) -> bool:
    return any(map(str.strip, line))


@contextmanager
def _any_size(text: str) -> Iterator[None]:
    """Let a cell be as long as the text. The module's limit is the process's, so it is put back, one at a time."""
    with _limit:
        before = csv.field_size_limit()
        csv.field_size_limit(min(max(before, len(text) + 1), _LARGEST))
        try:
            yield
        finally:
            csv.field_size_limit(before)
