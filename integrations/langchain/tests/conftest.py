"""One small real model and one real sheet for all tests; one thread, no network."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from fitted.fit import DOCUMENTS, MODEL, TASK
from no_network import no_network  # noqa: F401

from cribsheet import CompressedKnowledgeLLM
from cribsheet.testing import echo_backbone, tiny_backbone

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the fitted model in `fitted` and a sheet of it in `people.sheet`."""
    folder = tmp_path_factory.mktemp("langchain")
    shutil.copytree(MODEL, folder / "fitted")
    kb = CompressedKnowledgeLLM.build(list(DOCUMENTS), TASK, model=folder / "fitted", rate=1, scorer="recent")
    kb.save(folder / "people.sheet")
    kb.close()
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That folder as the working directory, so that relative paths work as users write them."""
    monkeypatch.chdir(place)
    return place


@pytest.fixture(scope="session")
def kb() -> CompressedKnowledgeLLM:
    """A sheet of the pocket model that keeps everything."""
    documents = {
        "moreno": "Alice Moreno lives in Lisbon. Alice Moreno works for Nordwind Labs.",
        "smith": "Bob Smith lives in Oslo. Bob Smith works for Karst Foods.",
        "berg": "Clara Berg lives in Cairo. Clara Berg works for Nordwind Labs.",
    }
    corpus = [{"id": name, "text": text, "metadata": {"page": n}} for n, (name, text) in enumerate(documents.items())]
    return CompressedKnowledgeLLM.build(corpus, "Answer questions about people.", rate=1, scorer="recent")


@pytest.fixture(scope="session")
def writer() -> CompressedKnowledgeLLM:
    """A small random model: what it writes means nothing, and grammars must hold all the same."""
    return CompressedKnowledgeLLM.build(["Alice lives in Lisbon. " * 10], "Answer.", model=tiny_backbone(), rate=1)


@pytest.fixture(scope="session")
def echo() -> CompressedKnowledgeLLM:
    """A sheet whose model says the same whatever it is asked."""
    texts = {"moreno": "Alice Moreno lives in Lisbon. " * 3, "smith": "Bob Smith lives in Oslo. " * 3}
    corpus = [{"id": name, "text": text, "metadata": {"page": 7}} for name, text in texts.items()]
    return CompressedKnowledgeLLM.build(corpus, "Where?", model=echo_backbone("In Lisbon."), rate=1)


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
