"""Answers of a form and calls of tools, on a model of random weights: the grammar alone makes them fit."""

from __future__ import annotations

import sys
import threading
import typing
from datetime import date
from enum import Enum
from typing import Annotated, Any, Literal, Optional
from uuid import UUID

import pytest
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel, Field, TypeAdapter, field_validator
from typing_extensions import TypedDict

from cribsheet import CompressedKnowledgeLLM, RequestError
from cribsheet.asking.prepared import Prepared

ASK = "Who?"


@pytest.fixture
def llm(writer: CompressedKnowledgeLLM):
    return writer.as_chat_model(max_tokens=100)


class Color(Enum):
    red, blue = "red", "blue"


class Item(BaseModel):
    """One thing."""

    name: str = Field(max_length=8)
    color: Color
    count: int = Field(ge=0, le=9)


class Order(BaseModel):
    """Nested, with everything."""

    items: list[Item] = Field(min_length=1, max_length=2)
    kind: Literal["a", "b"]
    note: Optional[str] = None  # noqa: UP045, as people write it
    extra: int | str
    by_name: dict[str, int] = {}


class Node(BaseModel):
    """It holds itself."""

    value: int
    children: list[Node] = []


class Person(BaseModel):
    """Its children are of its kind, and must be told."""

    name: str = Field(max_length=3)
    children: list[Person] = Field(max_length=2)


class Family(BaseModel):
    """The recursion is further inside."""

    head: Person
    others: dict[str, Person] = {}


class Call(BaseModel):
    """Two classes that hold each other."""

    arguments: list[Argument] = Field(max_length=2)


class Argument(BaseModel):
    """Of a call."""

    value: int | Call


class Tree(TypedDict):
    """A dict that holds its kind."""

    children: list[Tree]


class Formats(BaseModel):
    """Values of a form."""

    phone: str = Field(pattern=r"^\d{3}-\d{4}$")
    email: str = Field(min_length=3, max_length=8)
    step: int = Field(multiple_of=5, ge=0, le=50)
    day: date
    key: UUID


class Typed(TypedDict):
    """A dict."""

    a: Annotated[str, ..., "first"]
    b: Annotated[int | None, None, "second"]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("schema", [Order, Node, Formats, Typed])
async def test_answers_fit_whatever_the_schema_whole_or_streamed(llm, schema, method):
    bound = llm.with_structured_output(schema, method=method)
    settings = {"max_tokens": 250} if schema in (Formats, Order) else {}
    kind = dict if schema is Typed else schema
    made = await bound.ainvoke(ASK, **settings)
    assert isinstance(made, kind) and made == [*bound.stream(ASK, **settings)][-1]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("limit", [40, 60])
def test_answers_are_complete_whatever_the_limit(llm, method, limit):
    class Person(BaseModel):
        """Somebody."""

        name: str
        age: int | None = None

    raw = llm.with_structured_output(Person.model_json_schema(), method=method, include_raw=True)
    result = raw.invoke(ASK, max_tokens=limit)
    assert result["parsing_error"] is None and set(result["parsed"]) <= {"name", "age"}
    assert isinstance(result["raw"], AIMessage)
    assert isinstance(llm.with_structured_output(Person, method=method).invoke(ASK, max_tokens=limit), Person)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("schema", [Person, Family, Call, Tree])
def test_what_holds_itself_is_enforced_by_its_own_schema_all_the_way_down(llm, schema, method, seed):
    whole = {"temperature": 3, "seed": seed, "max_tokens": 80}
    made = llm.with_structured_output(schema, method=method).invoke(ASK, **whole)
    assert TypeAdapter(schema).validate_python(made, strict=True) == made
    if schema is Person:
        own = Person.model_json_schema()
        named = {"name": "person", "description": "d", "parameters": own}
        for given in ({"title": "person", "description": "d", **own}, named, {"type": "function", "function": named}):
            assert Person.model_validate(llm.with_structured_output(given, method=method).invoke(ASK, **whole))


def test_tools_whose_arguments_hold_themselves_are_enforced_too(llm):
    @tool
    def plant(person: Person) -> str:
        """Plants a family tree."""
        return person.name

    def prune(person: Person) -> str:
        """Cuts a family tree."""
        return person.name

    with_title = {"title": "tree", "description": "d", **Person.model_json_schema()}
    for offered, name in ((plant, "plant"), (prune, "prune"), (Person, "Person"), (with_title, "tree"), (Tree, "Tree")):
        for seed in range(4):
            forced = llm.bind_tools([now, offered], tool_choice=name, temperature=3, seed=seed)
            (call,) = forced.invoke(ASK, max_tokens=80).tool_calls
            given = call["args"].get("person", call["args"])
            kind = Tree if offered is Tree else Person
            assert call["name"] == name and TypeAdapter(kind).validate_python(given, strict=True)


def test_a_recursion_that_no_schema_tells_is_refused_as_such(llm):
    class Loop(typing.TypedDict):
        """Python's own dicts have no schema before 3.12."""

        inside: list[Loop]

    Loop.__annotations__["inside"] = list[Loop]
    if sys.version_info < (3, 12):
        for method in ("json_schema", "function_calling"):
            with pytest.raises(RequestError, match="refers to itself"):
                llm.with_structured_output(Loop, method=method)


def test_a_limit_that_no_answer_fits_is_refused_before_it_begins(llm):
    with pytest.raises(RequestError, match="within max_tokens=5"):
        llm.with_structured_output(Order).invoke(ASK, max_tokens=5)


def test_a_stream_of_a_dict_grows_towards_the_answer(llm):
    pieces = list(llm.with_structured_output({"title": "t", **Item.model_json_schema()}).stream(ASK))
    assert len(pieces) > 2 and pieces[-1].keys() == {"name", "color", "count"}
    assert all(piece.keys() <= pieces[-1].keys() for piece in pieces)


@pytest.mark.parametrize(
    "schema",
    [
        {"name": "A", "description": "d", "parameters": Item.model_json_schema()},
        {"name": "A", "strict": True, "schema": Item.model_json_schema()},
        {"type": "function", "function": {"name": "A", "parameters": Item.model_json_schema()}},
        Item.model_json_schema(),
    ],
)
def test_schemas_may_come_in_any_form_that_openai_has(llm, schema):
    assert llm.with_structured_output(schema).invoke(ASK).keys() == {"name", "color", "count"}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "object", "not": {}}, "cannot be used"),
        ({"title": "x", "type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"nonsense": 1}, "says nothing about the answer"),
    ],
)
def test_a_schema_that_no_grammar_can_enforce_is_refused_when_bound(llm, schema, message):
    with pytest.raises(RequestError, match=message):
        llm.with_structured_output(schema)
    with pytest.raises(RequestError, match="The method is 'xml'"):
        llm.with_structured_output(Item, method="xml")


def test_what_an_answer_of_a_form_may_still_fail_on_is_raised(llm):
    with pytest.raises(OutputParserException):  # the caller's own stop cuts it
        llm.with_structured_output(Person).invoke(ASK, stop=["children"])

    class Never(BaseModel):
        """A class may check more than its schema says."""

        city: Literal["Oslo"]

        @field_validator("city")
        @classmethod
        def _refuse(cls, city: str) -> str:
            raise ValueError(f"not {city}")

    with pytest.raises(OutputParserException, match="not Oslo"):
        llm.with_structured_output(Never).invoke(ASK)
    for schema in ({"enum": []}, {"type": "object", "properties": {"a": {"enum": []}}, "required": ["a"]}):
        with pytest.raises(RequestError, match="cannot be used"):
            llm.with_structured_output(schema)


def test_json_mode_gives_json_and_an_error_of_parsing_stays_beside_the_raw_answer(llm):
    result = llm.with_structured_output(Item, method="json_mode", include_raw=True).invoke(ASK)
    assert result["parsed"] is None and result["parsing_error"] is not None and result["raw"].text.startswith("{")


@tool
def now() -> str:
    """The time."""
    return "noon"


@tool
def add(a: Annotated[int, Field(ge=0, le=99)], b: Annotated[int, Field(ge=0, le=99)]) -> int:
    """Add two numbers."""
    return a + b


@tool
def label(tags: set[str]) -> int:
    """Nothing forces a set."""
    return len(tags)


FUNCTION = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("any", {"now", "add"}),
        ("required", {"now", "add"}),
        (True, {"now", "add"}),
        ({"type": "any"}, {"now", "add"}),
        ("add", {"add"}),
        ("now", {"now"}),
        (FUNCTION, {"add"}),
        ({"type": "tool", "name": "add"}, {"add"}),
    ],
)
def test_a_forced_call_is_one_of_the_tools_and_runs(llm, choice, names):
    (call,) = llm.bind_tools([now, add], tool_choice=choice, strict=True).invoke(ASK).tool_calls
    assert call["name"] in names
    assert {"now": now, "add": add}[call["name"]].invoke(call).content.isalnum()


@pytest.mark.parametrize("choice", [None, "auto", "none", False, {"type": "auto"}])
def test_a_call_that_is_not_forced_is_the_model_s_own_choice(llm, choice):
    message = llm.bind_tools([now, add], tool_choice=choice).invoke(ASK, max_tokens=4)
    assert message.tool_calls == [] and message.response_metadata["finish_reason"] == "length"


def test_calls_stream_in_one_piece_with_the_metadata(llm):
    whole, *more = llm.bind_tools([add], tool_choice="add").stream(ASK)
    for chunk in more:
        whole += chunk
    assert [call["name"] for call in whole.tool_calls] == ["add"]
    assert whole.response_metadata["finish_reason"] == "tool_calls" and whole.usage_metadata["output_tokens"] > 0


def test_a_result_goes_back_in_also_when_the_tool_failed(llm):
    message = llm.bind_tools([add], tool_choice="any").invoke(ASK)
    (call,) = message.tool_calls
    done = ToolMessage("It failed: no such number", tool_call_id=call["id"], status="error")
    told = [HumanMessage(ASK), message, done]
    count = llm.get_num_tokens_from_messages
    assert count(told, tools=[add]) > count(told) > count(told[:1])
    assert llm.bind_tools([add]).invoke(told, max_tokens=3).usage_metadata["output_tokens"] == 3


def test_what_cannot_be_bound_is_refused_when_bound(llm):
    with pytest.raises(RequestError, match="uniqueItems"):
        llm.bind_tools([label], tool_choice="any")
    with pytest.raises(RequestError, match="one of the tools now, add"):
        llm.bind_tools([now, add], tool_choice="nope")
    with pytest.raises(RequestError, match="web_search"):
        llm.bind_tools([{"type": "web_search"}])
    assert llm.bind_tools([label])  # of its own accord the model may try


CALLS = '[{"name": "now", "arguments": {}}, {"name": "now", "arguments": {}}]'


def test_several_calls_of_one_answer_are_parallel_calls_unless_only_one_is_wanted(llm):
    said = {"regex": CALLS.replace("[", r"\[").replace("{", r"\{").replace("}", r"\}"), "max_tokens": 160}
    assert len(llm.bind_tools([now], **said).invoke(ASK).tool_calls) == 2
    assert len(llm.bind_tools([now], parallel_tool_calls=False, **said).invoke(ASK).tool_calls) == 1


def test_an_answer_of_a_form_beside_tools_has_the_form_or_is_a_call(llm):
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": Item.model_json_schema()}}
    message = llm.bind_tools([add], response_format=form).invoke(ASK)
    assert message.tool_calls or Item.model_validate_json(message.text)


async def test_grammars_are_made_off_the_event_loop(llm, writer, monkeypatch):
    prepare, threads = CompressedKnowledgeLLM.prepare, set()

    def noted(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(args[0], Prepared):
            threads.add(threading.current_thread())
        return prepare(self, *args, **kwargs)

    monkeypatch.setattr(CompressedKnowledgeLLM, "prepare", noted)
    bound = llm.with_structured_output(Item)
    await bound.ainvoke(ASK)
    assert [each async for each in bound.astream(ASK)]
    assert threads and threading.main_thread() not in threads
