"""Comparisons: judged as written, at equal budgets, resumable, the same every time; and the connectivity set."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from corpus import DOCUMENTS, FEW_SHOT

from cribsheet import CompressedKnowledgeLLM
from cribsheet.cli import run
from cribsheet.compare.compare import ALL, CLOSED, FULL, NAMES, Corpus, Record, Settings, compare, size_before, summary
from cribsheet.compare.judged import judged
from cribsheet.compare.questions import Asked, draw_examples, read_questions, write_questions
from cribsheet.compare.report import page, setup_of
from cribsheet.engine.pool import LoadedModel
from cribsheet.errors import DocumentError, RequestError
from cribsheet.testing import save_tiny_model, tiny_backbone
from cribsheet_bench.connectivity import DIRECT, JOIN, make_corpus, rows_of

QUESTIONS = [
    Asked("Where does Hugo Ali live?", ("Quito",), "place", ("hugo",)),
    Asked("Where does Clara Berg live?", ("Cairo",), "place", ("clara",)),
    Asked("What does Clara speak?", ("Hindi, Greek, Zulu",), "list", ("clara",)),
]
SETTINGS = Settings(max_tokens=4, guide="dropped", scorer="task")
ROW = {"method", "rate", "budget", "type", "n", "em", "f1", "set_f1", "ci_low", "ci_high", "tokens", "bytes", "seconds",
       "retrieved"}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return LoadedModel.get(tiny_backbone())


@pytest.fixture(scope="module")
def corpus():
    return Corpus("staff", DOCUMENTS, FEW_SHOT, QUESTIONS)


@pytest.fixture(scope="module")
def records(model, corpus):
    return list(compare(model, corpus, rates=[1.5, 2], settings=SETTINGS))


def same(records):
    return [replace(each, seconds=0) for each in records]


def test_every_method_answers_every_question_and_none_exceeds_its_budget(records, corpus):
    seen = {(each.method, each.rate, each.number) for each in records}
    assert seen == {(FULL, 1.0, n) for n in range(3)} | {(CLOSED, 1.0, n) for n in range(3)} | {
        (name, rate, n) for name in NAMES[2:] for rate in (1.5, 2) for n in range(3)
    }
    assert all(0 < each.tokens <= each.budget and each.nbytes > 0 for each in records)
    budgets = {each.rate: each.budget for each in records if each.method == "few-shot"}
    assert all(each.budget == budgets[each.rate] for each in records if each.method not in (FULL, CLOSED))
    used = {(each.method, each.rate): each.tokens for each in records}
    assert used["few-shot", 2] == budgets[2] and used["hybrid", 2] > budgets[2] // 4
    assert {each.mode for each in records if each.method == "retrieval"} == {"retrieval"}


@pytest.mark.parametrize("guide", ["resident", "dropped"])
def test_what_stands_before_a_question_counts_once_also_where_the_guide_is_read_again(model, guide):
    kb = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=model, rate=1.5, guide=guide)
    asked, told = "Where does Bob live?", "Bob moved to Bergen."
    passage = len(kb.session.layout.encoder.after(told + "\n\n", continues=True))
    hybrid = kb.ask(asked, max_tokens=1, retriever=lambda query: [told])
    assert hybrid.passages and size_before(kb, asked, hybrid)[0] == kb.sheet.tokens + passage
    assert size_before(kb, asked, kb.ask(asked, max_tokens=1)) == (kb.sheet.tokens, kb.sheet.nbytes)


def test_our_sheets_are_made_as_by_default_and_keep_their_budget_though_heads_differ(model, corpus):
    records = list(compare(model, corpus, methods=["few-shot", "hybrid"], rates=[2], settings=Settings(max_tokens=2)))
    budget = records[0].budget
    assert all(each.tokens <= budget for each in records) and records[0].tokens == pytest.approx(budget, abs=1)
    default = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=model, budget=budget)
    assert default.sheet.manifest.allocation == "profiled" and default.sheet.length > budget
    asked = corpus.questions[0].text
    assert records[0].answer == default.ask(asked, max_tokens=2).text


def test_a_comparison_is_the_same_every_time_and_goes_on_where_it_was(records, model, corpus):
    part = [each for each in records if each.number != 1]
    rest = list(compare(model, corpus, rates=[1.5, 2], settings=SETTINGS, done=part))
    assert {each.key for each in rest} == {each.key for each in records if each.number == 1}
    assert sorted(same(part + rest), key=lambda each: each.key) == sorted(same(records), key=lambda each: each.key)
    assert list(compare(model, corpus, rates=[1.5, 2, 2], settings=SETTINGS, done=records)) == []
    twice = compare(model, corpus, methods=["retrieval"] * 2, rates=[2, 2], settings=SETTINGS)
    assert [each.number for each in twice] == [0, 1, 2]


def test_rows_hold_what_was_counted_by_type_and_for_all(records):
    rows = summary(records)
    assert all(row.keys() == ROW for row in rows)
    assert {row["type"] for row in rows} == {ALL, "list", "place"}
    counts = {row["type"]: row["n"] for row in rows if row["method"] == "hybrid" and row["rate"] == 2}
    assert counts == {ALL: 3, "list": 1, "place": 2}
    assert all(0 <= row["ci_low"] <= row["em"] <= row["ci_high"] <= 1 for row in rows)
    assert {row["retrieved"] for row in rows if row["method"] == "few-shot"} == {0}


def test_intervals_are_drawn_by_document():
    one = Record("c", "few-shot", 8, 9, 0, "t", "d", "", 0, 0, 0, 1, 1, 0, "sheet")
    apart = [replace(one, number=n, cluster=f"d{n}", em=n % 2) for n in range(40)]
    together = [replace(each, cluster=f"d{n % 2}") for n, each in enumerate(apart)]
    (narrow,), (wide,) = ([r for r in summary(each) if r["type"] == ALL] for each in (apart, together))
    assert (wide["ci_low"], wide["ci_high"]) == (0, 1) and 0.2 < narrow["ci_low"] < narrow["ci_high"] < 0.8


def test_methods_that_cannot_be_are_left_out_and_unknown_ones_refused(model, corpus):
    bare = replace(corpus, task=type(FEW_SHOT)(FEW_SHOT.description))
    left = {each.method for each in compare(model, bare, methods=NAMES, rates=[2], settings=SETTINGS)}
    assert left == set(NAMES) - {"published few-shot", "few-shot", "hybrid", "auto", "recall"}
    assert [*compare(model, corpus, methods=["few-shot", "retrieval"], rates=[50], settings=SETTINGS)] == []
    with pytest.raises(RequestError, match="no method 'magic'; use full context"):
        next(compare(model, corpus, methods=["magic"], settings=SETTINGS))


def test_answers_are_judged_as_text_as_words_and_as_sets():
    asked = Asked("?", ("Oslo, Rome", "both"))
    assert asked.judge("Rome and Oslo") == (1, pytest.approx(0.8), 1)
    assert asked.judge("Both.") == (1, 1, 1)
    em, f1, items = asked.judge("Oslo")
    assert em == 0 and 0 < f1 < 1 and items == pytest.approx(2 / 3)
    assert asked.judge("") == (0, 0, 0)


def test_questions_are_read_back_as_they_were_written(tmp_path):
    file = tmp_path / "questions.jsonl"
    write_questions(file, QUESTIONS)
    assert read_questions(file) == QUESTIONS
    file.write_text(
        '\n{"question": "Who?", "answers": ["A", "B"], "all": true}\n{"question": "Who?", "answers": "A"}\n'
    )
    assert [each.golds for each in read_questions(file)] == [("A, B",), ("A",)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is no JSON"),
        ("[]", "line 1 is \\[\\]; write an object"),
        ('{"question": "Who?"}', "line 1 needs a text"),
        ('{"question": " ", "answers": ["A"]}', "line 1 needs a text"),
        (
            '{"question": "Who?", "answers": [["A"]]}',
            "line 1 has \\['A'\\] where texts belong; write texts under 'answers'",
        ),
        ('{"question": "Who?", "answer": "A"}', "unknown key 'answer'; allowed are question, answers"),
        ("", "holds no questions"),
    ],
)
def test_bad_questions_are_refused_with_their_line(tmp_path, line, message):
    file = tmp_path / "q.jsonl"
    file.write_text(line)
    with pytest.raises(DocumentError, match=message):
        read_questions(file)
    with pytest.raises(DocumentError, match="cannot read the questions"):
        read_questions(tmp_path / "none.jsonl")


def test_examples_are_drawn_from_every_type_by_seed_and_asked_no_more():
    many = [Asked(f"Question {n}?", (str(n),), "ab"[n % 2]) for n in range(20)]
    examples, left = draw_examples(many, 4, seed=1)
    assert [each.type for each in examples] == ["a", "b", "a", "b"] and len(left) == 16
    assert not set(examples) & set(left) and draw_examples(many, 4, seed=1) == (examples, left)
    assert draw_examples(many, 4, seed=2) != (examples, left)
    assert [len(part) for part in draw_examples(many[:6], 4, seed=1)] == [1, 5]


def test_the_page_needs_nothing_but_itself_and_draws_every_curve(records, model, corpus):
    rows = summary(records)
    setup = setup_of(model, corpus, NAMES, [1.5, 2], SETTINGS)
    shown = page({"setup": setup, "rows": rows})
    assert not re.search(r"(src|href)=|@import|url\(", shown)
    charts = re.findall(r"<figure>.*?</figure>", shown)
    assert len(charts) == 3
    for chart in charts:
        svg = ElementTree.fromstring(re.search(r"<svg.*</svg>", chart)[0])
        assert len(svg.findall("g")) == len(NAMES) - 2
        points = [circle for circle in svg.iter("circle")]
        assert len(points) == 2 * (len(NAMES) - 2)
        assert all(0 <= float(p.get("cx")) <= 420 and 0 <= float(p.get("cy")) <= 280 for p in points)
    assert shown.count("<tr>") == len(rows) + 1


@pytest.mark.parametrize("connectivity", [1, 4, 8])
@pytest.mark.parametrize("near", [False, True])
def test_each_person_works_on_as_many_projects_as_the_set_says(connectivity, near):
    corpus = make_corpus(connectivity, characters=9000, near_names=near, seed=3)
    assert corpus == make_corpus(connectivity, characters=9000, near_names=near, seed=3)
    assert corpus != make_corpus(connectivity, characters=9000, near_names=near, seed=4)
    ids = [document.id for document in corpus.documents]
    people = [name.split("/")[1] for name in ids if name.startswith("person/")]
    assert all(sum(f"membership/{name}/" in each for each in ids) == connectivity for name in people)
    assert 9000 <= sum(len(document.text) for document in corpus.documents) < 10500
    texts = {document.id: document.text for document in corpus.documents}
    for question in corpus.questions:
        told = " ".join(texts[name] for name in question.documents)
        assert all(item in told for item in question.golds[0].split(", "))
        assert len(question.documents) == (2 * connectivity if question.type == JOIN else len(question.documents))
    assert {question.type for question in corpus.questions} == {DIRECT, JOIN}
    examples = " ".join(f"{q} {a}" for q, a in corpus.task.examples)
    assert not any(name in examples for name in people if any(name in q.text for q in corpus.questions))
    assert all(("Person_0" in question.text) == near for question in corpus.questions)


def test_levels_of_connectivity_are_reported_apart_and_together(records):
    rows = rows_of([replace(each, corpus=f"connectivity {each.number % 2 + 1}") for each in records])
    assert {row["type"] for row in rows} > {ALL, "place", "place, connectivity 1", "place, connectivity 2"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    (folder / "staff").mkdir()
    for document in DOCUMENTS:
        (folder / "staff" / f"{document.id}.txt").write_text(document.text)
    write_questions(folder / "q.jsonl", [replace(q, documents=(f"{q.documents[0]}.txt",)) for q in QUESTIONS])
    save_tiny_model(folder / "model")
    return folder


def test_the_command_line_writes_table_json_and_page_and_goes_on_after_it_was_killed(files, capsys):
    out = files / "out.json"
    command = ["compare", str(files / "staff"), "--questions", str(files / "q.jsonl"), "--model", str(files / "model")]
    command += ["--rates", "1.5,2", "--methods", "few-shot,retrieval,hybrid", "--scorer", "task", "--guide", "dropped"]
    command += ["--task", FEW_SHOT.description, "--example", "Where is Eve?=>Unknown", "--max-tokens", "3"]
    command += ["--device", "cpu", "--json", str(out), "--html", str(files / "out.html")]
    command += ["--answers", str(files / "answers.jsonl")]
    assert run(command) == 0
    shown = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert "hybrid" in shown and "retrieved" in shown
    assert (files / "out.html").read_text().startswith("<!doctype html>")
    assert list(result) == ["setup", "rows"]
    assert all(row.keys() == ROW - {"set_f1", "retrieved"} for row in result["rows"])
    answers = [json.loads(line) for line in (files / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 3 * 2 * 3
    assert run(command) == 2 and "exists; pass --force" in capsys.readouterr().err
    partial = files / "out.json.partial"
    assert not partial.exists()
    half = [json.dumps(result["setup"], sort_keys=True), *map(json.dumps, answers[:7]), '{"corpus": "cut']
    partial.write_text("\n".join(half))
    assert run([*command, "--force"]) == 0
    assert "going on after 7 answers" in capsys.readouterr().err
    again = json.loads(out.read_text())
    assert [row["em"] for row in again["rows"]] == [row["em"] for row in result["rows"]]
    later = [json.loads(line) for line in (files / "answers.jsonl").read_text().splitlines()]
    assert later[:7] == answers[:7] and not partial.exists()
    partial.write_text("{}\n")
    assert run([*command, "--force"]) == 2 and "of another comparison" in capsys.readouterr().err
    assert run([*command, "--force", "--rates", "x"]) == 2 and run([*command, "--force", "--methods", "magic"]) == 2


def test_what_is_judged_are_differences_on_the_same_questions():
    def answers(method, scores, mode="sheet", corpus="connectivity 4"):
        one = Record(corpus, method, 32, 9, 0, JOIN, "d", "", 0, 0, 0, 1, 1, 0, mode)
        return [replace(one, number=n, cluster=f"d{n}", set_f1=score) for n, score in enumerate(scores)]

    records = [*answers("few-shot", [1, 1, 0, 0]), *answers("retrieval", [0, 0, 0, 1], "retrieval")]
    records += [*answers("hybrid", [1, 1, 0, 1], "hybrid"), *answers("auto", [1, 1, 0, 0])[:3]]
    rows = judged(records, broad=JOIN, connected=["connectivity 4"])
    points = {row["compared"]: (row["points"], row["n"]) for row in rows}
    assert points["hybrid - max(sheet, retrieval)"] == (25, 4)  # the sheet is the better one
    assert points["sheet - retrieval"] == (25, 4)
    assert points["auto - best mode"] == (0, 3)  # of the questions that all were asked
    assert points["auto retrieves for"] == (0, 3)
    assert all(row["ci_low"] <= row["points"] <= row["ci_high"] for row in rows)
    assert [row["compared"] for row in judged(records[:4], broad=JOIN)] == []
