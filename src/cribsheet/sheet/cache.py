"""Sheets that stay in host memory after their first use: those used last, up to a bound in bytes.

Keys and values of a large sheet are read from the disk when they are first used. From memory they go to the device at
the speed of the bus, all the faster from pinned memory, which is taken where there is a CUDA device.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from cribsheet.errors import BudgetError
from cribsheet.sheet import file
from cribsheet.sheet.archive.archive import archive_path
from cribsheet.sheet.registry import resolve
from cribsheet.sheet.sheet import Sheet

_Key = tuple[str, int, int, int]


class SheetCache:
    """At most `max_bytes` of sheets in host memory, for whoever opens and closes many of them. Thread-safe.

    `CompressedKnowledgeLLM.load(cache.load(path))` answers from one of them.

    A file that was written again is read again. A sheet larger than the bound is opened and not kept. Raises
    `BudgetError` for a bound below 1.
    """

    def __init__(self, max_bytes: int) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
            raise BudgetError(f"max_bytes is {max_bytes!r}; pass the most bytes of sheets to keep, at least 1.")
        self.max_bytes = max_bytes
        self._sheets: OrderedDict[_Key, Sheet] = OrderedDict()
        self._lock = threading.Lock()

    def load(self, place: str | Path) -> Sheet:
        """The sheet at a path, a URL, or `REGISTRY#NAME@VERSION`. Raises `SheetError` as `load_sheet`."""
        path = resolve(place)
        if (kept := self._kept(path)) is not None:
            return _with_archive(kept, path)
        key = _key(path) if path.is_file() else None  # of what is read or of what was there before, never of what comes
        opened = file.load(path)
        if key is None or _bytes(opened) > self.max_bytes:
            return opened
        sheet = _in_memory(opened)
        with self._lock:
            self._sheets[key] = sheet
            for old in [other for other in self._sheets if other[0] == key[0] and other != key]:
                del self._sheets[old]
            while self._held() > self.max_bytes:
                self._sheets.popitem(last=False)
        return sheet

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        with self._lock:
            return self._held()

    def __len__(self) -> int:
        """Sheets that are held."""
        return len(self._sheets)

    def clear(self) -> None:
        """Let go of all of them; open ones stay usable."""
        with self._lock:
            self._sheets.clear()

    def _kept(self, path: Path) -> Sheet | None:
        if not path.is_file():
            return None  # `file.load` says what is wrong
        key = _key(path)
        with self._lock:
            if key in self._sheets:
                self._sheets.move_to_end(key)
            return self._sheets.get(key)

    def _held(self) -> int:
        return sum(_bytes(sheet) for sheet in self._sheets.values())


def _key(path: Path) -> _Key:
    """What tells a file, and each version of it."""
    found = path.stat()
    return str(path.resolve()), found.st_ino, found.st_mtime_ns, found.st_size


def _with_archive(sheet: Sheet, path: Path) -> Sheet:
    """The same with the archive that lies beside its file by now, if one does: it may have come since."""
    if sheet.archive is None or sheet.archive.is_at(archive_path(path)):
        return sheet
    found = sheet.archive.at(archive_path(path))
    return sheet if found.trouble else dataclasses.replace(sheet, archive=found)


def _bytes(sheet: Sheet) -> int:
    return sheet.nbytes + sheet.indices.nbytes + sheet.origins.nbytes


def _in_memory(sheet: Sheet) -> Sheet:
    """The same with all of its layers in memory."""
    layers = [layer.with_each(_pinned) for layer in sheet.layers] if torch.cuda.is_available() else list(sheet.layers)
    return dataclasses.replace(sheet, layers=layers)


def _pinned(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, pin_memory=True).copy_(tensor)
