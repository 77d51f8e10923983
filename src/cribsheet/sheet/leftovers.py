"""Temporary files and folders that last, and what killed processes have left of them.

One that lasts is locked for as long as its process has it; the system lets go of the lock when that ends, however it
ends. What has a name of ours, is of this machine, and is locked by nobody, is deleted by whoever makes the next one in
that folder. Where there are no such locks, nothing is deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shutil
import stat
import sys
import tempfile
import time
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_UNLOCKED_SECONDS = 60  # in which one that was just made may not be locked yet


def temporary_file(suffix: str, folder: str | Path | None = None) -> Path:
    """An empty file, in the folder of temporary files by default. Raises `OSError` where none can be made."""
    handle, path = tempfile.mkstemp(prefix=_prepared(suffix, folder), suffix=suffix, dir=folder)
    os.close(handle)
    return Path(path)


def temporary_folder(suffix: str) -> Path:
    """An empty folder."""
    return Path(tempfile.mkdtemp(prefix=_prepared(suffix, None), suffix=suffix))


def hold(path: Path) -> int | None:
    """Lock a file or folder until the descriptor that comes back is closed; none where that cannot be."""
    if sys.platform == "win32":
        return None
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_SH)
        return handle
    return None


def hold_alone(path: Path) -> int | None:
    """Lock a file, as `hold` does, where nobody else has; raises `BlockingIOError` where somebody has."""
    if sys.platform == "win32":
        return None
    handle = None
    try:
        handle = os.open(path, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # nothing is there, or it is where there are no locks, as on some disks of others
        if handle is not None:
            os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return handle


def clean(folder: Path, name: str, seconds: float) -> None:
    """Delete what is called so (a pattern) in a folder, is ours, was not written for so long, and is held by nobody."""
    with contextlib.suppress(OSError):
        for found in os.listdir(folder):
            if re.fullmatch(name, found):
                _take_away(folder / found, seconds)


def _take_away(path: Path, seconds: float) -> None:
    if sys.platform == "win32":
        return
    with contextlib.suppress(OSError):  # somebody holds it, or was faster
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            found = os.fstat(handle)
            if found.st_uid == os.geteuid() and time.time() - found.st_mtime > seconds:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path) if stat.S_ISDIR(found.st_mode) else path.unlink()
        finally:
            os.close(handle)


def _prepared(suffix: str, folder: str | Path | None) -> str:
    """How names of temporaries begin on this machine; what was left of them is deleted."""
    machine = hashlib.sha256(platform.node().encode()).hexdigest()[:8]  # locks of others may not be seen here
    prefix = f".cribsheet-{machine}-"
    clean(Path(folder or tempfile.gettempdir()), f"{re.escape(prefix)}\\w{{8}}{re.escape(suffix)}", _UNLOCKED_SECONDS)
    return prefix
