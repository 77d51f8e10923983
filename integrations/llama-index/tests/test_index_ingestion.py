"""Whatever LlamaIndex reads becomes a sheet, and comes back as source nodes with its ids and metadata."""

from __future__ import annotations

import pytest
from llama_index.core import SimpleDirectoryReader
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import Document, ImageNode, NodeWithScore, TextNode

from cribsheet import CompressedKnowledgeLLM
from cribsheet.errors import DocumentError
from cribsheet.testing import tiny_backbone

TEXTS = {"lisbon": "Alice Moreno lives in Lisbon.", "oslo": "Bob Smith lives in Oslo."}


@pytest.fixture(scope="module")
def build():
    model = tiny_backbone()
    return lambda nodes: CompressedKnowledgeLLM.build(nodes, "Where do people live?", model=model, rate=2)


def sources(kb) -> dict:
    return {node.node_id: node for node in kb.as_index_retriever(similarity_top_k=10).retrieve("Where is Bob?")}


def test_documents_keep_their_ids_and_metadata(build):
    found = sources(build([Document(text=text, id_=name, metadata={"page": 7}) for name, text in TEXTS.items()]))
    assert {name: node.text for name, node in found.items()} == TEXTS
    assert all(node.metadata == {"page": 7} for node in found.values())


def test_nodes_and_scored_nodes_keep_their_documents(build):
    nodes = SentenceSplitter().get_nodes_from_documents([Document(text=TEXTS["oslo"], id_="oslo.txt")])
    found = sources(build([nodes[0], NodeWithScore(node=TextNode(text=TEXTS["lisbon"], id_="n2"), score=0.5)]))
    assert set(found) == {nodes[0].node_id, "n2"}
    assert found[nodes[0].node_id].node.ref_doc_id == "oslo.txt" and found["n2"].node.ref_doc_id is None
    assert "ref_doc_id" not in found[nodes[0].node_id].metadata
    scored = sources(build([NodeWithScore(node=nodes[0], score=1.0), TextNode(text=TEXTS["lisbon"])]))
    assert scored[nodes[0].node_id].node.ref_doc_id == "oslo.txt"


def test_a_pipelines_output_is_a_corpus(build, tmp_path):
    for name, text in TEXTS.items():
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    documents = SimpleDirectoryReader(str(tmp_path)).load_data()
    nodes = IngestionPipeline(transformations=[SentenceSplitter(chunk_size=64, chunk_overlap=0)]).run(
        documents=documents
    )
    found = sources(build(nodes))
    assert {node.metadata["file_name"] for node in found.values()} == {"lisbon.txt", "oslo.txt"}
    assert set(found) == {node.node_id for node in nodes}
    assert {node.node.ref_doc_id for node in found.values()} == {document.doc_id for document in documents}


def test_sources_survive_saving(build, tmp_path):
    kb = build([TextNode(text=text, id_=name, metadata={"page": 1}) for name, text in TEXTS.items()])
    path = kb.save(tmp_path / "a.sheet")
    opened = CompressedKnowledgeLLM.load(path, model=kb.backbone)
    assert {name: node.text for name, node in sources(opened).items()} == TEXTS
    bare = CompressedKnowledgeLLM.load(kb.save(tmp_path / "b.sheet", texts=False), model=kb.backbone)
    assert {name: (node.text, node.metadata) for name, node in sources(bare).items()} == {
        name: ("", {"page": 1}) for name in TEXTS
    }


def test_a_long_document_gives_the_passages_that_were_looked_at(build):
    text = " ".join(f"Line {n} is about number {n}." for n in range(60))
    retriever = build([Document(text=text, id_="long")]).as_index_retriever(passage_characters=200)
    nodes = retriever.retrieve("Which number is line 7 about?")
    assert len(nodes) == 3 and [each.score for each in nodes] == sorted((each.score for each in nodes), reverse=True)
    for found in nodes:
        start = found.node.start_char_idx
        assert found.node_id == f"long:{start}" and found.node.ref_doc_id == "long"
        assert found.text == text[start : found.node.end_char_idx] and 100 < len(found.text) <= 260
        assert found.text.split()[0] in text.split() and found.text.split()[-1] in text.split()


def test_what_is_no_text_is_refused(build):
    with pytest.raises(DocumentError, match="no text"):
        build([ImageNode(image="aGVsbG8=", id_="picture")])
