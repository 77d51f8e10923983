"""JSON schemas of classes, tools and functions as they are: LangChain's own conversion loses what refers to itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from langchain_core.tools import BaseTool
from langchain_core.tools.base import create_schema_from_function
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import PydanticUserError, TypeAdapter
from typing_extensions import is_typeddict

from cribsheet import RequestError

Tool = dict[str, Any] | type | Callable[..., Any] | BaseTool


def as_json_schema(schema: dict[str, Any] | type) -> dict[str, Any]:
    """The JSON schema of a class, or of OpenAI's forms. Raises `RequestError` for a recursion that is lost."""
    own = _own(schema)
    if own is not None and (not is_typeddict(schema) or _refers_to_itself(own)):
        return own
    try:
        return convert_to_json_schema(schema)
    except RecursionError as error:
        raise RequestError(f"{schema!r} refers to itself, and has no schema; make it a Pydantic class.") from error


def as_openai_tool(tool: Tool) -> dict[str, Any]:
    """A tool in OpenAI's form. Raises `RequestError` as `as_json_schema`."""
    own = _own(tool)
    if own is None or not _refers_to_itself(own):
        try:
            return convert_to_openai_tool(tool)
        except RecursionError as error:
            raise RequestError(f"{tool!r} refers to itself, and has no schema; make it a Pydantic class.") from error
    if is_typeddict(tool):
        function = {"name": getattr(tool, "__name__", ""), "description": tool.__doc__ or ""}
    else:
        function = convert_to_openai_tool(tool)["function"]
    return {"type": "function", "function": {**function, "parameters": own}}


def _refers_to_itself(schema: Mapping[str, Any]) -> bool:
    """Whether a schema, or one of its definitions, holds itself."""
    places = [(place, schema.get(place) or {}) for place in ("$defs", "definitions")]
    named = {f"#/{place}/{name}": set(_references(each)) for place, those in places for name, each in those.items()}
    for start, next_ones in named.items():
        seen: set[str] = set()
        ahead = set(next_ones)
        while ahead:
            seen |= ahead
            ahead = {reached for each in ahead for reached in named.get(each, ())} - seen
        if start in seen:
            return True
    return "#" in set(_references(schema))


def _references(part: Any) -> Iterator[str]:
    """What a part of a schema refers to."""
    inside = part.values() if isinstance(part, Mapping) else part if isinstance(part, list) else ()
    if isinstance(part, Mapping) and isinstance(part.get("$ref"), str):
        yield part["$ref"]
    for each in inside:
        yield from _references(each)


def _own(thing: Any) -> dict[str, Any] | None:
    """What a thing itself says of its JSON schema, if it says anything."""
    if isinstance(thing, BaseTool):
        thing = thing.tool_call_schema  # a class or, from elsewhere, a schema
        if isinstance(thing, dict):
            return thing
    if isinstance(thing, dict):  # a schema that is only a reference has no properties, without which it is not taken
        return thing if "title" in thing and "$ref" in thing else None
    made: dict[str, Any] | None = None
    try:
        if isinstance(thing, type) and is_basemodel_subclass(thing):
            kind: Any = thing
            made = kind.model_json_schema() if hasattr(kind, "model_json_schema") else kind.schema()
        elif is_typeddict(thing):
            made = TypeAdapter(thing).json_schema()
        elif callable(thing) and not isinstance(thing, type):
            arguments: Any = create_schema_from_function("arguments", thing, filter_args=())
            made = arguments.model_json_schema()
    except (PydanticUserError, TypeError, NameError, ValueError):  # LangChain's conversion says what is wrong
        return None
    return made
