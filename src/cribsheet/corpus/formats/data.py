"""JSON, JSON lines and tables: files of many documents, or one document of data."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from typing import Any

from cribsheet.corpus.formats.encoding import in_json
from cribsheet.corpus.formats.record import Record, is_record, one, record_of, short, surrogate_in
from cribsheet.corpus.formats.tables import rows_of
from cribsheet.corpus.formats.text import decode
from cribsheet.errors import DocumentError

_LINE_END = re.compile(r"\r\n|\r|\n")  # not splitlines(): JSON strings may hold U+2028
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(data: bytes, name: str) -> list[Record]:
    """Objects with a `text`, alone or in a list, are documents; other JSON is one document, indented.

    In a list of documents, those without text are empty, and so is a document whose text is null.
    """
    text = decode(data, name, in_json(data))
    if not text.strip():
        return []
    try:
        value = json.loads(text, object_pairs_hook=_named_once)
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"{name} is broken JSON ({error}); repair it, or rename it to .txt") from error
    _refuse_half_pairs(value, text, name)
    if is_record(value):
        return [record_of(value, name)]
    if isinstance(value, list) and any(map(is_record, value)):
        return [_item(item, f"{name}, item {row}", row) for row, item in enumerate(value, 1)]
    if not _is_filled(value):
        return []
    return one(json.dumps(_as_written(text), indent=2, ensure_ascii=False))


def read_jsonl(data: bytes, name: str) -> list[Record]:
    """A document a line: an object with a `text`, or any other as 'key: value' lines.

    A line that holds nothing but an id, or a text that is null, is an empty document.
    """
    lines = enumerate(_LINE_END.split(decode(data, name, in_json(data))), 1)
    return [_line_record(line, f"{name}, line {row}", row) for row, line in lines if line.strip()]


def _line_record(line: str, where: str, row: int) -> Record:
    try:
        value = json.loads(line, object_pairs_hook=_named_once)
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"{where}: broken JSON ({error}) in {short(line)}; repair or remove the line") from error
    _refuse_half_pairs(value, line, where)
    return _item(value if is_record(value) else _as_written(line), where, row)


def _item(value: Any, where: str, row: int) -> Record:
    """One document of many."""
    if is_record(value):
        return record_of(value, where, row)
    if isinstance(value, dict):
        if not any(_is_filled(item) for key, item in value.items() if key not in ("id", "metadata")):
            return Record("", {}, row=row)
        filled = [f"{key}: {_cell(item)}" for key, item in value.items() if _is_filled(item)]
        return Record("\n".join(filled), {}, row=row)
    return Record(_cell(value) if _is_filled(value) else "", {}, row=row)


def _refuse_half_pairs(value: Any, text: str, where: str) -> None:
    """Raise `DocumentError` for half a surrogate pair in the value of JSON, where it comes from an escape."""
    if _HALF_PAIR.search(text) and (found := surrogate_in(value, depth=len(text))):
        raise DocumentError(
            f"{where} holds {found}: an escape without its other half, as \\ud83d\\ude00 has one; complete or remove it"
        )


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for name, value in pairs:
        if name in named:
            raise ValueError(f"the name {short(name)} stands twice in one object")
        named[name] = value
    return named


def _as_written(text: str) -> Any:
    """The value of sound JSON for people to read: numbers that Python would write otherwise as they stand, in quotes.

    A version 1.10 is not 1.1.
    """
    return json.loads(text, parse_float=lambda digits: digits if repr(float(digits)) != digits else float(digits))


def _is_filled(value: object) -> bool:
    return value not in ("", None, [], {})


def _cell(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def read_csv(data: bytes, name: str) -> list[Record]:
    """A document per row where there is a column `text`, else one with a line 'header: value; ...' per row.

    The first row holds the headers, unless it says `sep=;`, as Excel has it. What separates the cells is the one of
    tab, semicolon, bar and comma by which most rows have as many cells as the headers. Beside a column `text`, `id`
    gives the ids and the other columns are metadata.
    """
    return _table(decode(data, name), name, tabs=False)


def read_tsv(data: bytes, name: str) -> list[Record]:
    """As `read_csv`, separated by tabs if there are any; quotation marks are text where they enclose no cell."""
    return _table(decode(data, name), name, tabs=True)


def _table(text: str, name: str, *, tabs: bool) -> list[Record]:
    try:
        header, *lines = rows_of(text, tabs=tabs) or [[]]
    except csv.Error as error:
        reason, line = error.args
        raise DocumentError(
            f"{name}, line {line}: broken table ({reason}); repair the quotes, or use JSONL for long texts"
        ) from error
    header = _told_apart([cell.strip() for cell in header])
    if "text" in header:
        return [_row_record(header, line, f"{name}, row {row}", row) for row, line in enumerate(lines, 1)]
    rows = [_named_cells(header, line) for line in lines]
    return one("\n".join("; ".join(f"{key}: {' '.join(cell.split())}" for key, cell in row) for row in rows))


def _row_record(header: list[str], line: list[str], where: str, row: int) -> Record:
    if any(map(str.strip, line[len(header) :])):
        raise DocumentError(
            f"{where} has {len(line)} cells, but the header names {len(header)}, so its text may be cut; put cells "
            "that hold a separator into quotes, or use JSONL for long texts"
        )
    cells = dict(_named_cells(header, line))
    text, id_ = cells.pop("text", ""), cells.pop("id", "")
    return Record(text, dict(cells), id_.strip() or None, row)


def _told_apart(header: list[str]) -> list[str]:
    """Headers with a number where one stands twice, so that no cell takes another's place."""
    counts: Counter[str] = Counter()
    told: list[str] = []
    for name in header:
        counts[name] += 1
        told.append(f"{name} {counts[name]}" if name and counts[name] > 1 else name)
    return told


def _named_cells(header: list[str], line: list[str]) -> list[tuple[str, str]]:
    """A row's filled cells with their headers; without one, a cell is named by its column, never lost."""
    names = header + [""] * (len(line) - len(header))
    pairs = enumerate(zip(names, line, strict=False), 1)
    return [(name or f"column {number}", cell) for number, (name, cell) in pairs if cell.strip()]
