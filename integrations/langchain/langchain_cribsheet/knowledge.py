"""Sheets as LangChain's objects hold them: opened when first needed, and opened once.

LangChain rebuilds its objects from their fields (for `configurable_fields`, serialisation, copies). So what is loaded
lives here, outside of them, and a rebuilt object finds it again.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from cribsheet import CompressedKnowledgeLLM, SheetError
from cribsheet.sheet.file import read_manifest
from cribsheet.sheet.manifest import Manifest


class Knowledge:
    """A sheet with its model, loaded on first use and kept while anybody holds this object."""

    _alive: ClassVar[weakref.WeakValueDictionary[tuple[str, ...], Knowledge]] = weakref.WeakValueDictionary()
    _lock: ClassVar[threading.RLock] = threading.RLock()

    def __init__(self, spec: tuple[str, ...], sheet: str, model: str | None, options: Mapping[str, Any]) -> None:
        self.spec = spec
        self._sheet, self._model, self._options = sheet, model, dict(options)
        self._opened: CompressedKnowledgeLLM | None = None
        self._manifest: Manifest | None = None
        self._opening = threading.Lock()
        self._beside: list[Knowledge] = []  # what was asked for in place of this one stays as long as this one

    @classmethod
    def of(cls, sheet: str | None, model: str | None, options: Mapping[str, Any]) -> Knowledge:
        """The knowledge of a sheet file with a model; the same object for the same values while anybody holds it.

        A file that was written anew since is another sheet.
        """
        if not sheet:
            raise SheetError("No sheet was given; pass sheet=, or set CRIBSHEET_SHEET to the path of one.")
        spec = (*_identity(sheet), str(model), repr(sorted(options.items())))
        with cls._lock:
            found = cls._alive.get(spec)
            if found is None:
                found = cls._alive[spec] = cls(spec, sheet, model, options)
            return found

    @classmethod
    def around(cls, llm: CompressedKnowledgeLLM) -> Knowledge:
        """The knowledge of a model that is open already."""
        made = cls((f"open {id(llm)}",), "", None, {})
        made._opened = llm
        return made

    @classmethod
    def given(cls, value: Any, sheet: str | None, model: str | None, options: Mapping[str, Any]) -> Knowledge | None:
        """What the fields of one of LangChain's objects stand for; nothing if they name no sheet.

        Raises `ValueError` for a `value` that is neither a `CompressedKnowledgeLLM` nor one of these.
        """
        if isinstance(value, CompressedKnowledgeLLM):
            return cls.around(value)
        if value is not None and not isinstance(value, Knowledge):
            raise ValueError(f"knowledge is a {type(value).__name__}; give a CompressedKnowledgeLLM, or sheet=.")
        if not sheet:
            return value
        if value is None:
            return cls.of(sheet, model, options)
        return value.instead(sheet, model, options)  # a rebuilt object keeps what it had loaded

    def instead(self, sheet: str | None, model: str | None, options: Mapping[str, Any]) -> Knowledge:
        """Another one, which stays loaded as long as this one does; this one, if it is the same path and model."""
        if self._sheet and (sheet, model, dict(options)) == (self._sheet, self._model, self._options):
            return self
        other = Knowledge.of(sheet, model, options)
        with self._lock:
            if other is not self and other not in self._beside:
                self._beside.append(other)
        return other

    @property
    def is_open(self) -> bool:
        """Whether the model is loaded."""
        return self._opened is not None

    @property
    def llm(self) -> CompressedKnowledgeLLM:
        """The model with its sheet, loaded now if it was not yet."""
        with self._opening:
            if self._opened is None:
                self._opened = CompressedKnowledgeLLM.load(self._path, model=self._model, **self._options)
            return self._opened

    @property
    def manifest(self) -> Manifest:
        """What the sheet was made with; read from the file without loading anything else."""
        if self._opened is not None:  # its sheet may have got further documents
            return self._opened.sheet.manifest
        if self._manifest is None:
            self._manifest = read_manifest(self._path)
        return self._manifest

    @property
    def _path(self) -> str:
        """The file that was meant when this was made, wherever the process works now."""
        return self.spec[0] if Path(self.spec[0]).exists() else self._sheet

    def __copy__(self) -> Knowledge:
        """Itself: copies of LangChain's objects share what is loaded."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Knowledge:
        """Itself."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """For other processes, which open the file themselves."""
        if not self._sheet:
            raise TypeError(
                "A model around an open CompressedKnowledgeLLM cannot go to another process; save the sheet, and give "
                "its path as sheet=."
            )
        return Knowledge.of, (self._sheet, self._model, self._options)


def _identity(sheet: str) -> tuple[str, ...]:
    """Which file a path means now, and which version of it."""
    path = Path(sheet).expanduser().absolute()
    try:
        found = path.stat()
    except OSError:  # it may come later; whoever opens it will hear of it
        return str(path), "", ""
    return str(path), str(found.st_mtime_ns), str(found.st_ino)
