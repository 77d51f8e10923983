"""`with_structured_output`: three ways to an answer that fits a schema, all of them bound by a grammar."""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING, Any

from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.pydantic import is_basemodel_subclass
from typing_extensions import is_typeddict

from cribsheet import RequestError
from cribsheet.structured.grammar import Grammar
from cribsheet.structured.tools import Toolbox, closed
from langchain_cribsheet.schemas import as_json_schema, as_openai_tool

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel

METHODS = ("json_schema", "function_calling", "json_mode")
_SAYS = {"type", "properties", "anyOf", "oneOf", "allOf", "$ref", "enum", "const"}


def structured(
    model: BaseChatModel,
    schema: dict[str, Any] | type,
    *,
    method: str,
    include_raw: bool,
    strict: bool | None,
    **kwargs: Any,
) -> Runnable[Any, Any]:
    """The model with its parser. Raises `RequestError` for an unknown method and for schemas no grammar can enforce."""
    if kwargs:
        raise RequestError(f"Unknown settings {', '.join(sorted(kwargs))}; use method, include_raw and strict.")
    if method not in METHODS:
        raise RequestError(f"The method is {method!r}; use one of {', '.join(METHODS)}.")
    is_class = isinstance(schema, type) and is_basemodel_subclass(schema)
    traced = {"kwargs": {"method": method}, "schema": _traced(schema)}
    parser: Runnable[Any, Any]
    if method == "function_calling":
        tool = as_openai_tool(schema)
        name = tool["function"]["name"]
        Grammar.json_schema(Toolbox.of([tool], name).schema)  # type: ignore[union-attr]
        bound = model.bind_tools([tool], tool_choice=name, ls_structured_output_format=traced)
        parser = (
            PydanticToolsParser(tools=[schema], first_tool_only=True)  # type: ignore[list-item]
            if is_class
            else JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)
        )
    else:
        wanted = _json_schema(schema) if method == "json_schema" else {"type": "object"}
        if method == "json_schema" and strict is not False:
            wanted = closed(wanted)
        Grammar.json_schema(wanted)
        bound = model.bind(json_schema=wanted, ls_structured_output_format=traced)
        parser = PydanticOutputParser(pydantic_object=schema) if is_class else JsonOutputParser()  # type: ignore[arg-type]
    if not include_raw:
        return bound | parser
    parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=bound) | parsed.with_fallbacks([failed], exception_key="parsing_error")


def _traced(schema: dict[str, Any] | type) -> Any:
    """A schema in a form that LangChain converts for tracing, which fails for dicts that hold their own kind."""
    if isinstance(schema, dict) or not is_typeddict(schema):
        return schema
    return {"title": schema.__name__, **as_json_schema(schema)}


def _json_schema(schema: dict[str, Any] | type) -> dict[str, Any]:
    """A JSON schema as it is, for LangChain's conversion leaves keywords out; a class or OpenAI's forms as theirs."""
    if isinstance(schema, dict) and isinstance(schema.get("schema"), dict):
        schema = schema["schema"]  # as in OpenAI's `response_format`
    if not isinstance(schema, dict) or "parameters" in schema or "function" in schema:
        return as_json_schema(schema)
    if not schema.keys() & _SAYS:
        raise RequestError(f"The JSON schema {schema!r} says nothing about the answer; use {', '.join(sorted(_SAYS))}.")
    return schema
