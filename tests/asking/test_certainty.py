"""What mode auto measures of a draft, and what it does with it; on the pocket model, which reads what it is told."""

from __future__ import annotations

import asyncio
import json

import pytest
import torch

from cribsheet import CompressedKnowledgeLLM, Document, Task
from cribsheet.asking.certainty import Judged, judge, nearness
from cribsheet.asking.evidence import looked_at
from cribsheet.asking.sources import _per_document, per_stretch
from cribsheet.compare.compare import Corpus
from cribsheet.compare.questions import Asked
from cribsheet.retrieval.content_words import told_by
from cribsheet.retrieval.placing import Told
from cribsheet.retrieval.retriever import PASSAGE_CHARACTERS
from cribsheet_bench.certainty import Measured, _measured, main
from cribsheet_bench.real.corpora import write_corpus

MEMBERS = {"Ada Abel": "Kelp Orbit", "Milan Dorn": "Quartz River", "Noor Falk": "Slate Engine"}
DOMAINS = {"Kelp Orbit": "forestry", "Quartz River": "tourism", "Slate Engine": "retail"}
TEXTS = [f"{who} is a member of {what}. {who} is part of the Sales department." for who, what in MEMBERS.items()]
TEXTS += [f"{what} is in the domain of {domain}. {what} began in 2004." for what, domain in DOMAINS.items()]
TASK = Task(
    "Answer questions about people and their projects.",
    (("Which project does Ada Abel belong to?", "Kelp Orbit"), ("What are Ada Abel's project domains?", "forestry")),
)
DIRECT, JOIN = "Which project does Noor Falk belong to?", "What are Noor Falk's project domains?"

ELSEWHERE = ["Noor Falk is part of the Sales department, and was before in that of Research and Development."]


def elsewhere(query):
    """A search that finds nothing of projects."""
    return ELSEWHERE


@pytest.fixture(scope="module")
def kb():
    documents = [Document(text, f"d{number}") for number, text in enumerate(TEXTS)]
    return CompressedKnowledgeLLM.build(documents, TASK, rate=2)


def judged(kb, question):
    draft = kb.ask(question, max_tokens=12, logprobs=0)
    return draft.text, judge(kb.session, kb.question_tokens(question), draft)


def test_a_draft_is_near_if_the_document_that_the_question_names_tells_it(kb):
    text, direct = judged(kb, DIRECT)
    assert text == "Slate Engine" and direct.nearness > 0.6 and direct.certainty == 0 < direct.probability
    text, join = judged(kb, JOIN)
    assert text == "retail" and join.nearness < 0.6 and join.certainty == join.probability > 0.7


def test_auto_retrieves_for_what_a_search_should_find_and_keeps_the_draft_of_what_it_would_not_find(kb):
    settings = {"max_tokens": 12, "retriever": elsewhere}
    asked = {question: kb.ask(question, mode="auto", **settings) for question in (DIRECT, JOIN)}
    assert [answer.mode for answer in asked.values()] == ["hybrid", "sheet"]
    assert asked[DIRECT].certainty == 0 and asked[DIRECT].passages
    assert asked[DIRECT].text == kb.ask(DIRECT, **settings).text
    assert asked[JOIN].certainty == pytest.approx(judged(kb, JOIN)[1].probability) and asked[JOIN].text == "retail"
    improbable = kb.ask(JOIN, mode="auto", sure=1.0, **settings)
    assert improbable.mode == "hybrid" and improbable.text == kb.ask(JOIN, **settings).text


def test_auto_keeps_what_the_best_passages_tell_already(kb):
    tells, idle = "Slate Engine is a project of many.", "Noor Falk was on holiday."

    def asked(*found, **settings):
        answers = [
            kb.ask(DIRECT, max_tokens=12, mode="auto", retriever=lambda query: list(found), **settings),
            asyncio.run(kb.aask(DIRECT, max_tokens=12, mode="auto", retriever=lambda query: list(found), **settings)),
        ]
        assert answers[0].text == answers[1].text
        assert len({(each.mode, each.certainty) for each in answers}) == 1
        return answers[0]

    for found in ([tells], [idle, tells, idle]):
        answer = asked(*found)
        assert (answer.text, answer.mode, answer.certainty, answer.passages) == ("Slate Engine", "sheet", 1.0, ())
        assert answer.sources and not any(each.retrieved for each in answer.sources)
    assert asked(idle, idle.upper(), tells).mode == "hybrid"  # not among the best two
    assert asked(idle, tells, top_k=1).mode == "hybrid"  # nor among those that would be told
    half = asked("The Slate of Paris.")
    assert (half.mode, half.certainty) == ("hybrid", 0.5) and asked("The Slate of Paris.", sure=0.5).mode == "sheet"
    assert asked(tells, sure=1.0).mode == "hybrid" and asked(sure=0.0).mode == "sheet"


SHARES = [
    ("Where does Bo live?", "Oslo", ["Bo moved to Oslo."], 1),
    ("Where does Bo live?", "Bo lives in Oslo.", ["Bo lives in Rome."], 0),  # the question's words do not count
    ("Where does Bo live?", "Oslo, Rome, Paris", ["Bo was in Oslo", "and in Rome."], 2 / 3),
    ("Where does Bo live?", "Bo lives.", ["Bo lives."], 0),  # it says nothing
    ("Where does Bo live?", "", ["Oslo"], 0),
    ("Where does Bo live?", "Oslo", [], 0),
    ("Which one?", "B", ["Vitamin B is one."], 0),
    ("How many?", "7", ["7 of them."], 1),
    ("誰が書いた？", "夏目漱石", ["夏目漱石の小説"], 1),
]


@pytest.mark.parametrize(("question", "answer", "texts", "share"), SHARES)
def test_what_is_told_is_a_share_of_what_an_answer_says_beyond_its_question(question, answer, texts, share):
    assert told_by(texts, answer, question) == pytest.approx(share)


@pytest.mark.parametrize(("sure", "mode"), [(1.0, "retrieval"), (0.7, "hybrid")])
def test_passages_stand_alone_where_the_sheet_lost_what_they_tell_and_leaves_them_no_room(kb, sure, mode):
    settings = {"max_tokens": 12, "passage_tokens": 14, "retriever": elsewhere}
    answer = kb.ask(DIRECT, mode="auto", sure=sure, **settings)
    assert answer.mode == mode and answer.text == kb.ask(DIRECT, mode=mode, **settings).text
    assert any(each.text in ELSEWHERE for each in answer.passages) is (mode == "retrieval")
    assert kb.ask(JOIN, mode="auto", **{**settings, "sure": 1.0}).mode == "hybrid"


def test_nearness_is_a_share_and_whole_where_all_is_one_stretch(kb):
    for question in (DIRECT, JOIN, "Who?"):
        draft = kb.ask(question, max_tokens=4, logprobs=0)
        assert 0 < nearness(kb.session, kb.question_tokens(question), draft) < 1
    one = CompressedKnowledgeLLM.build([Document(TEXTS[0], "all")], TASK, rate=1.5)
    draft = one.ask(JOIN, max_tokens=4, logprobs=0)
    assert nearness(one.session, one.question_tokens(JOIN), draft) == pytest.approx(1)


def test_stretches_are_documents_where_these_are_short_and_parts_of_long_ones(kb):
    asked = Told(kb.question_tokens(DIRECT))
    looked = looked_at(kb.backbone, kb.prefix, asked, asked.ids[-1:])
    stretches = per_stretch(kb.sheet, looked)[-len(TEXTS) :]  # before them, what is of no document
    assert torch.allclose(stretches, _per_document(kb.sheet, looked))
    joined = Document("\n\n".join(TEXTS * 3), "all")
    long = CompressedKnowledgeLLM.build([joined], TASK, rate=2, scorer="task")
    stretches = per_stretch(long.sheet, looked_at(long.backbone, long.prefix, asked, asked.ids[-1:]))
    assert int((stretches > 0).sum()) == -(-len(joined.text) // PASSAGE_CHARACTERS) > 2


def test_certainty_is_of_drafts_that_no_search_would_find():
    assert [Judged(0.9, near).certainty for near in (0.59, 0.6)] == [0.9, 0]
    assert [Judged(p, near).is_lost(0.7) for p, near in ((0.6, 0.6), (0.7, 0.6), (0.6, 0.5))] == [True, False, False]


@pytest.mark.parametrize("question", [DIRECT, JOIN])
def test_the_bench_foretells_what_auto_does(kb, question):
    draft = kb.ask(question, max_tokens=48, logprobs=0)
    for passages in (14, 200):
        found = _measured(kb, Asked(question, ("Slate Engine",)), draft, passages)
        measured = Measured("", "", 2.0, "direct", question, 0.0, 0.0, **found)
        for sure in (0.0, 0.7, 1.0):
            asked = {"mode": "auto", "passage_tokens": passages, "sure": sure}
            assert measured.chosen(sure=sure) == kb.ask(question, max_tokens=48, **asked).mode


def test_the_bench_asks_corpora_of_folders_and_reports_them(tmp_path, capsys):
    asked = [Asked(DIRECT, ("Slate Engine",), "own"), Asked(JOIN, ("retail",), "own")]
    documents = [Document(text, f"d{number}") for number, text in enumerate(TEXTS)]
    write_corpus(tmp_path / "data" / "own" / "0", Corpus("own/0", documents, TASK, asked))
    file = tmp_path / "rows.json"
    main(["--data", str(tmp_path / "data"), "--rates", "2", "--questions", "1", "--json", str(file)])
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["family"], row["corpus"], row["question"], row["kind"]) == ("own", "own/0", DIRECT, "read")
    assert row["full"] == row["draft"] and row["told"] in (0.0, 0.5, 1.0)
    assert "own" in capsys.readouterr().out
