"""The cluster that work runs on: the one at an address, or one of our own on this machine that ends with us."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STORE_BYTES = 128 << 20  # of a cluster of our own: what is in flight between its processes; more goes to its folder
_PREFIX, _OWNER = "cribsheet-", "owner"  # of the folder of such a cluster, and the file in it that tells whose it is
ADDRESS = "RAY_ADDRESS"  # how Ray's own tools name a cluster


@contextlib.contextmanager
def cluster(
    address: str | None = None, *, cpus: int | None = None, store_bytes: int = STORE_BYTES, show_logs: bool = False
) -> Iterator[None]:
    """Inside, Ray is connected: to the cluster at `address` or `RAY_ADDRESS`, or to one made here for the while.

    A cluster of our own has `cpus` processors (all by default), takes work only from those who have its token, which is
    made anew and known to its processes only, and leaves neither processes nor files. A connection that is there
    already is used, and left as it was. No usage is reported.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": show_logs, "logging_level": logging.ERROR}
    with contextlib.ExitStack() as stack:
        address = address or os.environ.get(ADDRESS) or "local"
        if address == "local":
            options |= {"num_cpus": cpus, "object_store_memory": store_bytes, "include_dashboard": False}
            options["_temp_dir"] = stack.enter_context(_folder())
            os.environ.setdefault(
                "RAY_AUTH_TOKEN", secrets.token_hex(32)
            )  # Ray listens at all of the machine's addresses
        with _signals_kept():
            ray.init(address=address, **options)
        stack.callback(ray.shutdown)
        yield


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """For sockets and logs; its name is short, for that of a socket may have a hundred characters only."""
    place = "/tmp" if Path("/tmp").is_dir() else None
    _clean(Path(place or tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=place, ignore_cleanup_errors=True) as folder:
        Path(folder, _OWNER).write_text(f"{os.getpid()} {_began(os.getpid())}")
        yield folder


def _clean(place: Path) -> None:
    """Delete what processes of this user that were killed have left; what belongs to a live one stays."""
    for owner in place.glob(f"{_PREFIX}*/{_OWNER}"):
        with contextlib.suppress(OSError, ValueError):
            if owner.parent.is_symlink() or owner.parent.stat().st_uid != os.geteuid():
                continue
            number, began = owner.read_text().split()
            if began and _began(int(number)) != began:
                shutil.rmtree(owner.parent, ignore_errors=True)


def _began(number: int) -> str:
    """When a process began, in ticks since the machine did; nothing if there is no such process."""
    try:
        told = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return ""
    return told.rpartition(")")[2].split()[19]


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself when it starts; it stays with whoever has it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    mine = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, mine)
