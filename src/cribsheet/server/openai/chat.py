"""`/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from cribsheet.asking.answer import Answer
from cribsheet.server.openai.generation import Piece
from cribsheet.server.openai.parameters import Ask, chat_ask
from cribsheet.server.openai.protocol import ChatRequest
from cribsheet.server.openai.replies import (
    ChatChoice,
    ChatChunk,
    ChatReply,
    ChunkChoice,
    Extended,
    ReplyMessage,
    chat_logprobs,
    finish,
    head,
    tool_calls,
    usage,
)
from cribsheet.server.openai.streaming import DONE
from cribsheet.server.service import Coming, Finished, Form
from cribsheet.server.settings import ServerSettings
from cribsheet.server.sheets import Served
from cribsheet.structured.tools import ToolCall


def chat_form(body: ChatRequest, settings: ServerSettings) -> Form:
    """What is asked and answered in a conversation."""

    def asks(served: Served) -> list[Ask]:
        return [chat_ask(body, served.kb, settings)]

    return Form(body.choices, asks, partial(_reply, body), partial(_events, body))


def _reply(body: ChatRequest, served: Served, answers: Sequence[Finished]) -> ChatReply:
    choices = [_choice(number, answer, extended, body) for number, (answer, extended) in enumerate(answers)]
    counted = usage([answer for answer, _ in answers], body.choices)
    return ChatReply(**head(served, "chatcmpl"), object="chat.completion", choices=choices, usage=counted)


def _choice(number: int, answer: Answer, extended: Extended | None, body: ChatRequest) -> ChatChoice:
    calls = _calls(answer, body)
    called = {"tool_calls": tool_calls(calls)} if calls else {}
    return ChatChoice(
        index=number,
        message=ReplyMessage(
            role="assistant", content=answer.text if not calls or answer.text else None, refusal=None, **called
        ),
        logprobs=chat_logprobs(answer.logprobs),
        finish_reason=finish(answer, calls),
        **_extension(extended),
    )


async def _events(body: ChatRequest, served: Served, pieces: AsyncIterator[Coming]) -> AsyncIterator[str]:
    common: dict[str, Any] = {**head(served, "chatcmpl"), "object": "chat.completion.chunk"}
    none_yet: dict[str, Any] = {"usage": None} if body.wants_usage else {}
    finished: dict[int, Answer] = {}

    def event(choice: ChunkChoice) -> str:
        return ChatChunk(**common, **none_yet, choices=[choice]).json_text()

    for number in range(body.choices):
        opening = ReplyMessage(role="assistant", content="", refusal=None)
        yield event(ChunkChoice(index=number, delta=opening, logprobs=None, finish_reason=None))
    async for piece, extended in pieces:
        for choice in _chunks(piece, extended, body):
            yield event(choice)
        if piece.answer is not None:
            finished[piece.choice] = piece.answer
    if body.wants_usage:
        counted = usage([finished[number] for number in sorted(finished)], body.choices)
        yield ChatChunk(**common, choices=[], usage=counted).json_text()
    yield DONE


def _chunks(piece: Piece, extended: Extended | None, body: ChatRequest) -> list[ChunkChoice]:
    """The events of one piece: its text, then calls and the end if it is the last."""
    chunks: list[ChunkChoice] = []
    logprobs = chat_logprobs(piece.logprobs) if body.logprobs else None
    if piece.text or piece.logprobs:
        delta = ReplyMessage(content=piece.text)
        chunks.append(ChunkChoice(index=piece.choice, delta=delta, logprobs=logprobs, finish_reason=None))
    if piece.answer is None:
        return chunks
    calls = _calls(piece.answer, body)
    if calls:
        delta = ReplyMessage(tool_calls=tool_calls(calls, numbered=True))
        chunks.append(ChunkChoice(index=piece.choice, delta=delta, logprobs=None, finish_reason=None))
    end = finish(piece.answer, calls)
    last = ChunkChoice(
        index=piece.choice, delta=ReplyMessage(), logprobs=None, finish_reason=end, **_extension(extended)
    )
    return [*chunks, last]


def _calls(answer: Answer, body: ChatRequest) -> tuple[ToolCall, ...]:
    return answer.tool_calls[:1] if body.parallel_tool_calls is False else answer.tool_calls


def _extension(extended: Extended | None) -> dict[str, Any]:
    return {} if extended is None else {"cribsheet": extended}
