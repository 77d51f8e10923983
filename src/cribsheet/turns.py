"""What callers ask, in OpenAI's shape, as the plain turns that a sheet's template renders.

System texts, tools and tool results become text of the user's turns after the sheet: what stands left of the question
is the sheet's and can no longer change. Nothing is dropped; what cannot be told to a text model is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cribsheet.errors import RequestError
from cribsheet.formats.record import short
from cribsheet.template import Message
from cribsheet.tools import Toolbox, ToolCall, result_text

Question = str | Sequence[Message]

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "user"}


def as_turns(question: Question, toolbox: Toolbox | None = None) -> list[Message]:
    """Turns of the roles system, user and assistant, each with text.

    A turn is `{"role", "content"}`; the assistant's may have `tool_calls`, a tool's has `content` and perhaps `name`.
    Contents are texts or lists of `{"type": "text", "text": ...}`. Raises `RequestError` for anything else, for empty
    turns of others than the assistant, and for a conversation that ends with the assistant.
    """
    given: Any = question
    if not isinstance(given, Sequence) or isinstance(given, (bytes, bytearray)):
        raise RequestError(f"The question is {given!r}; give a text, or a list of turns.")
    asked = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
    turns: list[Message] = [{"role": "system", "content": str(toolbox)}] if toolbox else []
    names: dict[str, str] = {}  # which tool a call's id belongs to
    for turn in asked:
        given = isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and "content" in turn
        if not given:
            raise RequestError(f"A turn is {turn!r}; give a mapping with the texts 'role' and 'content'.")
        role = _ROLES.get(turn["role"])
        if role is None:
            raise RequestError(f"A turn has the role {turn['role']!r}; use one of {', '.join(_ROLES)}.")
        text = _text(turn["content"])
        calls = [_call(call) for call in turn.get("tool_calls") or ()]
        names.update((call.id, call.name) for call in calls)
        if turn["role"] == "tool":
            text = result_text(turn.get("name") or names.get(str(turn.get("tool_call_id"))), text)
        text = "\n".join([text.strip(), *map(str, calls)]).strip()
        if not text and role != "assistant":  # a model may have had nothing to say
            raise RequestError(_EMPTY if turn is asked[-1] else f"The {turn['role']}'s turn is empty; leave it out.")
        if not _is_text(text):
            raise RequestError(f"A turn holds half a character, which is no text: {text!r}; leave it out.")
        turns.append({"role": role, "content": text})
    if not asked:
        raise RequestError(_EMPTY)
    if turns[-1]["role"] == "assistant":
        raise RequestError("The last turn is the assistant's, so there is nothing to answer; end with a question.")
    return turns


_EMPTY = "The question is empty; ask something."


def _text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts: list[str] = []
    for part in content if isinstance(content, Sequence) else [content]:
        if isinstance(part, str):
            parts.append(part)
        elif isinstance(part, Mapping) and part.get("type") in ("text", "input_text", "output_text"):
            parts.append(str(part.get("text", "")))
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise RequestError(f"A turn holds content of type {kind!r}, but the model reads text only; leave it out.")
    return "".join(parts)


def _is_text(text: str) -> bool:
    """Whether it can be written down; half a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _call(call: Any) -> ToolCall:
    """A past call, from ours or OpenAI's form."""
    if isinstance(call, ToolCall):
        return call
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    arguments = inner.get("arguments", {}) if isinstance(inner, Mapping) else None
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            why = "it is nested too deeply" if isinstance(error, RecursionError) else error
            raise RequestError(
                f"The arguments of a tool call are {short(arguments)}, which is no JSON: {why}"
            ) from None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not isinstance(arguments, Mapping):
        raise RequestError(f"A tool call is {call!r}; give a mapping with 'name', 'arguments' and 'id'.")
    return ToolCall(inner["name"], dict(arguments), str(call.get("id") or ""))
