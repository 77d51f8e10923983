"""JSON, JSON lines and tables: files of many documents, or one document of data."""

from __future__ import annotations

import csv
import io
import json

from cribsheet.errors import DocumentError
from cribsheet.formats.record import Record, is_record, one, record_of, short
from cribsheet.formats.text import decode


def read_json(data: bytes, name: str) -> list[Record]:
    """Objects with a `text`, alone or in a list, are documents; other JSON is one document, indented."""
    text = decode(data, name)
    if not text.strip():
        return []
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"{name} is broken JSON ({error}); repair it, or rename it to .txt") from error
    if is_record(value):
        return [record_of(value, name)]
    if isinstance(value, list) and value and all(map(is_record, value)):
        return [record_of(item, f"{name}, item {row}", row) for row, item in enumerate(value, 1)]
    return one(json.dumps(value, indent=2, ensure_ascii=False)) if value not in ([], {}, "", None) else []


def read_jsonl(data: bytes, name: str) -> list[Record]:
    """A document a line: an object with a `text`, or any other as 'key: value' lines."""
    lines = enumerate(decode(data, name).split("\n"), 1)  # not splitlines(): JSON strings may hold U+2028
    return [_line_record(line, f"{name}, line {row}", row) for row, line in lines if line.strip()]


def _line_record(line: str, where: str, row: int) -> Record:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"{where}: broken JSON ({error}) in {short(line)}; repair or remove the line") from error
    if is_record(value):
        return record_of(value, where, row)
    if isinstance(value, dict):
        filled = [f"{key}: {_cell(item)}" for key, item in value.items() if item not in ("", None)]
        return Record("\n".join(filled), {}, row=row)
    return Record(_cell(value), {}, row=row)


def _cell(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def read_csv(data: bytes, name: str) -> list[Record]:
    """A document per row where there is a column `text`, else one with a line 'header: value; ...' per row.

    The first row holds the headers. Commas separate, unless the first line has none and has semicolons or
    tabs. Beside a column `text`, `id` gives the ids and the other columns are metadata.
    """
    text = decode(data, name)
    first_line = text.lstrip("\r\n").partition("\n")[0]
    return _table(text, name, next((mark for mark in ",;\t" if mark in first_line), ","))


def read_tsv(data: bytes, name: str) -> list[Record]:
    """As `read_csv`, separated by tabs."""
    return _table(decode(data, name), name, "\t")


def _table(text: str, name: str, delimiter: str) -> list[Record]:
    # strict, because a quote that never closes would otherwise swallow the rest of the file into one cell
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    filled = (line for line in lines if any(map(str.strip, line)))
    try:
        header = [cell.strip() for cell in next(filled, [])]
        rows = [_named_cells(header, line) for line in filled]
    except csv.Error as error:
        raise DocumentError(
            f"{name}, line {lines.line_num}: broken table ({error}); repair the quotes, or use JSONL for long texts"
        ) from error
    if "text" in header:
        numbered = enumerate(rows, 1)
        return [record_of({"text": ""} | dict(row), f"{name}, row {number}", number) for number, row in numbered]
    return one("\n".join("; ".join(f"{key}: {' '.join(cell.split())}" for key, cell in row) for row in rows))


def _named_cells(header: list[str], line: list[str]) -> list[tuple[str, str]]:
    """A row's filled cells with their headers; without one, a cell is named by its column, never lost."""
    names = header + [""] * (len(line) - len(header))
    pairs = enumerate(zip(names, line, strict=False), 1)
    return [(name or f"column {number}", cell) for number, (name, cell) in pairs if cell.strip()]
