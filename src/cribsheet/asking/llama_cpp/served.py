"""A sheet in llama.cpp as our server asks it: answers while they are written, so many at a time as there are slots."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn, Self

from cribsheet.asking.answer import Answer
from cribsheet.asking.llama_cpp.llm import LlamaCpp, LlamaStream
from cribsheet.engine.sampling import TokenLogprob
from cribsheet.errors import EngineError, RequestError
from cribsheet.prompt.turns import Question
from cribsheet.sheet.sheet import Sheet


class ServedLlamaCpp:
    """What a server needs of `CompressedKnowledgeLLM`, over llama.cpp. Raises `RequestError` for what that lacks."""

    def __init__(self, llama: LlamaCpp, slots: int = 1) -> None:
        self._llama, self.sheet, self.room = llama, llama.sheet, llama.room
        self._threads = ThreadPoolExecutor(slots, thread_name_prefix="cribsheet-llama")

    @classmethod
    def load(cls, sheet: Sheet | str | Path, *, gguf: str | Path, slots: int = 1, tokenizer: Any = None) -> Self:
        """Open a sheet in llama.cpp; raises as `LlamaCpp`."""
        return cls(LlamaCpp(sheet, gguf, slots=slots, tokenizer=tokenizer), slots)

    def astream_many(
        self, question: Question, n: int, *, loop: asyncio.AbstractEventLoop, **settings: Any
    ) -> list[AsyncLlamaStream]:
        """The answers while they are written; with a seed, each has the next one."""
        if settings.pop("evidence", False):
            self.sources()
        if settings.pop("grammar", None) is not None:
            raise RequestError("llama.cpp answers here without forms; ask without response_format and forced tools.")
        timeout, seed = settings.get("timeout"), settings.pop("seed", None)
        seeds = [None if seed is None else seed + number for number in range(n)]
        streams = [self._llama.stream(question, **settings, seed=each) for each in seeds]
        return [AsyncLlamaStream(stream, timeout, loop, self._threads) for stream in streams]

    def sources(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: where an answer looked takes our attention."""
        raise RequestError("Answers of llama.cpp have no sources; ask without evidence and sources.")

    @property
    def backbone(self) -> NoReturn:
        """Refused: no model of ours is there, whose tokens could be named."""
        raise RequestError("llama.cpp answers here without logit_bias; ask without.")

    def close(self) -> None:
        """End llama.cpp; safe to call twice."""
        self._llama.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


class AsyncLlamaStream:
    """Pieces of an answer for `async for`; `.answer` is complete afterwards."""

    def __init__(
        self, stream: LlamaStream, timeout: float | None, loop: asyncio.AbstractEventLoop, threads: ThreadPoolExecutor
    ) -> None:
        self._stream, self._loop = stream, loop
        self._ends = None if timeout is None else time.monotonic() + timeout
        self._events: asyncio.Queue[str | BaseException | None] = asyncio.Queue()
        self._cancelled = threading.Event()
        try:
            threads.submit(self._read)
        except RuntimeError as error:
            raise EngineError("This llama.cpp was closed; open the sheet in it again.") from error

    @property
    def answer(self) -> Answer:
        """The answer, once all of it was read."""
        return self._stream.answer

    @property
    def is_late(self) -> bool:
        """Whether the time that the caller allowed is up."""
        return self._ends is not None and time.monotonic() > self._ends

    def logprobs_from(self, number: int) -> tuple[TokenLogprob, ...]:
        """None: llama.cpp is not asked for them."""
        return ()

    def cancel(self) -> None:
        """Stop within one token."""
        self._cancelled.set()

    async def __aiter__(self) -> AsyncIterator[str]:
        """Pieces of text; never empty ones."""
        while (event := await self._events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event

    def _read(self) -> None:
        """Read the answer, in a thread."""
        try:
            self._check_awaited()  # a thread may have been long in coming
            with self._stream as pieces:
                for text in pieces:
                    self._check_awaited()
                    self._tell(text)
            self._tell(None)
        except Exception as error:
            self._tell(error)

    def _check_awaited(self) -> None:
        if self._cancelled.is_set() or self.is_late:
            raise EngineError("The answer was stopped before it was complete; allow more time.")

    def _tell(self, event: str | BaseException | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop is closed, and nobody waits
            self.cancel()
