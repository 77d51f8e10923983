"""Where all requests for answers pass: may the caller ask, is there room, and the answers as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, TypeVar

from fastapi import Request
from fastapi.responses import Response

from cribsheet.asking.answer import Answer, Source
from cribsheet.asking.sources import LIMIT
from cribsheet.server.auth import Caller
from cribsheet.server.errors import Refusal
from cribsheet.server.limits import Gate
from cribsheet.server.openai.generation import Piece, Writing
from cribsheet.server.openai.parameters import Ask, log_facts
from cribsheet.server.openai.protocol import Asked, Extension
from cribsheet.server.openai.replies import Extended, Reply, extension_of
from cribsheet.server.openai.streaming import EventStream, ReaderLeft, while_connected
from cribsheet.server.settings import ServerSettings
from cribsheet.server.sheets import Served, Sheets
from cribsheet.server.telemetry.record import Record, record_of
from cribsheet.sheet.manifest import Manifest

T = TypeVar("T")
Lane = Literal["plain", "form", "long"]
Finished = tuple[Answer, Extended | None]  # with the reply's extension field
Coming = tuple[Piece, Extended | None]
# Threads that prepare questions: templates, tokens. Grammars, and what is long, may take seconds: they have their own.
_LANES: dict[Lane, int] = {"plain": 4, "form": 1, "long": 1}
_LONG = 64 * 1024  # bytes of a request


@dataclass(frozen=True, slots=True)
class Form:
    """What a route makes of a request: how many answers it asks for, its questions, and the reply, whole or as events.

    Questions are made in a thread, and may raise `Refusal`.
    """

    answers: int
    asks: Callable[[Served], Sequence[Ask]]
    reply: Callable[[Served, Sequence[Finished]], Reply]
    events: Callable[[Served, AsyncIterator[Coming]], AsyncIterator[str]]


class Service:
    """The sheets of a server with its limits."""

    def __init__(self, shelf: Sheets, settings: ServerSettings) -> None:
        self.shelf, self.settings = shelf, settings
        self.gate = Gate(settings)
        self._tracing = asyncio.Semaphore(1)  # evidence reads the model beside the engine, one at a time
        self._threads: dict[Lane, ThreadPoolExecutor] = {
            lane: ThreadPoolExecutor(count, thread_name_prefix=f"cribsheet-service-{lane}")
            for lane, count in _LANES.items()
        }

    async def in_thread(self, work: Callable[[], T], lane: Lane = "plain") -> T:
        """Do what takes a while without holding up the others: only those of the same lane wait for it."""
        return await asyncio.get_running_loop().run_in_executor(self._threads[lane], work)

    def close(self) -> None:
        """Close the sheets; running answers end."""
        self.shelf.close()
        for threads in self._threads.values():
            threads.shutdown(wait=False, cancel_futures=True)

    async def find(self, name: str, caller: Caller, record: Record) -> Served:
        """A sheet that the caller may ask, open. Raises `Refusal` as `known`."""
        self.known(name, caller)
        served = await self.shelf.find(name)
        if served is None:
            raise _unknown(name)
        record.sheet = name
        return served

    def known(self, name: str, caller: Caller) -> Manifest:
        """What a sheet that the caller may ask was made with.

        Raises `Refusal` in the same words for one that is not there.
        """
        manifest = self.shelf.manifests.get(name) if caller.may_ask(name) else None
        if manifest is None:
            raise _unknown(name)
        return manifest

    async def respond(self, request: Request, caller: Caller, body: Asked, form: Form) -> Response:
        """Answer a request, whole or as events. Raises `Refusal` where that cannot be."""
        served = await self.find(body.model, caller, record_of(request))
        answers = await self.begin(request, caller, served, body, lambda: form.asks(served), form.answers)
        if body.stream:
            pieces = await answers.stream()
            return left() if pieces is None else EventStream(form.events(served, pieces))
        whole = await answers.whole()
        if whole is None:
            return left()
        return Response(form.reply(served, whole).json_text(), media_type="application/json")

    async def begin(
        self,
        request: Request,
        caller: Caller,
        served: Served,
        body: Asked,
        asks: Callable[[], Sequence[Ask]],
        answers: int,
    ) -> Answers:
        """Let the request in and have its answers written. Raises `Refusal` where that cannot be."""
        record = record_of(request)
        record.facts |= log_facts(body)
        record.cleanup.callback(self.gate.enter(caller.name, answers))
        lane: Lane = "form" if body.has_form else "long" if len(await request.body()) > _LONG else "plain"
        prepared = await self.in_thread(asks, lane)
        if self.settings.log_text:
            record.facts["question"] = prepared[0].question
        return Answers(self, request, served, body, prepared, lane)

    async def extended(self, served: Served, ask: Ask, answer: Answer, wanted: Extension) -> Extended | None:
        """The reply's extension field, if the request asked for one: where the answer is from.

        The question is read again only for more sources than an answer brings along.
        """
        if not wanted.replies:
            return None
        limit = wanted.sources or 0
        sources: Sequence[Source] | None = None
        if limit > LIMIT:
            async with self._tracing:
                sources = await self.in_thread(lambda: served.kb.sources(ask.question, answer, limit=limit))
        elif limit:
            sources = answer.sources[:limit]
        elif wanted.evidence:
            sources = answer.sources
        return extension_of(answer, sources, texts=self.settings.show_documents)


class Answers:
    """The answers to one request."""

    def __init__(
        self, service: Service, request: Request, served: Served, body: Asked, asks: Sequence[Ask], lane: Lane
    ) -> None:
        self._service, self._request, self._body, self._lane = service, request, body, lane
        self.served, self._asks = served, asks
        self._record = record_of(request)

    async def whole(self) -> list[Finished] | None:
        """Every answer with its evidence; nothing if the caller left."""
        with suppress(ReaderLeft):
            return await while_connected(self._request.receive, self._whole())
        return None

    async def _whole(self) -> list[Finished]:
        found: dict[int, Finished] = {}
        async for piece, extended in self._pieces():
            if piece.answer is not None:
                found[piece.choice] = (piece.answer, extended)
        return [found[choice] for choice in sorted(found)]

    async def stream(self) -> AsyncIterator[Coming] | None:
        """Pieces of the answers, the first of which is there; nothing if the caller left before."""
        pieces = self._pieces()
        first: Coming | None = None
        with suppress(ReaderLeft):
            first = await while_connected(self._request.receive, pieces.__anext__())  # type: ignore[arg-type]
        return None if first is None else _chained(first, pieces)

    async def _pieces(self) -> AsyncIterator[Coming]:
        record = self._record
        writing = Writing()
        record.cleanup.callback(writing.stop)
        loop = asyncio.get_running_loop()
        await self._service.in_thread(lambda: writing.begin(self.served.kb, self._asks, loop), self._lane)
        async for piece in writing.pieces():
            record.begin_text()
            extended = None
            if piece.answer is not None:
                self._note(piece.choice, piece.answer)
                ask = self._asks[piece.choice // self._body.choices]
                extended = await self._service.extended(self.served, ask, piece.answer, self._body.extension)
            yield piece, extended

    def _note(self, choice: int, answer: Answer) -> None:
        record = self._record
        if choice % self._body.choices == 0:
            record.prompt_tokens += answer.usage.prompt_tokens
            record.cached_tokens += answer.usage.cached_tokens
        record.completion_tokens += answer.usage.completion_tokens
        record.facts.setdefault("finish", []).append(answer.finish_reason)
        if self._service.settings.log_text:
            record.facts.setdefault("answers", []).append(answer.text)


def _unknown(name: str) -> Refusal:
    return Refusal(404, f"There is no sheet {name!r}; see /v1/models.", param="model", code="model_not_found")


def left() -> Response:
    """For a caller who is no longer there; nobody reads it."""
    return Response(status_code=499)


async def _chained(first: Coming, rest: AsyncIterator[Coming]) -> AsyncIterator[Coming]:
    yield first
    async for each in rest:
        yield each
