"""What a reader gives: texts with what is known about them. Nothing here knows a format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cribsheet.errors import DocumentError


class Record(NamedTuple):
    """A text found in a file.

    `id` is the one that the file itself gives; `row` counts lines, rows or list items from 1 in a file of
    many.
    """

    text: str
    metadata: dict[str, Any]
    id: str | None = None
    row: int | None = None


def normalise(text: str) -> str:
    """The form in which every text is kept and spans are counted: LF line ends, no space around the whole."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def one(text: str, metadata: dict[str, Any] | None = None) -> list[Record]:
    """The single record of a file of prose, or none where there is no text."""
    return [Record(text, metadata or {})] if text.strip() else []


def is_record(value: object) -> bool:
    """Whether this is an object with a text: {"text": ..., "id": ..., "metadata": ...}."""
    return isinstance(value, Mapping) and isinstance(value.get("text"), str)


def record_of(value: Mapping[str, Any], where: str, row: int | None = None) -> Record:
    """A record from {"text", "id", "metadata"}; other keys are metadata too, a missing id is left open."""
    extra = {key: item for key, item in value.items() if key not in ("text", "id", "metadata")}
    metadata = value.get("metadata") or {}
    if not isinstance(metadata, Mapping):
        raise DocumentError(f"{where}: metadata is {short(metadata)}; give an object with named values")
    return Record(value["text"], extra | dict(metadata), given_id(value.get("id"), where), row)


def given_id(value: object, where: str) -> str | None:
    """An id as somebody gave it, a string or a whole number; None and "" mean that none was given."""
    if value is None or value == "":
        return None
    if isinstance(value, str) or type(value) is int:
        return str(value)
    raise DocumentError(f"{where}: the id is {short(value)}; give a string or a whole number, or leave it out")


def short(value: object) -> str:
    """A value as a message shows it: at most 60 characters."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
