"""The app: sheets, keys and limits behind the routes, and the page for people."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response

from cribsheet import __version__
from cribsheet.errors import RequestError
from cribsheet.server.auth import Keyring
from cribsheet.server.errors import install
from cribsheet.server.middleware import RequestMiddleware
from cribsheet.server.openai.replies import ChatChunk
from cribsheet.server.routes import OPEN_ROUTES, router
from cribsheet.server.service import Service
from cribsheet.server.settings import ServerSettings
from cribsheet.server.sheets import Sheets
from cribsheet.server.telemetry.metrics import Gauge, Metrics

_PAGE = {"page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'"
)


def create_app(shelf: Sheets, *, keys: Keyring | None = None, settings: ServerSettings | None = None) -> FastAPI:
    """An ASGI app that answers from the sheets of a shelf, and closes it when it ends.

    Without `keys` everybody may ask everything. Raises `RequestError` for keys to sheets that are not there.
    """
    for caller in keys.callers if keys else ():
        unknown = (caller.sheets or frozenset()) - set(shelf.manifests)
        if unknown:
            raise RequestError(
                f"The key {caller.name!r} is for the sheets {', '.join(sorted(unknown))}, not served here."
            )
    service = Service(shelf, settings or ServerSettings())
    metrics = Metrics(
        Gauge("cribsheet_answers_in_flight", "Answers being written or waiting.", lambda: {(): service.gate.in_flight}),
        Gauge("cribsheet_sheet_tokens", "Length of each sheet.", lambda: _sheet_tokens(shelf)),
    )

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(title="cribsheet", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.state.service, app.state.keys, app.state.metrics = service, keys, metrics
    app.add_middleware(RequestMiddleware, settings=service.settings, metrics=metrics)
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]
    install(app)
    app.include_router(router)
    for name, kind in _PAGE.items():
        text = files("cribsheet.server").joinpath("page", name).read_text(encoding="utf-8")
        place = "/" if name == "page.html" else f"/{name}"
        app.add_api_route(place, _asset(text, kind), methods=["GET", "HEAD"], include_in_schema=False)
    return app


def _asset(text: str, kind: str) -> Callable[[], Awaitable[Response]]:
    headers = {"Content-Security-Policy": _POLICY, "Referrer-Policy": "no-referrer"}

    async def asset() -> Response:  # not a plain function, which would get a thread
        return Response(text, media_type=kind, headers=headers)

    return asset


def _sheet_tokens(shelf: Sheets) -> dict[tuple[tuple[str, str], ...], float]:
    return {(("sheet", name),): manifest.budget for name, manifest in shelf.manifests.items()}


def _described(app: FastAPI) -> dict[str, Any]:
    """The API's description: invalid requests get 400, not FastAPI's 422; keys are needed where there are any."""
    if app.openapi_schema:
        return app.openapi_schema
    described = get_openapi(title=app.title, version=app.version, routes=app.routes)
    parts = described.setdefault("components", {})
    for path, operations in described["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if app.state.keys is not None and path not in OPEN_ROUTES:
                operation["security"] = [{"key": []}]
    chunk = ChatChunk.model_json_schema(mode="serialization", ref_template="#/components/schemas/{model}")
    parts["schemas"] |= {**chunk.pop("$defs"), "ChatChunk": chunk}  # FastAPI knows of whole replies only
    for name in ("HTTPValidationError", "ValidationError"):
        parts.get("schemas", {}).pop(name, None)
    if app.state.keys is None:  # with keys, not everybody may know the names
        for name in ("ChatRequest", "CompletionRequest"):
            parts["schemas"][name]["properties"]["model"]["enum"] = list(app.state.service.shelf.manifests)
    else:
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    app.openapi_schema = described
    return described
