"""The front of a served application: which replica is asked, whether there is room, and what is tried again.

Limits are kept here, where every request passes, so they hold for all replicas together. A replica that dies takes
nothing along that was not begun: the next one is asked. What was begun as a stream ends with an error in the stream, as
the API describes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.responses import Response
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from cribsheet.ray.totals import added
from cribsheet.server.auth import NO_KEY, Caller, Keyring
from cribsheet.server.errors import Refusal
from cribsheet.server.limits import Gate
from cribsheet.server.middleware import Receiving
from cribsheet.server.openai.json_body import strict_json
from cribsheet.server.openai.streaming import ReaderLeft, while_connected
from cribsheet.server.settings import ServerSettings
from cribsheet.server.telemetry.logs import log_request, log_to_stderr
from cribsheet.server.telemetry.metrics import Metrics
from cribsheet.server.telemetry.record import ID, Record

if TYPE_CHECKING:
    from cribsheet.ray.settings import Serving

_TRIES = 4  # replicas that are asked before a request is given up
_PAUSE_SECONDS = 0.2
_SCOPE = [
    "type",
    "asgi",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "root_path",
    "headers",
    "client",
    "server",
]
_ID, _LONGEST_ID = b"x-request-id", 128
_ASKING = ("/v1/chat/completions", "/v1/completions")
_LOST = "The replica that wrote the answer died; ask again."


class Front:
    """Which replica is asked."""

    def __init__(self, replicas: DeploymentHandle, serving: Serving) -> None:
        log_to_stderr()
        self._replicas, self._names = replicas, frozenset(serving.places())
        self._limits = ServerSettings(**serving.settings)
        self._keys = Keyring.of(serving.keys) if serving.keys else None
        self._gate, self._counted = Gate(self._limits), Metrics()

    async def __call__(self, request: Request) -> Response:
        """Hand a request on."""
        return _Relayed(self)

    async def relay(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        try:
            caller = self._caller(scope)
            receiving = Receiving(receive, self._limits)
            body = await _body(receiving)
            asked = strict_json(body) if body and scope["path"] in _ASKING else {}
            asked = asked if isinstance(asked, dict) else {}  # about which the replica decides
            with self._room(scope, asked, caller), contextlib.suppress(ReaderLeft):
                await while_connected(receiving, self._answer(scope, body, _sheet_of(scope["path"], asked), send))
        except HTTPException as error:
            await self._refuse(Refusal(error.status_code, str(error.detail)), scope, send)
        except Refusal as refusal:
            await self._refuse(refusal, scope, send)

    def _caller(self, scope: Scope) -> Caller | None:
        """Who asks, known before the body is read. Raises `Refusal` for an answer without a key."""
        if self._keys is None:
            return Caller((scope.get("client") or [""])[0])
        caller = self._keys.holder(scope["headers"])
        if caller is None and scope["path"] in _ASKING:
            raise Refusal(401, NO_KEY)
        return caller

    @contextlib.contextmanager
    def _room(self, scope: Scope, asked: Mapping[str, Any], caller: Caller | None) -> Iterator[None]:
        """The request counts among those of all replicas. Raises `Refusal` if it is one too many."""
        answers = _wanted(scope["path"], asked)
        leave = self._gate.enter(caller.name, answers) if answers and caller else lambda: None
        try:
            yield
        finally:
            leave()

    async def _refuse(self, refusal: Refusal, scope: Scope, send: Send) -> None:
        """Refuse what no replica is asked for; it is counted and logged as they would."""
        record = Record(scope["method"], scope["path"], status=refusal.status, error=refusal.detail.code)
        self._counted.requests.add(route="front", sheet="", status=str(refusal.status))
        log_request(record)
        await refusal.response()(scope, _nothing, send)

    async def _answer(self, scope: Scope, body: bytes, sheet: str, send: Send) -> None:
        plain = {name: scope[name] for name in _SCOPE if name in scope}
        if given := dict(scope["headers"]).get(_ID):  # Ray's, which it sends back itself
            plain[ID] = given.decode("latin-1")[:_LONGEST_ID]
        counted = scope["path"] == "/metrics"
        kind = ""
        for attempt in range(_TRIES):
            try:
                async for message in self._asked(plain, body, sheet):
                    if message["type"] == "http.response.start":
                        message["headers"] = [pair for pair in message["headers"] if pair[0] != _ID]
                        kind = _type_of(message)
                        counted = counted and message["status"] == 200
                    elif counted:
                        message = {**message, "body": await self._metrics()}
                        await send({"type": "http.response.start", "status": 200, "headers": _TEXT})
                    if not counted or message["type"] == "http.response.body":
                        await send(message)
                return
            except (RayActorError, BackPressureError, DeploymentUnavailableError):
                if kind:  # too late for another: the answer has begun
                    if kind != "text/event-stream":
                        raise
                    lost = json.dumps(Refusal(503, _LOST).body)
                    await send({"type": "http.response.body", "body": f"data: {lost}\n\n".encode()})
                    return
                await asyncio.sleep(_PAUSE_SECONDS * 2**attempt)
        await self._refuse(Refusal(503, "No replica could take the request; try again later."), scope, send)

    async def _asked(self, scope: Mapping[str, Any], body: bytes, sheet: str) -> AsyncIterator[Message]:
        known = sheet if sheet in self._names else ""
        handle = self._replicas.options(stream=True, multiplexed_model_id=known)
        answer = handle.answer.remote(dict(scope), body)
        try:
            async for messages in answer:
                for message in messages:
                    yield message
        finally:
            answer.cancel()

    async def _metrics(self) -> bytes:
        """What all replicas count, added up."""
        texts = await asyncio.to_thread(self._replicas.broadcast("metrics").results, timeout_s=10)
        return added([*texts, self._counted.render()]).encode()


_TEXT = [(b"content-type", b"text/plain; version=0.0.4"), (b"cache-control", b"no-store")]


class _Relayed(Response):
    def __init__(self, front: Front) -> None:
        super().__init__()
        self._front = front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._front.relay(scope, receive, send)


async def _body(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _sheet_of(path: str, asked: Mapping[str, Any]) -> str:
    """The sheet that a request is about, where it is easily seen."""
    parts = path.strip("/").split("/")
    if parts[:2] == ["v1", "sheets"] and len(parts) > 2:
        return parts[2]
    model = asked.get("model")
    return model if isinstance(model, str) else ""


def _wanted(path: str, asked: Mapping[str, Any]) -> int:
    """How many answers a request asks for."""
    if path not in _ASKING:
        return 0
    each, prompts = asked.get("n"), asked.get("prompt")
    choices = each if isinstance(each, int) and each > 0 else 1
    return choices * (len(prompts) if isinstance(prompts, list) and prompts else 1)


def _type_of(message: Message) -> str:
    kinds = [value for name, value in message["headers"] if name.lower() == b"content-type"]
    return (kinds[0] if kinds else b"none").decode("latin-1").partition(";")[0]


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
