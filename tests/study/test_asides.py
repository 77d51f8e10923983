"""What a study practises besides its documents, so that it stays, and questions in the task's own form."""

from __future__ import annotations

import json

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT
from safetensors import safe_open

from cribsheet import CompressedKnowledgeLLM
from cribsheet.compress.remembered import remember
from cribsheet.retention.exam import Exam
from cribsheet.study import practice as practice_module
from cribsheet.study.asides import asides
from cribsheet.study.notebook import read_practice, write_practice
from cribsheet.study.practice import in_form, make_practice


@pytest.fixture(scope="module")
def knowing():
    with CompressedKnowledgeLLM.build(DOCUMENTS[:3], FEW_SHOT, model="pocket", rate=2, guide="resident") as kb:
        yield kb


def nothing(exam):
    return exam.read(torch.cat([exam.documents(""), exam.guide]))


def test_asides_have_the_answers_that_are_given_without_documents(knowing):
    exam = Exam.of(knowing.session)
    made = asides(exam, nothing(exam), 6)
    assert 1 <= len(made) <= 6
    closed = exam.over(nothing(exam), [each.question for each in made])
    for each, answer in zip(made, closed, strict=True):
        assert answer.startswith(each.answer) or each.answer.startswith(answer)
        assert len(each.ids) - each.asked == len(each.tops) == len(each.weights)
    again = asides(exam, nothing(exam), 6)
    assert [(each.question, each.answer) for each in again] == [(each.question, each.answer) for each in made]
    assert len({each.question for each in made}) == len(made)
    other = asides(exam, nothing(exam), 6, seed=1)
    assert [each.question for each in other] != [each.question for each in made]
    assert asides(exam, nothing(exam), 0) == []


def test_a_practice_has_some_and_a_file_of_before_has_none(knowing, tmp_path, monkeypatch):
    monkeypatch.setattr(practice_module, "_ASIDES", 1)
    made = make_practice(knowing.session.loaded, knowing.session.layout, knowing.sheet)
    assert 1 <= len(made.asides) <= len(made.questions)
    path = tmp_path / "a.practice"
    write_practice(path, made)
    read = read_practice(path)
    assert read.digest == made.digest
    assert [each.question for each in read.asides] == [each.question for each in made.asides]
    assert (len(read.questions), len(read.texts)) == (len(made.questions), len(made.texts))
    with safe_open(path, framework="pt") as opened:
        metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    told = json.loads(metadata["practice"])
    kept = len(made.questions) + len(made.texts)
    assert told.pop("asides") == len(made.asides)
    told["exercises"] = told["exercises"][:kept]
    tensors = {name: tensor for name, tensor in tensors.items() if int(name.split(".")[0]) < kept}
    remember(path, "The practice", {"practice": json.dumps(told)}, tensors)
    before = read_practice(path)
    assert not before.asides and len(before.texts) == len(made.texts)


@pytest.mark.parametrize(
    ("question", "examples", "wanted"),
    [
        ("Who Won in Rome?", ("who got it", "when was it"), "who won in rome"),
        ("Who Won in Rome?", ("Who got it", "when was it"), "Who Won in Rome"),
        ("Who Won in Rome?", ("who got it?", "when was it"), "who won in rome?"),
        ("Who Won in Rome?", ("Who got it?",), "Who Won in Rome?"),
        ("Who Won in Rome?", (), "Who Won in Rome?"),
        ("", ("who got it",), ""),
        ("Who Won in Rome?", ("谁住在巴黎？",), "Who Won in Rome?"),
        ("Who Won in Rome?", ("谁住在巴黎",), "Who Won in Rome"),
        ("Who Won in Rome?", ("أين تعيش إيفا؟",), "Who Won in Rome?"),
    ],
)
def test_a_question_has_the_form_of_the_examples(question, examples, wanted):
    assert in_form(question, examples) == wanted
