"""`CribsheetRetriever`: the documents that the sheet looks at for a question, most attended first.

It takes the place of a retriever in chains that need documents: for citations, evaluators, and prompts with a
`{context}`. The sheet itself needs none of this to answer.
"""

from __future__ import annotations

import os
from typing import Any, Literal

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict, Field, model_validator

from cribsheet import CompressedKnowledgeLLM
from cribsheet.errors import RequestError
from langchain_cribsheet.knowledge import Knowledge


class CribsheetRetriever(BaseRetriever):
    """Documents of a sheet by how much attention a question gives them.

    k
        how many documents.
    content
        "text": the documents' texts. "marker": a short note in place of each text, for chains whose model answers from
        the sheet anyway and would only read the texts again; ids, metadata and scores are the same.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    sheet: str | None = Field(default_factory=lambda: os.environ.get("CRIBSHEET_SHEET"))
    model: str | None = Field(default_factory=lambda: os.environ.get("CRIBSHEET_MODEL"))
    model_options: dict[str, Any] = Field(default_factory=dict)
    knowledge: Any = Field(default=None, exclude=True, repr=False)
    k: int = 4
    content: Literal["text", "marker"] = "text"
    marker: str = "(The model has read this document.)"

    @model_validator(mode="after")
    def _set_knowledge(self) -> CribsheetRetriever:
        if isinstance(self.knowledge, CompressedKnowledgeLLM):
            self.knowledge = Knowledge.around(self.knowledge)
        if self.knowledge is None:
            self.knowledge = Knowledge.of(self.sheet, self.model, self.model_options)
        return self

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        wanted = self.k if k is None else k
        if wanted < 1:
            raise RequestError(f"k is {wanted}; ask for at least 1 document.")
        llm: CompressedKnowledgeLLM = self.knowledge.llm
        known = {document.id: document for document in llm.sheet.documents}
        found: list[Document] = []
        for source in llm.sources(query, "", limit=wanted):
            document = known[source.document_id]
            place = {"score": source.weight, "start": source.start, "stop": source.stop, "document_id": document.id}
            text = self.marker if self.content == "marker" or not document.text else document.text
            found.append(Document(page_content=text, id=document.id, metadata={**document.metadata, **place}))
        return found
