"""Passages are cut where texts allow it, found by their words, and taken from anybody's retriever."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from cribsheet import Document
from cribsheet.errors import RequestError
from cribsheet.retrieval.retriever import BM25Retriever, Passage, as_retriever, cut_into_passages

STAFF = [
    Document("Alice Moreno lives in Lisbon. She plays the violin.\n\nShe sits in office B12.", "alice"),
    Document("Bob Smith lives in Oslo. He plays chess.", "bob"),
    Document("李雷住在北京。他喜欢下棋。", "li"),
]


def test_passages_are_exact_stretches_in_order_and_lose_nothing_but_blanks():
    r = random.Random(0)
    pieces = ["ab ", "c. ", "\n", "\n\n", "xyz", "中。", "word "]
    for _ in range(500):
        text = "".join(r.choice(pieces) for _ in range(r.randint(1, 60))) + "end"
        document = Document(text, "d")
        size = r.randint(1, 40)
        passages = cut_into_passages([document], size)
        assert all(len(each.text) <= size for each in passages)
        assert all(each.text == document.text[each.start : each.stop] for each in passages)
        assert "".join("".join(each.text for each in passages).split()) == "".join(document.text.split())
        assert all(a.stop <= b.start for a, b in pairwise(passages))


def test_a_text_is_cut_at_paragraphs_first_then_lines_then_sentences_then_words():
    def cut(text, size):
        return [each.text for each in cut_into_passages([Document(text, "d")], size)]

    assert cut("One two.\n\nThree four.", 100) == ["One two.\n\nThree four."]
    assert cut("One two.\n\nThree four.", 12) == ["One two.", "Three four."]
    assert cut("One. Two. Three.", 10) == ["One. Two.", "Three."]
    assert cut("one two three", 8) == ["one two", "three"]
    assert cut("abcdefgh", 3) == ["abc", "def", "gh"]


def test_what_shares_rare_words_with_the_query_is_found_first_and_what_shares_none_not_at_all():
    retriever = BM25Retriever(STAFF, characters=60)
    found = retriever.retrieve("Where does Bob live, in Oslo?")
    assert found[0].document_id == "bob" and found[0].text == STAFF[1].text
    assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)
    assert all(each.score > 0 for each in found)
    assert retriever.retrieve("zebra quagga") == retriever.retrieve("?!") == retriever.retrieve("") == []
    assert len(retriever.retrieve("lives plays", top_k=1)) == 1


def test_a_document_is_found_by_its_name_in_each_of_its_passages():
    found = BM25Retriever(STAFF, characters=60).retrieve("alice office")
    assert found[0].text == "She sits in office B12."
    assert {each.document_id for each in found} == {"alice"}


def test_scripts_without_blanks_are_searched_by_character():
    assert BM25Retriever(STAFF).retrieve("谁住在北京？")[0].document_id == "li"


def test_equals_come_in_the_order_of_the_documents():
    same = [Document(f"The same words here. {n}", f"d{n}") for n in range(20)]
    found = BM25Retriever(same).retrieve("same words")
    assert [each.document_id for each in found] == [f"d{n}" for n in range(20)]


def test_a_corpus_without_text_cannot_be_searched():
    with pytest.raises(RequestError, match=r"no text to search.*pass a retriever of your own"):
        BM25Retriever([Document("", "empty")])
    with pytest.raises(RequestError, match="Passages of 0 characters"):
        cut_into_passages(STAFF, 0)


@dataclass
class Doc:  # as LangChain's
    page_content: str
    metadata: dict = field(default_factory=dict)
    id: str | None = None


@dataclass
class Node:  # as LlamaIndex's
    text: str
    node_id: str = "n1"
    ref_doc_id: str | None = None
    start_char_idx: int | None = None
    metadata: dict = field(default_factory=dict)

    def get_content(self):
        return self.text


@dataclass
class Scored:
    node: Node
    score: float | None = None


class Invoked:
    def __init__(self, found):
        self.found, self.asked = found, []

    def invoke(self, query):
        self.asked.append(query)
        return self.found


class Retrieved(Invoked):
    retrieve = Invoked.invoke


class AsyncOnly:
    async def ainvoke(self, query):
        await asyncio.sleep(0)
        return [Doc(query)]


@pytest.mark.parametrize(
    ("found", "passage"),
    [
        (Doc("A text.", {"source": "a.txt", "start_index": 7}), Passage("A text.", "a.txt", 7, 14)),
        (Doc("  A text.", {"start_index": 7}, "x"), Passage("A text.", "x", 9, 16)),
        (Scored(Node("A text.", ref_doc_id="doc", start_char_idx=3), 0.5), Passage("A text.", "doc", 3, 10, 0.5)),
        (Node("A text."), Passage("A text.", "n1")),
        ("A text.", Passage("A text.")),
        (("A text.", 2), Passage("A text.", score=2.0)),
        ({"text": "A text.", "id": 4, "score": 1.5}, Passage("A text.", "4", score=1.5)),
        (Passage("A text.", "p"), Passage("A text.", "p")),
    ],
)
@pytest.mark.parametrize("kind", [Invoked, Retrieved, lambda found: lambda query: found])
def test_whatever_a_retriever_gives_becomes_a_passage(found, passage, kind):
    search = as_retriever(kind([found]))
    assert search.fetch("q") == [passage] == asyncio.run(search.afetch("q"))


def test_empty_texts_are_no_passages_and_nothing_found_is_nothing():
    assert as_retriever(Invoked([Doc(" "), Doc("x")])).fetch("q") == [Passage("x")]
    assert as_retriever(Invoked(None)).fetch("q") == as_retriever(Invoked([])).fetch("q") == []


def test_async_retrievers_serve_both_worlds_but_never_block_a_running_loop():
    async def function(query):
        return [query]

    for retriever in (AsyncOnly(), function):
        search = as_retriever(retriever)
        assert search.fetch("q") == asyncio.run(search.afetch("q")) == [Passage("q")]

    async def inside():
        search.fetch("q")

    with pytest.raises(RequestError, match=r"async only.*use `aask`"):
        asyncio.run(inside())


def test_an_index_gives_its_own_retriever():
    class Index:
        def as_retriever(self):
            return Invoked(["x"])

    assert as_retriever(Index()).fetch("q") == [Passage("x")]


@pytest.mark.parametrize("thing", [object(), 3, "bm26", Doc])
def test_what_cannot_retrieve_is_refused(thing):
    with pytest.raises(RequestError, match=r"neither retrieve\(\) nor invoke\(\)"):
        as_retriever(thing)


@pytest.mark.parametrize("found", [b"bytes", 5])
def test_what_is_no_list_of_texts_is_refused_by_the_retriever_s_name(found):
    with pytest.raises(RequestError, match=r"The retriever Invoked gave .* must give a list"):
        as_retriever(Invoked(found)).fetch("q")
    with pytest.raises(RequestError, match=r"The retriever Invoked gave .* has no text"):
        as_retriever(Invoked([object()])).fetch("q")
