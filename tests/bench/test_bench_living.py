"""The benches of changing sheets and of evidence count what they say they count."""

from __future__ import annotations

import pytest
from corpus import DOCUMENTS

from cribsheet_bench import evidence, living


def test_precision_and_recall_count_gold_documents_among_the_first():
    asked = evidence.Asked("?", ("x",), frozenset({"a", "b"}), "direct")
    case = evidence.Case("w", DOCUMENTS, None, [asked])
    row = evidence.judged("m", case, asked, True, ["a", "c", "b"])
    assert row.precision == {1: 1.0, 3: pytest.approx(2 / 3)} and row.recall == {1: 0.5, 3: 1.0}
    nothing = evidence.judged("m", case, asked, False, [])
    assert nothing.precision == nothing.recall == {1: 0.0, 3: 0.0}
    (line,) = evidence.summary([row, nothing])
    assert (line["n"], line["answered"], line["recall3"], line["recall3_answered"]) == (2, 1, 0.5, 1.0)


def test_bm25_finds_the_document_that_has_the_question_s_words():
    asked = [evidence.Asked(f"Where does {d.id} live?", ("x",), frozenset({d.id}), "direct") for d in DOCUMENTS]
    rows = list(evidence.by_bm25(evidence.Case("staff", DOCUMENTS, None, asked)))
    assert [row.recall[1] for row in rows] == [1.0] * 4


def test_a_removed_document_is_compared_with_a_sheet_that_never_had_it(tiny):
    cost = living.measure_cost(tiny, DOCUMENTS, "task")
    assert cost["removed_equals_never_had"] and cost["documents"] == 3
    assert set(cost["shares"]) == {"replace", "remove", "extend"}
