"""Files that are written whole or not at all, and take the place of what was there: link, rights and owner stay."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from safetensors import SafetensorError

from cribsheet.errors import SheetError
from cribsheet.sheet.leftovers import clean, hold_alone

_LEFT_SECONDS = 86_400  # after which nobody is still writing


@dataclass(frozen=True, slots=True)
class Seen:
    """What a path led to at some time: nothing, or a file by its inode, bytes, and time of writing in ns."""

    path: Path
    file: tuple[int, int, int] | None = None

    @classmethod
    def at(cls, path: str | Path) -> Self:
        """What it leads to now."""
        try:
            found = os.stat(path)
        except OSError:
            return cls(Path(path))
        return cls(Path(path), (found.st_ino, found.st_size, found.st_mtime_ns))

    @property
    def is_there(self) -> bool:
        """Whether the path leads to that still."""
        return self == self.at(self.path)

    def check(self) -> None:
        """Raise `SheetError` if it leads to something else by now."""
        if not self.is_there:
            raise SheetError(
                f"{str(self.path)!r} was changed meanwhile, by another process or by hand; it stays as that left it, "
                "and this change was not written. Make it again on what lies there now, or write to another file."
            )


@contextlib.contextmanager
def changing(path: str | Path) -> Iterator[Seen]:
    """What lies at a path that is read, and written again in the end, while no other process is in such a block for it.

    Raises `SheetError` where one is. Where there are no locks only `Seen.check` finds out, before anything is written.
    """
    path = Path(path)
    try:
        held = hold_alone(path)
        while held is not None and _was_replaced(path, held):  # after it was opened, and before it was locked
            os.close(held)
            held = hold_alone(path)
    except BlockingIOError as error:
        raise SheetError(
            f"Another process is changing {str(path)!r}, so nothing was done; run this again when that has ended."
        ) from error
    try:
        yield Seen.at(path)
    finally:
        if held is not None:
            os.close(held)


def _was_replaced(path: Path, held: int) -> bool:
    """Whether a path leads to another file than that which was opened; not if it was taken away."""
    return path.exists() and not os.path.samestat(os.fstat(held), os.stat(path))


@contextlib.contextmanager
def writing(target: Path, what: str) -> Iterator[str]:
    """`replacing`, where whatever hinders the writing of `what` (a full disk, for one) is a `SheetError`."""
    try:
        with replacing(target) as unfinished:
            yield unfinished
    except (SafetensorError, OSError) as error:
        raise SheetError(
            f"{what} cannot be written to {str(target)!r}: {error}; what was there is as it was."
        ) from error


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[str]:
    """A temporary path beside `target` that takes its place on success and vanishes on failure.

    A link stays one, and what it leads to is replaced. What takes the place of a file has its rights, and its owner and
    group as far as we may give them. Raises `OSError` where something stands that is no regular file.
    """
    place = Path(os.path.realpath(target))
    before = place.stat() if place.exists() else None
    if before is not None and not stat.S_ISREG(before.st_mode):
        raise OSError(f"{str(place)!r} is no regular file")
    parts = rf"{re.escape(f'.{place.name}.')}\d+-[0-9a-f]{{8}}\.part(\.link)?"
    clean(place.parent, parts, _LEFT_SECONDS)
    unfinished = place.with_name(f".{place.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        # by nobody read before it has its rights, if there are some to keep
        handle = os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600 if before else 0o666)
        usual = os.fstat(handle).st_mode  # what the user's umask allows; safetensors would leave the file private
        os.close(handle)
        yield str(unfinished)
        if before is not None:
            usual = _keep_owner(unfinished, before)
        os.chmod(unfinished, usual & 0o777)
        os.replace(unfinished, place)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _keep_owner(path: Path, before: os.stat_result) -> int:
    """Give a file the owner and group of another, and return the rights that it may then have.

    Without the right to give it to a group, that of the file gets no more than everybody has.
    """
    found = path.stat()
    if not hasattr(os, "chown") or (found.st_uid, found.st_gid) == (before.st_uid, before.st_gid):
        return before.st_mode
    for owner in (before.st_uid, -1):
        with contextlib.suppress(PermissionError):
            os.chown(path, owner, before.st_gid)
            return before.st_mode
    others = before.st_mode & 0o007
    return before.st_mode & ~0o070 | others << 3
