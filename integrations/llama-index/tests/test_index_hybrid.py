"""Hybrid: what a retriever finds is told after the sheet, within what the window leaves."""

from __future__ import annotations

import asyncio
import logging

import pytest
from index_corpus import ANSWER, NEWCOMER, QUESTION
from llama_index.core import VectorStoreIndex
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import TextNode

from cribsheet import CompressedKnowledgeLLM
from cribsheet.errors import RequestError
from cribsheet.testing import tiny_backbone

KARL = "Where does Karl Voss live?"


@pytest.fixture
def hybrid(kb, index):
    return kb.as_query_engine(retriever=index.as_retriever(similarity_top_k=1), max_tokens=12)


def test_answers_come_from_the_sheet_and_from_what_was_retrieved(hybrid):
    for response in (hybrid.query(KARL), asyncio.run(hybrid.aquery(KARL))):
        assert "Turin" in str(response)
        assert response.source_nodes[0].node_id == "karl" and response.source_nodes[0].score > 0
        assert len(response.source_nodes) == 4  # and what the answer looked at in the sheet
        assert set(response.metadata) == {node.node_id for node in response.source_nodes} | {"cribsheet"}
    assert str(hybrid.query(QUESTION)) == ANSWER


def test_it_streams(kb, index):
    streaming = kb.as_query_engine(retriever=index.as_retriever(similarity_top_k=1), streaming=True, max_tokens=12)
    assert "Turin" in "".join(streaming.query(KARL).response_gen)


def test_postprocessors_work_on_what_was_retrieved(kb, index):
    two = index.as_retriever(similarity_top_k=2)

    def cut_at(score):
        picky = [SimilarityPostprocessor(similarity_cutoff=score)]
        return kb.as_query_engine(retriever=two, max_tokens=12, node_postprocessors=picky)

    sources = [node.node_id for node in cut_at(0.1).query(KARL).source_nodes]
    assert sources[0] == "karl" and "printer" not in sources
    nothing = cut_at(2.0)
    assert str(nothing.query(QUESTION)) == ANSWER
    assert asyncio.run(nothing.aquery(QUESTION)).source_nodes[0].node_id == "hugo"


def test_the_prompt_is_ones_own(kb, index):
    own = kb.as_query_engine(
        retriever=index.as_retriever(similarity_top_k=1),
        max_tokens=12,
        text_qa_template=PromptTemplate("{context_str}\n\nWhere does {query_str} live?"),
    )
    assert "Turin" in str(own.query("Karl Voss"))


def test_a_document_that_both_know_is_one_source(kb):
    same = VectorStoreIndex([TextNode(text=document.text, id_=document.id) for document in kb.sheet.documents])
    response = kb.as_query_engine(retriever=same.as_retriever(similarity_top_k=1), max_tokens=12).query(QUESTION)
    ids = [node.node_id for node in response.source_nodes]
    assert ids[0] == "hugo" and len(ids) == len(set(ids)) == 3


def test_passages_are_told_within_a_budget(kb, index, caplog):
    retriever = index.as_retriever(similarity_top_k=2)

    def prompt_tokens(**settings):
        response = kb.as_query_engine(retriever=retriever, max_tokens=2, similarity_top_k=0, **settings).query(KARL)
        return response.metadata["cribsheet"]["usage"]["prompt_tokens"], response.source_nodes

    alone = kb.sheet.length + kb.count_tokens("Passages:\n\n\n\n" + KARL)
    (everything, both), (some, first) = prompt_tokens(), prompt_tokens(context_tokens=12)
    assert [len(both), len(first)] == [2, 1] and "do not fit: 1 of 2 are told" in caplog.text
    assert alone < some <= alone + 12 < everything
    with pytest.raises(RequestError, match="context_tokens is 0"):
        prompt_tokens(context_tokens=0)


def test_passages_never_push_the_question_out_of_the_window(caplog):
    small = CompressedKnowledgeLLM.build([NEWCOMER], model=tiny_backbone(max_position_embeddings=600), rate=1)
    long = VectorStoreIndex([TextNode(text=f"{NEWCOMER} " * 20, id_=f"n{n}") for n in range(3)])
    engine = small.as_query_engine(retriever=long.as_retriever(similarity_top_k=3), max_tokens=20)
    with caplog.at_level(logging.WARNING):
        usage = engine.query(KARL).metadata["cribsheet"]["usage"]
    assert 600 - 20 - 30 < usage["prompt_tokens"] <= 600 - 20
    assert "do not fit: 1 of 3 are told" in caplog.text
