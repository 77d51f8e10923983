"""Recall over HTTP: what is recalled, by what, and what is said where there is nothing to recall from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from live import random_sheet, serving

from cribsheet import CompressedKnowledgeLLM

ASK = {"messages": [{"role": "user", "content": "Where does Bob live?"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    kb = random_sheet()
    documents, task = kb.sheet.documents, kb.sheet.task
    kept = CompressedKnowledgeLLM.build(documents, task, model=kb.backbone, rate=2, archive=True)
    lost = kept.save(tmp_path_factory.mktemp("lost") / "lost.sheet")
    Path(f"{lost}.archive").unlink()
    sheets = {
        "kept": kept,
        "bare": CompressedKnowledgeLLM(kb.backbone, replace(kept.sheet, texts=())),
        "none": kb,
        "lost": CompressedKnowledgeLLM.load(lost, model=kb.backbone),
    }
    with serving(sheets) as running:
        yield running


@pytest.mark.parametrize("stream", [False, True])
def test_stretches_are_recalled_and_named(live, stream):
    asked = {"mode": "recall", "top_k": 1, "evidence": True}
    reply = live.post(**ASK, model="kept", cribsheet=asked, **({"stream": True} if stream else {}))
    assert reply.status_code == 200 and '"mode":"recall"' in reply.text.replace(" ", "")
    if not stream:
        extension = reply.json()["choices"][0]["cribsheet"]
        (passage,) = [each for each in extension["sources"] if each["retrieved"]]
        assert passage["document"] == "bob"


def test_the_sheet_points_by_itself_also_without_texts(live):
    for name in ("kept", "bare"):
        reply = live.post(**ASK, model=name, cribsheet={"mode": "recall", "retriever": "sheet", "top_k": 1})
        assert reply.json()["choices"][0]["cribsheet"]["mode"] == "recall", reply.text
    refused = live.post(**ASK, model="bare", cribsheet={"mode": "recall"})
    assert refused.status_code == 400 and "without their texts" in refused.json()["error"]["message"]


def test_without_an_archive_it_is_refused_or_the_sheet_answers_alone(live):
    refused = live.post(**ASK, model="none", cribsheet={"mode": "recall"})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "cribsheet.mode"
    assert "no archive" in refused.json()["error"]["message"]
    unreadable = live.post(**ASK, model="lost", cribsheet={"mode": "recall"})
    error = unreadable.json()["error"]
    assert (unreadable.status_code, error["code"]) == (503, "archive_unavailable")
    assert ".archive" not in error["message"] and "/" not in error["message"]  # nothing of this machine's files
    for name in ("none", "lost"):
        alone = live.post(**ASK, model=name, cribsheet={"mode": "recall", "no_archive": "sheet"})
        assert alone.json()["choices"][0]["cribsheet"]["mode"] == "sheet", alone.text


@pytest.mark.parametrize(
    ("extension", "param"),
    [
        ({"mode": "hybrid", "retriever": "sheet"}, "cribsheet.retriever"),
        ({"mode": "hybrid", "no_archive": "sheet"}, "cribsheet.no_archive"),
        ({"retriever": "sheet"}, "cribsheet.retriever"),
        ({"mode": "recall", "no_archive": "guess"}, "cribsheet.no_archive"),
        ({"mode": "recall", "retriever": "bm25"}, "cribsheet.retriever"),
    ],
)
def test_fields_that_mean_nothing_are_refused_by_name(live, extension, param):
    reply = live.post(**ASK, model="kept", cribsheet=extension)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
