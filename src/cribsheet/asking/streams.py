"""What a caller holds while an answer is written, pieces of text, then the whole answer; and all that are written."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Self

from torch import Tensor

from cribsheet.asking.answer import Answer, Source, Usage
from cribsheet.asking.prepared import Prepared
from cribsheet.attention.prefix import Prefix
from cribsheet.engine.pool import LoadedModel
from cribsheet.engine.request import Delta, Event, Finished, Request, Sink, own_copy
from cribsheet.engine.sampling import TokenLogprob
from cribsheet.errors import EngineError, RequestError
from cribsheet.structured.tools import CallReader

Trace = Callable[[Tensor], tuple[Source, ...]]


class Stream:
    """What a caller holds while an answer is written; shared by the sync and async forms."""

    def __init__(self, question: Prepared, sink: Sink) -> None:
        self.question, self.sink = question, sink
        self.certainty: float | None = None
        self._reader = CallReader(question.toolbox) if question.toolbox else None
        self._began = time.perf_counter()
        self._first = 0.0
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._answer: Answer | None = None
        self._cached = question.before
        self._sources: tuple[Source, ...] = ()  # of an answer that is taken over
        self._trace: Trace | None = None

    def request(self, prefix: Prefix, trace: Trace | None = None) -> Request:
        """What the engine is to answer, over a prefix; `trace` finds the sources in what was looked at."""
        recalled = self.question.recalled
        self._cached, self._trace = prefix.tokens + (recalled.tokens if recalled else 0), trace
        return self.question.over(prefix, self.sink)

    def ask_instead(self, question: Prepared) -> None:
        """Listen to the answer of a question that says the same and more."""
        self.question = question.instead_of(self.question)

    def take_over(self, answer: Answer) -> None:
        """Tell an answer that was written already as this one's own."""
        assert answer.finish_reason != "tool_calls"  # a draft has no toolbox that would read it
        self.sink(Delta(answer.text, answer.logprobs or ()))
        self._sources = answer.sources
        self.sink(Finished(answer.finish_reason, answer.usage.completion_tokens))

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

    @property
    def is_late(self) -> bool:
        """Whether the time that the caller allowed is up."""
        return self.question.is_late

    def cancel(self) -> None:
        """Stop within one token; the stream then ends with finish reason "cancelled"."""
        self.question.cancelled.set()

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
        question, cached, asked = self.question, self._cached, len(self.question.told.ids)
        seconds = time.perf_counter() - self._began
        calls = self._reader.calls if self._reader else ()
        return Answer(
            text="".join(self._texts),
            finish_reason="tool_calls" if calls and end.reason == "stop" else end.reason,
            tool_calls=calls,
            sources=self._sources if end.looked is None or self._trace is None else self._trace(end.looked),
            usage=Usage(cached + asked, cached, end.completion_tokens),
            seconds=seconds,
            first_token_seconds=self._first or seconds,
            mode=question.mode,
            passages=question.passages,
            certainty=self.certainty,
            logprobs=None if question.params.logprobs is None else tuple(self._logprobs),
        )


class AnswerStream(Stream):
    """Iterate for pieces of text as they are written; `.answer` is complete afterwards."""

    def __init__(self, question: Prepared) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        super().__init__(question, self._events.put)

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

    def __exit__(self, *error: object) -> None:
        """Stop the work if it still runs."""
        self.close()


class AsyncAnswerStream(Stream):
    """`AnswerStream` for `async for`."""

    def __init__(self, question: Prepared, loop: asyncio.AbstractEventLoop) -> None:
        self._events = events = asyncio.Queue[Event]()
        super().__init__(question, lambda event: _hand_over(loop, events, event))
        self.work: asyncio.Task[None] | Future[None] | None = None  # what is done before the question can be asked

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

    async def __aexit__(self, *error: object) -> None:
        """Stop the work if it still runs."""
        await self.aclose()


class Running:
    """The answers that are being written from a sheet, and from those that took its place, until it is closed.

    The model's engine ends with the last of those who use it.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self._lock, self._closed = threading.Lock(), False
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        loaded.enter(self)

    @property
    def closed(self) -> bool:
        """Whether nothing can be asked any more."""
        return self._closed

    def check_open(self) -> None:
        """Raise `EngineError` once it is closed."""
        if self._closed:
            raise EngineError("This sheet is closed; load it again to ask more questions.")

    def add(self, streams: Sequence[Stream]) -> None:
        """Remember who listens to what is asked now. Raises `EngineError` once it is closed."""
        with self._lock:
            self.check_open()
            self._streams.update(streams)

    def close(self) -> None:
        """Cancel whatever runs; safe to call twice."""
        with self._lock:
            self._closed = True
            streams = list(self._streams)
        for stream in streams:
            stream.cancel()
        self.loaded.leave(self)


def _hand_over(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(events.put_nowait, event)
