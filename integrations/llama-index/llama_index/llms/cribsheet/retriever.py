"""`CribsheetRetriever`: where in the documents the sheet looks for a question, as source nodes.

The sheet needs none of this to answer. It is for citations, evaluators and whatever else asks for sources.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.schema import NodeRelationship, NodeWithScore, QueryBundle, RelatedNodeInfo, TextNode

from cribsheet import CompressedKnowledgeLLM, Document, RequestError, Source


class SheetNode(TextNode):
    """A passage that the sheet has read: a source, which our synthesizer does not tell the model once more."""


@dataclass
class AnsweredQuery(QueryBundle):
    """A query with its answer: what the answer looked at says more than what the question looks at."""

    answer: str = ""


class CribsheetRetriever(BaseRetriever):
    """The passages of a sheet's documents that get the most attention (`CompressedKnowledgeLLM.passages`).

    similarity_top_k
        how many. LlamaIndex's name for it; the score is a share of attention, 0 to 1.
    passage_characters
        a document that is longer gives passages of about this many characters around its most attended places.

    Nodes keep their documents' ids and metadata; a passage has the id `<document>:<start>` and its document as source.
    """

    def __init__(
        self,
        knowledge: CompressedKnowledgeLLM,
        *,
        similarity_top_k: int = 3,
        passage_characters: int = 1500,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        if similarity_top_k < 0:
            raise RequestError(f"similarity_top_k is {similarity_top_k}; ask for 0 documents or more.")
        if passage_characters < 1:
            raise RequestError(f"passage_characters is {passage_characters}; give at least 1.")
        self._knowledge = knowledge
        self._top_k, self._characters = similarity_top_k, passage_characters
        super().__init__(callback_manager=callback_manager)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy over the same model and sheet."""
        return copy.copy(self)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        if not self._top_k:
            return []
        answer = query_bundle.answer if isinstance(query_bundle, AnsweredQuery) else ""
        found = self._knowledge.passages(query_bundle.query_str, answer, limit=self._top_k, characters=self._characters)
        known = {document.id: document for document in self._knowledge.sheet.documents}  # they may have changed since
        pairs = [(source, known[source.document_id]) for source in found if source.document_id in known]
        return [NodeWithScore(node=self._node(*pair), score=pair[0].weight) for pair in pairs]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)

    def _node(self, source: Source, document: Document) -> SheetNode:
        start, stop = source.start, source.stop
        whole = stop - start >= len(document.text)
        metadata = dict(document.metadata)
        parent = metadata.pop("ref_doc_id", None) if whole else document.id
        node = SheetNode(
            id_=document.id if whole else f"{document.id}:{start}",
            text=source.text,
            start_char_idx=start,
            end_char_idx=stop,
        )
        node.metadata = metadata
        if parent:
            node.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=parent)
        return node


def told_node(source: Mapping[str, Any]) -> TextNode:
    """A passage that was retrieved and told, as a node; `source` is an entry of a response's `raw["sources"]`."""
    node = TextNode(
        id_=f"{source['document_id']}:{source['start']}",
        text=source["text"],
        start_char_idx=source["start"],
        end_char_idx=source["stop"],
    )
    node.metadata = dict(source["metadata"])
    if source["document_id"]:
        node.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=source["document_id"])
    return node
