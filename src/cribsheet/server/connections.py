"""Connections as uvicorn keeps them, but bounded: none waits for ever for half a header, and none brings costly bytes.

`serving` is uvicorn's configuration with all of it, for `cribsheet serve` and for programs that run the app themselves.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from cribsheet.server.errors import Refusal

HEADER_SECONDS = 10.0  # from the connection's beginning, or the end of the last answer, to the end of a header
KEEP_ALIVE_SECONDS = 5  # without a byte
_HEADER_BYTES = 32 * 1024
_PIECE = 8 * 1024  # bytes read at once, so that what is too long is seen before it is parsed
_MAX_LINES = 20_000  # of a body that comes in chunks, each of which begins a line and costs as much as a kilobyte


def serving(app: Any, **options: Any) -> uvicorn.Config:
    """How uvicorn serves the app; `options` are its own."""
    settled = {"http": Connection, "ws": "none", "timeout_keep_alive": KEEP_ALIVE_SECONDS, "server_header": False}
    limits = {"h11_max_incomplete_event_size": _HEADER_BYTES, "log_config": None, "access_log": False}
    return uvicorn.Config(app, **{**settled, **limits, **options})


class Connection(H11Protocol):
    """One connection, closed if a header takes longer than `header_seconds`, or the rest of a body nobody reads."""

    header_seconds = HEADER_SECONDS

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._deadline: asyncio.TimerHandle | None = None
        self._lines = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first header."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Parse some bytes at a time."""
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            if self.transport.is_closing() or self._is_costly(piece):
                return
            super().data_received(piece)
            if self._is_served():
                self._stop_waiting()

    def on_response_complete(self) -> None:
        """Wait for the next header, if it is not there yet."""
        self._lines = 0
        super().on_response_complete()
        if not self._is_served():
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _is_served(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _is_costly(self, piece: bytes) -> bool:
        """Whether the body of this request comes in too many chunks; it is refused then."""
        if not self._is_served() or not any(name == b"transfer-encoding" for name, _ in self.headers):
            return False
        self._lines += piece.count(b"\n")
        if self._lines <= _MAX_LINES:
            return False
        if not self.cycle.response_started:
            text = f"The body comes in more than {_MAX_LINES // 2} chunks; send it with its length, or in larger ones."
            body = json.dumps(Refusal(400, text).body).encode()
            head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        self.transport.close()
        return True

    def _wait(self) -> None:
        self._stop_waiting()
        self._deadline = self.loop.call_later(self.header_seconds, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
