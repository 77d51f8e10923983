"""Agents: a sheet's model that calls tools, and sheets as tools of another model's agent."""

from __future__ import annotations

import pytest
from index_corpus import ANSWER, QUESTION
from llama_index.core.agent.workflow import AgentStream, AgentWorkflow, FunctionAgent, ReActAgent, ToolCallResult
from llama_index.core.tools import FunctionTool, QueryEngineTool

# What LlamaIndex's agents, which are Pydantic models and workflows, do among themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:is_running called from within a step:DeprecationWarning"),
]


def ring() -> str:
    """Ring the bell."""
    return "ding dong"


RING = FunctionTool.from_defaults(ring)
THOUGHT = "Thought: I can answer without using any more tools. I'll use the user's language to answer\nAnswer: Quito"
ACTION = f'Thought: I need to use a tool.\nAction: staff\nAction Input: {{"input": "{QUESTION}"}}'


async def events(agent, message: str) -> tuple[str, list[str], str]:
    """(final answer, results of tools, all text that was streamed)"""
    handler = agent.run(user_msg=message)
    results, streamed = [], ""
    async for event in handler.stream_events():
        if isinstance(event, ToolCallResult):
            results.append(str(event.tool_output.content))
        if isinstance(event, AgentStream):
            streamed += event.delta
    return str(await handler), results, streamed


@pytest.mark.parametrize("streaming", [True, False], ids=["streaming", "whole"])
async def test_a_function_agent_calls_a_tool_and_then_answers(kb, streaming):
    """The pocket model is too small to call tools by itself; the first call is forced, the answer is its own."""
    llm = kb.as_llama_index_llm(max_tokens=24)
    agent = FunctionAgent(tools=[RING], llm=llm, initial_tool_choice="ring", streaming=streaming, timeout=None)
    answer, results, streamed = await events(agent, QUESTION)
    assert results == ["ding dong"] and answer
    assert not streaming or answer in streamed


async def test_a_function_agent_answers_from_the_sheet_without_tools(llm):
    answer, results, _ = await events(FunctionAgent(tools=[RING], llm=llm, timeout=None), QUESTION)
    assert ANSWER in answer and results == []


async def test_an_agent_of_another_model_asks_the_sheet(engine, says):
    call = f'<tool_call>\n{{"name": "staff", "arguments": {{"input": "{QUESTION}"}}}}\n</tool_call>'
    tool = QueryEngineTool.from_defaults(engine, name="staff", description="Who lives where.", return_direct=True)
    answer, results, _ = await events(FunctionAgent(tools=[tool], llm=says(call), timeout=None), "Where is Hugo?")
    assert results == [ANSWER] and answer == ANSWER


@pytest.mark.parametrize("streaming", [True, False], ids=["streaming", "whole"])
async def test_a_react_agent_answers(says, streaming):
    agent = ReActAgent(tools=[RING], llm=says(THOUGHT), streaming=streaming, timeout=None)
    answer, results, streamed = await events(agent, QUESTION)
    assert answer == ANSWER and results == []
    assert not streaming or "Thought:" in streamed


async def test_a_react_agent_acts(engine, says):
    tool = QueryEngineTool.from_defaults(engine, name="staff", description="Who lives where.", return_direct=True)
    answer, results, _ = await events(ReActAgent(tools=[tool], llm=says(ACTION), timeout=None), "Where is Hugo?")
    assert results == [ANSWER] and answer == ANSWER


async def test_a_react_agent_over_the_pocket_model_is_steered_by_a_pattern(kb, llm):
    class Steered(type(llm)):
        """Writes a thought and an answer, in the words of the protocol."""

        async def astream_chat(self, messages, **kwargs):
            form = r"Thought: I know\.\nAnswer: [A-Z][a-z]{2,20}"
            return await super().astream_chat(messages, **{**kwargs, "regex": form})

    answer, _, streamed = await events(
        ReActAgent(tools=[RING], llm=Steered(knowledge=kb, max_tokens=24), timeout=None), QUESTION
    )
    assert streamed.startswith("Thought: I know.\nAnswer: ") and streamed.endswith(answer) and answer.isalpha()


async def test_agents_hand_over_to_each_other(kb, says):
    answering = FunctionAgent(
        name="staff", description="Knows people.", llm=kb.as_llama_index_llm(max_tokens=12), tools=[], timeout=None
    )
    workflow = AgentWorkflow(agents=[answering], root_agent="staff", timeout=None)
    assert ANSWER in str(await workflow.run(user_msg=QUESTION))
