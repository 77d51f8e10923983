"""File formats: one small reader each, from the bytes of a file to its texts. `READERS` is the table.

A reader gets the bytes and the file's name (for messages) and gives `Record`s: one for a file of prose,
several for a file of many documents, none for a file without text. To support another format, write a reader
and add a row.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from cribsheet.corpus.formats.data import read_csv, read_json, read_jsonl, read_tsv
from cribsheet.corpus.formats.html import read_html
from cribsheet.corpus.formats.office import read_docx, read_pptx
from cribsheet.corpus.formats.pdf import read_pdf
from cribsheet.corpus.formats.record import Record
from cribsheet.corpus.formats.text import read_text
from cribsheet.errors import DocumentError

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
    ".docx": read_docx,
    ".pptx": read_pptx,
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
    return reader(_bytes_of(path, name), name)


def _bytes_of(path: Path, name: str) -> bytes:
    """The content of a regular file. Pipes, sockets and devices have no end, or act when they are read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DocumentError(f"{name} is no regular file, but {_kind_of(path)}; copy its content, or leave it out")
        with open(path, "rb", opener=_without_waiting) as file:  # it may have become a pipe since
            return file.read()
    except OSError as error:
        raise DocumentError(f"cannot read {name}: {error.strerror}; make it readable, or leave it out") from error
    except (MemoryError, OverflowError) as error:
        raise DocumentError(f"{name} is larger than this machine's memory; split it, or leave it out") from error


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _kind_of(path: Path) -> str:
    kinds = {"a pipe": path.is_fifo(), "a socket": path.is_socket(), "a folder": path.is_dir()}
    return next((kind for kind, fits in kinds.items() if fits), "a device")
