"""What callers ask, in OpenAI's shape, as the plain turns that a sheet's template renders.

System texts, tools and tool results become text of the user's turns after the sheet: what stands left of the question
is the sheet's and can no longer change. Nothing that was said is dropped; what cannot be told to a text model is
refused. Histories of other providers' models hold more than was said: thoughts, and what their own tools did.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cribsheet.corpus.formats.record import short
from cribsheet.errors import RequestError
from cribsheet.prompt.template import Message
from cribsheet.structured.tools import Toolbox, ToolCall, result_text

Question = str | Sequence[Message]

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "user",
    "function": "user",
}
TEXTS = ("text", "input_text", "output_text", "text-plain")
_CALLS = ("tool_use", "tool_call", "function_call")
_RESULTS = ("tool_result", "function_call_output")
# What a model wrote for itself, what its provider did meanwhile, and pieces of calls that are whole elsewhere.
_NOT_SAID = re.compile(
    r".*thinking|reasoning.*|server_tool.*|mcp_.*|.*_tool_(use|result)|.*_(call|call_output|call_chunk|result)|"
    r"tool_use|input_json_delta|executable_code|container_upload|compaction|citation|reference|non_standard"
)
_MARKS = ("cachePoint", "cache_point")  # for other engines' caches
_THOUGHTS = re.compile(r"\s*<(think(?:ing)?)>.*?</\1>", re.S)
_EMPTY = "The question is empty; ask something."


def as_turns(question: Question, toolbox: Toolbox | None = None) -> list[Message]:
    """Turns of the roles system, user and assistant, each with text.

    A turn is `{"role", "content"}`; the assistant's may have `tool_calls` or `refusal`, and a tool's has `content` and
    perhaps `name`. Contents are texts or lists of `{"type": "text", "text": ...}`; the assistant's may hold whatever
    else other providers' models leave in them, as far as it needs not be told. System turns without a text are left
    out. Raises `RequestError` for anything else, for empty turns of the user, and for a conversation that ends with the
    assistant.
    """
    given: Any = question
    if not isinstance(given, Sequence) or isinstance(given, (bytes, bytearray)):
        raise RequestError(f"The question is {given!r}; give a text, or a list of turns.")
    asked: list[Any] = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
    turns: list[Message] = []
    names: dict[str, str] = {}  # which tool a call's id belongs to
    for turn in asked:
        said = _said(turn, names)
        if said["content"] or said["role"] == "assistant":  # a model may have had nothing to say
            turns.append(said)
        elif said["role"] != "system":
            raise RequestError(_EMPTY if turn is asked[-1] else f"The {turn['role']}'s turn is empty; leave it out.")
    if not turns:
        raise RequestError(_EMPTY)
    if turns[-1]["role"] == "assistant":
        raise RequestError("The last turn is the assistant's, so there is nothing to answer; end with a question.")
    return [{"role": "system", "content": str(toolbox)}, *turns] if toolbox else turns


def is_not_said(kind: Any) -> bool:
    """Whether content of this type may stand in the assistant's turns, or be a call or a result, but is no text."""
    return isinstance(kind, str) and bool(_NOT_SAID.fullmatch(kind))


def not_read(kind: Any) -> str:
    """What is said of content of a type that no text model reads."""
    return f"A turn holds content of type {kind!r}, but the model reads text only; leave it out."


def _said(turn: Any, names: dict[str, str]) -> dict[str, str]:
    """A turn's role and text, with calls and results as they are told; `names` of calls grow."""
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
        raise RequestError(f"A turn is {turn!r}; give a mapping with the texts 'role' and 'content'.")
    role = _ROLES.get(turn["role"])
    if role is None:
        raise RequestError(f"A turn has the role {turn['role']!r}; use one of {', '.join(_ROLES)}.")
    is_ours = role == "assistant"
    if "content" not in turn and not is_ours:
        raise RequestError(f"A turn is {turn!r}; give a mapping with the texts 'role' and 'content'.")
    parts = list(_parts(turn.get("content")))
    text = "".join(_text(part, names, is_ours=is_ours) for part in parts)
    calls: list[ToolCall] = []
    if is_ours:
        text = _THOUGHTS.sub("", text, count=1) if _THOUGHTS.match(text) else text
        text = "\n".join(filter(None, (text.strip(), str(turn.get("refusal") or "").strip())))
        calls = [_call(call) for call in _calls(turn, parts)]
        names.update((call.id, call.name) for call in calls)
    elif turn["role"] in ("tool", "function"):
        text = result_text(turn.get("name") or names.get(str(turn.get("tool_call_id"))), text)
    text = "\n".join([text.strip(), *map(str, calls)]).strip()
    if not _is_text(text):
        raise RequestError(f"A turn holds half a character, which is no text: {text!r}; leave it out.")
    return {"role": role, "content": text}


def _parts(content: Any) -> Iterator[Any]:
    if isinstance(content, str) or not isinstance(content, Sequence):
        content = [] if content is None else [content]
    yield from content


def _kind(part: Any) -> Any:
    """The type of a piece of content, or in forms that have none, what it holds."""
    return part.get("type", next(iter(part), None)) if isinstance(part, Mapping) else None


def _text(part: Any, names: Mapping[str, str], *, is_ours: bool) -> str:
    """What a piece of content says."""
    kind = _kind(part)
    if isinstance(part, str):
        return part
    if kind in TEXTS:
        return str(part.get("text") or "")
    if is_ours and kind == "refusal":
        return str(part.get("refusal") or "")
    if (is_ours and is_not_said(kind)) or kind in _MARKS:
        return ""
    if kind in _RESULTS:
        called = str(part.get("tool_use_id") or part.get("call_id"))
        inner = part.get("content", part.get("output"))
        told = "".join(_text(each, names, is_ours=False) for each in _parts(inner))
        return result_text(names.get(called), told) + "\n"
    shown = kind if isinstance(part, Mapping) else type(part).__name__
    raise RequestError(not_read(shown))


def _calls(turn: Mapping[str, Any], parts: Sequence[Any]) -> list[Any]:
    """The calls of an assistant's turn, from the one place of several where they are told."""
    if turn.get("tool_calls"):
        return list(turn["tool_calls"])
    if turn.get("function_call"):
        return [turn["function_call"]]
    return [part for part in parts if _kind(part) in _CALLS]


def _is_text(text: str) -> bool:
    """Whether it can be written down; half a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _call(call: Any) -> ToolCall:
    """A past call, from ours or any provider's form."""
    if isinstance(call, ToolCall):
        return call
    given = call.model_dump() if hasattr(call, "model_dump") else call  # openai-python's
    inner = (given.get("function") or given.get("custom") or given) if isinstance(given, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise RequestError(f"A tool call is {call!r}; give a mapping with 'name', 'arguments' and 'id'.")
    arguments: Any = next((inner[name] for name in ("arguments", "args", "input") if inner.get(name) is not None), {})
    if inner is given.get("custom"):  # its input is a text, and no JSON
        arguments = {"input": arguments}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}") or {}
        except (ValueError, RecursionError) as error:
            why = "it is nested too deeply" if isinstance(error, RecursionError) else error
            raise RequestError(
                f"The arguments of a tool call are {short(arguments)}, which is no JSON: {why}"
            ) from None
    if not isinstance(arguments, Mapping):
        raise RequestError(f"A tool call is {call!r}; give a mapping with 'name', 'arguments' and 'id'.")
    return ToolCall(inner["name"], dict(arguments), str(given.get("call_id") or given.get("id") or ""))
