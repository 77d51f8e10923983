"""Archives of sheets in segments: written as documents are read, and put together anew when these come and go.

Each segment has blocks of its own, so that what stays is copied as it is, and nothing of what left is copied.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cribsheet.errors import SheetError
from cribsheet.plan.assemble import archive_runs
from cribsheet.plan.plan import Plan
from cribsheet.sheet.archive.archive import Archive
from cribsheet.sheet.archive.layout import Layout
from cribsheet.sheet.archive.writer import ArchiveWriter
from cribsheet.sheet.sheet import Sheet, with_archive

logger = logging.getLogger(__name__)
_AT_ONCE = 8  # blocks that are copied at once


@dataclass(frozen=True, slots=True)
class ArchivePart:
    """Tokens `first` to `stop` of an archive, those of a segment whose first document has the number `document`."""

    archive: Archive
    first: int
    stop: int
    document: int

    def blocks(self) -> tuple[int, int]:
        """Those that hold its tokens and no others. Raises `SheetError` if the archive cannot be read so."""
        ends = self.archive.layout.ends
        if self.first not in ends or self.stop not in ends:
            raise SheetError(f"The archive {str(self.archive.path)!r} has no block that ends where a document does.")
        return ends.index(self.first), ends.index(self.stop)


def readable(sheet: Sheet) -> Archive | None:
    """The archive of a sheet that is to be changed; none, with a warning, if it cannot be read."""
    try:
        if sheet.archive is not None:
            sheet.archive.layout  # noqa: B018 - opens it
        return sheet.archive
    except SheetError as error:
        logger.warning("the changed sheet will have no archive: %s", error)
        return None


def writable_folder(archive: Archive) -> Path | None:
    """Where files go that may take the place of an archive: beside it, or where temporary ones go."""
    folder = archive.path.parent
    return folder if os.access(folder, os.W_OK) else None


def runs_of(plans: Sequence[Plan], preamble: int = 0) -> list[int]:
    """`archive_runs` of documents that are read apart, behind one preamble of so many tokens, or none."""
    runs = [preamble] if preamble else []
    for plan in plans:
        runs += archive_runs(plan)[plan.corpus.preamble_tokens > 0 :]
    return runs


def origins_of(plans: Sequence[Plan], preamble: int = 0) -> torch.Tensor:
    """(N, 3) int32 as in `Archive.origins`, of the same."""
    rows = [torch.tensor([[-1, 0, 0]], dtype=torch.int32).expand(preamble, -1)]
    number = 0
    for plan in plans:
        rows.append(_numbered(plan.corpus.origins[plan.corpus.preamble_tokens :], number))
        number += len(plan.corpus.documents)
    return torch.cat(rows)


def with_joined(sheet: Sheet, parts: Sequence[ArchivePart | None], documents: Sequence[int]) -> Sheet:
    """The sheet with an archive of these parts, one behind the other, of so many documents each.

    None, with a warning, if not all of them can be read, or they differ in their type.
    """
    known = [part for part in parts if part is not None]
    if not known:
        return sheet
    types = {part.archive.dtype for part in known}
    if len(known) < len(parts) or len(types) > 1:
        why = "not all sheets have one" if len(types) == 1 else f"they are in {' and '.join(sorted(types))}"
        logger.warning("the sheet has no archive any more: %s", why)
        return sheet
    try:
        return with_archive(sheet, _copied(known, documents))
    except SheetError as error:
        logger.warning("the sheet has no archive any more: %s", error)
        return sheet


def _copied(parts: Sequence[ArchivePart], documents: Sequence[int]) -> ArchiveWriter:
    """A temporary file of these parts."""
    sizes: list[int] = []
    origins, number = [], 0
    for part, count in zip(parts, documents, strict=True):
        first, stop = part.blocks()
        sizes += part.archive.layout.blocks[first:stop]
        origins.append(_numbered(part.archive.origins[part.first : part.stop], number - part.document))
        number += count
    like = parts[0].archive.layout
    layout = Layout(like.layers, like.heads, like.head_size, like.dtype, sizes)
    writer = ArchiveWriter(layout, torch.cat(origins), None, writable_folder(parts[0].archive))
    writer.begin()
    for part in parts:
        first, stop = part.blocks()
        for block in range(first, stop, _AT_ONCE):
            writer.put(part.archive.blocks(block, min(block + _AT_ONCE, stop)))
    return writer


def _numbered(origins: torch.Tensor, more: int) -> torch.Tensor:
    """Origins (n, 3) with so much added to the numbers of documents."""
    number = torch.where(origins[:, :1] >= 0, origins[:, :1] + more, origins[:, :1])
    return torch.cat([number, origins[:, 1:]], 1)
