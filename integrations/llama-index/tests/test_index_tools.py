"""Tools: calls forced by grammar, or found in what the model writes, and their results told back."""

import asyncio
from typing import Annotated

import pytest
from index_corpus import ANSWER, QUESTION
from llama_index.core.llms import ChatMessage
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.program import FunctionCallingProgram
from llama_index.core.tools import FunctionTool, QueryEngineTool
from pydantic import BaseModel, Field

from cribsheet.errors import RequestError


def add(a: Annotated[int, Field(ge=0, le=9)], b: Annotated[int, Field(ge=0, le=9)]) -> int:
    """Add two numbers."""
    return a + b


def ring() -> str:
    """Ring the bell."""
    return "ding"


TOOLS = [FunctionTool.from_defaults(add), FunctionTool.from_defaults(ring)]
CALLED = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 5}}\n</tool_call>'


@pytest.fixture(scope="module")
def caller(kb):
    """The pocket model with room for a call."""
    return kb.as_llama_index_llm(max_tokens=32)


@pytest.mark.parametrize(
    "choice",
    [{"tool_choice": "add"}, {"tool_choice": {"type": "function", "function": {"name": "add"}}}],
    ids=["name", "openai"],
)
def test_a_tool_that_is_named_is_called_with_arguments_that_fit(caller, choice):
    response = caller.chat_with_tools(TOOLS, user_msg="What is 2 + 5?", **choice)
    (call,) = caller.get_tool_calls_from_response(response)
    assert isinstance(call, ToolSelection) and call.tool_name == "add" and call.tool_id
    assert set(call.tool_kwargs) == {"a", "b"} and all(type(n) is int for n in call.tool_kwargs.values())
    assert response.raw["finish_reason"] == "tool_calls"


def test_a_required_call_calls_one_of_the_tools_in_every_form(caller):
    async def native() -> list:
        response = await caller.achat_with_tools(TOOLS, user_msg="Ring!", tool_required=True)
        stream = await caller.astream_chat_with_tools(TOOLS, user_msg="Ring!", tool_required=True)
        return [response, [each async for each in stream][-1]]

    responses = [
        caller.chat_with_tools(TOOLS, user_msg="Ring!", tool_required=True),
        list(caller.stream_chat_with_tools(TOOLS, user_msg="Ring!", tool_required=True))[-1],
        *asyncio.run(native()),
    ]
    calls = [caller.get_tool_calls_from_response(response)[0] for response in responses]
    assert len({str((call.tool_name, call.tool_kwargs)) for call in calls}) == 1
    assert calls[0].tool_name in ("add", "ring")


def test_without_need_the_model_may_answer(llm):
    response = llm.chat_with_tools(TOOLS, user_msg=QUESTION)
    assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []
    with pytest.raises(ValueError, match="called no tool; it answered"):
        llm.get_tool_calls_from_response(response)
    assert ANSWER in llm.chat_with_tools(TOOLS, user_msg=QUESTION, tool_choice="none").message.content
    assert llm.chat_with_tools([], user_msg=QUESTION).message.content == ANSWER


def test_a_call_that_the_model_makes_of_its_own_accord_is_found_also_in_a_stream(says):
    model = says(CALLED)
    whole = model.chat_with_tools(TOOLS, user_msg="What is 2 + 5?")
    *before, last = list(model.stream_chat_with_tools(TOOLS, user_msg="What is 2 + 5?"))
    assert [response.delta for response in before] == []
    for response in (whole, last):
        (call,) = model.get_tool_calls_from_response(response)
        assert (call.tool_name, call.tool_kwargs) == ("add", {"a": 2, "b": 5})
        assert not response.message.content


def test_several_calls_come_only_where_several_are_allowed(says):
    model = says(f"{CALLED}\n<tool_call>\n{{'name': 'ring'}}\n</tool_call>".replace("'", '"'))
    for allowed, names in ((True, ["add", "ring"]), (False, ["add"])):
        response = model.chat_with_tools(TOOLS, user_msg="Add and ring.", allow_parallel_tool_calls=allowed)
        assert [call.tool_name for call in model.get_tool_calls_from_response(response)] == names


def test_results_of_calls_are_told_back(kb, caller):
    call = caller.chat_with_tools(TOOLS, user_msg="What is 2 + 5?", tool_choice="add").message
    (made,) = [block for block in call.blocks if block.block_type == "tool_call"]
    result = ChatMessage(role="tool", content="7", additional_kwargs={"tool_call_id": made.tool_call_id})
    history = [ChatMessage(role="user", content="What is 2 + 5?"), call, result]
    response = caller.chat_with_tools(TOOLS, chat_history=history)
    told = kb.count_tokens("What is 2 + 5?", [tool.metadata.to_openai_tool() for tool in TOOLS])
    assert response.raw["usage"]["prompt_tokens"] > kb.sheet.length + told
    openai_history = ChatMessage(
        role="assistant",
        additional_kwargs={
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "ring", "arguments": "{}"}}]
        },
    )
    told_back = ChatMessage(role="tool", content="ding", additional_kwargs={"tool_call_id": "1"})
    asked = ChatMessage(role="user", content=QUESTION)
    assert ANSWER in caller.chat([asked, openai_history, told_back, asked]).message.content


def test_a_choice_that_does_not_exist_is_refused(llm):
    with pytest.raises(RequestError, match="one of the tools add, ring"):
        llm.chat_with_tools(TOOLS, user_msg="Divide!", tool_choice="divide")


def test_predict_and_call_calls_the_tool(caller):
    tools = [TOOLS[1]]
    assert caller.predict_and_call(tools, user_msg="Ring!", tool_required=True).response == "ding"
    answer = asyncio.run(caller.apredict_and_call(tools, user_msg="Ring!", tool_required=True))
    assert answer.response == "ding"


def test_a_function_calling_program_makes_its_class(caller):
    class Extension(BaseModel):
        """A telephone extension."""

        number: int = Field(ge=100, le=999)

    program = FunctionCallingProgram.from_defaults(
        output_cls=Extension, llm=caller, prompt_template_str="Which extension has {name}?"
    )
    assert 100 <= program(name="Hugo Ali").number <= 999
    streaming = FunctionCallingProgram.from_defaults(
        output_cls=Extension, llm=caller, prompt_template_str="Which extension has {name}?", tool_choice="Extension"
    )
    streamed = list(streaming.stream_call(name="Hugo Ali"))
    assert isinstance(streamed[-1], Extension)


def test_a_sheet_is_a_tool_for_other_agents(engine):
    tool = QueryEngineTool.from_defaults(engine, name="staff", description="Knows where people live.")
    assert tool.call(QUESTION).content == ANSWER
    assert asyncio.run(tool.acall(QUESTION)).content == ANSWER
    assert tool.call(QUESTION).raw_output.source_nodes[0].node_id == "hugo"
