"""`kb.as_query_engine()` is the `RetrieverQueryEngine` that others expect, answering from a sheet."""

from __future__ import annotations

import asyncio
import copy
import json

import pytest
from index_corpus import ANSWER, NEWCOMER, QUESTION
from llama_index.core.base.response.schema import AsyncStreamingResponse, Response, StreamingResponse
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.retrievers import RecursiveRetriever
from llama_index.core.schema import IndexNode, NodeWithScore, QueryBundle, TextNode
from llama_index.llms.cribsheet import CompressedKnowledgeQueryEngine, CribsheetLLM, SheetNode

from cribsheet.errors import RequestError

KARL = "Where does Karl Voss live?"


def test_a_query_is_a_text_or_a_bundle(engine):
    assert isinstance(engine, RetrieverQueryEngine)
    answers = [engine.query(QUESTION), engine.query(QueryBundle(QUESTION)), asyncio.run(engine.aquery(QUESTION))]
    assert [str(answer) for answer in answers] == [ANSWER] * 3
    assert all(isinstance(answer, Response) for answer in answers)


def test_streams_sync_and_async(kb):
    streaming = kb.as_query_engine(max_tokens=12, streaming=True)
    response = streaming.query(QUESTION)
    assert isinstance(response, StreamingResponse) and response.source_nodes
    assert response.metadata["cribsheet"] == {}  # nothing is known yet
    pieces = list(response.response_gen)
    assert "".join(pieces) == ANSWER and len(pieces) > 1
    assert response.metadata["cribsheet"]["usage"]["completion_tokens"] >= len(pieces)

    async def native() -> list[str]:
        response = await streaming.aquery(QUESTION)
        assert isinstance(response, AsyncStreamingResponse) and response.source_nodes
        pieces = [piece async for piece in response.async_response_gen()]
        assert response.metadata["cribsheet"]["finish_reason"] == "stop"
        return [*pieces, str(await (await streaming.aquery(QUESTION)).get_response())]

    *pieces, whole = asyncio.run(native())
    assert "".join(pieces) == whole == ANSWER


def test_source_nodes_are_the_documents_that_the_answer_looked_at(kb, engine):
    for document in kb.sheet.documents:
        name = document.text.split(" lives")[0]
        response = engine.query(f"Where does {name} live?")
        first = response.source_nodes[0]
        assert (first.node_id, first.text, first.metadata) == (document.id, document.text, document.metadata)
        scores = [node.score for node in response.source_nodes]
        assert len(scores) == 3 and scores == sorted(scores, reverse=True) and 0 < sum(scores) <= 1.0001
    assert "hugo" in engine.query(QUESTION).get_formatted_sources()


def test_metadata_is_that_of_each_source_and_what_is_known_of_the_call(kb, engine):
    response = engine.query(QUESTION)
    assert json.loads(json.dumps(response.metadata)) == response.metadata
    call = response.metadata["cribsheet"]
    assert response.metadata == {**{node.node_id: node.metadata for node in response.source_nodes}, "cribsheet": call}
    assert (call["sheet"], call["kept_tokens"]) == (kb.sheet.manifest.digest, kb.sheet.tokens)
    assert call["usage"]["prompt_tokens_details"]["cached_tokens"] == kb.sheet.length


def test_recursive_retrieval_takes_the_answer_with_its_metadata(engine, index):
    node = IndexNode(text="Who lives where", index_id="staff", obj=engine)
    index.insert_nodes([node])
    retriever = RecursiveRetriever(
        "vector",
        retriever_dict={"vector": index.as_retriever(similarity_top_k=1)},
        query_engine_dict={"staff": engine},
    )
    (found,) = retriever.retrieve("Who lives where?")
    assert isinstance(found, NodeWithScore) and found.node.get_content()
    assert "cribsheet" in found.metadata


def test_how_many_sources_can_be_chosen(kb):
    assert len(kb.as_query_engine(max_tokens=2, similarity_top_k=1).query(QUESTION).source_nodes) == 1
    assert kb.as_query_engine(max_tokens=2, similarity_top_k=0).query(QUESTION).source_nodes == []
    with pytest.raises(RequestError, match="similarity_top_k is -1"):
        kb.as_query_engine(similarity_top_k=-1)


def test_postprocessors_work_on_the_sources_of_the_sheet(kb):
    strict = kb.as_query_engine(max_tokens=12, node_postprocessors=[SimilarityPostprocessor(similarity_cutoff=0.3)])
    for response in (strict.query(QUESTION), asyncio.run(strict.aquery(QUESTION))):
        assert str(response) == ANSWER and [node.node_id for node in response.source_nodes] == ["hugo"]


def test_retrieving_then_synthesizing_is_querying(engine):
    bundle = QueryBundle(QUESTION)
    found, afound = engine.retrieve(bundle), asyncio.run(engine.aretrieve(bundle))
    assert [node.node_id for node in found] == [node.node_id for node in afound]
    assert all(isinstance(node.node, SheetNode) for node in found)
    response = engine.synthesize(bundle, found)
    aresponse = asyncio.run(engine.asynthesize(bundle, found))
    assert str(response) == str(aresponse) == ANSWER
    assert response.source_nodes == found
    alone = engine.query(bundle).metadata["cribsheet"]["usage"]
    assert response.metadata["cribsheet"]["usage"] == alone  # what the sheet has read is not told again


def test_nodes_from_elsewhere_are_told_and_are_sources(engine):
    node = NodeWithScore(node=TextNode(text=NEWCOMER, id_="karl"), score=0.5)
    more = NodeWithScore(node=TextNode(text="unread", id_="more"), score=0.1)
    for response in (
        engine.synthesize(QueryBundle(KARL), [node], [more]),
        asyncio.run(engine.asynthesize(QueryBundle(KARL), [node], [more])),
    ):
        assert "Turin" in str(response)
        assert [each.node_id for each in response.source_nodes] == ["karl", "more"]


def test_nodes_without_text_are_neither_told_nor_sources(engine):
    nodes = [NodeWithScore(node=TextNode(text=text, id_=name)) for name, text in (("blank", " "), ("karl", NEWCOMER))]
    response = engine.synthesize(QueryBundle(KARL), nodes)
    assert "Turin" in str(response) and [each.node_id for each in response.source_nodes] == ["karl"]


def test_a_deep_copy_answers_over_the_same_model(engine):
    assert str(copy.deepcopy(engine).query(QUESTION)) == ANSWER


def test_without_nodes_the_sheet_answers(engine):
    assert str(engine.synthesize(QueryBundle(QUESTION), [])) == ANSWER
    assert engine._response_synthesizer.get_response(QUESTION, []) == ANSWER
    assert asyncio.run(engine._response_synthesizer.aget_response(QUESTION, [])) == ANSWER
    assert "Turin" in engine._response_synthesizer.get_response(KARL, [NEWCOMER])


def test_prompts_can_be_read_and_changed(kb, llm):
    changed = kb.as_query_engine(max_tokens=12)
    name = "response_synthesizer:simple_template"
    assert set(changed.get_prompts()) == {name, "response_synthesizer:text_qa_template"}
    changed.update_prompts({name: PromptTemplate("Where does {query_str} live?")})
    assert str(changed.query("Clara Berg")) == "Cairo"
    own = kb.as_query_engine(max_tokens=12, simple_template=PromptTemplate("Where does {query_str} live?"))
    assert str(own.query("Clara Berg")) == "Cairo"
    with pytest.raises(RequestError, match="text_qa_template is for retrieved passages, but there is no retriever"):
        kb.as_query_engine(text_qa_template=PromptTemplate("{context_str} {query_str}"))


def test_another_retriever_can_be_put_in(engine, index):
    hybrid = engine.with_retriever(index.as_retriever(similarity_top_k=1))
    assert isinstance(hybrid, CompressedKnowledgeQueryEngine)
    assert "Turin" in str(hybrid.query(KARL)) and str(hybrid.query(QUESTION)) == ANSWER


def test_modes_of_one_call_answer_and_the_others_are_refused(kb):
    for mode in ("compact", "simple_summarize", "generation"):
        assert str(kb.as_query_engine(max_tokens=12, response_mode=mode).query(QUESTION)) == ANSWER
    sources = kb.as_query_engine(response_mode="no_text").query(QUESTION)
    assert sources.response == "" and len(sources.source_nodes) == 3
    context = asyncio.run(kb.as_query_engine(response_mode="context_only").aquery(QUESTION))
    assert "Hugo Ali lives in Quito." in str(context)
    for mode in ("refine", "tree_summarize", "accumulate", "compact_accumulate"):
        with pytest.raises(RequestError, match=f"response mode is '{mode}', but a sheet answers in one call; use one"):
            kb.as_query_engine(response_mode=mode)


def test_it_is_made_of_an_llm_too_and_refuses_what_it_does_not_know(kb, llm, settings):
    assert str(CompressedKnowledgeQueryEngine.from_args(llm=llm).query(QUESTION)) == ANSWER
    settings.llm = llm
    assert str(CompressedKnowledgeQueryEngine.from_args().query(QUESTION)) == ANSWER
    with pytest.raises(RequestError, match=r"does not know use_async; use .*temperature"):
        kb.as_query_engine(use_async=True)
    with pytest.raises(RequestError, match="max_tokens would go unused"):
        CompressedKnowledgeQueryEngine.from_args(llm=llm, max_tokens=5)
    with pytest.raises(RequestError, match="a CompactAndRefine; give a CribsheetSynthesizer"):
        kb.as_query_engine(response_synthesizer=get_response_synthesizer(llm=llm))
    with pytest.raises(RequestError, match="MockLLM, which has no sheet; give a CribsheetLLM"):
        from llama_index.core.llms import MockLLM

        CompressedKnowledgeQueryEngine.from_args(llm=MockLLM())


def test_the_stock_engine_needs_nodes_and_ours_does_not(kb, llm):
    class Nothing(type(kb.as_index_retriever())):
        def _retrieve(self, query_bundle):
            return []

    stock = RetrieverQueryEngine.from_args(Nothing(kb), llm=llm)
    assert str(stock.query(QUESTION)) == "Empty Response"
    assert str(kb.as_query_engine(retriever=Nothing(kb), max_tokens=12).query(QUESTION)) == ANSWER
    assert isinstance(kb.as_llama_index_llm(), CribsheetLLM)
