"""Tools that a model may call: how they are told to it, how a call is forced, and how calls are found in its text.

Chat templates put tools in front of everything else, which would change what stands left of the question; so they are
told as text in the turn after the sheet, and calls come back as text in the form that most open models were trained on:

    <tool_call>
    {"name": "add", "arguments": {"a": 1, "b": 2}}
    </tool_call>

A forced call is bound by a grammar: it is complete and fits the tool's schema. One that the model makes of its own
accord is parsed, in this and a few other usual forms; what names no known tool stays text, and so does a tool's own
description that is given back.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cribsheet.errors import RequestError
from cribsheet.structured.grammar import TOO_DEEP

_OPEN, _CLOSE, _LIST = "<tool_call>", "</tool_call>", "[TOOL_CALLS]"
_NOTHING: Mapping[str, Any] = {"type": "object", "properties": {}}
_SAY_ALL = {"$ref", "anyOf", "oneOf", "allOf"}  # what a schema of arguments may be instead of one of an object
_NAMED = ("properties", "$defs", "definitions", "patternProperties")  # of a schema, that are schemas by name
_VALUES = ("enum", "const", "default", "examples")  # of a schema, that are no schemas
ANY = ("any", "required", True)
# What a whole answer that is a call may stand in: a fence of code, or the tags of other prompts.
_TAGS = "tools?|tool_calls?|function_calls?"
_AROUND = re.compile(rf"```[\w-]*(.*?)(?:```|\Z)|<({_TAGS})>(.*?)(?:</\2>|\Z)", re.S)
_HALF = re.compile("[\ud800-\udfff]")
_DEEP = 3  # fences and tags in one another
# What may stand before a whole answer that is a call, read on from anywhere: also from within a fence's first line.
_BEFORE = re.compile(rf"(?:(?<=[\w`-])[\w-]*)?\s*(?:(?:```[\w-]*|<(?:{_TAGS})>)\s*)*")
_BEGUN = re.compile(r"`{1,2}|</?[a-z_]{0,14}")  # what may become one of them


@dataclass(frozen=True, slots=True)
class Tool:
    """Something that the model may ask its caller to do; `parameters` is the JSON schema of an object."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: dict(_NOTHING))

    @classmethod
    def of(cls, spec: Tool | Mapping[str, Any]) -> Tool:
        """A tool from its OpenAI form, with or without `{"type": "function", "function": ...}` around it.

        Raises `RequestError` for anything else.
        """
        if isinstance(spec, Tool):
            return spec
        inner = spec.get("function", spec) if isinstance(spec, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
            raise RequestError(f"A tool is {spec!r}; give a mapping with 'name', 'description' and 'parameters'.")
        parameters = inner.get("parameters") or _NOTHING
        if not isinstance(parameters, Mapping):
            raise RequestError(f"The parameters of tool {inner['name']!r} are {parameters!r}; give a JSON schema.")
        return cls(inner["name"], str(inner.get("description") or ""), dict(parameters))


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call: which tool, with what, and a name for the call that its result refers to."""

    name: str
    arguments: dict[str, Any]
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex}")

    def __str__(self) -> str:
        """The call as the model writes it."""
        call = {"name": self.name, "arguments": self.arguments}
        return f"{_OPEN}\n{json.dumps(call, ensure_ascii=False)}\n{_CLOSE}"


@dataclass(frozen=True, slots=True)
class Toolbox:
    """The tools of one request, and whether one of them must be called.

    `forced` holds the tools of which one must be called; empty if the model may choose to answer.
    """

    tools: tuple[Tool, ...]
    forced: tuple[Tool, ...] = ()

    @classmethod
    def of(cls, tools: Sequence[Tool | Mapping[str, Any]] | None, choice: Any = None) -> Toolbox | None:
        """The tools as OpenAI's `tools` and `tool_choice` say; nothing if none may be called.

        `choice` is "auto" or none, "none", "any", "required" or true, a tool's name, or
        `{"type": "function", "function": {"name": ...}}`. Raises `RequestError` for a choice that does not exist.
        """
        known = {tool.name: tool for tool in map(Tool.of, tools or ())}
        if len(known) < len(tools or ()):
            raise RequestError(f"Two tools have one name among {', '.join(known)}; rename one.")
        wanted = choice
        if isinstance(choice, Mapping):
            wanted = (choice.get("function") or choice).get("name") or choice.get("type")
        if not known:
            if wanted in (None, False, "auto", "none"):
                return None
            raise RequestError(f"tool_choice is {choice!r}, but no tools were given; pass tools=[...].")
        everything = tuple(known.values())
        if wanted in (None, False, "auto"):
            return cls(everything)
        if wanted == "none":
            return None
        if wanted in ANY:
            return cls(everything, everything)
        if wanted not in known:
            raise RequestError(
                f"tool_choice is {choice!r}; use 'auto', 'none', 'any', or one of the tools {', '.join(known)}."
            )
        return cls(everything, (known[wanted],))

    @property
    def schema(self) -> dict[str, Any]:
        """JSON schema of a forced call."""
        return _either([_call_schema(tool) for tool in self.forced])

    def beside(self, schema: Any) -> dict[str, Any]:
        """JSON schema of an answer that is either a call, or fits a schema."""
        given = json.loads(schema) if isinstance(schema, str) else dict(schema)
        return _either([given, *map(_call_schema, self.tools)])

    def __str__(self) -> str:
        """The tools as they are told to the model."""
        try:
            lines = [
                json.dumps({"name": each.name, "description": each.description, "parameters": each.parameters},
                           ensure_ascii=False)
                for each in self.tools
            ]  # fmt: skip
        except RecursionError:
            raise RequestError(TOO_DEEP) from None
        how = f'{_OPEN}\n{{"name": ..., "arguments": {{...}}}}\n{_CLOSE}'
        if self.forced:
            how = 'by answering only with {"name": ..., "arguments": {...}}'
            return "\n".join(["Tools:", *lines, f"Call one of them {how}."])
        return "\n".join(["Tools, if you need them:", *lines, f"To call one, write\n{how}"])


class CallReader:
    """Parts an answer, as it is written, into text for the reader and calls.

    `push` returns text that is certain to be no part of a call; `finish` the rest, with `calls` complete.
    """

    def __init__(self, toolbox: Toolbox) -> None:
        self._tools = {tool.name: tool for tool in toolbox.tools}
        self._forced = bool(toolbox.forced)
        # What is not shown: pieces that were read, and after them what must be read again with the next one.
        self._held: list[str] = []
        self._unread = ""
        self._last = ""  # what stands before it, while the answer opens
        self._read: Callable[[str], str] = self._keep if self._forced else self._open
        self.calls: tuple[ToolCall, ...] = ()

    def push(self, text: str) -> str:
        """Add text of the answer; returns what can be shown. Nothing is read more than a few times."""
        return self._read(text)

    def finish(self) -> str:
        """The rest of the text, without calls."""
        rest, self.calls = self._parted("".join([*self._held, self._unread]))
        return rest

    def _keep(self, text: str) -> str:
        """Show nothing more before the end: a call has begun."""
        self._held.append(text)
        return ""

    def _open(self, text: str) -> str:
        """Show nothing while all of the answer may be calls."""
        near = self._last + self._unread + text
        before = _BEFORE.match(near, len(self._last))
        at = before.end() if before else len(self._last)
        self._held.append(near[len(self._last) : at])
        self._last, self._unread = near[max(at - 1, 0) : at], near[at:]
        if not self._unread or _BEGUN.fullmatch(self._unread):
            return ""
        if self._unread[0] in "{[":
            self._read = self._keep
            return self._move()
        self._unread, self._held = "".join([*self._held, self._unread]), []
        self._read = self._show
        return self._show("")

    def _show(self, text: str) -> str:
        """Show what stands before the first mark of a call, also of one that may have begun, without blanks there."""
        near = self._unread + text
        at = min((found for mark in (_OPEN, _LIST) if (found := _mark(near, mark)) >= 0), default=len(near))
        bare = near[:at].rstrip()
        shown = ""
        if bare:
            shown, self._held = "".join([*self._held, bare]), []
        self._held.append(near[len(bare) : at])
        self._unread = near[at:]
        if near.startswith((_OPEN, _LIST), at):
            self._read = self._keep
            self._move()
        return shown

    def _move(self) -> str:
        """Nothing needs to be read again."""
        self._held.append(self._unread)
        self._unread = ""
        return ""

    def _parted(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        whole = self._whole(text)
        if whole:
            return "", whole
        calls: list[ToolCall] = []
        kept: list[str] = []
        after = 0
        for block in re.finditer(rf"{_OPEN}(.*?)(?:{_CLOSE}|\Z)", text, re.S):
            found = self._calls(_values(block[1].strip()))
            if found:
                calls += found
                kept.append(text[after : block.start()].rstrip())
                after = block.end()
        return "".join([*kept, text[after:] if not calls or text[after:].strip() else ""]), tuple(calls)

    def _whole(self, text: str, deep: int = _DEEP) -> tuple[ToolCall, ...]:
        """The calls that a text is made of, also inside of fences and tags; none if it holds anything else."""
        inner = text.strip().removeprefix(_LIST)
        found = self._calls(_values(inner))
        if found or not deep:
            return found
        one = _AROUND.fullmatch(inner)  # of all of it first, for arguments may hold fences too
        if one and (found := self._whole(one[1] or one[3] or "", deep - 1)):
            return found
        several = "\n".join(each[1] or each[3] or "" for each in _AROUND.finditer(inner))
        return self._whole(several, deep - 1) if several and not _AROUND.sub("", inner).strip() else ()

    def _calls(self, values: Sequence[Any]) -> tuple[ToolCall, ...]:
        """The calls that JSON values stand for; none unless all of them are calls of known tools."""
        calls = [self._call(each) for each in values]
        return tuple(call for call in calls if call) if all(calls) else ()

    def _call(self, value: Any) -> ToolCall | None:
        if isinstance(value, dict) and isinstance(value.get("function"), dict):
            value = value["function"]
        name = value.get("name") if isinstance(value, dict) else None
        tool = self._tools.get(name) if isinstance(name, str) else None
        if tool is None:
            return None
        given = [value[key] for key in ("arguments", "parameters") if value.get(key) is not None]
        arguments = given[0] if given else {}
        if isinstance(arguments, str):
            arguments = {} if arguments in ("", "null") else _loaded(arguments)
        if not isinstance(arguments, dict) or (not self._forced and _is_told(tool, value, arguments)):
            return None
        return ToolCall(tool.name, _writable(arguments))


def result_text(name: str | None, content: str) -> str:
    """A tool's result as it is told to the model."""
    return f"<tool_response>\n{f'{name}: ' if name else ''}{content}\n</tool_response>"


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON schema whose objects hold nothing beside the properties that they name, unless it says otherwise.

    Raises `RequestError` for one that is nested too deeply.
    """
    try:
        return _closed(schema)
    except RecursionError:
        raise RequestError(TOO_DEEP) from None


def _closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, Mapping):
            made[key] = {name: _closed(each) if isinstance(each, Mapping) else each for name, each in value.items()}
        elif key in _VALUES:
            made[key] = value
        elif isinstance(value, Mapping):
            made[key] = _closed(value)
        elif isinstance(value, list):
            made[key] = [_closed(each) if isinstance(each, Mapping) else each for each in value]
        else:
            made[key] = value
    if "properties" in made and "allOf" not in made:
        made.setdefault("additionalProperties", False)
    return made


def _call_schema(tool: Tool) -> dict[str, Any]:
    """JSON schema of a call."""
    parameters = {**({} if tool.parameters.keys() & _SAY_ALL else _NOTHING), **tool.parameters}
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "arguments": _moved(closed(parameters), "properties/arguments")},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _either(schemas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """JSON schema of a value that fits one of several."""
    if len(schemas) == 1:
        return dict(schemas[0])
    return {"anyOf": [_moved(schema, f"anyOf/{number}") for number, schema in enumerate(schemas)]}


def _moved(schema: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A JSON schema at a place inside of another one, where what it says of itself still refers to it."""

    def moved(part: Any) -> Any:
        if isinstance(part, list):
            return [moved(each) for each in part]
        if not isinstance(part, Mapping):
            return part
        made = dict(part)
        for key, value in part.items():
            if key in _NAMED and isinstance(value, Mapping):
                made[key] = {name: moved(each) for name, each in value.items()}
            elif key not in _VALUES:
                made[key] = moved(value)
        refers = made.get("$ref")
        if isinstance(refers, str) and (refers == "#" or refers.startswith("#/")):
            made["$ref"] = f"#/{place}{refers[1:]}"
        return made

    return {key: value for key, value in moved(schema).items() if key not in ("$id", "$schema")}


def _is_told(tool: Tool, value: Mapping[str, Any], arguments: Mapping[str, Any]) -> bool:
    """Whether a model gave back what it was told of a tool, or all of it but the schema, instead of a call."""
    takes = tool.parameters.get("properties")
    if not arguments:
        return "description" in value and "arguments" not in value
    is_schema = arguments.get("type") == "object" and isinstance(arguments.get("properties"), dict)
    return arguments in (tool.parameters, takes) or (is_schema and "properties" not in (takes or {}))


def _values(text: str) -> list[Any]:
    """The JSON values that a text is made of, with nothing but blanks between them; a list is its items."""
    decoder, values, at = json.JSONDecoder(), list[Any](), 0
    text = text.strip()
    try:
        while at < len(text):
            value, at = decoder.raw_decode(text, at)
            values += value if isinstance(value, list) else [value]
            while at < len(text) and text[at].isspace():
                at += 1
    except (ValueError, RecursionError):
        return []
    return values


def _writable(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments that any encoding can store: what a model wrote as half of an escaped pair is replaced."""
    written = json.dumps(arguments, ensure_ascii=False)
    repaired = _HALF.sub("\ufffd", written)
    return arguments if repaired == written else dict(json.loads(repaired))


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _mark(text: str, mark: str) -> int:
    """Where `mark` stands in the text, or where it may have begun at its end; -1 if nowhere."""
    at = text.find(mark)
    if at >= 0:
        return at
    return next((len(text) - n for n in range(min(len(mark), len(text)), 0, -1) if text.endswith(mark[:n])), -1)
