"""What the parts of this bench hand to each other, as JSON files in one folder.

`prepare.py` builds the sheets, asks our engine, and writes what is to be asked; `serve.py` asks one vLLM and writes
rows. Each is a process of its own, so that one that fails or hangs takes nothing along.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

SHEETS, WHOLE, PLAIN = "sheets", "whole contexts", "plain"


@dataclass(frozen=True, slots=True)
class Corpus:
    """A corpus as vLLM has it: `ids` that stand for the sheet exported to `file`, and those of the whole context.

    `nbytes` are the sheet's keys and values as vLLM holds them, `whole_nbytes` those of the context.
    """

    name: str
    file: str
    ids: list[int]
    whole: list[int]
    nbytes: int
    whole_nbytes: int


@dataclass(frozen=True, slots=True)
class Ours:
    """An answer of our engine: its tokens, and by how many nats each was likelier than the next best."""

    text: str
    tokens: list[int]
    margins: list[float]


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about a corpus, as it follows either: its tokens, how long its answer may be, and what is right.

    `ours` are our answers by the type that was computed in. `plain` are its tokens without anything before it.
    """

    corpus: int
    text: str
    type: str
    golds: list[str]
    ids: list[int]
    plain: list[int]
    longest: int
    ours: dict[str, Ours]


@dataclass(frozen=True, slots=True)
class Work:
    """All that is to be asked. `ends` are tokens at which answers end, and `stops` texts."""

    model: str
    corpora: list[Corpus]
    asked: list[Asked]
    ends: list[int]
    stops: list[str]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The work of a folder."""
        told = json.loads((folder / "work.json").read_text(encoding="utf-8"))
        told["corpora"] = [Corpus(**each) for each in told["corpora"]]
        told["asked"] = [_asked(**each) for each in told["asked"]]
        return cls(**told)

    def write(self, folder: Path) -> None:
        """Leave it in a folder."""
        (folder / "work.json").write_text(json.dumps(asdict(self)), encoding="utf-8")

    def parting(self, ours: Ours, theirs: Sequence[int]) -> float | None:
        """By how many nats we preferred our token where an answer parts from ours; nothing where none does."""
        kept = [[token for token in tokens if token not in self.ends] for tokens in (ours.tokens, theirs)]
        if kept[0] == kept[1]:
            return None
        places = (place for place, (a, b) in enumerate(zip(*kept, strict=False)) if a != b)
        return ours.margins[min(next(places, min(map(len, kept))), len(ours.margins) - 1)]


def _asked(ours: dict[str, Any], **told: Any) -> Asked:
    return Asked(**told, ours={dtype: Ours(**each) for dtype, each in ours.items()})


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows that were written so far."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def add_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows, so that they are there whatever comes after."""
    with file.open("a", encoding="utf-8") as opened:
        opened.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
