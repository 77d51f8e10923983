"""An archive while it is made: a file of its final size, which is filled block by block as a corpus is read.

Whoever goes on with it says how much of it stands, with a digest of that; what comes behind is written again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import weakref
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from cribsheet.errors import BudgetError, SheetError
from cribsheet.sheet.archive.layout import DIGEST, SUFFIX, Layout, root_digest
from cribsheet.sheet.int4 import BLOCK
from cribsheet.sheet.layers import StoredLayer
from cribsheet.sheet.leftovers import hold, temporary_file
from cribsheet.sheet.manifest import ArchiveEntry
from cribsheet.sheet.tensors import LARGEST, TensorFile, is_usable


class ArchiveWriter:
    """Fills the file at `path`, token by token from 0 on. `origins` (N, 3) are those of all tokens.

    Without a path it is a temporary file in `folder`, or where such files go, which is there as long as this object.
    """

    def __init__(self, layout: Layout, origins: Tensor, path: Path | None, folder: str | Path | None = None) -> None:
        self.path, self.layout = path or _temporary(folder), layout
        self._is_temporary = path is None
        self._held: list[int] = []  # what locks a temporary file
        if self._is_temporary:
            weakref.finalize(self, _remove, self.path, self._held, os.getpid())
            self._hold()
        self._origins = origins.to(torch.int32)
        self._digests = torch.zeros(len(layout.blocks), DIGEST, dtype=torch.uint8)
        self._block = 0  # that is written next
        sizes = (kind.nbytes for kind in layout.tensors.values())
        self._starts = dict(zip(layout.tensors, accumulate(sizes, initial=len(layout.header)), strict=False))

    @property
    def tokens(self) -> int:
        """How many were written."""
        return self.layout.ends[self._block]

    def reach(self, tokens: int) -> int:
        """Up to where, of so many tokens, the next ones were read in one pass: it ends with a shorter block."""
        sizes = enumerate(self.layout.blocks[self._block :], self._block + 1)
        short = next((block for block, size in sizes if size < BLOCK), len(self.layout.blocks))
        return self.layout.ends[min(short, bisect_right(self.layout.ends, tokens) - 1)]

    def begin(self) -> None:
        """Make the file, in the place of what was there. Raises `BudgetError` where the disk has no room for it."""
        with self._told():
            needed, free = self.layout.nbytes, shutil.disk_usage(self.path.parent).free
        if needed > free:
            fewer = "" if self.layout.dtype == "int4" else " or in fewer bits (archive='int4')"
            raise BudgetError(
                f"The archive takes {needed:,} bytes, and {str(self.path.parent)!r} has {free:,} free; make room, or "
                f"write it elsewhere (archive_folder=){fewer}."
            )
        with self._told():
            self.path.unlink(missing_ok=True)  # never into a file that somebody else may have open, or linked to
            with open(self.path, "xb") as file:
                file.write(self.layout.header)
                file.truncate(needed)
            if self._is_temporary:
                self._hold()
        self._write("origins", 0, self._origins)
        self._write("blocks", 0, torch.tensor(self.layout.blocks, dtype=torch.uint8))

    def resume(self, tokens: int, digest: str) -> None:
        """Go on behind `tokens` tokens, which must be those that had this `digest`.

        Raises `SheetError` if they are not.
        """
        block = self.layout.ends.index(tokens) if tokens in self.layout.ends else -1
        try:
            file = TensorFile(self.path)
            same = block >= 0 and file.piece(file.begin, 0) == self.layout.header
            digests = file.rows("digests", 0, block) if same else self._digests[:0]
            same = same and hashlib.sha256(digests.numpy().data).hexdigest() == digest
            for number in range(block if same else 0):
                same = same and self.layout.block_digest(self._block_of(file, number)) == _bytes(digests[number])
            file.close()
        except (OSError, ValueError) as error:
            raise SheetError(f"The unfinished archive {str(self.path)!r} cannot be read ({error}). {_ANEW}") from error
        if not same:
            raise SheetError(f"The unfinished archive {str(self.path)!r} is damaged or of another build. {_ANEW}")
        with self._told():
            _make_own(self.path)
        self._digests[:block], self._block = digests, block

    def append(self, layers: Sequence[StoredLayer]) -> None:
        """The next tokens in all layers (K, n, ...), keys before rotation; n fills blocks."""
        self.put(self.layout.parts_of(layers))

    def put(self, parts: Mapping[str, Tensor]) -> None:
        """The next tokens as rows of the large tensors. Raises `SheetError` for numbers that no archive may have."""
        if wrong := next((name for name, rows in parts.items() if not is_usable(rows)), None):
            raise SheetError(
                f"The archive would have numbers in {wrong!r} that are not finite, or beyond {LARGEST:g}, as a model "
                "gives that overflows in float16; build in bfloat16 or float32."
            )
        layout, first = self.layout, self._block
        start = layout.ends[first]
        stop = start + len(parts["keys"])
        last = layout.ends.index(stop)
        for name, rows in parts.items():
            self._write(name, first if layout.is_of_blocks(name) else start, rows)
        for block in range(first, last):
            own = layout.block_of(parts, block, first)
            self._digests[block] = torch.tensor(list(layout.block_digest(own)), dtype=torch.uint8)
        self._write("digests", first, self._digests[first:last])
        self._block = last

    @property
    def digest(self) -> str:
        """Of all that was written so far."""
        return hashlib.sha256(self._digests[: self._block].numpy().data).hexdigest()

    def finish(self) -> ArchiveEntry:
        """What the manifest says of the file, which is complete."""
        assert self._block == len(self.layout.blocks), "tokens are missing"
        small = {
            "origins": self._origins,
            "blocks": torch.tensor(self.layout.blocks, dtype=torch.uint8),
            "digests": self._digests,
        }
        digest = root_digest(self.layout.header, small)
        return ArchiveEntry(digest=digest, dtype=self.layout.dtype, bytes=self.layout.nbytes)

    def _hold(self) -> None:
        """Lock a temporary file, and only then let go of what had its name before: the name is never nobody's."""
        before, handle = self._held.copy(), hold(self.path)
        self._held[:] = [] if handle is None else [handle]
        for each in before:
            os.close(each)

    def _block_of(self, file: TensorFile, number: int) -> dict[str, Tensor]:
        ends = self.layout.ends[number : number + 2]
        return {
            name: file.rows(name, *((number, number + 1) if self.layout.is_of_blocks(name) else ends))
            for name in self.layout.rows
        }

    def _write(self, name: str, row: int, rows: Tensor) -> None:
        """Rows of a tensor to their place in the file."""
        kind = self.layout.tensors[name]
        place = self._starts[name] + row * (kind.nbytes // max(1, kind.shape[0]))
        with self._told(), open(self.path, "r+b") as file:
            file.seek(place)
            file.write(rows.contiguous().flatten().view(torch.uint8).numpy().data)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SheetError(
                f"The archive cannot be written to {str(self.path)!r}: {error}; make room, or write it elsewhere "
                "(archive_folder=)."
            ) from error


def unfinished_archive(checkpoint: str | Path, folder: str | Path | None = None) -> Path:
    """Where the archive of a build lies that remembers in `checkpoint` how far it is: beside that, or in a folder.

    There, checkpoints of one name in several places have archives of several names.
    """
    beside = Path(checkpoint).absolute()
    if folder is None or Path(folder).absolute() == beside.parent:
        return Path(f"{checkpoint}{SUFFIX}.part")
    return Path(folder) / f"{beside.name}-{hashlib.sha256(os.fsencode(beside)).hexdigest()[:8]}{SUFFIX}.part"


_ANEW = (
    "Delete it and the checkpoint, and build again; or, if it was begun elsewhere, give the archive_folder= of before."
)


def _make_own(path: Path) -> None:
    """A file that has another name too was saved with a sheet: from here on it is another file."""
    if os.stat(path).st_nlink > 1:
        copy = path.with_name(f"{path.name}.copy")
        shutil.copyfile(path, copy)
        os.replace(copy, path)


def _temporary(folder: str | Path | None) -> Path:
    try:
        return temporary_file(SUFFIX, folder)
    except OSError as error:
        raise SheetError(
            f"The archive cannot be begun in {str(folder or tempfile.gettempdir())!r}: {error}; name another folder "
            "(archive_folder=)."
        ) from error


def _remove(path: Path, held: Sequence[int], maker: int) -> None:
    with contextlib.suppress(OSError):
        if os.getpid() == maker:  # a forked child ends, or lets go of its copy, while the parent needs the file
            path.unlink(missing_ok=True)
    for handle in held:
        os.close(handle)


def _bytes(row: Tensor) -> bytes:
    return bytes(row.tolist())
