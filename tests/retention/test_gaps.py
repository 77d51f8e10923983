"""Questions that plain rules make of sentences: what is left out, and what must stand around it."""

from __future__ import annotations

import pytest

from cribsheet.retention.gaps import gaps
from cribsheet.retention.probes import agree
from cribsheet.retrieval.retriever import Passage, words

ASKED = 'What is left out of this sentence of the documents: "{}"?'


def made(text, rare=None):
    return list(gaps(Passage(text, "a", 0, len(text)), set(words(text)) if rare is None else rare))


def test_numbers_dates_and_names_are_left_out_of_their_sentences():
    text = "It was early. In May 1895 the chemist James Dewar of London sold 12% of his shares to Linde and left."
    found = made(text)
    assert [gap.answer for gap in found] == ["May 1895", "James Dewar of London", "12%", "Linde"]
    assert found[0].question == ASKED.format("In ___ the chemist James Dewar of London sold 12% of")
    assert found[3].question == ASKED.format(
        "In May 1895 the chemist James Dewar of London sold 12% of his shares to ___ and left."
    )
    for gap in found:
        assert gap.answer not in gap.question and gap.stretch.text == text
        assert agree(gap.question, f"It is {gap.answer}.", gap.answer)


ANSWERS = {
    "the first word of a sentence may be none": ("Yesterday the old man went down to the sea.", []),
    "what stands there twice": ("He left for Oslo and came back from Oslo in the end.", []),
    "half of a name at the beginning": ("Frederick William invited all of them to come over.", []),
    "a name and its number": ("All of them ran Windows 95 until the office was closed.", ["Windows 95"]),
    "a year behind a small word": ("In 1895 the office of the mayor was closed for good.", ["1895"]),
    "parts of other words": ("The file of version-2 and the one called a_3.14.15b are kept here.", []),
    "too little around it": ("He saw Oslo.", []),
    "thousands": ("The town had 62,888 people at that time, as they said.", ["62,888"]),
    "a date": ("The ship sailed on December 5, 1966 with all of her crew.", ["December 5, 1966"]),
    "a day first": ("The ship sailed on 5 December 1966 with all of her crew.", ["5 December 1966"]),
    "millions": ("The house was sold for 3.5 million to people from abroad.", ["3.5 million"]),
    "letters with accents": ("The old painter came from Zürich, as far as anybody knows.", ["Zürich"]),
    "another script": ("彼は1895年に東京で生まれました。そして大阪に移りました。", []),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_what_is_left_out_is_particular_and_whole(name):
    text, answers = ANSWERS[name]
    assert [gap.answer for gap in made(text)] == answers


def test_gap_and_sentence_must_differ_from_the_rest_of_the_documents():
    text = "The river runs through Lisbon and through many other towns."
    assert [gap.answer for gap in made(text, {"river", "lisbon"})] == ["Lisbon"]
    assert made(text, {"lisbon"}) == [] == made(text, {"river"})


def test_a_long_sentence_is_cut_at_words():
    text = "and so on, " * 40 + "the mayor of Turin laughed, " + "and so forth, " * 40
    (gap,) = made(text)
    shown = gap.question.removeprefix(ASKED[:-4]).removesuffix('"?')
    assert "the mayor of ___ laughed" in shown and len(shown) < 210
    assert set(words(shown)) <= {*words(text), "___"}
