"""`/v1/completions`: each prompt is a question to the sheet."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from cribsheet.asking.answer import Answer
from cribsheet.server.auth import Caller
from cribsheet.server.openai.generation import Piece
from cribsheet.server.openai.parameters import completion_asks
from cribsheet.server.openai.protocol import CompletionRequest
from cribsheet.server.openai.replies import (
    CompletionChoice,
    CompletionReply,
    Extended,
    completion_logprobs,
    finish,
    head,
    usage,
)
from cribsheet.server.openai.streaming import DONE, EventStream
from cribsheet.server.service import Answers, Service, left
from cribsheet.server.telemetry.record import record_of


async def complete(service: Service, request: Request, body: CompletionRequest, caller: Caller) -> Response:
    """Answer prompts."""
    served = await service.find(body.model, caller, record_of(request))
    wanted = len(body.prompts) * body.choices
    answers = await service.begin(
        request, caller, served, body, lambda: completion_asks(body, served.kb, service.settings), wanted
    )
    if body.stream:
        pieces = await answers.stream()
        return left() if pieces is None else EventStream(_events(answers, body, pieces))
    whole = await answers.whole()
    if whole is None:
        return left()
    reply = CompletionReply(
        **head(served, "cmpl"),
        object="text_completion",
        choices=[_choice(number, *each) for number, each in enumerate(whole)],
        usage=usage([answer for answer, _ in whole], body.choices),
    )
    return Response(reply.json_text(), media_type="application/json")


def _choice(number: int, answer: Answer, extended: Extended | None) -> CompletionChoice:
    return CompletionChoice(
        index=number,
        text=answer.text,
        logprobs=completion_logprobs(answer.logprobs),
        finish_reason=finish(answer, ()),
        **({} if extended is None else {"cribsheet": extended}),
    )


async def _events(
    answers: Answers, body: CompletionRequest, pieces: AsyncIterator[tuple[Piece, Extended | None]]
) -> AsyncIterator[str]:
    common: dict[str, Any] = {**head(answers.served, "cmpl"), "object": "text_completion"}
    none_yet: dict[str, Any] = {"usage": None} if body.wants_usage else {}
    finished: dict[int, Answer] = {}
    offsets: Counter[int] = Counter()
    async for piece, extended in pieces:
        logprobs = completion_logprobs(piece.logprobs, offsets[piece.choice]) if body.logprobs is not None else None
        offsets[piece.choice] += sum(len(each.token) for each in piece.logprobs)
        if piece.text or piece.logprobs:
            choice = CompletionChoice(index=piece.choice, text=piece.text, logprobs=logprobs, finish_reason=None)
            yield CompletionReply(**common, **none_yet, choices=[choice]).json_text()
        if piece.answer is not None:
            finished[piece.choice] = piece.answer
            last = CompletionChoice(
                index=piece.choice,
                text="",
                logprobs=None,
                finish_reason=finish(piece.answer, ()),
                **({} if extended is None else {"cribsheet": extended}),
            )
            yield CompletionReply(**common, **none_yet, choices=[last]).json_text()
    if body.wants_usage:
        counted = usage([finished[number] for number in sorted(finished)], body.choices)
        yield CompletionReply(**common, choices=[], usage=counted).json_text()
    yield DONE
