"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`, each with the right status."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException

from cribsheet.errors import EngineError, RequestError, SheetError, TemplateError, WindowError
from cribsheet.server.telemetry.record import record_of

logger = logging.getLogger(__name__)

# status -> the type and the code that OpenAI's clients know
_KINDS = {
    400: ("invalid_request_error", "invalid_value"),
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "forbidden"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "request_timeout"),
    413: ("invalid_request_error", "request_too_large"),
    421: ("invalid_request_error", "unknown_host"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    500: ("server_error", "internal_error"),
    503: ("server_error", "overloaded"),
    504: ("server_error", "answer_timeout"),
}
RETRY_SECONDS = 1
_LONGEST_MESSAGE, _LONGEST_PLACE = 1000, 200  # characters that are told of what a caller sent
_ODD_TURNS = "The model's chat template has no form for these turns in this order; ask in one turn of the user."


class ErrorDetail(BaseModel):
    """What is wrong, and with which field."""

    model_config = ConfigDict(extra="forbid")

    message: str
    type: str
    param: str | None
    code: str


class ErrorReply(BaseModel):
    """The body of every answer that is not 200."""

    model_config = ConfigDict(extra="forbid")

    error: ErrorDetail


class Refusal(Exception):
    """A request that is not served; `param` is the field at fault."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind, usual = _KINDS[status]
        shown = _shortened(message, _LONGEST_MESSAGE)
        place = param and _shortened(param, _LONGEST_PLACE)
        self.detail = ErrorDetail(message=shown, type=kind, param=place, code=code or usual)

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        return ErrorReply(error=self.detail).model_dump()

    def response(self, headers: dict[str, str] | None = None) -> JSONResponse:
        """The error as a response."""
        own = {"Retry-After": str(RETRY_SECONDS)} if self.status in (429, 503) else {}
        own |= {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return JSONResponse(self.body, self.status, {**own, **(headers or {})})


def _shortened(text: str, limit: int) -> str:
    """A text that can be sent, for what it quotes may be none; of a long one the beginning and the end."""
    shown = text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"
    return shown.encode(errors="replace").decode()


@contextlib.contextmanager
def naming(param: str | None) -> Iterator[None]:
    """What the library refuses inside is the fault of that field."""
    try:
        yield
    except RequestError as error:
        raise Refusal(400, str(error), param=param) from error


def refusal_of(
    error: BaseException, *, late: bool = False, field: str | None = None, form: str | None = None
) -> Refusal:
    """What a caller is told of an error; of one that nobody foresaw only that it happened.

    `field` is where the request has the question, `form` where it has the form of the answer.
    """
    if isinstance(error, Refusal):
        return error
    if isinstance(error, WindowError):
        return Refusal(400, str(error), param=field, code="context_length_exceeded")
    if isinstance(error, RequestError):
        return Refusal(400, str(error), param=form)
    if isinstance(error, TemplateError):
        return Refusal(400, _ODD_TURNS, param="messages")
    if isinstance(error, EngineError):
        return Refusal(504 if late else 503, str(error))
    if isinstance(error, SheetError):
        logger.error("an archive cannot be read: %s", error)  # not told to callers: it names files of this machine
        told = "The sheet's archive cannot be read; use another mode, or no_archive 'sheet'."
        return Refusal(503, told, param="cribsheet.mode", code="archive_unavailable")
    return Refusal(500, "The server failed on this request; its log tells more under the request's id.")


def install(app: FastAPI) -> None:
    """Make the app answer in this shape, whoever refuses."""

    async def refused(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Refusal)
        record_of(request).error = error.detail.code
        return error.response()

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return await refused(request, _first_fault(error.errors(), error.body))

    async def by_framework(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        status = error.status_code if error.status_code in _KINDS else 400
        detail: Any = error.detail  # a refusal where a body is read, which may raise nothing else
        refusal = detail if isinstance(detail, Refusal) else Refusal(status, str(detail))
        record_of(request).error = refusal.detail.code
        return refusal.response(dict(error.headers or {}))

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, by_framework)


def _first_fault(errors: Sequence[Any], body: Any) -> Refusal:
    """The fault that lies deepest: of the forms that a field may have, the one that was meant.

    Of two as deep, one in a form whose `type` is right, then one about that type.
    """
    found = [(_path(each, body), each) for each in errors]
    other = {each["loc"][:-1] for each in errors if each["type"] == "literal_error"}

    def weight(pair: tuple[list[str | int], Any]) -> tuple[int, int]:
        kind, form = pair[1]["type"], pair[1]["loc"][:-1]
        is_meant = form not in other and not kind.endswith("_type")
        return len(pair[0]), 2 * is_meant + (kind == "literal_error")

    path, fault = max(found, key=weight)
    param = written(path) or None
    if fault["type"] == "extra_forbidden":
        return Refusal(400, f"The field {param!r} is not supported; leave it out.", param=param, code="unknown_field")
    if fault["type"] == "missing":
        return Refusal(400, f"The field {param or 'body'!r} is missing.", param=param, code="missing_field")
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "literal_error":  # of all forms
        alike = [each for place, each in found if place == path and each["type"] == fault["type"]]
        known = dict.fromkeys(each["ctx"]["expected"] for each in alike)
        message = f"Input should be {' or '.join(known)}"
    if param is None:
        first = message.partition(" ")[0]
        param = first if isinstance(body, dict) and first in body else None
        if isinstance(body, bytes | str):
            message = "it is not declared as JSON; send the header Content-Type: application/json."
        return Refusal(400, f"The body: {message}", param=param)
    return Refusal(400, f"{param}: {message}", param=param)


def written(path: Sequence[str | int]) -> str:
    """A place in a body, as refusals name it."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")


def _path(fault: Any, body: Any) -> list[str | int]:
    """Where in the body a fault is, without the names of the forms that were tried."""
    path: list[str | int] = []
    location = [step for step in fault["loc"] if step != "body"] if fault["loc"][:1] == ("body",) else [*fault["loc"]]
    for number, step in enumerate(location):
        inside = isinstance(body, dict) and step in body
        inside = inside or (isinstance(body, list) and isinstance(step, int) and step < len(body))
        if inside:
            body = body[step]
            path.append(step)
        elif number == len(location) - 1 and fault["type"] in ("missing", "extra_forbidden"):
            path.append(step)
    return path
