"""What is around every request: an id, limits of size and time, a log line, and nothing left behind."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cribsheet.server.errors import Refusal, refusal_of
from cribsheet.server.settings import ServerSettings
from cribsheet.server.telemetry.logs import log_failure, log_request
from cribsheet.server.telemetry.metrics import Metrics
from cribsheet.server.telemetry.record import Record, keep

_GONE = 499  # nobody was there to get a status; as web servers log it
_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]


class RequestMiddleware:
    """ASGI middleware around the whole app."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = keep(scope)
        sending, receiving = _Sending(send, record, self._settings), Receiving(receive, self._settings)
        try:
            with record.cleanup:
                await self._served(scope, receiving, sending)
        except Exception as error:
            if sending.failed:
                record.error = "reader_too_slow"
            else:
                log_failure(record, error)
                record.error = "internal_error"
                if not record.status:
                    await refusal_of(error).response()(scope, receive, sending)
        finally:
            record.status = record.status or _GONE
            self._count(scope, record)
            log_request(record)

    async def _served(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._is_addressed(scope):
            refusal = Refusal(421, "This server is not known by that name; see --host and --allow-host.")
            await refusal.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_addressed(self, scope: Scope) -> bool:
        """Whether the request names this server; a page elsewhere that has its own name point here does not."""
        if not self._settings.hosts:
            return True
        host = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        return name.lower() in self._settings.hosts

    def _count(self, scope: Scope, record: Record) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.requests.add(route=route, sheet=record.sheet, status=str(record.status))
        if not record.sheet:
            return
        self._metrics.seconds.observe(record.seconds, sheet=record.sheet)
        if record.first_seconds is not None:
            self._metrics.first.observe(record.first_seconds, sheet=record.sheet)
        for kind in ("prompt", "cached", "completion"):
            self._metrics.tokens.add(getattr(record, f"{kind}_tokens"), sheet=record.sheet, kind=kind)


class _Sending:
    """Send that notes the status, adds headers, and gives up on readers who take nothing."""

    def __init__(self, send: Send, record: Record, settings: ServerSettings) -> None:
        self._send, self._record, self._limit = send, record, settings.send_seconds
        self.failed = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._record.status = message["status"]
            known = {name for name, _ in message["headers"]}
            added = [pair for pair in _HEADERS if pair[0] not in known]
            message["headers"] = [*message["headers"], *added, (b"x-request-id", self._record.id.encode())]
        try:
            async with asyncio.timeout(self._limit):
                await self._send(message)
        except (TimeoutError, OSError):
            self.failed = True
            raise


class Receiving:
    """Receive that bounds size and time of the body; afterwards it waits for a disconnect as long as it takes."""

    def __init__(self, receive: Receive, settings: ServerSettings) -> None:
        self._receive, self._settings = receive, settings
        self._size, self._complete = 0, False
        self._deadline: float | None = None

    async def __call__(self) -> Message:
        """The next piece of the body, or word that the caller left."""
        if self._complete:
            return await self._receive()
        loop = asyncio.get_running_loop()
        self._deadline = self._deadline or loop.time() + self._settings.receive_seconds
        try:
            async with asyncio.timeout_at(self._deadline):
                message: dict[str, Any] = dict(await self._receive())
        except TimeoutError:
            raise HTTPException(
                408, f"The request took more than {self._settings.receive_seconds:g} seconds."
            ) from None
        self._size += len(message.get("body", b""))
        if self._size > self._settings.max_body_bytes:
            raise HTTPException(413, f"The request has more than {self._settings.max_body_bytes} bytes; send less.")
        self._complete = not message.get("more_body", False)
        return message
