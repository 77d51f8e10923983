"""The chat model tells passages after the sheet, by the core's own hybrid, and its messages say where answers come from."""  # noqa: E501

from __future__ import annotations

import logging

import pytest
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_cribsheet import source_documents
from pydantic import Field, ValidationError

NEWS = Document("Eve Lund lives in Turin.", metadata={"source": "news.txt", "start_index": 10, "page": 3})
EVE, BOB = "Where does Eve Lund live?", "Where does Bob Smith live?"


class News(BaseRetriever):
    asked: list[str] = Field(default_factory=list)

    def _get_relevant_documents(self, query, *, run_manager):
        self.asked.append(query)
        return [NEWS]


async def test_a_retriever_of_the_model_serves_every_way_to_call_it(kb):
    news = News()
    llm = kb.as_chat_model(retriever=news, max_tokens=12)
    messages = [llm.invoke(EVE), await llm.ainvoke(EVE), kb.as_chat_model(max_tokens=12).invoke(EVE, retriever=news)]
    for chunks in (list(llm.stream(EVE)), [chunk async for chunk in llm.astream(EVE)]):
        whole = chunks[0]
        for chunk in chunks[1:]:
            whole += chunk
        messages.append(whole)
    assert len(news.asked) == len(messages) == 5
    for message in messages:
        assert message.text == "Turin" and message.response_metadata["mode"] == "hybrid"
        (told,) = [each for each in source_documents(message) if each.metadata["retrieved"]]
        assert told.page_content == NEWS.page_content
        place = told.metadata
        assert (place["source"], place["start_index"], place["end_index"], place["page"]) == ("news.txt", 10, 34, 3)
        assert 0 < place["score"] <= 1


async def test_several_answers_share_one_search(kb):
    news = News()
    llm = kb.as_chat_model(retriever=news, max_tokens=12)
    made = await llm.agenerate([ChatPromptTemplate.from_template(EVE).format_messages()], n=3)
    assert [each.text for each in made.generations[0]] == ["Turin"] * 3 and len(news.asked) == 1


def test_an_answer_of_the_sheet_names_its_documents_unless_evidence_is_off(kb):
    sources = source_documents(kb.as_chat_model().invoke(BOB))
    texts = {document.id: document.text for document in kb.sheet.documents}
    assert {each.metadata["document_id"] for each in sources} == set(texts)
    for each in sources:
        place = each.metadata
        assert each.page_content == texts[place["document_id"]][place["start_index"] : place["end_index"]] != ""
        assert not place["retrieved"]
    assert source_documents(kb.as_chat_model(evidence=False).invoke(BOB)) == []


@pytest.mark.parametrize("document", [None, NEWS])  # of the sheet, and one that the sheet has never seen
def test_a_chain_with_a_retriever_of_its_own_is_not_told_twice_and_warns(kb, document, caplog):
    found = document or Document(kb.sheet.documents[1].text)
    prompt = ChatPromptTemplate.from_messages([("system", "Context: {context}"), ("human", "{question}")])
    own = News()
    llm = kb.as_chat_model(retriever=own, max_tokens=12)
    context = RunnableLambda(lambda query: found.page_content)
    chain = {"context": context, "question": RunnablePassthrough()} | prompt | llm
    with caplog.at_level(logging.WARNING, "cribsheet"):
        message = chain.invoke(BOB if document is None else EVE)
    assert message.text == ("Oslo" if document is None else "Turin")
    assert not any(each.metadata["retrieved"] for each in source_documents(message))
    assert "both have a retriever" in caplog.text and (own.asked == [] or document is not None)


def test_the_sheet_s_own_documents_are_searched_and_a_mode_is_kept(kb):
    llm = kb.as_chat_model(mode="auto", retriever="bm25", top_k=1, passage_tokens=60, sure=1.0, max_tokens=12)
    message = llm.invoke(BOB)
    assert message.response_metadata["mode"] == "hybrid" and 0 <= message.response_metadata["certainty"] <= 1
    assert [each.metadata["document_id"] for each in source_documents(message) if each.metadata["retrieved"]] == [
        "smith"
    ]
    assert llm.invoke(BOB, mode="sheet").response_metadata["mode"] == "sheet"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "magic"}, "mode"),
        ({"passage_tokens": 100}, "pass a retriever or a mode"),
        ({"retriever": 7}, r"neither retrieve\(\) nor invoke\(\)"),
        ({"retriever": "bm26"}, "no built-in retriever"),
    ],
)
def test_settings_that_make_no_sense_are_refused_when_the_model_is_made(kb, settings, message):
    with pytest.raises(ValidationError, match=message):
        kb.as_chat_model(**settings)


def test_answers_with_other_retrievers_are_other_answers_to_a_cache(here):
    from langchain_cribsheet import ChatCribsheet

    models = [
        ChatCribsheet(sheet="people.sheet", model="fitted", retriever=each) for each in (None, "bm25", News(), News())
    ]
    assert len({each._get_llm_string() for each in models}) == 4
    assert models[1].to_json()["kwargs"]["retriever"] == "bm25"
    assert models[2].to_json()["type"] == "not_implemented"
