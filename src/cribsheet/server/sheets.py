"""The sheets that a server answers from, by name."""

from __future__ import annotations

import contextlib
import datetime
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from cribsheet.asking.llama_cpp.served import ServedLlamaCpp
from cribsheet.errors import SheetError
from cribsheet.llm import CompressedKnowledgeLLM
from cribsheet.sheet.manifest import Manifest
from cribsheet.sheet.registry import is_url

logger = logging.getLogger(__name__)
Kb = CompressedKnowledgeLLM | ServedLlamaCpp
"""What answers from a sheet: our engine, or llama.cpp."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")


@dataclass(frozen=True, slots=True)
class Served:
    """A sheet under its name."""

    name: str
    kb: Kb

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

    def __init__(self, sheets: Mapping[str, Kb]) -> None:
        self._sheets = {_check(name): Served(name, kb) for name, kb in sheets.items()}

    @classmethod
    def open(cls, sheets: Sequence[str | Path], load: Callable[..., Kb] | None = None, **options: Any) -> Self:
        """Open `PATH` (named by its file) or `NAME=PATH` each, in our engine, its keys and values put on the device.

        `options` are those of `CompressedKnowledgeLLM.load`, or of another `load`, such as llama.cpp's. Raises
        `SheetError` for names that are none or taken.
        """
        opened: dict[str, Kb] = {}
        with contextlib.ExitStack() as undo:
            for each in sheets:
                name, place = named(each)
                if name in opened:
                    raise SheetError(f"Two sheets have the name {name!r}; write NAME={place} to give one another.")
                kb = undo.enter_context(contextlib.closing((load or _loaded)(place, **options)))
                logger.info("opened sheet %s: %d tokens, rate %.1f", name, kb.sheet.length, kb.sheet.rate)
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


def _loaded(place: str, **options: Any) -> CompressedKnowledgeLLM:
    """A sheet in our engine, its keys and values on the device before anybody asks."""
    kb = CompressedKnowledgeLLM.load(place, **options)
    try:
        assert kb.prefix.tokens
    except BaseException:
        kb.close()
        raise
    return kb


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
        path = re.sub(r"\?[^#]*", "", place) if is_url(place) else place
        name = re.sub(r"\.sheet\Z", "", path.rstrip("/").rsplit("/", 1)[-1])
    return _check(name), place


def _check(name: str) -> str:
    if not _NAME.match(name):
        raise SheetError(
            f"A sheet cannot be named {name!r}; use letters, digits, '.', '_' and '-', as in NAME=path/to/file.sheet."
        )
    return name
