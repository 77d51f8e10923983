"""What LlamaIndex's own prompts hope to read, as JSON schemas, so that a grammar makes sure of it.

Selectors, question generators and Pydantic parsers take the model's text apart, and how many choices there are stands
in the prompt only. Asked to choose among two, a small model may choose the ninth; bound by these it cannot.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from llama_index.core.base.base_selector import MultiSelection, SingleSelection
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.output_parsers import PydanticOutputParser
from llama_index.core.output_parsers.selection import Answer, SelectionOutputParser
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.question_gen.output_parser import SubQuestionOutputParser
from llama_index.core.question_gen.types import SubQuestion

from cribsheet.structured.tools import closed

_NUMBERED = re.compile(r"\(1 to (\d+)\)")  # in the prompts of all four selectors
_REASON = {"type": "string", "maxLength": 80}
_SUB_QUESTION = {"type": "string", "minLength": 1, "maxLength": 200}
_SUB_QUESTIONS = 8  # at most

_form: ContextVar[dict[str, Any] | None] = ContextVar("cribsheet_form", default=None)


@contextmanager
def asked_for(form: dict[str, Any] | None) -> Iterator[None]:
    """Inside of it, `current()` is this form: LlamaIndex's `predict` has no argument for it on its way to `chat`."""
    before = _form.set(form)
    try:
        yield
    finally:
        _form.reset(before)


def current() -> dict[str, Any] | None:
    """The JSON schema that the answer which is asked for now must fit, if there is one."""
    return _form.get()


def unread(prompt: BasePromptTemplate, told: Mapping[str, Any], answer: str) -> dict[str, Any] | None:
    """The form in which to ask again, if a prompt's parser cannot read the answer, or it chose what there is not."""
    form, parser = of_parser(prompt, told), prompt.output_parser
    if form is None or parser is None:
        return None
    try:
        read = parser.parse(answer)
    except Exception:  # of many kinds: each parser takes texts apart in its own way
        return form
    return None if _exists(read, told) else form


def _exists(read: Any, told: Mapping[str, Any]) -> bool:
    """Whether all choices and tools that were read are among those that were told."""
    several = getattr(read, "parsed_output", ())
    choices = {each.choice for each in several if isinstance(each, Answer)}
    tools = {each.tool_name for each in several if isinstance(each, SubQuestion)}
    return choices <= set(range(1, told.get("num_choices", 0) + 1)) and tools <= set(_names(told.get("tools_str")))


def of_parser(prompt: BasePromptTemplate, told: Mapping[str, Any]) -> dict[str, Any] | None:
    """The JSON schema of what a prompt's parser reads; none where that is any text. `told` fills the prompt."""
    parser = prompt.output_parser
    if isinstance(parser, SelectionOutputParser) and isinstance(told.get("num_choices"), int):
        one = _object(choice=_number(told["num_choices"]), reason=_REASON)
        return _list(one, told.get("max_outputs", 1) or told["num_choices"])
    if isinstance(parser, SubQuestionOutputParser) and (names := _names(told.get("tools_str"))):
        one = _object(sub_question=_SUB_QUESTION, tool_name={"type": "string", "enum": names})
        return _object(items=_list(one, _SUB_QUESTIONS))
    return of_class(parser.output_cls) if isinstance(parser, PydanticOutputParser) else None


def of_class(output_cls: type[BaseModel], messages: Sequence[ChatMessage] = ()) -> dict[str, Any]:
    """The JSON schema of a class; of a selection, among the choices that the messages number."""
    choices = _NUMBERED.search("\n".join(message.content or "" for message in messages))
    if choices is None or output_cls not in (SingleSelection, MultiSelection):
        return closed(output_cls.model_json_schema())
    one = _object(index=_number(int(choices[1])), reason=_REASON)
    return one if output_cls is SingleSelection else _object(selections=_list(one, int(choices[1])))


def _object(**properties: Any) -> dict[str, Any]:
    return closed({"type": "object", "properties": properties, "required": list(properties)})


def _list(item: dict[str, Any], most: int) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1, "maxItems": most}


def _number(most: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": 1, "maximum": most}


def _names(tools: Any) -> list[str]:
    """The names in a question generator's list of tools, which is JSON unless somebody writes another."""
    try:
        return list(json.loads(tools))
    except (TypeError, ValueError):
        return []
