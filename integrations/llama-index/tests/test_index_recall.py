"""LLM and query engine recall what any retriever finds, or what the sheet looks at."""

from __future__ import annotations

import pytest
from index_corpus import QUESTION
from llama_index.llms.cribsheet import SheetNode

from cribsheet import CompressedKnowledgeLLM
from cribsheet.errors import RequestError

KARL = "Where does Karl Voss live?"


@pytest.fixture(scope="module")
def recalling(kb):
    return CompressedKnowledgeLLM.build(kb.sheet.documents, kb.sheet.task, model=kb.backbone, rate=3, archive="float32")


def test_an_llm_recalls_what_the_built_in_search_finds(recalling):
    llm = recalling.as_llama_index_llm(mode="recall", top_k=1, max_tokens=12)
    (passage,) = [each for each in llm.complete(QUESTION).raw["sources"] if each["retrieved"]]
    assert llm.complete(QUESTION).raw["mode"] == "recall" and passage["text"]


def test_an_engine_recalls_the_nodes_of_its_retriever_and_what_the_sheet_looks_at(recalling):
    nodes = recalling.as_index_retriever(similarity_top_k=1)
    for retriever in (nodes, "sheet"):
        response = recalling.as_query_engine(retriever=retriever, mode="recall", max_tokens=6).query(QUESTION)
        assert response.metadata["cribsheet"]["mode"] == "recall"
        assert any(not isinstance(each.node, SheetNode) for each in response.source_nodes)


def test_nodes_of_elsewhere_cannot_be_recalled(recalling, index, caplog):
    engine = recalling.as_query_engine(retriever=index.as_retriever(), mode="recall", max_tokens=3)
    response = engine.query(KARL)
    assert response.metadata["cribsheet"]["mode"] == "sheet" and "cannot be recalled" in caplog.text


def test_without_an_archive_it_says_how_to_build_one(kb):
    with pytest.raises(RequestError, match="archive=True"):
        kb.as_query_engine(mode="recall").query(QUESTION)
    assert kb.as_query_engine(mode="recall", no_archive="sheet", max_tokens=3).query(QUESTION)
