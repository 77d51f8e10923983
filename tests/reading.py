"""Files written into the folder of a test, and the documents that come out of them."""

from __future__ import annotations

from pathlib import Path

from cribsheet.corpus.documents import Document, read_documents


def read(name: str, content: str | bytes) -> list[Document]:
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    return read_documents(Path(name))


def text_of(name: str, content: str | bytes) -> str:
    [document] = read(name, content)
    return document.text
