"""What is seen of a sheet and an answer at a prompt and in a notebook: little, true, and harmless."""

from __future__ import annotations

import re

import pytest
from corpus import DOCUMENTS, FEW_SHOT, QUESTION

from cribsheet import CompressedKnowledgeLLM, Document
from cribsheet.testing import tiny_backbone

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def kb():
    documents = [*DOCUMENTS, *(Document(f"{EVIL} lives in house {n}.", f"{EVIL}&{n}") for n in range(30))]
    with CompressedKnowledgeLLM.build(documents, FEW_SHOT, model=tiny_backbone(), rate=3, scorer="task") as kb:
        yield kb


def test_a_line_says_what_there_is_and_holds_no_tensors(kb):
    sheet, answer = kb.sheet, kb.ask(QUESTION, max_tokens=40)
    size = f"34 documents, {sheet.manifest.corpus_tokens:,} tokens became {sheet.tokens:,} (rate 3.0)"
    for shown, name in ((repr(kb), "CompressedKnowledgeLLM over"), (repr(sheet), "Sheet of")):
        assert shown.startswith(f"<{name} {size}, ") and "MB in float32" in shown
    assert repr(answer).startswith(f"<Answer {answer.text[:59] + '…'!r} (") and answer.finish_reason in repr(answer)
    assert f"{len(answer.sources)} sources" in repr(answer) and str(answer) == answer.text
    assert all(len(shown) < 200 and "\n" not in shown for shown in (repr(kb), repr(sheet), repr(answer)))


def test_a_notebook_shows_sources_and_documents_and_runs_nothing(kb):
    answer = kb.ask(QUESTION, max_tokens=8)
    tables = answer._repr_html_(), kb._repr_html_(), kb.sheet._repr_html_()
    assert all("<script" not in table and "&lt;script&gt;" in table for table in tables[1:])
    assert "<script" not in tables[0]
    assert [re.findall("<tr>", table).__len__() for table in tables] == [1 + len(answer.sources), 21, 21]
    assert all(source.document_id.replace(EVIL, "") for source in answer.sources)
    assert "and 14 documents more" in tables[1] and FEW_SHOT.description in tables[1]


def test_an_answer_without_sources_is_its_text(kb):
    answer = kb.ask(QUESTION, max_tokens=3, evidence=False)
    assert "<table" not in answer._repr_html_() and ", 0 sources)" in repr(answer)


def test_a_closed_one_says_so():
    kb = CompressedKnowledgeLLM.build(DOCUMENTS[:1], FEW_SHOT, model=tiny_backbone(), rate=1)
    kb.close()
    assert repr(kb).endswith(", closed>") and "1 document, " in repr(kb)
