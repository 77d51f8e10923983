"""File formats: one small reader each, from the bytes of a file to its texts. `READERS` is the table.

A reader gets the bytes and the file's name (for messages) and gives `Record`s: one for a file of prose,
several for a file of many documents, none for a file without text. To support another format, write a reader
and add a row.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cribsheet.errors import DocumentError
from cribsheet.formats.data import read_csv, read_json, read_jsonl, read_tsv
from cribsheet.formats.html import read_html
from cribsheet.formats.pdf import read_pdf
from cribsheet.formats.record import Record
from cribsheet.formats.text import read_text

Reader = Callable[[bytes, str], list[Record]]

# No configuration (toml, yaml, ini): a task file beside the documents would give its answers away.
_PROSE = (".txt", ".text", ".md", ".markdown", ".rst", ".adoc", ".tex", ".log")
_CODE = (
    *(".py", ".js", ".ts", ".java", ".kt", ".swift", ".c", ".h", ".cc", ".cpp", ".hpp", ".cs", ".go", ".rs"),
    *(".rb", ".php", ".r", ".jl", ".sh", ".sql"),
)
READERS: dict[str, Reader] = {
    **dict.fromkeys((*_PROSE, *_CODE), read_text),
    **dict.fromkeys((".html", ".htm", ".xhtml"), read_html),
    ".pdf": read_pdf,
    ".json": read_json,
    **dict.fromkeys((".jsonl", ".ndjson"), read_jsonl),
    ".csv": read_csv,
    ".tsv": read_tsv,
}


def read_file(path: Path) -> list[Record]:
    """The texts of a file, read once; `DocumentError` for an unknown type or unreadable content."""
    reader = READERS.get(path.suffix.lower())
    name = path.as_posix()
    if reader is None:
        raise DocumentError(
            f"{name} is of an unsupported type ({path.suffix or 'no suffix'}); convert it to one of "
            f"{', '.join(sorted(READERS))}, or pass its text in Document(text, id)"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DocumentError(f"cannot read {name}: {error.strerror}; make it readable, or leave it out") from error
    return reader(data, name)
