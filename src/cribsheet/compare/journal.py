"""Rows as lines of a file while they come, so that a bench that was killed goes on where it was."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from cribsheet.errors import RequestError
from cribsheet.sheet.atomic import replacing

logger = logging.getLogger(__name__)
R = TypeVar("R")
_LONG = 1000  # characters of a line


class Journal(Generic[R]):
    """The rows of an unfinished run, in a file beside its output; without an output, in memory only."""

    def __init__(
        self,
        output: Path | None,
        setup: Mapping[str, Any],
        row: Callable[..., R],
        *,
        told: Callable[[str], object] = logger.info,
    ) -> None:
        """Read what an earlier run left, of which `row` makes rows (dataclasses); `told` hears of it.

        Raises `RequestError` if that was a run with another `setup`.
        """
        self.rows: list[R] = []
        self._path = unfinished(output) if output else None
        if self._path is None:
            return
        head = json.dumps(setup, sort_keys=True)
        if self._path.exists():
            first, lines = read_lines(self._path)
            if json.dumps(first, sort_keys=True) != head:
                raise RequestError(f"{str(self._path)!r} is of another comparison; finish that one, or remove the file")
            self.rows += [row(**line) for line in lines]
            if lines:
                told(f"going on after {len(lines)} answers")
        write_whole(self._path, "".join(line + "\n" for line in (head, *map(_line, self.rows))))

    def add(self, rows: Iterable[R]) -> None:
        """Remember rows, at once."""
        new = list(rows)
        self.rows += new
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(_line(row) + "\n" for row in new))

    def remove(self) -> None:
        """Forget the file; the result is written."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def unfinished(output: Path) -> Path:
    """Where the rows of a run are while it goes on."""
    return output.with_name(output.name + ".partial")


def read_lines(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The setup and the rows that a journal holds; what follows its last line end was cut off."""
    first, *rest = path.read_text(encoding="utf-8").split("\n")
    return json.loads(first), [json.loads(line) for line in rest[:-1]]


def write_rows(path: Path, result: Mapping[str, Any]) -> None:
    """JSON of a result, an entry a line and a row a line, so that it is read and compared line by line.

    Rows are mappings, lists or dataclasses in a list; what JSON does not know is written as its text.
    """
    entries = (f" {_json(name)}: {_lines(value)}" for name, value in result.items())
    write_whole(path, "{\n" + ",\n".join(entries) + "\n}\n")


def write_whole(path: Path, text: str) -> None:
    """Whole or not at all."""
    with replacing(path) as unfinished:
        Path(unfinished).write_text(text, encoding="utf-8")


def _lines(value: Any) -> str:
    """Rows in a list, and the entries of a large mapping, a line each; all else in one line."""
    if isinstance(value, list) and value and all(isinstance(row, Mapping | list) or is_dataclass(row) for row in value):
        return "[\n" + ",\n".join(map(_line, value)) + "\n ]"
    line = _json(value)
    if isinstance(value, Mapping) and len(line) > _LONG:
        return "{\n" + ",\n".join(_json({name: entry})[1:-1] for name, entry in value.items()) + "\n }"
    return line


def _line(row: Any) -> str:
    return _json(asdict(row) if is_dataclass(row) else row)  # type: ignore[arg-type]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
