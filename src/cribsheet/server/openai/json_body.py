"""Bodies as JSON, read strictly: what readers of JSON would each understand in their own way is refused.

Everything here is done in the event loop, so it is little: who asks is known before a body is read, one pass over its
bytes counts what it holds before anything is built of it, and what is built is bounded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from fastapi import HTTPException, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from cribsheet.server.auth import caller_of
from cribsheet.server.errors import Refusal, written

MAX_VALUES = 20_000  # a conversation of thousands of turns, or all the tools that there may be, with their schemas
MAX_DEPTH = 64  # lists and mappings inside each other
_TEXT = re.compile(
    rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL
)  # also one that does not end, so that none is read twice
_GZIP = b"\x1f\x8b"
_NO_BRACKET = bytes(set(range(256)) - set(b"[]{}"))


class StrictRoute(APIRoute):
    """A route whose body is from somebody who may ask, holds no more than is read, and names everything once."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's, with a request that reads strictly; FastAPI itself would read it before it asks for the key."""
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            if self.body_field is not None:
                caller_of(request)
            return await handle(_StrictRequest(request.scope, request.receive))

        return strictly


class _StrictRequest(Request):
    async def json(self) -> Any:
        """The body. Raises `HTTPException` around a `Refusal`, which is all that FastAPI lets pass here."""
        try:
            return strict_json(await self.body())
        except Refusal as refusal:
            raise HTTPException(refusal.status, refusal) from refusal


def strict_json(body: bytes) -> Any:
    """What a body says.

    Raises `Refusal` for what is no JSON, for more than `MAX_VALUES` values or `MAX_DEPTH` levels, and for a name that
    an object has twice.
    """
    _check_size(body)
    twice: list[_Twice] = []

    def once(pairs: list[tuple[str, Any]]) -> Any:
        found = dict(pairs)
        if len(found) == len(pairs):
            return found
        twice.append(_Twice(_repeated(pairs), found))
        return twice[-1]

    try:  # UTF-8 alone: what was counted in another encoding would be something else
        said = json.loads(body.decode("utf-8-sig"), object_pairs_hook=once, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise Refusal(400, f"The body is no JSON: {error}.") from None
    except UnicodeDecodeError:
        why = "it is compressed; send it plain" if body[:2] == _GZIP else "it is not encoded as UTF-8"
        raise Refusal(400, f"The body is no JSON: {why}.") from None
    except ValueError:
        raise Refusal(400, "The body holds a number of too many digits; send a shorter one.") from None
    if twice:
        place = _place_of(twice[-1], said)
        raise Refusal(400, f"The field {place!r} is given more than once; leave one.", param=place)
    return said


def _check_size(body: bytes) -> None:
    """Refuse what holds too much, by its commas and brackets outside of texts."""
    bare, texts = _TEXT.subn(b"", body, count=2 * MAX_VALUES + 1)  # names and values
    opened = bare.count(b"[") + bare.count(b"{")
    if texts > 2 * MAX_VALUES or opened + bare.count(b",") > MAX_VALUES:
        raise Refusal(400, f"The body holds more than {MAX_VALUES} values; send less, or longer texts instead of many.")
    if opened > MAX_DEPTH:
        steps = (1 if each in b"[{" else -1 for each in bare.translate(None, _NO_BRACKET))
        if max(accumulate(steps)) > MAX_DEPTH:
            raise Refusal(400, f"The body is nested too deeply, in more than {MAX_DEPTH} levels; send a flatter one.")


def _repeated(pairs: list[tuple[str, Any]]) -> str:
    """The first name that was there before."""
    known: set[str] = set()
    for name, _ in pairs:
        if name in known:
            return name
        known.add(name)
    raise AssertionError("no name is repeated")


@dataclass(frozen=True, eq=False)
class _Twice:
    """An object that has a name twice, where it stands in what was read."""

    name: str
    inside: dict[str, Any]


def _place_of(sought: _Twice, said: Any) -> str:
    """The path of the name, as refusals write it."""
    waiting: list[tuple[Any, list[str | int]]] = [(said, [])]
    while True:
        value, path = waiting.pop()
        if value is sought:
            return written([*path, sought.name])
        inside = value.inside if isinstance(value, _Twice) else value
        steps = inside.items() if isinstance(inside, dict) else enumerate(inside) if isinstance(inside, list) else ()
        waiting += [(each, [*path, step]) for step, each in steps]


def _no_number(name: str) -> Any:
    raise Refusal(400, f"The body is no JSON: {name} is no number there.")
