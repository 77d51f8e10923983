"""Tables for notebooks. Whatever comes from documents and models is escaped by who fills them: a notebook runs it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    cells = [("th", names), *(("td", row) for row in rows)]
    lines = ("".join(f"<{tag}>{cell}</{tag}>" for cell in row) for tag, row in cells)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
