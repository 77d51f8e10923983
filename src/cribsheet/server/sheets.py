"""The sheets that a server answers from, by name."""

from __future__ import annotations

import contextlib
import datetime
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from cribsheet.errors import SheetError
from cribsheet.llm import CompressedKnowledgeLLM
from cribsheet.sheet.manifest import Manifest

logger = logging.getLogger(__name__)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")


@dataclass(frozen=True, slots=True)
class Served:
    """A sheet under its name."""

    name: str
    kb: CompressedKnowledgeLLM

    @property
    def digest(self) -> str:
        """What tells it from other sheets, and from other versions of itself."""
        return self.kb.sheet.manifest.digest


class Sheets(Protocol):
    """What a server answers from: it knows all of its sheets by their manifests, and may open them when asked."""

    @property
    def manifests(self) -> Mapping[str, Manifest]:
        """What there is, by name."""

    async def find(self, name: str) -> Served | None:
        """The sheet of that name, open; none if there is none."""

    def close(self) -> None:
        """Close all of them; running answers end."""


class Shelf(Mapping[str, Served]):
    """Open sheets by name. Those made with one model share it, and its engine."""

    def __init__(self, sheets: Mapping[str, CompressedKnowledgeLLM]) -> None:
        self._sheets = {_check(name): Served(name, kb) for name, kb in sheets.items()}

    @classmethod
    def open(cls, sheets: Sequence[str | Path], **options: Any) -> Self:
        """Open `PATH` (named by its file) or `NAME=PATH` each, and put its keys and values on the device.

        `options` are those of `CompressedKnowledgeLLM.load`. Raises `SheetError` for names that are none or taken.
        """
        opened: dict[str, CompressedKnowledgeLLM] = {}
        with contextlib.ExitStack() as undo:
            for each in sheets:
                name, place = named(each)
                if name in opened:
                    raise SheetError(f"Two sheets have the name {name!r}; write NAME={place} to give one another.")
                kb = undo.enter_context(CompressedKnowledgeLLM.load(place, **options))
                logger.info("opened sheet %s: %d tokens, rate %.1f", name, kb.prefix.tokens, kb.sheet.rate)
                opened[name] = kb
            undo.pop_all()
        return cls(opened)

    @property
    def manifests(self) -> Mapping[str, Manifest]:
        """What each of them was made with."""
        return {name: served.kb.sheet.manifest for name, served in self.items()}

    async def find(self, name: str) -> Served | None:
        """A sheet, or none."""
        return self.get(name)

    def close(self) -> None:
        """Close all of them; running answers end."""
        for served in self._sheets.values():
            served.kb.close()

    def __getitem__(self, name: str) -> Served:
        return self._sheets[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sheets)

    def __len__(self) -> int:
        return len(self._sheets)


def created(manifest: Manifest) -> int:
    """When a sheet was built, in seconds since 1970."""
    try:
        return int(datetime.datetime.fromisoformat(manifest.created).timestamp())
    except (ValueError, OverflowError, OSError):  # a year that the system's calendar does not have
        return 0


def named(sheet: str | Path) -> tuple[str, str]:
    """Name and place of a sheet from `PATH` or `NAME=PATH`. Raises `SheetError` for a name that cannot be one."""
    name, equals, place = str(sheet).partition("=")
    if not equals or not _NAME.match(name):
        place = str(sheet)
        name = re.sub(r"\.sheet\Z", "", place.rstrip("/").rsplit("/", 1)[-1])
    return _check(name), place


def _check(name: str) -> str:
    if not _NAME.match(name):
        raise SheetError(
            f"A sheet cannot be named {name!r}; use letters, digits, '.', '_' and '-', as in NAME=path/to/file.sheet."
        )
    return name
