"""From passages to tokens: where they stand, whatever a retriever says of them, and how many fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from corpus import DOCUMENTS, FEW_SHOT

from cribsheet import build_sheet
from cribsheet.recall.stretches import Stretch, as_passages, choose_stretches, located, mark, named
from cribsheet.retrieval.passages import known_of
from cribsheet.retrieval.retriever import Passage

BOB = DOCUMENTS[1].text


@pytest.fixture(scope="module")
def sheet(tiny):
    return build_sheet(tiny, DOCUMENTS, FEW_SHOT, rate=3, archive="float32")


def place_of(sheet, passage):
    return located(sheet, lambda: known_of(sheet.texts), passage)


def chosen(sheet, *places, tokens=1000, top_k=None):
    found = choose_stretches(
        sheet.archive, [Stretch(*each) for each in places], sheet.texts, tokens=tokens, top_k=top_k
    )
    for each in found:
        assert (each.first, each.last) == sheet.archive.places(each.document, each.start, each.stop)
    return found


@pytest.mark.parametrize(
    "passage",
    [
        Passage("Oslo.\nHe enjoys chess", "bob", 19, 40),
        Passage("Oslo.\nHe enjoys chess", "bob", 19),
        Passage("Oslo.\nHe enjoys chess", "bob"),
        Passage("Oslo.\nHe enjoys chess"),  # from somewhere
        Passage("Oslo. He  enjoys\tchess", "files/bob.txt"),  # with other breaks, under another name
        Passage("Oslo.\nHe enjoys chess", "bob", 3, 9),  # a place of an older version
    ],
)
def test_a_passage_is_found_in_the_documents_whatever_is_known_of_it(sheet, passage):
    assert place_of(sheet, passage) == Stretch(1, 19, 40)


def test_a_marker_stands_in_the_place_of_a_passage(sheet):
    marker = mark(sheet.manifest.documents[1], 19, 40)
    assert place_of(sheet, Passage(f"(Read.) {marker}", "x")) == Stretch(1, 19, 40)


def test_a_place_ends_with_its_document(sheet):
    text = DOCUMENTS[1].text
    assert place_of(sheet, Passage(text[19:], "bob", 19, 999)) == Stretch(1, 19, len(text))


def test_what_is_not_in_the_documents_is_nowhere(sheet):
    for passage in (
        Passage("Bob moved to Bergen.", "bob"),
        Passage("  ", "bob"),
        Passage("[recall 00000000:0-5]"),
        Passage(""),
    ):
        assert place_of(sheet, passage) is None


def test_without_texts_only_a_place_tells_where_a_passage_stands(sheet):
    bare = replace(sheet, texts=())
    assert place_of(bare, Passage("Oslo.", "bob", 19, 24)) == Stretch(1, 19, 24)
    assert place_of(bare, Passage("Oslo.", "bob")) is None
    assert as_passages(bare, [Stretch(1, 19, 24)]) == [Passage("", "bob", 19, 24)]


def test_marks_name_places_of_documents_and_no_others(sheet):
    first, second, *_ = sheet.manifest.documents
    tag = first.digest[:8]
    wrong = f"[recall {tag}:9-3] [recall 00000000:0-1] [recall 0:0-1] [recall {tag}:{'9' * 30}-1]"
    assert named(sheet, f"a {mark(first, 3, 9)} b {mark(second, 70, 9999)} {wrong} {mark(first, 3, 9)}") == [
        Stretch(0, 3, 9),
        Stretch(1, 70, len(BOB)),
    ]


def test_stretches_stand_in_reading_order_and_those_that_overlap_or_touch_are_one(sheet):
    found = chosen(sheet, (3, 0, 20), (1, 20, 60), (1, 0, 23), (0, 5, 10))
    assert [(each.document, each.start, each.stop) for each in found] == [(0, 5, 10), (1, 0, 60), (3, 0, 20)]
    assert [each.first for each in found] == sorted(each.first for each in found)
    touching = chosen(sheet, (1, 25, 60), (1, 0, 24))  # the line break between them comes along
    assert [(each.start, each.stop) for each in touching] == [(0, 60)]
    assert len(chosen(sheet, (0, 0, len(DOCUMENTS[0].text)), (1, 0, 30))) == 2  # of two documents


def test_no_token_counts_twice_and_no_more_are_taken_than_fit(sheet):
    whole = chosen(sheet, (1, 0, len(BOB)))[0].tokens
    assert len(chosen(sheet, (1, 0, len(BOB)), (1, 5, 30), (3, 0, 55), tokens=whole + 4)) == 1
    for tokens in range(8, whole + 20):
        found = chosen(sheet, (1, 0, 40), (1, 10, len(BOB)), (2, 0, 30), tokens=tokens)
        assert tokens - 12 < sum(each.tokens for each in found) <= tokens


def test_the_first_that_does_not_fit_is_cut_at_a_word_and_the_rest_is_left_out(sheet):
    (first, cut) = chosen(sheet, (3, 0, 24), (1, 0, len(BOB)), (0, 0, 10), tokens=40)[::-1]
    assert (first.document, cut.document) == (3, 1) and cut.start == 0
    assert BOB[: cut.stop].split() == BOB.split()[: len(BOB[: cut.stop].split())]
    assert chosen(sheet, (1, 0, len(BOB)), tokens=3) == []  # hardly a word says nothing


def test_at_most_so_many_are_told(sheet):
    assert [each.document for each in chosen(sheet, (2, 0, 9), (0, 0, 9), (1, 0, 9), top_k=2)] == [0, 2]
    assert chosen(sheet, (2, 0, 9), (2, 0, 9), (1, 0, 9), top_k=2)[0].document == 1  # the same again does not count
