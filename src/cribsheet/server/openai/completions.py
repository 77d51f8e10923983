"""`/v1/completions`: each prompt is a question to the sheet."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from cribsheet.asking.answer import Answer
from cribsheet.server.openai.parameters import Ask, completion_asks
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
from cribsheet.server.openai.streaming import DONE
from cribsheet.server.service import Coming, Finished, Form
from cribsheet.server.settings import ServerSettings
from cribsheet.server.sheets import Served


def completion_form(body: CompletionRequest, settings: ServerSettings) -> Form:
    """What is asked and answered for prompts."""

    def asks(served: Served) -> Sequence[Ask]:
        return completion_asks(body, served.kb, settings)

    return Form(len(body.prompts) * body.choices, asks, partial(_reply, body), partial(_events, body))


def _reply(body: CompletionRequest, served: Served, answers: Sequence[Finished]) -> CompletionReply:
    choices = [_choice(number, answer, extended) for number, (answer, extended) in enumerate(answers)]
    counted = usage([answer for answer, _ in answers], body.choices)
    return CompletionReply(**head(served, "cmpl"), object="text_completion", choices=choices, usage=counted)


def _choice(number: int, answer: Answer, extended: Extended | None) -> CompletionChoice:
    return CompletionChoice(
        index=number,
        text=answer.text,
        logprobs=completion_logprobs(answer.logprobs),
        finish_reason=finish(answer, ()),
        **({} if extended is None else {"cribsheet": extended}),
    )


async def _events(body: CompletionRequest, served: Served, pieces: AsyncIterator[Coming]) -> AsyncIterator[str]:
    common: dict[str, Any] = {**head(served, "cmpl"), "object": "text_completion"}
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
