"""Rows as lines of a file while they come, so that a bench that was killed goes on where it was."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

from cribsheet.errors import RequestError
from cribsheet.sheet.atomic import replacing

logger = logging.getLogger(__name__)
R = TypeVar("R")


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


def tell_progress() -> None:
    """Show on stderr what benches tell of their progress, also where other libraries are to be quiet."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("cribsheet_bench").setLevel(logging.INFO)


def unfinished(output: Path) -> Path:
    """Where the rows of a run are while it goes on."""
    return output.with_name(output.name + ".partial")


def read_lines(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The setup and the rows that a journal holds; what follows its last line end was cut off."""
    first, *rest = path.read_text(encoding="utf-8").split("\n")
    return json.loads(first), [json.loads(line) for line in rest[:-1]]


def write_rows(path: Path, head: Mapping[str, Any], rows: Sequence[Any]) -> None:
    """JSON of a head and "rows" (dataclasses), a row a line, so that it is read and compared line by line."""
    told = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items())
    write_whole(path, "{\n" + told + ' "rows": [\n' + ",\n".join(map(_line, rows)) + "\n ]\n}\n")


def write_whole(path: Path, text: str) -> None:
    """Whole or not at all."""
    with replacing(path) as unfinished:
        Path(unfinished).write_text(text, encoding="utf-8")


def _line(row: Any) -> str:
    return json.dumps(asdict(row), ensure_ascii=False)
