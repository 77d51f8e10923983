"""The retriever gives passages of the sheet's own documents, and always something."""

from __future__ import annotations

import copy

import pytest
from langchain_core.documents import Document
from langchain_cribsheet import ChatCribsheet, CribsheetRetriever

from cribsheet import CompressedKnowledgeLLM
from cribsheet.errors import EngineError, RequestError, SheetError
from cribsheet.testing import tiny_backbone

ASK = "Where does Alice Moreno live?"


@pytest.fixture(scope="module")
def long() -> CompressedKnowledgeLLM:
    """One long document, as a single PDF would be, and a short one."""
    story = " ".join(f"Number {n} is kept in room {n * 7}." for n in range(60))
    corpus = [{"id": "story", "text": story, "metadata": {"source": "story.pdf", "page": 3}}, {"id": "b", "text": "B."}]
    return CompressedKnowledgeLLM.build(corpus, "Rooms.", model=tiny_backbone(), rate=2)


def test_passages_are_stretches_of_the_documents_in_order_of_attention_and_never_overlap(long):
    text = long.sheet.documents[0].text
    found = long.as_retriever(k=5, characters=200).invoke("Where is number 7?")
    scores = [each.metadata["score"] for each in found]
    assert len(found) == 5 and scores == sorted(scores, reverse=True) and 0 < sum(scores) <= 1 + 1e-6
    taken: set[int] = set()
    for each in found:
        place = each.metadata
        if place["document_id"] == "story":
            start, stop = place["start_index"], place["end_index"]
            assert each.page_content == text[start:stop] and 0 < stop - start <= 200
            assert (start == 0 or text[start - 1].isspace()) and not taken & set(range(start, stop))
            taken |= set(range(start, stop))
            assert place["source"] == "story.pdf" and place["page"] == 3 and each.id == f"story:{start}"
        else:
            assert (each.id, each.page_content, place["source"]) == ("b", "B.", "b")
    assert len({each.id for each in found}) == 5


async def test_a_short_document_is_one_passage_and_async_is_the_same(kb):
    retriever = kb.as_retriever(k=2)
    found = retriever.invoke(ASK)
    texts = {document.id: document.text for document in kb.sheet.documents}
    assert [each.page_content for each in found] == [texts[each.id] for each in found]
    assert found == await retriever.ainvoke(ASK) == retriever.batch([ASK])[0]
    assert len(retriever.invoke(ASK, k=1)) == 1 and len(kb.as_retriever(k=99).invoke(ASK)) == 3


def test_markers_take_the_place_of_texts_and_nothing_else_changes(kb, tmp_path):
    full, marked = kb.as_retriever().invoke(ASK), kb.as_retriever(content="marker", marker="(read)").invoke(ASK)
    assert {each.page_content for each in marked} == {"(read)"}
    assert [(each.id, each.metadata) for each in full] == [(each.id, each.metadata) for each in marked]
    bare = CompressedKnowledgeLLM.load(kb.save(tmp_path / "bare.sheet", texts=False))
    found = bare.as_retriever().invoke(ASK)
    assert [each.id for each in found] == [each.id for each in full]
    assert {each.page_content for each in found} == {"(The model has read this document.)"}


def test_something_always_comes_so_that_no_context_is_empty(kb, long):
    assert kb.as_retriever(k=1).invoke("  ")[0].page_content  # an agent searches for nothing now and then
    recent = CompressedKnowledgeLLM.build(
        ["x " * 50], "A task.", model=long.backbone, budget=36, guide="resident", scorer="recent"
    )
    assert len(recent.as_retriever().invoke("anything")) >= 1


@pytest.mark.filterwarnings("ignore:This API is in beta")
def test_it_is_a_tool_and_a_runnable(kb):
    tool = kb.as_retriever(k=1).as_tool(name="search", description="Finds passages.")
    (found,) = tool.invoke({"query": ASK} if "query" in tool.args else ASK)
    assert isinstance(found, Document)
    assert (kb.as_retriever(k=2) | len).invoke(ASK) == 2


def test_it_opens_a_file_like_the_chat_model_and_shares_what_is_loaded(here, monkeypatch):
    retriever = CribsheetRetriever(sheet="people.sheet", model="fitted", k=1)
    assert not retriever.knowledge.is_open
    assert "lives in" in retriever.invoke("Who?")[0].page_content
    assert ChatCribsheet(sheet="people.sheet", model="fitted").knowledge is retriever.knowledge
    assert copy.deepcopy(retriever).knowledge is retriever.knowledge
    monkeypatch.setenv("CRIBSHEET_SHEET", "people.sheet")
    monkeypatch.setenv("CRIBSHEET_MODEL", "fitted")
    assert CribsheetRetriever().knowledge is retriever.knowledge


def test_mistakes_are_refused(kb, monkeypatch):
    monkeypatch.delenv("CRIBSHEET_SHEET", raising=False)
    for wrong in ({"k": 0}, {"characters": 0}, {"content": "summary"}, {"marker": ""}, {"top_k": 3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            kb.as_retriever(**wrong)
    with pytest.raises(RequestError, match="limit is 0"):
        kb.as_retriever().invoke(ASK, k=0)
    with pytest.raises(RequestError, match="leaves"):
        kb.as_retriever().invoke("x " * 20000)
    with pytest.raises((SheetError, ValueError), match="set CRIBSHEET_SHEET"):
        CribsheetRetriever()
    with pytest.raises(ValueError, match="Both knowledge= and sheet="):
        CribsheetRetriever(knowledge=kb, sheet="a.sheet")
    closed = CompressedKnowledgeLLM.build(["a b c " * 9], model=tiny_backbone(), rate=1)
    retriever = closed.as_retriever()
    closed.close()
    with pytest.raises(EngineError, match="closed"):
        retriever.invoke(ASK)
