"""The usual chains, agents and graphs keep their shapes over a sheet; the docs page shows five of them with answers."""

from __future__ import annotations

import asyncio
from typing import TypedDict

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain_classic.chains import create_history_aware_retriever, create_retrieval_chain, load_summarize_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables import RunnableParallel, RunnablePassthrough
from langchain_core.tools import create_retriever_tool, tool
from langgraph.graph import START, StateGraph

from cribsheet import CompressedKnowledgeLLM
from cribsheet.testing import echo_backbone

ASK = "Where does Alice Moreno live?"
PROMPT = ChatPromptTemplate.from_messages([("system", "Answer from the context.\n\n{context}"), ("human", "{input}")])


@pytest.fixture
def llm(echo):
    return echo.as_chat_model(max_tokens=40)


@pytest.fixture
def retriever(echo):
    return echo.as_retriever(k=1)


def as_text(documents: list[Document]) -> str:
    return "\n\n".join(document.page_content for document in documents)


async def test_lcel_streams_and_tells_of_every_step(llm, retriever):
    chain = {"context": retriever | as_text, "input": RunnablePassthrough()} | PROMPT | llm | StrOutputParser()
    assert chain.invoke(ASK) == "".join(chain.stream(ASK)) == "In Lisbon."
    events = [event["event"] async for event in chain.astream_events(ASK, version="v2")]
    assert {"on_retriever_end", "on_prompt_end", "on_chat_model_start", "on_parser_stream"} <= set(events)


def test_what_was_retrieved_reaches_the_model(llm, retriever):
    chain = {"context": retriever | as_text, "input": RunnablePassthrough()} | PROMPT | llm
    told = chain.invoke(ASK).usage_metadata["input_tokens"]
    assert told > (PROMPT | llm).invoke({"context": "", "input": ASK}).usage_metadata["input_tokens"] + 10


def test_parallel_branches_run_with_their_own_settings(llm):
    made = RunnableParallel(whole=llm, cut=llm.bind(stop=["bon"])).invoke(ASK)
    assert (made["whole"].text, made["cut"].text) == ("In Lisbon.", "In Lis")


async def test_retrieval_chains_keep_their_keys_whole_and_streamed(llm, retriever):
    chain = create_retrieval_chain(retriever, create_stuff_documents_chain(llm, PROMPT))
    made = chain.invoke({"input": ASK})
    assert list(made) == ["input", "context", "answer"] and made["answer"] == "In Lisbon."
    assert isinstance(made["context"][0], Document)
    pieces = [piece async for piece in chain.astream({"input": ASK})]
    assert [key for piece in pieces for key in piece][:3] == ["input", "context", "answer"] and len(pieces) > 3
    assert "".join(piece.get("answer", "") for piece in pieces) == "In Lisbon."


def test_a_history_is_read_and_the_question_rewritten(llm, retriever):
    turns = [MessagesPlaceholder("chat_history"), ("human", "{input}")]
    found = create_history_aware_retriever(llm, retriever, ChatPromptTemplate.from_messages(turns))
    prompt = ChatPromptTemplate.from_messages([("system", "{context}"), *turns])
    chain = create_retrieval_chain(found, create_stuff_documents_chain(llm, prompt))
    history = [HumanMessage("Where does Bob live?"), AIMessage("Oslo")]
    made = chain.invoke({"input": "And Alice?", "chat_history": history})
    assert made["answer"] == "In Lisbon." and len(made["context"]) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["stuff", "map_reduce", "refine"])
def test_summaries_count_tokens_offline(llm, kind):
    chain = load_summarize_chain(llm, chain_type=kind)
    made = chain.invoke({"input_documents": [Document(page_content="Some text."), Document(page_content="More.")]})
    assert made["output_text"].strip() == "In Lisbon."


@wrap_model_call
def look_first(request, handler):
    first = isinstance(request.messages[-1], HumanMessage)
    return handler(request.override(tool_choice="any") if first else request.override(tools=[]))


async def test_an_agent_calls_the_retriever_reads_its_result_and_answers(llm, retriever):
    search = create_retriever_tool(retriever, "search", "Finds passages.")

    @wrap_model_call
    async def alook_first(request, handler):
        first = isinstance(request.messages[-1], HumanMessage)
        return await handler(request.override(tool_choice="any") if first else request.override(tools=[]))

    asked = {"messages": [("human", ASK)]}
    steps = create_agent(llm, [search], middleware=[look_first]).invoke(asked)["messages"]
    assert [step.type for step in steps] == ["human", "ai", "tool", "ai"]
    assert steps[1].tool_calls[0]["name"] == "search" and "lives in" in steps[2].text
    assert steps[-1].text == "In Lisbon."
    again = (await create_agent(llm, [search], middleware=[alook_first]).ainvoke(asked))["messages"]
    assert [step.type for step in again] == ["human", "ai", "tool", "ai"]


CALL = '<tool_call>\n{"name": "ring", "arguments": {"city": "Oslo"}}\n</tool_call>'


async def test_a_call_that_the_model_makes_of_its_own_accord_is_found_also_in_a_stream():
    @tool
    def ring(city: str) -> str:
        """Ring somebody."""
        return f"rang {city}"

    with CompressedKnowledgeLLM.build(["Some text. " * 20], model=echo_backbone(CALL), rate=1) as kb:
        llm = kb.as_chat_model().bind_tools([ring])
        message = llm.invoke("Ring!")
        assert [(call["name"], call["args"]) for call in message.tool_calls] == [("ring", {"city": "Oslo"})]
        assert message.text == "" and message.response_metadata["finish_reason"] == "tool_calls"
        chunks = [chunk async for chunk in llm.astream("Ring!")]
        assert sum(len(chunk.tool_call_chunks) for chunk in chunks) == 1
        assert "".join(chunk.text for chunk in chunks) == ""


class State(TypedDict):
    question: str
    context: list[Document]
    answer: str


async def test_graph_nodes_keep_their_state_and_stream_messages(llm, retriever):
    def retrieve(state: State) -> dict:
        return {"context": retriever.invoke(state["question"])}

    async def generate(state: State) -> dict:
        told = PROMPT.invoke({"context": as_text(state["context"]), "input": state["question"]})
        return {"answer": (await llm.ainvoke(told)).text}

    graph = StateGraph(State).add_sequence([retrieve, generate]).add_edge(START, "retrieve").compile()
    made = await graph.ainvoke({"question": ASK})
    assert set(made) == {"question", "context", "answer"} and made["answer"] == "In Lisbon."
    pieces = [chunk.text async for chunk, _ in graph.astream({"question": ASK}, stream_mode="messages")]
    assert "".join(pieces) == "In Lisbon." and len(pieces) > 2
    many = await asyncio.gather(*(graph.ainvoke({"question": ASK}) for _ in range(8)))
    assert {each["answer"] for each in many} == {"In Lisbon."}
