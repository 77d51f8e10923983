"""The archive of a sheet, open: any stretch of the corpus as it was read, without reading it.

Nothing of it stays in memory but where tokens came from and the digests of its blocks. A stretch is read from the file
when it is asked for (from the system's cache, if it was lately), and each block is compared with its digest the first
time. The file is not mapped: if it were cut while it is served, that would end the process.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cribsheet.errors import RequestError, SheetError
from cribsheet.sheet.archive.layout import ABOUT, SUFFIX, Layout, Parts, root_digest
from cribsheet.sheet.layers import StoredLayer
from cribsheet.sheet.manifest import Manifest
from cribsheet.sheet.tensors import TensorFile, is_usable
from cribsheet.vocabulary import StorageDtype

_CPU = torch.device("cpu")
_PIECE = 1 << 24  # bytes that are copied at once
_VERIFIED_AT_ONCE = 8  # blocks


@dataclass(frozen=True, slots=True)
class _Index:
    """What is read of an archive when it is first used: its layout, `origins` (N, 3), and `digests` (B, 32)."""

    layout: Layout
    origins: Tensor
    digests: Tensor


class Archive:
    """Keys and values of every token that was read for a sheet, in a file at `path`. Thread-safe.

    `tokens` are those of the corpus, the preamble's included; an index is that of `Sheet.indices`. Keys are before
    rotation, so that a stretch may be placed anywhere. It stays the file that was opened, whatever comes to stand at
    its path. What reads it raises `SheetError` if the file is missing, damaged, or of another sheet.
    """

    def __init__(self, path: str | Path, manifest: Manifest, owner: object = None) -> None:
        """The archive that a manifest names.

        A file with an `owner` is written to by nobody else, so that it may get another name instead of being copied;
        if it is temporary, it is there as long as its owner.
        """
        assert manifest.archive is not None
        self.path, self._manifest, self._entry = Path(path), manifest, manifest.archive
        self._owner, self._lock, self._verified = owner, threading.Lock(), set[int]()
        self._version = (0, 0)
        self._index: _Index | None = None
        self._file: TensorFile | None = None
        self._trouble = ""
        try:
            self._file = TensorFile(self.path)
        except FileNotFoundError:
            self._trouble = (
                f"The archive {str(self.path)!r} is missing; put it there again, beside its sheet, and open that "
                "again, or build the sheet again with archive=True."
            )
        except (OSError, ValueError) as error:
            self._trouble = _damaged(self.path, error)
        else:
            if self._file.size != self.bytes:
                self._trouble = _foreign(self.path, f"it has {self._file.size:,} bytes", f"one of {self.bytes:,}")

    @classmethod
    def beside(cls, sheet: str | Path, manifest: Manifest) -> Archive | None:
        """The archive of a sheet's file, or none if its manifest names none."""
        return cls(archive_path(sheet), manifest) if manifest.archive is not None else None

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it is opened again, where its file is seen under the same path."""
        return Archive, (self.path, self._manifest)

    def __repr__(self) -> str:
        """One line."""
        return f"<Archive of {self.tokens:,} tokens, {self.bytes / 1e6:,.1f} MB in {self.dtype}, {str(self.path)!r}>"

    @property
    def tokens(self) -> int:
        """Length of the corpus, the preamble included."""
        return self._manifest.corpus_tokens

    @property
    def dtype(self) -> StorageDtype:
        """The type that its numbers are stored in."""
        return self._entry.dtype

    @property
    def bytes(self) -> int:
        """Of its file."""
        return self._entry.bytes

    @property
    def digest(self) -> str:
        """What the sheet's manifest says of it."""
        return self._entry.digest

    @property
    def trouble(self) -> str:
        """Why it cannot be read, as far as opening it shows, or empty."""
        return self._trouble

    @property
    def layout(self) -> Layout:
        """How it lies in its file."""
        return self._known().layout

    @property
    def origins(self) -> Tensor:
        """(N, 3) int32: document of each token (-1: none), first and last-plus-one character in it."""
        return self._known().origins

    @property
    def digests(self) -> Tensor:
        """(B, 32) uint8, of its blocks."""
        return self._known().digests

    def stretch(self, first: int, stop: int) -> list[tuple[Tensor, Tensor]]:
        """Keys before rotation and values (K, stop - first, D) of tokens `first` to `stop` in every layer, on the CPU.

        They are in the float type that they are stored in, of int8 and int4 in float32. Raises `RequestError` for
        tokens that are not there.
        """
        kept = torch.float32 if self.dtype in ("int8", "int4") else getattr(torch, self.dtype)
        restored = (layer.restored(_CPU, kept) for layer in self.layers(first, stop))
        return [(layer.keys, layer.values) for layer in restored]

    def layers(self, first: int, stop: int) -> list[StoredLayer]:
        """The same as it is stored, for whoever restores it on a device: a quarter of the bytes in int4."""
        if not 0 <= first < stop <= self.tokens:
            raise RequestError(
                f"Tokens {first} to {stop} were asked for; the archive has those from 0 to {self.tokens}."
            )
        layout = self._known().layout
        begin, end = bisect_right(layout.ends, first) - 1, bisect_left(layout.ends, stop)
        start = layout.ends[begin]
        parts = {
            name: rows if layout.is_of_blocks(name) else rows[first - start : stop - start]
            for name, rows in self.blocks(begin, end).items()
        }
        ends = layout.ends[begin : end + 1]
        bounds = [min(max(place, first), stop) for place in ends]
        return layout.layers_of(parts, [after - before for before, after in pairwise(bounds)])

    def places(self, document: int, first_char: int, last_char: int) -> tuple[int, int]:
        """The tokens [first, stop) that hold characters `first_char` to `last_char` of a document.

        Raises `RequestError` where there are none.
        """
        number, begin, end = self.origins.unbind(1)
        held = ((number == document) & (begin < last_char) & (end > first_char)).nonzero().flatten()
        if not len(held):
            raise RequestError(
                f"There are no tokens of the characters {first_char} to {last_char} of document {document} in the "
                "archive; pass a number of `Sheet.documents` and characters in its text."
            )
        return int(held[0]), int(held[-1]) + 1

    def blocks(self, first: int, stop: int) -> dict[str, Tensor]:
        """The large tensors' rows of blocks `first` to `stop`, compared with their digests the first time."""
        known = self._known()
        ends, layout = known.layout.ends, known.layout
        try:
            found = {
                name: self._rows(name, first, stop) if layout.is_of_blocks(name) else
                self._rows(name, ends[first], ends[stop])
                for name in layout.rows
            }  # fmt: skip
            version = self._opened().version()
        except (OSError, ValueError) as error:
            raise SheetError(_damaged(self.path, error)) from error
        with self._lock:
            if version != self._version:
                self._version = version
                self._verified.clear()
            unsure = [block for block in range(first, stop) if block not in self._verified]
        for block in unsure:
            self._verify(known, block, first, found)
        with self._lock:
            self._verified.update(unsure)
        return found

    def verify(self) -> None:
        """Read all of it and compare with its digests. Raises `SheetError` for the first difference."""
        blocks = len(self._known().layout.blocks)
        with self._lock:
            self._verified.clear()
        for first in range(0, blocks, _VERIFIED_AT_ONCE):
            self.blocks(first, min(first + _VERIFIED_AT_ONCE, blocks))

    def check(self) -> None:
        """Raise `SheetError` unless all of it can be read; what was just written, and nobody else has, need not be."""
        if self._owner is None or not self._opened().is_alone():
            self.verify()
        else:
            self._known()

    def is_at(self, path: Path) -> bool:
        """Whether a path leads to this very file."""
        try:
            return self._file is not None and self._file.is_same(path)
        except OSError:
            return False

    def at(self, path: Path) -> Archive:
        """The same archive, if it is that which lies at another path."""
        return Archive(path, self._manifest)

    def copy_to(self, unfinished: str) -> None:
        """Put the file at a path too, where an empty one stands: by a link if nobody else has it, else by copying."""
        file = self._opened()
        # a file that was saved is copied: two sheets would share rights, and whatever is written to one of them
        if self._owner is not None and file.is_alone() and _link(self.path, unfinished):
            if file.is_same(Path(unfinished)):
                return
            _empty(unfinished)  # another build has taken the name since
        with open(unfinished, "wb") as copy:
            for start in range(0, file.size, _PIECE):
                copy.write(file.piece(min(_PIECE, file.size - start), start))

    def _rows(self, name: str, first: int, stop: int) -> Tensor:
        return self._opened().rows(name, first, stop)

    def _verify(self, known: _Index, block: int, first: int, found: Parts) -> None:
        """Compare a block with its digest, given the rows of several from `first` on."""
        ends, layout = known.layout.ends, known.layout
        own = layout.block_of(found, block, first)
        if layout.block_digest(own) != bytes(known.digests[block].tolist()):
            raise SheetError(
                f"The archive {str(self.path)!r} is damaged: its tokens {ends[block]} to {ends[block + 1]} are not "
                "those that were written; copy it again from where it came, or build the sheet again."
            )
        if wrong := next((name for name, rows in own.items() if not is_usable(rows)), None):
            raise SheetError(
                f"The archive {str(self.path)!r} has numbers in {wrong!r} that no model gives; build the sheet again."
            )

    def _opened(self) -> TensorFile:
        if self._file is None or self._trouble:
            raise SheetError(self._trouble)
        return self._file

    def _known(self) -> _Index:
        """What is read once; it is compared with what the sheet says of it."""
        with self._lock:
            if self._index is None:
                file = self._opened()
                try:
                    self._index = self._read_index(file)
                except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
                    if isinstance(error, SheetError):
                        raise
                    raise SheetError(_damaged(self.path, error)) from error
                self._version = file.version()
            return self._index

    def _read_index(self, file: TensorFile) -> _Index:
        made = self._manifest.fingerprint
        if ABOUT not in file.metadata:
            raise ValueError("it is no archive")
        small = file.read(("origins", "blocks", "digests"))
        found = root_digest(file.piece(file.begin, 0), small)
        if found != self.digest:
            raise SheetError(_foreign(self.path, f"its digest is {found[:16]}", self.digest[:16]))
        blocks = small["blocks"].tolist()
        layout = Layout(made.layers, made.kv_heads, made.head_size, self.dtype, blocks)
        here = {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}
        if here != {name: (kind.dtype, kind.shape) for name, kind in layout.tensors.items()} or 0 in blocks:
            raise ValueError("its tensors are not those that it must have")
        if not layout.fits(self._manifest):
            raise ValueError(f"it has {layout.tokens} tokens, and the corpus has {self.tokens}")
        return _Index(layout, small["origins"], small["digests"])


def archive_path(sheet: str | Path) -> Path:
    """Where the archive of a sheet's file lies: beside its name, or for a link to it also beside the file itself."""
    beside = Path(f"{sheet}{SUFFIX}")
    if os.path.islink(sheet) and not os.path.lexists(beside):
        return Path(f"{os.path.realpath(sheet)}{SUFFIX}")
    return beside


def is_archive(path: Path) -> bool:
    """Whether an archive lies at a path."""
    try:
        return path.is_file() and ABOUT in TensorFile(path).metadata
    except (OSError, ValueError):
        return False


def _damaged(path: Path, error: Exception) -> str:
    return (
        f"The archive {str(path)!r} cannot be read ({error}); copy it again from where it came, or build the sheet "
        "again with archive=True."
    )


def _foreign(path: Path, found: str, named: str) -> str:
    return (
        f"The archive {str(path)!r} is of another sheet, was changed, or a save was interrupted between sheet and "
        f"archive: {found}, and the sheet names {named}; put the sheet's own archive there, save the sheet that was "
        "being saved again, or build again with archive=True."
    )


def _link(path: Path, unfinished: str) -> bool:
    """Whether a file got another name, that of an empty one, which stays if it did not."""
    named = f"{unfinished}.link"
    try:
        os.link(path, named)
    except OSError:
        return False  # on another disk, for one
    os.replace(named, unfinished)
    return True


def _empty(path: str) -> None:
    """A file of its own where a link stood, read by nobody before it has its rights."""
    os.unlink(path)
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
