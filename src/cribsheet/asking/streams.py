"""What a caller holds while an answer is written: pieces of text, then the whole answer."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Literal, Self

from torch import Tensor

from cribsheet.asking.answer import Answer, Source, Usage
from cribsheet.engine.request import Delta, Event, Finished, Request, own_copy
from cribsheet.engine.sampling import TokenLogprob
from cribsheet.errors import RequestError
from cribsheet.retrieval.retriever import Passage
from cribsheet.structured.tools import CallReader, Toolbox


class Stream:
    """What a caller holds while an answer is written; shared by the sync and async forms."""

    def __init__(self, request: Request, toolbox: Toolbox | None) -> None:
        self.request = request
        self.mode: Literal["sheet", "retrieval", "hybrid"] = "sheet"
        self.passages: tuple[Passage, ...] = ()
        self.certainty: float | None = None
        self._reader = CallReader(toolbox) if toolbox else None
        self._began = time.perf_counter()
        self._first = 0.0
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._answer: Answer | None = None
        self.sources: tuple[Source, ...] = ()  # of an answer that is taken over
        self.trace: Callable[[Tensor], tuple[Source, ...]] | None = None

    @property
    def answer(self) -> Answer:
        """The whole answer, once the stream has ended."""
        if self._answer is None:
            raise RequestError("The answer is not finished; read the stream to its end first.")
        return self._answer

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """Log-probabilities of the tokens that were read so far, if they were asked for."""
        return tuple(self._logprobs)

    def logprobs_from(self, number: int) -> tuple[TokenLogprob, ...]:
        """Those of the tokens from a number on, without a copy of all."""
        return tuple(self._logprobs[number:])

    def cancel(self) -> None:
        """Stop within one token; the stream then ends with finish reason "cancelled"."""
        self.request.cancel()

    def __del__(self) -> None:
        """A stream that nobody holds any more stops the work too."""
        if self._answer is None:
            self.cancel()

    def _take(self, event: Event) -> str:
        """The text of an event, perhaps none, that a reader may see; errors are raised here."""
        if isinstance(event, BaseException):
            self._answer = self._finish(Finished("cancelled", 0))
            raise own_copy(event)
        if isinstance(event, Finished):
            rest = self._reader.finish() if self._reader else ""
            self._texts.append(rest)
            self._answer = self._finish(event)
            return rest
        self._first = self._first or time.perf_counter() - self._began
        self._logprobs.extend(event.logprobs)
        text = self._reader.push(event.text) if self._reader else event.text
        self._texts.append(text)
        return text

    def _finish(self, end: Finished) -> Answer:
        cached, asked = self.request.prefix.tokens, len(self.request.question)
        seconds = time.perf_counter() - self._began
        calls = self._reader.calls if self._reader else ()
        return Answer(
            text="".join(self._texts),
            finish_reason="tool_calls" if calls and end.reason == "stop" else end.reason,
            tool_calls=calls,
            sources=self.sources if end.looked is None or self.trace is None else self.trace(end.looked),
            usage=Usage(cached + asked, cached, end.completion_tokens),
            seconds=seconds,
            first_token_seconds=self._first or seconds,
            mode=self.mode,
            passages=self.passages,
            certainty=self.certainty,
            logprobs=None if self.request.params.logprobs is None else tuple(self._logprobs),
        )


class AnswerStream(Stream):
    """Iterate for pieces of text as they are written; `.answer` is complete afterwards."""

    def __init__(self, request: Request, toolbox: Toolbox | None = None) -> None:
        super().__init__(request, toolbox)
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        request.sink = self._events.put

    def __iter__(self) -> Iterator[str]:
        """Pieces of text; never empty ones."""
        return self

    def __next__(self) -> str:
        """The next piece of text, waiting for it; several readers share the pieces and all see the end."""
        while self._answer is None:
            event = self._events.get()
            if not isinstance(event, Delta):
                self._events.put(event)
            text = self._take(event)
            if text:
                return text
        raise StopIteration

    def close(self) -> None:
        """Stop the work if it still runs; safe to call twice and from any thread."""
        if self._answer is None:
            self.cancel()

    def __enter__(self) -> Self:
        """The stream itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the work if it still runs."""
        self.close()


class AsyncAnswerStream(Stream):
    """`AnswerStream` for `async for`."""

    def __init__(self, request: Request, toolbox: Toolbox | None, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(request, toolbox)
        self.work: asyncio.Task[None] | Future[None] | None = None  # what is done before the question can be asked
        self._events = events = asyncio.Queue[Event]()
        request.sink = lambda event: _hand_over(loop, events, event)

    def __aiter__(self) -> AsyncIterator[str]:
        """Pieces of text; never empty ones."""
        return self

    async def __anext__(self) -> str:
        """The next piece of text."""
        while self._answer is None:
            try:
                event = await self._events.get()
            except asyncio.CancelledError:
                self.cancel()
                raise
            if not isinstance(event, Delta):
                self._events.put_nowait(event)
            text = self._take(event)
            if text:
                return text
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Stop the work if it still runs."""
        if self._answer is None:
            self.cancel()

    async def __aenter__(self) -> Self:
        """The stream itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the work if it still runs."""
        await self.aclose()


def _hand_over(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(events.put_nowait, event)
