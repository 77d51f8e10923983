"""LLM and query engine leave retrieval to the core: its modes, its budget, and sources that say what was retrieved."""

from __future__ import annotations

import asyncio
import logging
import pickle

import pytest
from index_corpus import ANSWER, QUESTION
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.prompts import PromptTemplate
from llama_index.core.retrievers import BaseRetriever
from llama_index.llms.cribsheet import CribsheetLLM, SheetNode

from cribsheet.errors import RequestError, SheetError

KARL = "Where does Karl Voss live?"


class Counting(BaseRetriever):
    """Another retriever, which counts."""

    def __init__(self, inner):
        self.inner, self.asked = inner, []
        super().__init__()

    def _retrieve(self, query_bundle):
        self.asked.append(query_bundle.query_str)
        return self.inner.retrieve(query_bundle)


@pytest.fixture
def retriever(index):
    return Counting(index.as_retriever(similarity_top_k=1))


def told(nodes):
    return [each.node.text for each in nodes if not isinstance(each.node, SheetNode)]


def test_every_way_to_call_an_llm_with_a_retriever_tells_what_it_finds(kb, retriever):
    llm = kb.as_llama_index_llm(retriever=retriever, max_tokens=12)

    async def streamed():
        return [each async for each in await llm.astream_complete(KARL)][-1]

    responses = [llm.complete(KARL), asyncio.run(llm.acomplete(KARL)), list(llm.stream_complete(KARL))[-1]]
    responses += [asyncio.run(streamed()), kb.as_llama_index_llm(max_tokens=12).complete(KARL, retriever=retriever)]
    assert retriever.asked == [KARL] * 5
    for response in responses:
        assert "Turin" in response.text and response.raw["mode"] == "hybrid"
        (passage,) = [each for each in response.raw["sources"] if each["retrieved"]]
        assert "Karl Voss" in passage["text"] and passage["weight"] > 0


@pytest.mark.parametrize("streaming", [False, True])
def test_an_engine_in_a_mode_asks_its_retriever_once_and_has_its_nodes(kb, retriever, streaming):
    engine = kb.as_query_engine(retriever=retriever, mode="hybrid", max_tokens=12, streaming=streaming)
    response = engine.query(KARL)
    assert "Turin" in ("".join(response.response_gen) if streaming else str(response))
    assert retriever.asked == [KARL] and len(told(response.source_nodes)) == 1
    assert {"page": 6} in [node.metadata for node in response.source_nodes]
    assert len(response.source_nodes) == 4 and response.metadata["cribsheet"]["mode"] == "hybrid"
    assert set(response.metadata) == {node.node_id for node in response.source_nodes} | {"cribsheet"}


def test_auto_does_not_retrieve_for_what_is_certain_enough(kb, retriever):
    engine = kb.as_query_engine(retriever=retriever, mode="auto", sure=0.0, max_tokens=12)
    assert str(engine.query(QUESTION)) == ANSWER and retriever.asked == []
    response = asyncio.run(kb.as_query_engine(retriever=retriever, mode="auto", sure=1.0, max_tokens=12).aquery(KARL))
    assert "Turin" in str(response) and retriever.asked == [KARL]
    assert response.metadata["cribsheet"]["certainty"] < 1


def test_the_sheet_s_own_documents_are_searched_and_retrieval_alone_has_no_other_sources(kb):
    engine = kb.as_query_engine(retriever="bm25", top_k=1, passage_tokens=60, max_tokens=12)
    response = engine.query(QUESTION)
    assert str(response) == ANSWER and len(told(response.source_nodes)) == 1
    assert response.source_nodes[0].node.ref_doc_id == "hugo"
    alone = kb.as_query_engine(mode="retrieval", top_k=1, max_tokens=12).query(QUESTION)
    assert len(alone.source_nodes) == len(told(alone.source_nodes)) == 1


def test_postprocessors_work_on_what_the_core_retrieves(kb, index):
    nothing = [SimilarityPostprocessor(similarity_cutoff=2.0)]
    engine = kb.as_query_engine(
        retriever=index.as_retriever(), mode="hybrid", node_postprocessors=nothing, max_tokens=12
    )
    assert told(engine.query(QUESTION).source_nodes) == []


def test_where_engine_and_llm_both_have_a_retriever_only_the_engine_s_is_asked(kb, retriever, caplog):
    second = Counting(retriever.inner)
    llm = kb.as_llama_index_llm(retriever=second, max_tokens=12)
    own = PromptTemplate("{context_str}\n\n{query_str}")
    with caplog.at_level(logging.WARNING):
        response = kb.as_query_engine(retriever=retriever).from_args(retriever, llm, text_qa_template=own).query(KARL)
    assert "Turin" in str(response) and (retriever.asked, second.asked) == ([KARL], [])
    assert "both have a retriever" in caplog.text


def test_settings_that_make_no_sense_are_refused(kb, index):
    for settings, message in (
        ({"mode": "magic"}, "The mode is 'magic'"),
        ({"retriever": 7}, r"neither retrieve\(\) nor invoke\(\)"),
        ({"passage_tokens": 9}, "pass a retriever or a mode"),
    ):
        with pytest.raises(RequestError, match=message):
            kb.as_query_engine(**settings)
        with pytest.raises(RequestError, match=message):
            kb.as_llama_index_llm(**settings)


def test_what_holds_a_sheet_in_memory_or_a_retriever_says_so_when_it_is_pickled(kb, sheet_path, index):
    for held in (kb, kb.as_query_engine(), kb.as_index_retriever(), kb.as_llama_index_llm()):
        with pytest.raises(SheetError, match="save"):
            pickle.dumps(held)
    llm = CribsheetLLM(sheet_path, retriever="bm25", mode="auto")
    again = pickle.loads(pickle.dumps(llm))
    assert (again.retriever, again.mode) == ("bm25", "auto")
    with pytest.raises(RequestError, match="holds a retriever"):
        pickle.dumps(CribsheetLLM(sheet_path, retriever=index.as_retriever()))


def test_source_nodes_follow_a_corpus_that_changes(build_independent):
    kb = build_independent
    retriever = kb.as_index_retriever(similarity_top_k=9)
    before = {each.node.ref_doc_id or each.node.node_id for each in retriever.retrieve(QUESTION)}
    kb.extend([{"id": "new", "text": "Karl Voss lives in Turin. " * 3}])
    kb.replace("hugo", "Hugo Ali lives in Lima.")
    after = {each.node_id: each.node.text for each in retriever.retrieve(QUESTION)}
    assert set(after) == before | {"new"} and after["hugo"] == "Hugo Ali lives in Lima."
