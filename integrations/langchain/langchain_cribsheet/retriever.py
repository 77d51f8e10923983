"""`CribsheetRetriever`: the passages that the sheet looks at for a question, most attended first.

It takes the place of a retriever in chains that need documents: for citations, evaluators, and prompts with a
`{context}`. The sheet itself needs none of this to answer, so `content="marker"` is what a chain wants whose model
answers from the sheet.
"""

from __future__ import annotations

import os
from typing import Any, Literal

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict, Field, model_validator

from cribsheet import CompressedKnowledgeLLM, SheetError, Source
from cribsheet.recall.stretches import mark
from cribsheet.sheet.manifest import Manifest
from langchain_cribsheet.knowledge import Knowledge


class CribsheetRetriever(BaseRetriever):
    """Passages of a sheet's documents by how much attention a question gives them.

    sheet, model, model_options, knowledge
        as for `ChatCribsheet`.
    k
        how many documents, also per call. At least one always comes, so that no prompt has an empty context.
    characters
        length of a passage, about; a shorter document is one passage.
    content
        "text": the passages. "marker": a short note in place of each, for chains whose model answers from the sheet
        anyway and would only read the texts again; ids, metadata and order are the same. Passages of a sheet that was
        saved without texts are markers. Where the sheet has an archive, a marker also names its place, so that a
        `ChatCribsheet(mode="recall")` recalls it.

    What it costs: each question is read once to see where the sheet looks, whatever `content` is. With texts, the model
    of the chain then reads k passages again that the sheet holds already, so a question takes longer than with the
    retriever that was there before; with markers it reads k lines.

    Metadata are the document's own and `document_id`, `start_index`, `end_index` (characters in the document) and
    `score` (share of the attention, 0 to 1); `source` is the document's id unless it has a source of its own.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    sheet: str | None = Field(default_factory=lambda: os.environ.get("CRIBSHEET_SHEET"))
    model: str | None = Field(default_factory=lambda: os.environ.get("CRIBSHEET_MODEL"))
    model_options: dict[str, Any] = Field(default_factory=dict)
    knowledge: Any = Field(default=None, exclude=True, repr=False)
    k: int = Field(default=4, ge=1)
    characters: int = Field(default=1500, ge=1)
    content: Literal["text", "marker"] = "text"
    marker: str = Field(default="(The model has read this document.)", min_length=1)

    @model_validator(mode="after")
    def _set_knowledge(self) -> CribsheetRetriever:
        if isinstance(self.knowledge, CompressedKnowledgeLLM):
            if self.sheet and "sheet" in self.model_fields_set:
                raise ValueError(f"Both knowledge= and sheet={self.sheet!r} were given; pass one of them.")
            self.__dict__["sheet"] = None
        known = Knowledge.given(self.knowledge, self.sheet, self.model, self.model_options)
        if known is None:
            raise SheetError("No sheet was given; pass sheet=, or set CRIBSHEET_SHEET to the path of one.")
        self.__dict__["knowledge"] = known
        return self

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        llm: CompressedKnowledgeLLM = self.knowledge.llm
        asked = query if query.strip() else llm.sheet.task.description  # agents search for nothing now and then
        found = llm.passages(asked, limit=self.k if k is None else k, characters=self.characters)
        sheet = llm.sheet.manifest
        numbers = {entry.id: number for number, entry in enumerate(sheet.documents)}
        made = [self._document(each, numbers[each.document_id], sheet) for each in found if each.document_id in numbers]
        return made or [Document(page_content=self.marker, metadata={"source": sheet.digest, "score": 0.0})]

    def _document(self, passage: Source, number: int, sheet: Manifest) -> Document:
        entry = sheet.documents[number]
        named = f" {mark(entry, passage.start, passage.stop)}" if sheet.archive else ""
        whole = passage.stop - passage.start >= entry.characters
        place = {
            "document_id": entry.id,
            "start_index": passage.start,
            "end_index": passage.stop,
            "score": passage.weight,
        }
        return Document(
            page_content=(passage.text if self.content == "text" else "") or self.marker + named,
            id=entry.id if whole else f"{entry.id}:{passage.start}",
            metadata={"source": entry.id, **entry.metadata, **place},
        )
