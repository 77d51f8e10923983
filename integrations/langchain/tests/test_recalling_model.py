"""The chat model recalls: what it searches for itself, and what the markers of a chain's retriever name."""

from __future__ import annotations

import pytest
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_cribsheet import source_documents

from cribsheet import CompressedKnowledgeLLM

BOB = "Where does Bob Smith live?"


@pytest.fixture(scope="module")
def recalling(kb):
    documents = [{"id": each.id, "text": each.text, "metadata": each.metadata} for each in kb.sheet.documents]
    return CompressedKnowledgeLLM.build(
        documents, "Answer questions about people.", model=kb.backbone, rate=3, archive=True
    )


async def test_a_chat_model_recalls_in_every_way_to_call_it(recalling):
    llm = recalling.as_chat_model(mode="recall", top_k=1, max_tokens=12)
    messages = [llm.invoke(BOB), await llm.ainvoke(BOB)]
    messages.append(recalling.as_chat_model(retriever="sheet", top_k=1, max_tokens=12).invoke(BOB))
    for message in messages[:2]:
        (told,) = [each for each in source_documents(message) if each.metadata["retrieved"]]
        assert told.metadata["source"] == "smith" and message.text == "Oslo"
    assert [message.response_metadata["mode"] for message in messages] == ["recall"] * 3


def test_markers_of_a_chain_s_retriever_say_what_is_recalled_and_texts_do_not(recalling, caplog):
    retriever = recalling.as_retriever(content="marker", k=1)
    (marker,) = retriever.invoke(BOB)
    number = [each.id for each in recalling.sheet.documents].index(marker.metadata["document_id"])
    entry = recalling.sheet.manifest.documents[number]
    start, stop = marker.metadata["start_index"], marker.metadata["end_index"]
    assert marker.page_content == f"(The model has read this document.) [recall {entry.digest[:8]}:{start}-{stop}]"
    prompt = ChatPromptTemplate.from_template("Context:\n{context}\n\n{question}")
    told = retriever | (lambda found: "\n".join(each.page_content for each in found))
    chain = {"context": told, "question": RunnablePassthrough()} | prompt
    message = (chain | recalling.as_chat_model(mode="recall", max_tokens=12)).invoke(BOB)
    (recalled,) = [each for each in source_documents(message) if each.metadata["retrieved"]]
    assert message.response_metadata["mode"] == "recall"
    assert (recalled.metadata["source"], recalled.page_content) == (
        marker.metadata["document_id"], recalling.sheet.texts[number][start:stop]
    )  # fmt: skip
    assert isinstance((chain | recalling.as_chat_model(max_tokens=3) | StrOutputParser()).invoke(BOB), str)


def test_a_retriever_s_markers_are_found_where_they_are_passed_as_passages(recalling):
    retriever = recalling.as_retriever(content="marker", k=1)
    answer = recalling.ask(BOB, mode="recall", retriever=retriever, max_tokens=3)
    assert [each.document_id for each in answer.passages] == [retriever.invoke(BOB)[0].metadata["document_id"]]


def test_without_an_archive_markers_stay_as_they_were_and_recall_says_how_to_build_one(kb):
    assert kb.as_retriever(content="marker", k=1).invoke(BOB)[0].page_content == "(The model has read this document.)"
    with pytest.raises(ValueError, match="archive=True"):
        kb.as_chat_model(mode="recall").invoke(BOB)
    llm = kb.as_chat_model(mode="recall", no_archive="sheet", max_tokens=6)
    assert llm.invoke(BOB).response_metadata["mode"] == "sheet"
