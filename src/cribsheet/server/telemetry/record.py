"""What is known of one request: for its log line and metrics, and what must be freed when it is over."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import HTTPConnection

_PLACE = "cribsheet.record"
ID = "cribsheet.id"  # in a request's scope, where whoever handed it on has named it already


@dataclass(slots=True)
class Record:
    """One request; `cleanup` runs on every way out, `facts` go into the log line."""

    method: str
    path: str
    id: str = field(default_factory=lambda: f"req_{uuid.uuid4().hex}")
    began: float = field(default_factory=time.perf_counter)
    status: int = 0  # 0 until an answer begins
    caller: str = ""
    sheet: str = ""
    error: str = ""
    first_seconds: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    cleanup: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def seconds(self) -> float:
        """Time since it arrived."""
        return time.perf_counter() - self.began

    def begin_text(self) -> None:
        """The first text goes out."""
        if self.first_seconds is None:
            self.first_seconds = self.seconds


def keep(scope: MutableMapping[str, Any]) -> Record:
    """A record for a request that arrives."""
    record = scope[_PLACE] = Record(scope["method"], scope["path"])
    record.id = scope.get(ID, record.id)
    return record


def record_of(request: HTTPConnection) -> Record:
    """The record of a request."""
    record: Record = request.scope[_PLACE]
    return record
