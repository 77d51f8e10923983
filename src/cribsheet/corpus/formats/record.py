"""What a reader gives: texts with what is known about them. Nothing here knows a format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from cribsheet.errors import DocumentError

METADATA_DEPTH = 20  # what nests deeper, or in itself, is kept as its text
_SURROGATE = re.compile("[\ud800-\udfff]")


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
    """Whether this is an object with a text, which may be null: {"text": ..., "id": ..., "metadata": ...}."""
    return (
        isinstance(value, Mapping) and "text" in value and (isinstance(value["text"], str) or _is_null(value["text"]))
    )


def _is_null(value: object) -> bool:
    return value is None or (isinstance(value, float) and value != value)  # tables without gaps have NaN for nothing


def record_of(value: Mapping[str, Any], where: str, row: int | None = None) -> Record:
    """A record from {"text", "id", "metadata"}; other keys are metadata too, a missing id is left open."""
    extra = {key: item for key, item in value.items() if key not in ("text", "id", "metadata")}
    metadata = value.get("metadata") or {}
    if not isinstance(metadata, Mapping):
        raise DocumentError(f"{where}: metadata is {short(metadata)}; give an object with named values")
    text = "" if _is_null(value["text"]) else value["text"]
    return Record(text, extra | dict(metadata), given_id(value.get("id"), where), row)


def given_id(value: object, where: str) -> str | None:
    """An id as somebody gave it, a string or a whole number; None and blank strings mean that none was given."""
    if _is_null(value) or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str) or type(value) is int:
        return str(value)
    raise DocumentError(f"{where}: the id is {short(value)}; give a string or a whole number, or leave it out")


def surrogate_in(value: object, depth: int = METADATA_DEPTH) -> str:
    """Where a value, or anything in it down to `depth`, holds half a surrogate pair, in words; "" if nowhere.

    Such a half is a character that no encoding can store. It comes from escapes in JSON, and from bytes that were
    decoded with `surrogateescape`, as Python does with file names.
    """
    left: list[tuple[str, object, int]] = [("", value, 0)]
    while left:
        place, inner, level = left.pop()
        if isinstance(inner, Mapping) and level < depth:
            left += ((f"{place}.{key}", item, level + 1) for key, item in reversed(dict(inner).items()))
            left += ((f"the name {key!r}", str(key), depth) for key in inner)
        elif isinstance(inner, list | tuple) and level < depth:
            left += ((f"{place}[{number}]", item, level + 1) for number, item in enumerate(inner))
        elif not isinstance(inner, bool | int | float | None) and (found := _SURROGATE.search(str(inner))):
            at = f" of {place.removeprefix('.')}" if place else ""
            return f"half a surrogate pair, {found[0]!r}, at character {found.start()}{at}"
    return ""


def mending_of(found: str) -> str:
    """What a program can do about a text that `surrogate_in` found something in."""
    if re.search(r"\\udc[89a-f]", found):  # where Python puts bytes that it cannot decode
        return "decode its bytes in the encoding that they are in, or with errors='replace'"
    return "mend it with text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"


def short(value: object) -> str:
    """A value as a message shows it: at most 60 characters."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
