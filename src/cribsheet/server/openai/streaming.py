"""Server-sent events, and work that ends when its reader leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cribsheet.server.errors import Refusal, refusal_of

T = TypeVar("T")
DONE = "[DONE]"


class ReaderLeft(Exception):
    """The caller closed the connection before the answer was complete."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do the work unless the caller leaves first. Raises `ReaderLeft` then; the work is cancelled."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ReaderLeft
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Events as `data:` lines. What goes wrong underway becomes a last event in the shape of an error."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the last, or until the reader leaves."""
        with contextlib.suppress(ReaderLeft):
            await while_connected(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await _send_event(send, event)
        except Refusal as refusal:
            await _send_event(send, json.dumps(refusal.body))
        except OSError:
            raise  # the reader's, not ours
        except Exception as error:
            await _send_event(send, json.dumps(refusal_of(error).body))
            raise
        await send({"type": "http.response.body", "body": b"", "more_body": False})


# Some clients end a line at these too; inside JSON they may be written as escapes.
_BREAKS = {place: f"\\u{place:04x}" for place in (0x85, 0x2028, 0x2029)}


async def _send_event(send: Send, data: str) -> None:
    line = f"data: {data.translate(_BREAKS)}\n\n".encode()
    await send({"type": "http.response.body", "body": line, "more_body": True})
