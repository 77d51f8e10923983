"""The routes: who may go where, and what each answers with."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request
from fastapi.responses import PlainTextResponse, Response

from cribsheet import __version__
from cribsheet.server.auth import Caller, caller_of
from cribsheet.server.errors import ErrorReply, Refusal
from cribsheet.server.openai import catalogue
from cribsheet.server.openai.chat import chat_form
from cribsheet.server.openai.completions import completion_form
from cribsheet.server.openai.json_body import StrictRoute
from cribsheet.server.openai.protocol import ChatRequest, CompletionRequest
from cribsheet.server.openai.replies import ChatChunk, ChatReply, CompletionReply, Reply
from cribsheet.server.openai.streaming import DONE
from cribsheet.server.service import Service
from cribsheet.server.sheets import Served
from cribsheet.server.telemetry.metrics import Metrics
from cribsheet.server.telemetry.record import record_of

OPEN_ROUTES = ("/health",)  # need no key
_ALWAYS = (400, 408, 413, 421, 500)
_TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

router = APIRouter(route_class=StrictRoute)


async def _service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _caller_of(request: Request) -> Caller:
    return caller_of(request)


ServiceOf = Annotated[Service, Depends(_service_of)]
CallerOf = Annotated[Caller, Depends(_caller_of)]


Name = Annotated[str, Path(max_length=128)]


async def _served_of(request: Request, name: Name, service: ServiceOf, caller: CallerOf) -> Served:
    return await service.find(name, caller, record_of(request))


ServedOf = Annotated[Served, Depends(_served_of)]


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorReply} for status in sorted({*statuses, *_ALWAYS})}


def _replies(reply: type[Reply], *statuses: int, **more: Any) -> dict[int | str, dict[str, Any]]:
    return {200: {"model": reply, **more}, **_errors(*statuses)}


def _events(piece: type[Reply]) -> dict[str, Any]:
    """A stream as OpenAPI 3.1 describes one, by its single event: a piece, an error, or the mark of the end."""
    kinds = [{"$ref": f"#/components/schemas/{kind.__name__}"} for kind in (piece, ErrorReply)]
    told = {"contentMediaType": "application/json", "contentSchema": {"anyOf": kinds}}
    data = {"type": "string", "anyOf": [{"const": DONE}, told]}
    return {"text/event-stream": {"schema": {"type": "object", "properties": {"data": data}, "required": ["data"]}}}


@router.post("/v1/chat/completions", responses=_replies(ChatReply, 401, 404, 429, 503, 504, content=_events(ChatChunk)))
async def chat_completions(request: Request, body: ChatRequest, service: ServiceOf, caller: CallerOf) -> Response:
    """Answer a conversation from a sheet, whole or as a stream of events."""
    return await service.respond(request, caller, body, chat_form(body, service.settings))


@router.post(
    "/v1/completions", responses=_replies(CompletionReply, 401, 404, 429, 503, 504, content=_events(CompletionReply))
)
async def complete(request: Request, body: CompletionRequest, service: ServiceOf, caller: CallerOf) -> Response:
    """Answer prompts from a sheet, whole or as a stream of events."""
    return await service.respond(request, caller, body, completion_form(body, service.settings))


@router.get("/v1/models", responses=_replies(catalogue.ModelList, 401))
async def models(service: ServiceOf, caller: CallerOf) -> Response:
    """The sheets that may be asked."""
    entries = [catalogue.entry(*each) for each in service.shelf.manifests.items() if caller.may_ask(each[0])]
    return _json(catalogue.ModelList(object="list", data=entries))


@router.get("/v1/models/{name}", responses=_replies(catalogue.ModelEntry, 401, 404))
async def model(name: Name, service: ServiceOf, caller: CallerOf) -> Response:
    """One of the sheets."""
    return _json(catalogue.entry(name, service.known(name, caller)))


@router.get("/v1/sheets/{name}", responses=_replies(catalogue.SheetDetails, 401, 404))
async def sheet(served: ServedOf, service: ServiceOf) -> Response:
    """What a sheet holds."""
    texts = service.settings.show_documents
    return await service.in_thread(lambda: _json(catalogue.details(served, texts=texts)), "long")


@router.get("/v1/sheets/{name}/documents/{number}", responses=_replies(catalogue.DocumentDetails, 401, 403, 404))
async def document(served: ServedOf, service: ServiceOf, number: Annotated[int, Path(ge=0)]) -> Response:
    """A document's text, and which of its tokens the sheet keeps."""
    if not service.settings.show_documents:
        raise Refusal(403, "This server does not show its documents.")
    return await service.in_thread(lambda: _json(catalogue.document(served, number)), "long")


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health() -> dict[str, str]:
    """Whether the server answers; it says nothing of what it serves."""
    return {"status": "ok", "version": __version__}


@router.get("/metrics", responses={**_TEXT, **_errors(401, 403)}, response_class=PlainTextResponse)
async def metrics(request: Request, caller: CallerOf) -> Response:
    """Counters in Prometheus' text format; with keys, for those that may ask every sheet."""
    if caller.sheets is not None:
        raise Refusal(403, "Metrics name every sheet, so they need a key for all sheets.")
    counted: Metrics = request.app.state.metrics
    return PlainTextResponse(counted.render(), media_type="text/plain; version=0.0.4")


def _json(reply: Reply) -> Response:
    return Response(reply.json_text(), media_type="application/json")
