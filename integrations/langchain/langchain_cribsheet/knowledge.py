"""Sheets as LangChain's objects hold them: opened when first needed, and opened once.

LangChain rebuilds its objects from their fields (for `configurable_fields`, serialisation, copies). So what is loaded
lives here, outside of them, and a rebuilt object finds it again.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from typing import Any, ClassVar

from cribsheet import CompressedKnowledgeLLM
from cribsheet.errors import SheetError
from cribsheet.sheet import Manifest
from cribsheet.storage import read_manifest


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
        """The knowledge of a sheet file with a model; the same object for the same values while anybody holds it."""
        if not sheet:
            raise SheetError("No sheet was given; pass sheet=, or set CRIBSHEET_SHEET to the path of one.")
        spec = (sheet, str(model), repr(sorted(options.items())))
        with cls._lock:
            found = cls._alive.get(spec)
            if found is None:
                found = cls._alive[spec] = cls(spec, sheet, model, options)
            return found

    @classmethod
    def around(cls, llm: CompressedKnowledgeLLM) -> Knowledge:
        """The knowledge of a model that is open already."""
        made = cls((f"open {id(llm)}",), "", None, {})
        made._opened, made._manifest = llm, llm.sheet.manifest
        return made

    def instead(self, sheet: str | None, model: str | None, options: Mapping[str, Any]) -> Knowledge:
        """Another one, which stays loaded as long as this one does."""
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
                self._opened = CompressedKnowledgeLLM.load(self._sheet, model=self._model, **self._options)
            return self._opened

    @property
    def manifest(self) -> Manifest:
        """What the sheet was made with; read from the file without loading anything else."""
        if self._manifest is None:
            self._manifest = self._opened.sheet.manifest if self._opened else read_manifest(self._sheet)
        return self._manifest
