"""The progress of a build on stderr, unless a caller asked for JSON alone."""

from __future__ import annotations

from contextlib import AbstractContextManager

from cribsheet.progress import Progress, shown


def build_progress(*, hidden: bool = False) -> AbstractContextManager[Progress | None]:
    """What `build_sheet(progress=)` takes: shows tokens read, tokens/s and time left until the block is left."""
    return shown(not hidden)
