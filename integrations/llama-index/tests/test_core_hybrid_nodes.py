"""Any LlamaIndex retriever, or an index itself, serves the core's hybrid mode."""

from __future__ import annotations

from llama_index.core import VectorStoreIndex
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeRelationship, NodeWithScore, RelatedNodeInfo, TextNode

NODE = TextNode(text="Eve Lund lives in Turin.", id_="n1", start_char_idx=10)
NODE.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id="news")


class News(BaseRetriever):
    def _retrieve(self, query_bundle):
        return [NodeWithScore(node=NODE, score=0.5)]


async def test_a_retriever_and_an_index_tell_what_the_sheet_has_never_read(kb):
    for retriever in (News(), VectorStoreIndex([NODE])):
        answer = kb.ask("Where does Eve Lund live?", retriever=retriever)
        assert (answer.text, answer.mode) == ("Turin", "hybrid")
        (passage,) = answer.passages
        assert (passage.document_id, passage.start, passage.stop) == ("news", 10, 34)
        assert passage.score is not None
        later = await kb.aask("Where does Eve Lund live?", retriever=retriever)
        assert later.text == answer.text
