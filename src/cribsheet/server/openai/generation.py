"""The answers to one request while they are written: pieces in the order in which they come, and the work's end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from cribsheet.asking.answer import Answer
from cribsheet.asking.llama_cpp.served import AsyncLlamaStream
from cribsheet.asking.streams import AsyncAnswerStream
from cribsheet.engine.sampling import TokenLogprob
from cribsheet.server.errors import Refusal, refusal_of
from cribsheet.server.openai.parameters import Ask
from cribsheet.server.sheets import Kb


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of one of the answers, with what was asked about its tokens; `answer` only in the last piece of each."""

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    answer: Answer | None = None


class Writing:
    """Answers that are being written. `stop` ends the work within one token; safe to call at any time."""

    def __init__(self) -> None:
        self._asks: list[Ask] = []  # of each stream
        self._streams: list[AsyncAnswerStream | AsyncLlamaStream] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._pieces: asyncio.Queue[Piece | BaseException] = asyncio.Queue()
        self._stopped = False

    def begin(self, kb: Kb, asks: Sequence[Ask], loop: asyncio.AbstractEventLoop) -> None:
        """Hand the questions to the engine; called in a thread, for that may take a while.

        Raises `Refusal` for what cannot be answered.
        """
        try:
            for ask in asks:
                self._asks += [ask] * ask.answers
                self._streams += kb.astream_many(ask.question, ask.answers, loop=loop, **ask.settings)
        except Exception as error:
            refusal = refusal_of(error, field=ask.field, form=ask.form)
            raise (error if refusal.status == 500 else refusal) from error
        if self._stopped:
            self.stop()

    async def pieces(self) -> AsyncIterator[Piece]:
        """Pieces of all answers until each had its last. Raises `Refusal` for whatever goes wrong."""
        self._tasks = [asyncio.create_task(self._read(n, stream)) for n, stream in enumerate(self._streams)]
        left = len(self._streams)
        while left:
            piece = await self._pieces.get()
            if isinstance(piece, BaseException):
                raise piece
            left -= piece.answer is not None
            yield piece

    def stop(self) -> None:
        """Nobody waits any more."""
        self._stopped = True
        for stream in self._streams:
            stream.cancel()
        for task in self._tasks:
            task.cancel()

    async def _read(self, choice: int, stream: AsyncAnswerStream | AsyncLlamaStream) -> None:
        told = 0
        try:
            async for text in stream:
                logprobs = stream.logprobs_from(told)
                told += len(logprobs)
                self._pieces.put_nowait(Piece(choice, text, logprobs))
        except Exception as error:
            late = stream.is_late
            ask = self._asks[choice]
            refusal = refusal_of(error, late=late, field=ask.field, form=ask.form)
            self._pieces.put_nowait(error if refusal.status == 500 else refusal)
            return
        answer = stream.answer
        if answer.finish_reason == "cancelled":
            self._pieces.put_nowait(Refusal(503, "The server is shutting down; ask again later."))
            return
        self._pieces.put_nowait(Piece(choice, "", stream.logprobs_from(told), answer))
