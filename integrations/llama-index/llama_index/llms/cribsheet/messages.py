"""LlamaIndex's messages to conversations in OpenAI's shape, and answers back to its responses."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    ChatResponse,
    CitableBlock,
    CitationBlock,
    CompletionResponse,
    ContentBlock,
    LogProb,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)

from cribsheet import Answer, AnswerStream, AsyncAnswerStream, RequestError
from cribsheet.asking.llama_cpp.llm import LlamaStream
from cribsheet.engine.sampling import TokenLogprob

_ROLES = {MessageRole.FUNCTION: "tool", MessageRole.CHATBOT: "assistant", MessageRole.MODEL: "assistant"}
Response = TypeVar("Response")
# What a model wrote for itself, marks for other engines' caches, and what stands behind a text that is told.
_LEFT_OUT = (ThinkingBlock, CachePoint, CitationBlock)
_SAID = ("content", "tool_calls", "function_call", "refusal")
_BESIDE = ("tool_call_id", "name", "function_call", "refusal")


def as_conversation(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Turns for `CompressedKnowledgeLLM.ask`. Raises `RequestError` for messages that a text model cannot be told.

    Turns in which nothing was said are left out, except the last: chat engines remember empty answers too.
    """
    turns = [_turn(message) for message in messages]
    return [turn for turn in turns if any(turn.get(name) for name in _SAID) or turn is turns[-1]]


def _turn(message: ChatMessage) -> dict[str, Any]:
    texts = [_text(block) for block in message.blocks if not isinstance(block, (ToolCallBlock, *_LEFT_OUT))]
    calls: list[Any] = [_past_call(block) for block in message.blocks if isinstance(block, ToolCallBlock)]
    more = message.additional_kwargs
    return {
        "role": _ROLES.get(message.role, message.role.value),
        "content": "\n".join(texts),
        "tool_calls": calls or more.get("tool_calls") or [],
        **{name: more[name] for name in _BESIDE if name in more},
    }


def _text(block: ContentBlock) -> str:
    if isinstance(block, TextBlock):
        return block.text
    if isinstance(block, CitableBlock):
        return "\n".join([block.title, *map(_text, block.content)])
    raise RequestError(
        f"A message holds a block of type {block.block_type!r}, but the model reads text only; leave it out."
    )


def _past_call(block: ToolCallBlock) -> dict[str, Any]:
    return {"id": block.tool_call_id, "function": {"name": block.tool_name, "arguments": block.tool_kwargs}}


def arguments(call: ToolCallBlock) -> dict[str, Any]:
    """The arguments of a call; other models' calls may hold them as JSON."""
    given = call.tool_kwargs
    return given if isinstance(given, dict) else dict(json.loads(given))


def usage(answer: Answer) -> dict[str, Any]:
    """Token counts as OpenAI reports them, which LlamaIndex's counters and tracers read."""
    counted = answer.usage
    return {
        "prompt_tokens": counted.prompt_tokens,
        "completion_tokens": counted.completion_tokens,
        "total_tokens": counted.total_tokens,
        "prompt_tokens_details": {"cached_tokens": counted.cached_tokens},
    }


def as_chat_response(answer: Answer, facts: Mapping[str, Any], delta: str | None = None) -> ChatResponse:
    """The response of a whole answer; `facts` are what `raw` tells besides its usage."""
    calls = [
        ToolCallBlock(tool_call_id=call.id, tool_name=call.name, tool_kwargs=call.arguments)
        for call in answer.tool_calls
    ]
    text = [TextBlock(text=answer.text)] if answer.text or not calls else []
    message = ChatMessage(role=MessageRole.ASSISTANT, blocks=[*text, *calls])
    if calls:  # LlamaIndex's programs look for them here while an answer is streamed
        message.additional_kwargs["tool_calls"] = [_openai_call(block) for block in calls]
    return ChatResponse(message=message, delta=delta, raw=_raw(answer, facts), logprobs=_logprobs(answer))


def as_completion(answer: Answer, facts: Mapping[str, Any], delta: str | None = None) -> CompletionResponse:
    """As `as_chat_response`, for completions."""
    return CompletionResponse(text=answer.text, delta=delta, raw=_raw(answer, facts), logprobs=_logprobs(answer))


def _raw(answer: Answer, facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **facts,
        "finish_reason": answer.finish_reason,
        "usage": usage(answer),
        "mode": answer.mode,
        "certainty": answer.certainty,
        "sources": [asdict(each) for each in answer.sources],
    }


def _openai_call(block: ToolCallBlock) -> dict[str, Any]:
    function = {"name": block.tool_name, "arguments": json.dumps(block.tool_kwargs, ensure_ascii=False)}
    return {"id": block.tool_call_id, "type": "function", "function": function}


def _logprobs(answer: Answer) -> list[list[LogProb]] | None:
    """For each token the chosen one, then the alternatives that were asked for."""
    return None if answer.logprobs is None else [_alternatives(token) for token in answer.logprobs]


def _alternatives(token: TokenLogprob) -> list[LogProb]:
    pairs = [(token.token, token.logprob), *token.top]
    return [LogProb(token=text, logprob=logprob, bytes=list(text.encode())) for text, logprob in pairs]


def partial_chat_response(text: str, delta: str) -> ChatResponse:
    """The response so far."""
    return ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=text), delta=delta)


def partial_completion(text: str, delta: str) -> CompletionResponse:
    """The completion so far."""
    return CompletionResponse(text=text, delta=delta)


def responses(
    stream: AnswerStream | LlamaStream,
    partial: Callable[[str, str], Response],
    whole: Callable[[Answer, str], Response],
) -> Generator[Response, None, None]:
    """Responses as LlamaIndex streams them: the text so far with each piece, then once all that is known."""
    text = ""
    with stream:
        for delta in stream:
            text += delta
            yield partial(text, delta)
    yield whole(stream.answer, "")


async def aresponses(
    stream: AsyncAnswerStream, partial: Callable[[str, str], Response], whole: Callable[[Answer, str], Response]
) -> AsyncGenerator[Response, None]:
    """`responses` for `async for`."""
    text = ""
    async with stream:
        async for delta in stream:
            text += delta
            yield partial(text, delta)
    yield whole(stream.answer, "")
