"""How sheets and answers look where a value is shown: in a line at a prompt, as a table in a notebook.

Whatever comes from documents and models is escaped: a notebook runs what it shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cribsheet.answer import Answer, Source
    from cribsheet.sheet import Sheet

_TEXT = 60  # characters of an answer's text in a line
_SNIPPET = 160  # characters of a source in a table
_ROWS = 20  # documents in a table


def sheet_line(sheet: Sheet) -> str:
    """What was condensed, to how much, and by which model."""
    made = sheet.manifest
    return (
        f"{_documents(len(made.documents))}, {made.corpus_tokens:,} tokens became {sheet.tokens:,} "
        f"(rate {sheet.rate:.1f}), {sheet.nbytes / 1e6:,.1f} MB in {made.dtype}, by {made.fingerprint.model}"
    )


def answer_line(answer: Answer) -> str:
    """The beginning of the text, why it ended, and how many sources it has."""
    text = answer.text if len(answer.text) <= _TEXT else answer.text[: _TEXT - 1] + "…"
    sources = f"{len(answer.sources)} source{'s' * (len(answer.sources) != 1)}"
    calls = f", calls {', '.join(call.name for call in answer.tool_calls)}" if answer.tool_calls else ""
    return (
        f"{text!r} ({answer.finish_reason}, {answer.usage.completion_tokens} tokens, {answer.mode}, {sources}{calls})"
    )


def sheet_table(sheet: Sheet) -> str:
    """HTML: the line, the task, and how much was kept of each document."""
    made, kept = sheet.manifest, sheet.kept_per_document()
    rows = [
        (
            escape(entry.id),
            f"{entry.tokens:,}",
            f"{kept[entry.id]:,.0f}",
            f"{kept[entry.id] / max(1, entry.tokens):.0%}",
        )
        for entry in made.documents[:_ROWS]
    ]
    more = len(made.documents) - len(rows)
    left = f"<p>and {_documents(more)} more</p>" if more > 0 else ""
    head = f"<p>{escape(sheet_line(sheet))}<br>task: {escape(sheet.task.description)}</p>"
    return head + _table(("document", "tokens", "kept", "share"), rows) + left


def answer_table(answer: Answer) -> str:
    """HTML: the text, and the sources with the place in each that was looked at most."""
    text = f'<p style="white-space: pre-wrap">{escape(answer.text)}</p>'
    if not answer.sources:
        return text
    rows = [
        (f"{source.weight:.0%}", escape(source.document_id), _place(source), escape(_snippet(source.text)))
        for source in answer.sources
    ]
    return text + _table(("attention", "document", "place", "text"), rows)


def _documents(count: int) -> str:
    return f"{count:,} document{'s' * (count != 1)}"


def _place(source: Source) -> str:
    return f"{source.start:,}–{source.stop:,}{', retrieved' if source.retrieved else ''}"


def _snippet(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SNIPPET else line[: _SNIPPET - 1] + "…"


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    cells = [("th", names), *(("td", row) for row in rows)]
    lines = ("".join(f"<{tag}>{cell}</{tag}>" for cell in row) for tag, row in cells)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
