"""What the conformance tests share: a small sheet of the pocket model, judges that say what they are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from index_corpus import NEWCOMER, PEOPLE, STAFF, WordEmbedding
from llama_index.core import Settings, VectorStoreIndex
from llama_index.core.schema import TextNode
from llama_index.llms.cribsheet import CribsheetLLM
from no_network import no_network  # noqa: F401

from cribsheet import CompressedKnowledgeLLM
from cribsheet.testing import echo_backbone, tiny_backbone

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def settings(llm: CribsheetLLM) -> Iterator[Any]:
    """LlamaIndex's global settings: ours during a test, untouched after it."""
    before = dict(vars(Settings))
    Settings.llm, Settings.embed_model, Settings.tokenizer = llm, WordEmbedding(), llm.tokenize
    yield Settings
    vars(Settings).update(before)
    vars(Settings).update({name: None for name in set(vars(Settings)) - set(before)})


@pytest.fixture(scope="session")
def kb() -> CompressedKnowledgeLLM:
    """Who lives where, on a sheet of the pocket model that keeps everything: nothing here is about what is lost."""
    return CompressedKnowledgeLLM.build(STAFF, PEOPLE, rate=1, scorer="recent")


@pytest.fixture(scope="session")
def llm(kb: CompressedKnowledgeLLM) -> CribsheetLLM:
    """Answers of a few tokens from that sheet."""
    made: CribsheetLLM = kb.as_llama_index_llm(max_tokens=12)
    return made


@pytest.fixture(scope="session")
def engine(kb: CompressedKnowledgeLLM) -> Any:
    """The query engine over that sheet."""
    return kb.as_query_engine(max_tokens=12)


@pytest.fixture(scope="session")
def sheet_path(kb: CompressedKnowledgeLLM, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The sheet in a file."""
    return str(kb.save(tmp_path_factory.mktemp("sheets") / "staff.sheet"))


@pytest.fixture(scope="session")
def says() -> Callable[[str], CribsheetLLM]:
    """Another real model, which always says one thing: for judges, selectors and agents, whose words tests decide."""
    made: dict[str, CribsheetLLM] = {}

    def saying(text: str) -> CribsheetLLM:
        if text not in made:
            model = CompressedKnowledgeLLM.build(["Rules for judges."], "Judge.", model=echo_backbone(text), rate=1)
            made[text] = model.as_llama_index_llm()
        return made[text]

    return saying


@pytest.fixture
def index() -> VectorStoreIndex:
    """A vector index of somebody whom the sheet does not know, and something else."""
    nodes = [
        TextNode(text=NEWCOMER, id_="karl", metadata={"page": 6}),
        TextNode(text="The printer on the second floor is broken.", id_="printer"),
    ]
    return VectorStoreIndex(nodes, embed_model=WordEmbedding())


@pytest.fixture
def build_independent() -> CompressedKnowledgeLLM:
    """A sheet of a random model whose documents may change."""
    return CompressedKnowledgeLLM.build(STAFF, PEOPLE, model=tiny_backbone(), rate=1, mode="independent")
