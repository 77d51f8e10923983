"""Hybrid and evidence over HTTP: passages of the sheet's own documents, and where answers are from."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
from live import random_sheet, serving

from cribsheet import CompressedKnowledgeLLM

ASK = {"messages": [{"role": "user", "content": "Where does Bob live?"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def live():
    kb = random_sheet()
    bare = CompressedKnowledgeLLM(kb.backbone, replace(kb.sheet, texts=()))
    with serving({"noise": kb, "bare": bare}) as running:
        yield running


def choices(live, **fields):
    reply = live.post(**ASK, **{"model": "noise", **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"]


@pytest.mark.parametrize("mode", ["hybrid", "retrieval"])
def test_passages_are_told_and_named_in_every_choice(live, mode):
    asked = {"mode": mode, "top_k": 1, "passage_tokens": 60, "evidence": True}
    told = choices(live, cribsheet=asked, n=2, temperature=1.0, top_k=3, seed=1)
    assert len(told) == 2
    for choice in told:
        extension = choice["cribsheet"]
        assert extension["mode"] == mode and "certainty" not in extension
        (passage,) = [each for each in extension["sources"] if each["retrieved"]]
        assert passage["document"] == "bob" and passage["text"].startswith("Bob")
        assert any(not each["retrieved"] for each in extension["sources"]) == (mode == "hybrid")
    again = choices(live, cribsheet=asked, temperature=1.0, top_k=3, seed=1)
    assert again[0]["message"] == told[0]["message"]
    free = choices(live, cribsheet=asked, temperature=1.0, seed=1)  # the sampler's own top_k was not taken for passages
    assert len([each for each in free[0]["cribsheet"]["sources"] if each["retrieved"]]) == 1


def test_auto_tells_how_certain_the_sheet_was(live):
    (sure,) = choices(live, cribsheet={"mode": "auto", "sure": 0.0})
    assert sure["cribsheet"].keys() == {"mode", "certainty"} and sure["cribsheet"]["mode"] == "sheet"
    (unsure,) = choices(live, cribsheet={"mode": "auto", "sure": 1.0})
    assert unsure["cribsheet"]["mode"] == "hybrid" and unsure["cribsheet"]["certainty"] < 1


def test_evidence_is_on_or_off_and_nothing_is_added_unasked(live):
    assert "cribsheet" not in choices(live)[0]
    assert "cribsheet" not in choices(live, cribsheet={"evidence": False})[0]
    (choice,) = choices(live, cribsheet={"evidence": True})
    assert choice["cribsheet"]["mode"] == "sheet" and choice["cribsheet"]["sources"]
    assert not any(each["retrieved"] for each in choice["cribsheet"]["sources"])


def test_more_sources_than_answers_carry_are_bounded_for_all_answers_together(live):
    for path, fields in (
        ("/v1/chat/completions", {**ASK, "n": 16}),
        ("/v1/completions", {"prompt": ["Who?"] * 8, "n": 2, "max_tokens": 2}),
    ):
        reply = live.post(path, model="noise", cribsheet={"sources": 4}, **fields)
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "cribsheet.sources"
        assert "4 sources of each of 16 answers are 64, but at most 60" in reply.json()["error"]["message"]
    assert len(choices(live, cribsheet={"sources": 4}, n=2)) == 2
    assert len(choices(live, cribsheet={"sources": 3}, n=16)) == 16


def test_a_sheet_without_texts_has_nothing_to_search(live):
    reply = live.post(**ASK, model="bare", cribsheet={"mode": "hybrid"})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "cribsheet.mode"
    assert "without their texts" in reply.json()["error"]["message"]
    assert live.post(**ASK, model="bare", cribsheet={"mode": "sheet"}).status_code == 200


@pytest.mark.skipif(find_spec("sentence_transformers") is not None, reason="the extra cribsheet[dense] is installed")
def test_a_server_whose_retriever_is_not_installed_says_so_only_where_it_is_asked_for():
    with serving({"noise": random_sheet()}, retriever="dense") as live:
        assert choices(live)
        reply = live.post(**ASK, model="noise", cribsheet={"mode": "hybrid"})
        assert reply.status_code == 400 and 'pip install "cribsheet[dense]"' in reply.json()["error"]["message"]
