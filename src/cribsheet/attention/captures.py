"""What is captured once it was used often enough, by kind of use."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from cribsheet.attention.agreement import finding_out

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Captures(Generic[T]):
    """Captured computations by key (`engine/graphs.py`); one that cannot be captured is told once, not tried again."""

    def __init__(self) -> None:
        self._made: dict[Hashable, T | None] = {}
        self._uses: dict[Hashable, int] = {}
        self._way: Hashable = None

    def __bool__(self) -> bool:
        """Whether anything was captured."""
        return any(each is not None for each in self._made.values())

    def find(
        self, key: Hashable, uses: int, make: Callable[[], T | None], *, way: Hashable = None, has_room: bool = True
    ) -> T | None:
        """What was captured for `key`; `make` captures it after so many uses without, unless something is found out.

        Where that gives none, it is not tried again. Without room it is not made now, and the next use looks again.
        What was captured of another `way` of computing is let go.
        """
        if way != self._way:
            self._made, self._uses, self._way = {}, {}, way
        self._uses[key] = self._uses.get(key, 0) + 1
        is_due = key not in self._made and self._uses[key] > uses and has_room
        if is_due and finding_out.acquire(blocking=False):
            try:
                self._made[key] = make()
            except Exception:
                logger.warning("%r could not be captured and is run kernel by kernel", key, exc_info=True)
                self._made[key] = None
            finally:
                finding_out.release()
        return self._made.get(key)
