"""Structured answers are whole instances of their class, however weak the model: a grammar binds them."""

from __future__ import annotations

import asyncio
from typing import Literal

import pytest
from index_corpus import ANSWER, QUESTION
from llama_index.core.base.response.schema import PydanticResponse
from llama_index.core.llms import ChatMessage
from llama_index.core.output_parsers import PydanticOutputParser
from llama_index.core.prompts import ChatPromptTemplate, PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.core.types import PydanticProgramMode
from llama_index.llms.cribsheet import CompressedKnowledgeQueryEngine
from pydantic import BaseModel, Field, ValidationError, field_validator

from cribsheet.errors import RequestError


class Home(BaseModel):
    """Where somebody lives."""

    city: Literal["Quito", "Oslo", "Cairo"]
    sure: bool


class Person(BaseModel):
    """Its children are of its kind."""

    name: Literal["Ada", "Bo"]
    children: list[Person] = Field(max_length=1)


PROMPT = PromptTemplate("Where does {name} live?")


@pytest.fixture(scope="module")
def writer(kb):
    """The pocket model with room for an object."""
    return kb.as_llama_index_llm(max_tokens=24)


def test_all_four_forms_give_the_same_instance(writer):
    async def native() -> list[Home]:
        stream = await writer.astream_structured_predict(Home, PROMPT, name="Hugo Ali")
        return [await writer.astructured_predict(Home, PROMPT, name="Hugo Ali"), [each async for each in stream][-1]]

    streamed = list(writer.stream_structured_predict(Home, PROMPT, name="Hugo Ali"))
    made = [writer.structured_predict(Home, PROMPT, name="Hugo Ali"), streamed[-1], *asyncio.run(native())]
    assert made == [made[0]] * 4
    assert all(isinstance(each, Home) for each in made) and len(streamed) > 2


def test_a_class_that_holds_its_kind_is_enforced_all_the_way_down_also_as_the_arguments_of_a_tool(kb):
    llm = kb.as_llama_index_llm(max_tokens=60, temperature=5)
    tool = FunctionTool.from_defaults(lambda **given: str(given), name="tree", description="A.", fn_schema=Person)
    for seed in range(4):
        assert isinstance(llm.structured_predict(Person, PROMPT, {"seed": seed}, name="Hugo Ali"), Person)
        called = llm.chat_with_tools([tool], user_msg="Plant it.", tool_choice="tree", seed=seed)
        (call,) = llm.get_tool_calls_from_response(called)
        assert Person.model_validate(call.tool_kwargs)


def test_few_tokens_still_make_a_whole_instance_and_too_few_are_refused(kb):
    assert isinstance(kb.as_llama_index_llm(max_tokens=20).structured_predict(Home, PROMPT, name="Hugo Ali"), Home)
    with pytest.raises(RequestError, match="No answer that fits the JSON schema was found within max_tokens=4"):
        kb.as_llama_index_llm(max_tokens=4).structured_predict(Home, PROMPT, name="Hugo Ali")


def test_chat_prompts_and_settings_of_a_call_are_used(writer):
    prompt = ChatPromptTemplate([ChatMessage(role="system", content="Be brief."), ChatMessage(content="{q}")])
    made = writer.structured_predict(Home, prompt, llm_kwargs={"max_tokens": 20, "tool_required": True}, q=QUESTION)
    assert isinstance(made, Home)
    with pytest.raises(RequestError, match="max_new_tokens"):
        writer.structured_predict(Home, prompt, llm_kwargs={"max_new_tokens": 24}, q=QUESTION)


def test_a_prompt_whose_parser_reads_a_class_is_answered_with_it(writer):
    parser = PydanticOutputParser(Home)
    answer = writer.predict(PromptTemplate(QUESTION, output_parser=parser))
    assert isinstance(parser.parse(answer), Home)
    assert writer.predict(PromptTemplate(QUESTION)) == ANSWER  # and the next one is free again


def test_what_a_schema_cannot_say_is_left_to_the_class(writer):
    class Picky(BaseModel):
        city: Literal["Quito", "Oslo"]

        @field_validator("city")
        @classmethod
        def _refuse(cls, city: str) -> str:
            raise ValueError("not that one")

    with pytest.raises(ValidationError, match="not that one"):
        writer.structured_predict(Picky, PROMPT, name="Hugo Ali")


def test_other_program_modes_go_their_own_ways(kb):
    calling = kb.as_llama_index_llm(max_tokens=40, pydantic_program_mode=PydanticProgramMode.FUNCTION)
    assert isinstance(calling.structured_predict(Home, PROMPT, name="Hugo Ali"), Home)
    assert isinstance(asyncio.run(calling.astructured_predict(Home, PROMPT, name="Hugo Ali")), Home)


@pytest.mark.filterwarnings("ignore:The `json` method is deprecated")  # called by LlamaIndex's own StructuredLLM
def test_a_structured_llm_answers_with_instances(writer):
    structured = writer.as_structured_llm(Home)
    made = structured.complete(QUESTION).raw
    assert isinstance(made, Home)
    assert asyncio.run(structured.achat([ChatMessage(content=QUESTION)])).raw == made
    assert list(structured.stream_chat([ChatMessage(content=QUESTION)]))[-1].raw == made


def test_a_query_engine_answers_with_instances(kb, writer):
    response = kb.as_query_engine(max_tokens=24, output_cls=Home).query(QUESTION)
    assert isinstance(response, PydanticResponse) and isinstance(response.response, Home)
    assert response.city == response.response.city
    assert response.source_nodes and response.metadata["cribsheet"]["finish_reason"] == "stop"
    of_structured_llm = CompressedKnowledgeQueryEngine.from_args(llm=writer.as_structured_llm(Home))
    assert of_structured_llm.query(QUESTION).response == response.response
    streamed = kb.as_query_engine(max_tokens=24, output_cls=Home, streaming=True).query(QUESTION)
    assert Home.model_validate_json(str(streamed)) == response.response
    assert (
        asyncio.run(kb.as_query_engine(max_tokens=24, output_cls=Home).aquery(QUESTION)).response == response.response
    )
