"""Passages by what they mean: the nearest first, by one small seam that any real encoder fits."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from importlib.util import find_spec

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT, QUESTION
from transformers import BertConfig, BertModel

from cribsheet import CompressedKnowledgeLLM, Document
from cribsheet.asking.settings import Retrieval
from cribsheet.cli import run
from cribsheet.errors import RequestError
from cribsheet.retrieval.dense import DenseRetriever
from cribsheet.retrieval.retriever import cut_into_passages
from cribsheet.testing import save_tiny_model, tiny_backbone, tiny_tokenizer

INSTALLED = find_spec("sentence_transformers") is not None
QUERIES = ["Where does Bob live?", "Who plays the violin, and where?", "x"]


def tiny_encoder():
    """A real random encoder and its tokenizer."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(None)  # with a chat template the library would read texts as turns
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **sizes)).eval()
    torch.random.set_rng_state(state)
    return model, tokenizer


class Mean:
    """The mean of an encoder's states, as sentence-transformers takes it; it notes what it is asked."""

    def __init__(self):
        self.model, self.tokenizer = tiny_encoder()
        self.queries, self.documents = [], []

    def encode_query(self, texts, *, show_progress_bar):
        self.queries += texts
        return self.places(texts)

    def encode_document(self, texts, *, show_progress_bar):
        self.documents += texts
        return self.places(texts).numpy()  # an array will do as well

    def places(self, texts):
        given = self.tokenizer(list(texts), padding=True, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            states = self.model(**given).last_hidden_state
        mask = given["attention_mask"].unsqueeze(-1)
        return (states * mask).sum(1) / mask.sum(1)


@pytest.fixture(scope="module")
def kb():
    return CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=tiny_backbone(), rate=3, guide="dropped")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same model in a folder, of which sentence-transformers takes the mean."""
    pytest.importorskip("sentence_transformers", reason="the extra cribsheet[dense] is not installed")
    place = tmp_path_factory.mktemp("dense") / "encoder"
    model, tokenizer = tiny_encoder()
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture
def default(folder, monkeypatch):
    """That folder as what the name "dense" stands for."""
    monkeypatch.setenv("CRIBSHEET_DENSE_MODEL", str(folder))
    return folder


def test_the_nearest_passages_come_first_with_their_cosines():
    mean = Mean()
    retriever = DenseRetriever(DOCUMENTS, model=mean, characters=60)
    assert retriever.passages == cut_into_passages(DOCUMENTS, 60) and len(retriever.passages) > 5
    for query in QUERIES:
        found = retriever.retrieve(query)
        cosines = torch.cosine_similarity(mean.places([query]), mean.places([each.text for each in found]))
        torch.testing.assert_close(torch.tensor([each.score for each in found]), cosines, atol=1e-5, rtol=0)
        assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)
        assert retriever.retrieve(query, top_k=2) == found[:2] == retriever.retrieve(query, 2)
        assert {each.text for each in found} == {each.text for each in retriever.passages}
    assert mean.documents == [each.text for each in retriever.passages] and set(mean.queries) == set(QUERIES)


def test_a_passage_is_nearest_to_itself_and_equals_come_in_order():
    retriever = DenseRetriever(DOCUMENTS, model=Mean(), characters=60)
    for passage in retriever.passages:
        assert retriever.retrieve(passage.text)[0].text == passage.text
    same = [Document("The same words here.", f"d{n}") for n in range(9)]
    found = DenseRetriever(same, model=Mean()).retrieve("words")
    assert [each.document_id for each in found] == [f"d{n}" for n in range(9)]


def test_nothing_is_found_for_nothing_and_nothing_searched_without_text():
    assert DenseRetriever(DOCUMENTS, model=Mean()).retrieve(" \n") == []
    with pytest.raises(RequestError, match=r"no text to search.*pass a retriever of your own"):
        DenseRetriever([Document("", "empty")], model=Mean())
    with pytest.raises(RequestError, match="The model of the retriever is 7; give a folder"):
        DenseRetriever(DOCUMENTS, model=7)


def test_one_retriever_serves_many_threads():
    retriever = DenseRetriever(DOCUMENTS, model=Mean(), characters=60)
    alone = [retriever.retrieve(query, 3) for query in QUERIES]
    found = [None] * len(QUERIES)

    def search(n):
        found[n] = retriever.retrieve(QUERIES[n], 3)

    threads = [threading.Thread(target=search, args=(n,)) for n in range(len(QUERIES))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_a_question_is_helped_by_it(kb):
    retriever = DenseRetriever(DOCUMENTS, model=Mean())
    answer = kb.ask(QUESTION, max_tokens=6, retriever=retriever, top_k=2)
    assert answer.mode == "hybrid" and set(answer.passages) == set(retriever.retrieve(QUESTION, 2))
    later = asyncio.run(kb.aask(QUESTION, max_tokens=6, retriever=retriever, top_k=2))
    assert (later.text, later.passages) == (answer.text, answer.passages)


@pytest.mark.skipif(INSTALLED, reason="the extra cribsheet[dense] is installed")
def test_without_the_extra_every_way_to_ask_for_it_says_how_to_get_it(kb, tmp_path, capsys):
    missing = 'pip install "cribsheet[dense]"; or use "bm25", or pass a retriever of your own'
    for fails in (
        lambda: kb.ask(QUESTION, retriever="dense"),
        lambda: kb.stream(QUESTION, retriever="dense", mode="auto"),
        lambda: asyncio.run(kb.aask(QUESTION, retriever="dense")),
        lambda: Retrieval("hybrid", "dense"),
        lambda: kb.dense,
        lambda: DenseRetriever(DOCUMENTS, model=tmp_path),
    ):
        with pytest.raises(RequestError, match=re.escape(missing)):
            fails()
    file = str(kb.save(tmp_path / "a.sheet"))
    assert run(["serve", file, "--retriever", "dense"]) == 2
    assert missing in capsys.readouterr().err


def test_the_library_s_own_models_are_loaded_from_a_folder(folder):
    ours = DenseRetriever(DOCUMENTS, model=Mean(), characters=60)
    theirs = DenseRetriever(DOCUMENTS, model=folder, characters=60, device="cpu")
    for query in QUERIES:
        first, second = ({each.text: each.score for each in one.retrieve(query)} for one in (ours, theirs))
        assert first == pytest.approx(second, abs=1e-5)
    with pytest.raises(RequestError, match=r"cannot be loaded \(.*CRIBSHEET_DENSE_MODEL or --dense-model"):
        DenseRetriever(DOCUMENTS, model=folder.parent / "nowhere")


def test_the_name_stands_for_the_sheet_s_own_documents_and_they_are_placed_once(kb, default):
    assert kb.dense is kb.dense and kb.dense is not kb.bm25
    for mode in ("hybrid", "retrieval", "auto"):
        answer = kb.ask(QUESTION, max_tokens=4, retriever="dense", mode=mode, sure=1.0, top_k=2)
        assert set(answer.passages) == set(kb.dense.retrieve(QUESTION, 2)) and answer.mode in ("hybrid", "retrieval")
    with kb.stream(QUESTION, max_tokens=4, retriever="dense", top_k=2) as stream:
        assert "".join(stream) == kb.ask(QUESTION, max_tokens=4, retriever="dense", top_k=2).text


def test_documents_that_change_are_placed_anew(default):
    kb = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=tiny_backbone(), rate=1.5, mode="independent")
    before = kb.dense
    kb.extend([Document("Zoe lives in Rome.", "zoe")])
    assert kb.dense is not before and "zoe" in {each.document_id for each in kb.dense.passages}


def test_the_command_line_takes_it_with_its_model(kb, folder, tmp_path, capsys):
    save_tiny_model(tmp_path / "model")
    small = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=tmp_path / "model", rate=3)
    asking = ["ask", str(small.save(tmp_path / "a.sheet")), QUESTION, "--max-tokens", "3", "--json", "--top-k", "2"]
    assert run([*asking, "--retriever", "dense", "--dense-model", str(folder)]) == 0
    told = {each["text"] for each in json.loads(capsys.readouterr().out)["passages"]}
    assert told == {each.text for each in DenseRetriever(DOCUMENTS, model=folder).retrieve(QUESTION, 2)}


def test_a_model_of_another_retriever_is_refused(capsys):
    assert run(["ask", "a.sheet", "Who?", "--retriever", "bm25", "--dense-model", "x"]) == 2
    assert "--dense-model is the model of --retriever dense" in capsys.readouterr().err
