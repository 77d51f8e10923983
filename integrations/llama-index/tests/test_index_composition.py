"""Engines over sheets inside of other engines: routed to, asked sub-questions, transformed, retried, cited."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest
from index_corpus import ANSWER, PEOPLE, QUESTION, WordEmbedding
from llama_index.core import VectorStoreIndex
from llama_index.core.evaluation import RelevancyEvaluator
from llama_index.core.indices.query.query_transform import HyDEQueryTransform, StepDecomposeQueryTransform
from llama_index.core.query_engine import (
    CitationQueryEngine,
    MultiStepQueryEngine,
    RetryQueryEngine,
    RouterQueryEngine,
    SubQuestionQueryEngine,
    TransformQueryEngine,
)
from llama_index.core.query_engine.retry_source_query_engine import RetrySourceQueryEngine
from llama_index.core.question_gen import LLMQuestionGenerator
from llama_index.core.response_synthesizers import TreeSummarize
from llama_index.core.schema import QueryBundle, TextNode
from llama_index.core.selectors import (
    LLMMultiSelector,
    LLMSingleSelector,
    PydanticMultiSelector,
    PydanticSingleSelector,
)
from llama_index.core.tools import QueryEngineTool, ToolMetadata

from cribsheet import CompressedKnowledgeLLM

KARL = "Where does Karl Voss live?"


def chosen(*choices: int) -> str:
    return json.dumps([{"choice": choice, "reason": f"reason {choice}"} for choice in choices])


@pytest.fixture
def tools(engine, index, llm):
    return [
        QueryEngineTool.from_defaults(engine, name="staff", description="Who lives where."),
        QueryEngineTool.from_defaults(index.as_query_engine(llm=llm), name="news", description="Newcomers."),
    ]


@pytest.mark.parametrize(("choice", "question", "word"), [(1, QUESTION, ANSWER), (2, KARL, "")])
def test_a_router_asks_the_sheet_or_the_vector_index(tools, llm, says, choice, question, word):
    router = RouterQueryEngine(LLMSingleSelector.from_defaults(says(chosen(choice))), tools, llm=llm)
    for response in (router.query(question), asyncio.run(router.aquery(question))):
        assert word in str(response) and response.metadata["selector_result"].ind == choice - 1
        assert response.source_nodes[0].node_id == ("hugo" if choice == 1 else "karl")


def test_a_router_that_is_given_its_llm_needs_none_in_the_settings(settings, tools, llm, says):
    settings._llm = None  # as in a fresh process, where LlamaIndex would look for OpenAI's package
    router = RouterQueryEngine(LLMSingleSelector.from_defaults(says(chosen(1))), tools, llm=llm)
    assert str(router.query(QUESTION)) == ANSWER and settings._llm is None


def test_a_router_asks_both_and_sums_up(tools, llm, says):
    summarizer = TreeSummarize(llm=says("Both."))
    router = RouterQueryEngine(
        LLMMultiSelector.from_defaults(says(chosen(1, 2))), tools, llm=llm, summarizer=summarizer
    )
    for response in (router.query(QUESTION), asyncio.run(router.aquery(QUESTION))):
        assert str(response) == "Both."
        assert {"hugo", "karl"} <= {node.node_id for node in response.source_nodes}


def test_a_streaming_engine_can_be_routed_to(kb, tools, llm, says):
    streaming = QueryEngineTool.from_defaults(kb.as_query_engine(max_tokens=12, streaming=True), description="Staff.")
    router = RouterQueryEngine(LLMSingleSelector.from_defaults(says(chosen(1))), [streaming, tools[1]], llm=llm)
    assert "".join(router.query(QUESTION).response_gen) == ANSWER


@pytest.mark.parametrize("kind", [LLMSingleSelector, PydanticSingleSelector, PydanticMultiSelector])
def test_a_sheets_own_model_selects_only_what_there_is(kb, kind):
    """A small model knows no JSON and cannot count; what cannot be read is asked for again, bound by a grammar."""
    selector = kind.from_defaults(llm=kb.as_llama_index_llm(max_tokens=40))
    tools = [ToolMetadata(name="staff", description="people"), ToolMetadata(name="shop", description="prices")]
    chosen = selector.select(tools, QUESTION).inds
    assert chosen and set(chosen) <= {0, 1}


async def test_a_sheets_own_model_divides_a_question_among_tools_that_exist(kb):
    generator = LLMQuestionGenerator.from_defaults(kb.as_llama_index_llm(max_tokens=48))
    tools = [ToolMetadata(name="staff", description="people"), ToolMetadata(name="shop", description="prices")]
    made = await generator.agenerate(tools, QueryBundle(QUESTION))
    assert made and all(each.sub_question and each.tool_name in ("staff", "shop") for each in made)


@pytest.fixture(scope="module")
def three(kb):
    """Three sheets on one loaded model."""
    shop = ["The red lamp costs 40 euros.", "The blue chair costs 70 euros."]
    guests = [
        "Rex Hunter lives in Bergen. He works for Karst Foods.",
        "Tom Miller lives in Geneva. He works for Silver Motors.",
    ]
    kbs = [
        kb,
        CompressedKnowledgeLLM.build(shop, "What do things cost?", model=kb.backbone, rate=1, scorer="recent"),
        CompressedKnowledgeLLM.build(guests, "Where do people live?", model=kb.backbone, rate=1, scorer="recent"),
    ]
    assert len({id(each.backbone) for each in kbs}) == 1
    return kbs


QUESTIONS = {"staff": QUESTION, "shop": "What does the red lamp cost?", "guests": "Where does Tom Miller live?"}


@pytest.mark.parametrize("use_async", [False, True], ids=["sync", "async"])
def test_sub_questions_go_to_three_sheets_on_one_model(three, says, use_async):
    asked = [{"sub_question": question, "tool_name": name} for name, question in QUESTIONS.items()]
    tools = [
        QueryEngineTool.from_defaults(each.as_query_engine(max_tokens=12), name=name, description=name)
        for name, each in zip(QUESTIONS, three, strict=True)
    ]
    engine = SubQuestionQueryEngine.from_defaults(
        query_engine_tools=tools,
        llm=says("All three."),
        question_gen=LLMQuestionGenerator.from_defaults(says(json.dumps(asked))),
        use_async=use_async,
        verbose=False,
    )
    response = engine.query("What do you know?")
    assert str(response) == "All three."
    texts = [node.node.get_content() for node in response.source_nodes]
    answers = {text.split("\n")[0].removeprefix("Sub question: "): text for text in texts if "Sub question" in text}
    assert set(answers) == set(QUESTIONS.values())
    assert (
        ANSWER in answers[QUESTION] and "40" in answers[QUESTIONS["shop"]] and "Geneva" in answers[QUESTIONS["guests"]]
    )


def test_an_error_in_a_sub_engine_is_loud_in_the_log(kb, says, caplog):
    """LlamaIndex goes on without the answer of an engine that fails; the log says why."""
    closed = CompressedKnowledgeLLM(kb.backbone, kb.sheet)
    tool = QueryEngineTool.from_defaults(closed.as_query_engine(), name="staff", description="Staff.")
    closed.close()
    engine = SubQuestionQueryEngine.from_defaults(
        query_engine_tools=[tool],
        llm=says("Nothing."),
        question_gen=LLMQuestionGenerator.from_defaults(
            says(json.dumps([{"sub_question": QUESTION, "tool_name": "staff"}]))
        ),
        use_async=False,
        verbose=False,
    )
    with caplog.at_level(logging.WARNING):
        assert str(engine.query("What do you know?")) == "Empty Response"
    assert "This sheet is closed; load it again" in caplog.text


def test_a_query_can_be_transformed_first(engine, llm, says):
    hyde = TransformQueryEngine(engine, HyDEQueryTransform(llm=says("He lives in a house."), include_original=True))
    assert str(hyde.query(QUESTION)) == ANSWER == str(asyncio.run(hyde.aquery(QUESTION)))
    assert {"query_engine:response_synthesizer:simple_template"} < set(hyde.get_prompts())
    steps = MultiStepQueryEngine(
        engine,
        StepDecomposeQueryTransform(llm=says(QUESTION)),
        response_synthesizer=engine._response_synthesizer,
        num_steps=1,
    )
    assert ANSWER in steps.query("Who is Hugo?").source_nodes[0].node.get_content().split("\n")[-1]


def test_an_answer_that_a_judge_rejects_is_tried_again(engine, llm, says, settings):
    settings.llm = says("YES")
    content = RetryQueryEngine(engine, RelevancyEvaluator(llm=says("YES")), max_retries=1)
    assert str(content.query(QUESTION)) == ANSWER
    rejecting = RetryQueryEngine(engine, RelevancyEvaluator(llm=says("NO")), max_retries=1)
    assert str(rejecting.query(QUESTION)) != ""
    sources = RetrySourceQueryEngine(engine, RelevancyEvaluator(llm=says("YES")), llm=llm, max_retries=1)
    assert str(sources.query(QUESTION)) == ANSWER


def test_citations_come_from_what_the_sheet_looks_at(kb, index, llm, says):
    retriever = kb.as_index_retriever(similarity_top_k=2)
    citing = CitationQueryEngine.from_args(index, retriever=retriever, llm=says("Quito [1]."))
    response = citing.query(QUESTION)
    assert str(response) == "Quito [1]." and response.source_nodes[0].text.startswith("Source 1:")
    assert "Hugo Ali" in "".join(node.text for node in response.source_nodes)
    by_sheet = CitationQueryEngine.from_args(index, retriever=retriever, llm=llm)
    assert str(asyncio.run(by_sheet.aquery(QUESTION))) not in ("", "Empty Response")


def test_sources_are_a_retriever_for_everything_else(kb):
    retriever = kb.as_index_retriever(similarity_top_k=5)
    found = retriever.retrieve("Where does Nina Sato live?")
    assert found[0].node_id == "nina" and found == asyncio.run(
        retriever.aretrieve(QueryBundle("Where does Nina Sato live?"))
    )
    index = VectorStoreIndex([node.node for node in found], embed_model=WordEmbedding())
    (nearest,) = index.as_retriever(similarity_top_k=1).retrieve("Nina Sato")
    assert isinstance(nearest.node, TextNode) and nearest.node_id == "nina"
    assert PEOPLE.description
