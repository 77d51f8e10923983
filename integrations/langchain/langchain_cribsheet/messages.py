"""LangChain's messages to conversations in OpenAI's shape, and answers back to messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.messages.tool import tool_call, tool_call_chunk

from cribsheet import Answer, RequestError, Sheet, Usage
from cribsheet.engine.sampling import TokenLogprob

_ROLES = {
    HumanMessage: "user",
    AIMessage: "assistant",
    SystemMessage: "system",
    ToolMessage: "tool",
    FunctionMessage: "function",
}
_BESIDE = ("function_call", "refusal")  # what older messages and OpenAI's keep in `additional_kwargs`


def as_conversation(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Turns for `CompressedKnowledgeLLM.ask`. Raises `RequestError` for messages that are no turns."""
    return [_turn(message) for message in messages]


def _turn(message: BaseMessage) -> dict[str, Any]:
    role = message.role if isinstance(message, ChatMessage) else None
    role = role or next((role for kind, role in _ROLES.items() if isinstance(message, kind)), None)
    if role is None:
        raise RequestError(f"A message of type {message.type!r} cannot be told to the model; leave it out.")
    turn: dict[str, Any] = {"role": role, "content": message.content}
    if isinstance(message, AIMessage):
        beside = {name: message.additional_kwargs[name] for name in _BESIDE if name in message.additional_kwargs}
        return {**turn, **beside, "tool_calls": message.tool_calls}
    if isinstance(message.content, list):  # each part is a text of its own, which an answer's are not
        parts = [part for each in message.content for part in ("\n", each)]
        turn["content"] = parts[1:]
    if isinstance(message, ToolMessage):
        turn["tool_call_id"] = message.tool_call_id
    return {**turn, "name": message.name} if message.name else turn


def source_documents(message: BaseMessage) -> list[Document]:
    """What an answer of `ChatCribsheet` looked at, by weight, as documents; none where evidence was turned off.

    Metadata are those of `CribsheetRetriever`: `document_id`, `source`, `start_index`, `end_index`, `score`; and
    `retrieved`, which tells passages that were retrieved from what the sheet keeps. A retrieved passage keeps the
    metadata it came with, under other names.
    """
    return [
        Document(
            page_content=each["text"],
            id=f"{each['document_id']}:{each['start']}",
            metadata={
                **each["metadata"],
                "source": each["document_id"],
                "document_id": each["document_id"],
                "start_index": each["start"],
                "end_index": each["stop"],
                "score": each["weight"],
                "retrieved": each["retrieved"],
            },
        )
        for each in message.response_metadata.get("sources", ())
    ]


def as_message(answer: Answer, facts: Mapping[str, Any]) -> AIMessage:
    """The message of a whole answer; `facts` are the sheet's."""
    return AIMessage(
        content=answer.text,
        tool_calls=[tool_call(name=call.name, args=call.arguments, id=call.id) for call in answer.tool_calls],
        usage_metadata=_usage(answer.usage),
        response_metadata=_metadata(answer, facts),
    )


def last_chunk(answer: Answer, facts: Mapping[str, Any]) -> AIMessageChunk:
    """The last chunk of a stream: calls, usage and metadata, which must come only once."""
    return AIMessageChunk(
        content="",
        tool_call_chunks=[
            tool_call_chunk(
                name=call.name, args=json.dumps(call.arguments, ensure_ascii=False), id=call.id, index=number
            )
            for number, call in enumerate(answer.tool_calls)
        ],
        usage_metadata=_usage(answer.usage),
        response_metadata=_metadata(answer, facts),
        chunk_position="last",
    )


def _usage(usage: Usage) -> UsageMetadata:
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.cached_tokens),
    )


def facts_of(sheet: Sheet, model: str) -> dict[str, Any]:
    """What every message tells of the sheet."""
    return {
        "model_name": model,
        "model_provider": "cribsheet",
        "sheet": sheet.manifest.digest,
        "kept_tokens": sheet.tokens,
        "corpus_tokens": sheet.manifest.corpus_tokens,
    }


def _metadata(answer: Answer, facts: Mapping[str, Any]) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        **facts,
        "finish_reason": answer.finish_reason,
        "mode": answer.mode,
        "sources": [asdict(each) for each in answer.sources],
    }
    if answer.certainty is not None:
        metadata["certainty"] = answer.certainty
    if answer.logprobs is not None:
        metadata["logprobs"] = {"content": [_logprob(each) for each in answer.logprobs]}
    return metadata


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    top = [_plain(text, logprob) for text, logprob in token.top]
    return {**_plain(token.token, token.logprob), "top_logprobs": top}


def _plain(text: str, logprob: float) -> dict[str, Any]:
    whole = "\ufffd" not in text  # a part of a character has bytes that its text does not tell
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}
