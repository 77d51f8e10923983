"""Bodies as JSON, read strictly: what readers of JSON would each understand in their own way is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from cribsheet.server.refusals import Refusal, written


class StrictRoute(APIRoute):
    """A route whose body names everything once."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's, with a request that reads strictly."""
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
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
    """What a body says. Raises `Refusal` for what is no JSON, and for a name that an object has twice."""
    twice: list[_Twice] = []

    def once(pairs: list[tuple[str, Any]]) -> Any:
        found = dict(pairs)
        if len(found) == len(pairs):
            return found
        names = [name for name, _ in pairs]
        twice.append(_Twice(next(name for name in found if names.count(name) > 1), found))
        return twice[-1]

    try:
        said = json.loads(body, object_pairs_hook=once, parse_constant=_no_number)
    except RecursionError:
        raise Refusal(400, "The body is nested too deeply; send a flatter one.") from None
    except json.JSONDecodeError as error:
        raise Refusal(400, f"The body is no JSON: {error}.") from None
    except UnicodeDecodeError:
        raise Refusal(400, "The body is no JSON: it is not encoded as UTF-8.") from None
    except ValueError:
        raise Refusal(400, "The body holds a number of too many digits; send a shorter one.") from None
    if twice:
        place = _place_of(twice[-1], said)
        raise Refusal(400, f"The field {place!r} is given more than once; leave one.", param=place)
    return said


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
