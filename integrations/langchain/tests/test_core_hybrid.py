"""Any LangChain retriever or runnable serves the core's hybrid mode."""

from __future__ import annotations

import logging

from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda

NEWS = Document("Eve Lund lives in Turin.", metadata={"source": "news.txt", "start_index": 10})


class News(BaseRetriever):
    def _get_relevant_documents(self, query, *, run_manager):
        return [NEWS]


async def test_a_retriever_and_a_runnable_tell_what_the_sheet_has_never_read(kb):
    for retriever in (News(), RunnableLambda(lambda query: [NEWS])):
        answer = kb.ask("Where does Eve Lund live?", retriever=retriever)
        assert (answer.text, answer.mode) == ("Turin", "hybrid")
        (passage,) = answer.passages
        assert (passage.document_id, passage.start, passage.stop) == ("news.txt", 10, 34)
        later = await kb.aask("Where does Eve Lund live?", retriever=retriever)
        assert (later.text, later.passages) == (answer.text, answer.passages)
    assert kb.ask("Where does Bob Smith live?", retriever=News()).text == "Oslo"


def test_a_chain_that_has_retrieved_already_is_not_helped_twice(kb, caplog):
    prompt = ChatPromptTemplate.from_messages([("system", "Context: {context}"), ("human", "{question}")])
    text = kb.sheet.documents[1].text
    told = prompt.invoke({"context": text, "question": "Where does Bob Smith live?"}).to_messages()
    turns = [{"role": {"human": "user"}.get(each.type, each.type), "content": each.content} for each in told]
    asked = []
    with caplog.at_level(logging.WARNING, "cribsheet"):
        answer = kb.ask(turns, retriever=RunnableLambda(lambda query: asked.append(query) or [NEWS]))
    assert (answer.text, answer.mode, asked) == ("Oslo", "sheet", [])
    assert "both have a retriever" in caplog.text
