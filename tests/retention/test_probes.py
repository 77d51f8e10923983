"""Questions that the model writes itself: what they are about, which may serve, and when two answers say the same."""

from __future__ import annotations

import pytest
from corpus import DOCUMENTS, FEW_SHOT

from cribsheet.corpus.documents import Document, read_documents
from cribsheet.corpus.task import Task
from cribsheet.engine.pool import LoadedModel
from cribsheet.prompt.template import ChatLayout
from cribsheet.retention.exam import Exam
from cribsheet.retention.probes import EXAMPLES_TO_SPARE, Probe, agree, held_back, make_probes
from cribsheet.retrieval.retriever import words
from cribsheet.testing import echo_backbone

STAFF = read_documents([
    "Alice Moreno lives in Lisbon. She works for Nordwind Labs and plays the violin.",
    "Bob Smith lives in Oslo. He works for Harbor Foods and plays chess.",
    "Clara Berg lives in Cairo. She works for Nordwind Labs and keeps a parrot.",
    "Hugo Ali lives in Quito. He works for Silver Motors and speaks Greek.",
    "Nina Sato lives in Kyoto. She works for Harbor Foods and grows roses.",
])  # fmt: skip
TASK = Task("Answer questions about where people live.", examples=(("Where does Bob Smith live?", "Oslo"),))


def exam_of(model, task=TASK, **options):
    loaded = LoadedModel.get(model)
    return Exam(loaded, ChatLayout(loaded.backbone.tokenizer), task, **options)


@pytest.fixture(scope="module")
def pocket():
    return exam_of("pocket")


@pytest.fixture(scope="module")
def probes(pocket):
    return make_probes(pocket, STAFF)


def test_each_probe_is_about_its_stretch_and_answered_by_it(probes):
    assert len(probes) >= 6
    for probe in probes:
        asked, told = set(words(probe.question)), set(words(probe.stretch.text))
        assert asked & told and probe.question.endswith("?")
        assert set(words(probe.answer)) & told - asked
        assert probe.stretch.text in [document.text for document in STAFF]


def test_no_question_is_asked_twice_or_is_an_example(probes):
    questions = [" ".join(words(probe.question)) for probe in probes]
    assert len(set(questions)) == len(questions)
    assert "where does bob smith live" not in questions


def test_probes_stand_in_the_order_of_the_documents_and_are_about_most_of_them(probes):
    places = [[document.id for document in STAFF].index(probe.stretch.document_id) for probe in probes]
    assert places == sorted(places) and len(set(places)) >= 4


def test_what_is_known_closed_book_is_told_from_the_rest(pocket, probes):
    assert not any(probe.known for probe in probes)  # names that nobody ever read of
    held = make_probes(pocket, STAFF[:1], 2, held=[("Where does Alice Moreno live?", "Lisbon")])[0]
    assert held.stretch is None and (held.question, held.answer) == ("Where does Alice Moreno live?", "Lisbon")
    assert Probe("Where does Alice live?", "Lisbon", closed="In Lisbon.").known


def test_the_same_questions_come_every_time_and_others_for_another_seed(pocket, probes):
    few = make_probes(pocket, STAFF[:2], 4)
    assert few == make_probes(pocket, STAFF[:2], 4)
    assert few != make_probes(pocket, STAFF[:2], 4, seed=1)


def test_there_are_no_more_than_are_wanted(pocket):
    assert len([probe for probe in make_probes(pocket, STAFF, 3) if not probe.known]) == 3


def test_documents_without_a_stretch_give_no_probes(tiny):
    assert make_probes(exam_of(tiny, FEW_SHOT), [Document(text="Short.", id="a")]) == []


def test_a_model_that_writes_nonsense_gives_no_probes(tiny):
    assert make_probes(exam_of(tiny, FEW_SHOT), DOCUMENTS, 4) == []


def test_where_a_model_writes_too_few_questions_gaps_in_sentences_are_asked():
    documents = [
        Document("The old painter moved to Lisbon in the end, as far as anybody in the town knows.", "a"),
        Document("A young printer went to Turin for good, whatever the people of the house may say.", "b"),
    ]
    parrot = exam_of(echo_backbone("Lisbon."), TASK)  # it never asks, and has one answer
    (probe,) = make_probes(parrot, documents, 4)
    assert "The old painter moved to ___ in the end" in probe.question and probe.stretch.document_id == "a"
    assert probe.answer == "Lisbon." and probe.known
    assert make_probes(parrot, documents, 4) == [probe]
    assert make_probes(exam_of(echo_backbone("Rome."), TASK), documents, 4) == []


def test_a_question_that_the_window_cannot_hold_is_answered_with_nothing(tiny):
    exam = exam_of(tiny, FEW_SHOT)
    long = "lives in Lisbon " * tiny.window
    assert exam.alone([(long, "Who?"), ("", "Who?")])[0] == ""


AGREEMENTS = [
    ("Where does Bo live?", "Oslo", "oslo.", True),
    ("Where does Bo live?", "Bo lives in Oslo", "Bo lives in Rome", False),  # only the question's words are the same
    ("Where does Bo live?", "Bo lives in Oslo.", "Oslo", True),
    ("Where does Bo live?", "", "Oslo", False),
    ("Where does Bo live?", "", "", False),
    ("Is it Bo or Al?", "Bo", "Al", False),  # the answers have no other words
    ("Is it Bo or Al?", "Bo", "Bo", True),
    ("Who wrote it?", "Barry Warsaw, Guido", "Barry Warsaw", True),
    ("Who wrote it?", "Barry Warsaw, Guido van Rossum, Tim Peters, Nick", "Barry Warsaw", False),
    ("誰が書いた？", "夏目漱石", "夏目漱石です", True),
]


@pytest.mark.parametrize(("question", "first", "second", "same"), AGREEMENTS)
def test_two_answers_agree_if_they_share_half_of_what_is_new_in_them(question, first, second, same):
    assert agree(question, first, second) is agree(question, second, first) is same


def test_a_task_spares_every_fourth_of_many_examples_and_none_of_a_few():
    pairs = tuple((f"Where is {n}?", f"{n}") for n in range(EXAMPLES_TO_SPARE))
    assert held_back(Task("Where?", pairs[:-1])) == (Task("Where?", pairs[:-1]), ())
    guided, held = held_back(Task("Where?", pairs))
    assert held == (pairs[3], pairs[7])
    assert guided.examples == tuple(pair for pair in pairs if pair not in held)
