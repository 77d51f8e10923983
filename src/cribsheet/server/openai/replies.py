"""What goes back, in OpenAI's shape; the classes are also what the API's description says."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cribsheet.asking.answer import Answer, Source
from cribsheet.engine.sampling import TokenLogprob
from cribsheet.server.sheets import Served
from cribsheet.structured.tools import ToolCall

Finish = Literal["stop", "length", "tool_calls"]


class Reply(BaseModel):
    """Base of all replies; only fields that were set are sent."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    def json_text(self) -> str:
        """As it is sent."""
        return self.model_dump_json(exclude_unset=True)


class Alternative(Reply):
    """A token and its natural-log probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenScore(Alternative):
    """A token of the answer with its alternatives, best first."""

    top_logprobs: list[Alternative]


class ChatLogprobs(Reply):
    """The tokens of an answer or of a piece of it."""

    content: list[TokenScore]
    refusal: None = None


class Called(Reply):
    """A function and its arguments as JSON."""

    name: str
    arguments: str


class Call(Reply):
    """A tool that the model calls; `index` in streams only."""

    index: int = Field(default=0)
    id: str
    type: Literal["function"]
    function: Called


class Evidence(Reply):
    """Where in a document the answer looked; `weight` is its share, 0 to 1, of the attention on documents.

    One that was `retrieved` is a passage that was told after the sheet.
    """

    document: str
    start: int
    stop: int
    weight: float
    text: str
    retrieved: bool


class Extended(Reply):
    """The answer's extension field; `certainty` is how certain "auto" is that passages add nothing."""

    sources: list[Evidence] = []
    mode: Literal["sheet", "retrieval", "hybrid", "recall"]
    certainty: float | None = None


class ReplyMessage(Reply):
    """The assistant's turn, or a piece of it in a stream."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    refusal: None = None
    tool_calls: list[Call] = []


class ChatChoice(Reply):
    """One answer."""

    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish
    cribsheet: Extended | None = None


class ChunkChoice(Reply):
    """A piece of one answer."""

    index: int
    delta: ReplyMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish | None
    cribsheet: Extended | None = None


class CachedTokens(Reply):
    """Tokens of the prompt that are the sheet's and were not read again."""

    cached_tokens: int


class TokenUsage(Reply):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class _Head(Reply):
    id: str
    created: int
    model: str
    system_fingerprint: str = Field(description="Digest of the sheet.")


class ChatReply(_Head):
    """The whole answer of /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: TokenUsage


class ChatChunk(_Head):
    """One event of a stream of /v1/chat/completions."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]
    usage: TokenUsage | None = None


class CompletionLogprobs(Reply):
    """Tokens of an answer in the older form."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(Reply):
    """One answer, or a piece of it in a stream."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None
    cribsheet: Extended | None = None


class CompletionReply(_Head):
    """The answer of /v1/completions, or one event of its stream."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: TokenUsage | None = None


def head(served: Served, prefix: str) -> dict[str, Any]:
    """What all replies to one request have in common."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": served.name,
        "system_fingerprint": f"sheet_{served.digest}",
    }


def usage(answers: Sequence[Answer], choices: int) -> TokenUsage:
    """Token counts of all answers; a question with several choices counts once."""
    asked = answers[::choices]
    prompt = sum(answer.usage.prompt_tokens for answer in asked)
    completion = sum(answer.usage.completion_tokens for answer in answers)
    return TokenUsage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=CachedTokens(cached_tokens=sum(answer.usage.cached_tokens for answer in asked)),
    )


def finish(answer: Answer, calls: Sequence[ToolCall]) -> Finish:
    """Why it ended, as OpenAI says it."""
    if answer.finish_reason == "tool_calls" or calls:
        return "tool_calls"
    return "length" if answer.finish_reason == "length" else "stop"


def tool_calls(calls: Sequence[ToolCall], *, numbered: bool = False) -> list[Call]:
    """Calls as messages hold them."""
    return [
        Call(
            **({"index": number} if numbered else {}),
            id=call.id,
            type="function",
            function=Called(name=call.name, arguments=json.dumps(call.arguments, ensure_ascii=False)),
        )
        for number, call in enumerate(calls)
    ]


def chat_logprobs(tokens: Sequence[TokenLogprob] | None) -> ChatLogprobs | None:
    """Log-probabilities as chats report them."""
    if tokens is None:
        return None
    scores = [
        TokenScore(
            **_alternative(each.token, each.logprob), top_logprobs=[Alternative(**_alternative(*t)) for t in each.top]
        )
        for each in tokens
    ]
    return ChatLogprobs(content=scores, refusal=None)


def completion_logprobs(tokens: Sequence[TokenLogprob] | None, offset: int = 0) -> CompletionLogprobs | None:
    """Log-probabilities in the older form; `offset` is where the first token begins in the text."""
    if tokens is None:
        return None
    places = []
    for each in tokens:
        places.append(offset)
        offset += len(each.token)
    return CompletionLogprobs(
        tokens=[each.token for each in tokens],
        token_logprobs=[each.logprob for each in tokens],
        top_logprobs=[dict(each.top) for each in tokens] if any(each.top for each in tokens) else None,
        text_offset=places,
    )


def extension_of(answer: Answer, sources: Sequence[Source] | None, *, texts: bool) -> Extended:
    """The extension field of an answer, with its sources if they are wanted and, if they may be shown, their texts."""
    found: dict[str, Any] = {"mode": answer.mode}
    if answer.certainty is not None:
        found["certainty"] = answer.certainty
    if sources is not None:
        found["sources"] = [_evidence(source, source.text if texts else "") for source in sources]
    return Extended(**found)


def _evidence(source: Source, text: str) -> Evidence:
    return Evidence(
        document=source.document_id,
        start=source.start,
        stop=source.stop,
        weight=source.weight,
        text=text,
        retrieved=source.retrieved,
    )


def _alternative(token: str, logprob: float) -> dict[str, Any]:
    whole = "\ufffd" not in token  # a part of a character has bytes that its text does not tell
    return {"token": token, "logprob": logprob, "bytes": list(token.encode()) if whole else None}
