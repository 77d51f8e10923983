"""What a task is, and every form in which it may be given."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from cribsheet.corpus.task import Task
from cribsheet.errors import TaskError

TOML = """
description = "Questions about the staff."
instruction = "Answer in one word."

[[examples]]
question = "Who leads Osprey?"
answer = "Ada"
"""
STAFF = Task("Questions about the staff.", (("Who leads Osprey?", "Ada"),), "Answer in one word.")


def test_examples_come_as_pairs_or_mappings_and_are_stripped() -> None:
    examples: Any = [[" Who? ", "Ada\n"], {"question": "Where?", "answer": "here"}]
    task = Task(" Staff. ", examples)
    assert task == Task("Staff.", (("Who?", "Ada"), ("Where?", "here")))
    assert hash(task) == hash(Task.of(task))


def test_a_task_with_examples_is_few_shot() -> None:
    assert STAFF.few_shot
    assert not Task("Staff.").few_shot


def test_an_instruction_may_be_empty() -> None:
    assert Task("Staff.", instruction=" ").instruction == ""


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"description": " "}, "the task's description is ' ', which holds no text"),
        ({"description": 5}, "the task's description is 5, which is no text; put it in quotes"),
        ({"examples": [("Who?", "")]}, "the answer of example 1 is '', which holds no text"),
        ({"examples": [("a", "b"), ("", "b")]}, "the question of example 2 is ''"),
        ({"examples": [("How many?", 42)]}, "the answer of example 1 is 42, which is no text"),
        ({"examples": [("a", "b", "c")]}, "example 1 is ('a', 'b', 'c'); give a pair (question, answer)"),
        ({"examples": ["ab"]}, "example 1 is 'ab'; give a pair (question, answer)"),
        ({"examples": "Q => A"}, "the task's examples are 'Q => A'; give a list of (question, answer) pairs"),
        ({"examples": 3}, "the task's examples are 3"),
        ({"examples": [{"question": "a"}]}, "the answer of example 1 is ''"),
        (
            {"examples": [{"question": "a", "answr": "b"}]},
            "example 1 has the unknown key 'answr'; allowed are question, answer",
        ),
    ],
)
def test_a_malformed_task_is_refused_with_the_value(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError) as caught:
        Task(**{"description": "Staff.", **fields})
    assert message in str(caught.value)


@pytest.mark.parametrize("half", ["\ud83d", "\udc00", "\udce9"])
@pytest.mark.parametrize("field", ["description", "instruction", "question", "answer"])
def test_half_a_surrogate_pair_is_refused_where_it_stands(field: str, half: str) -> None:
    fields = {"description": "d", "instruction": "i", "question": "q", "answer": "a"} | {field: f"ab{half}"}
    with pytest.raises(TaskError, match=f"the (task's )?{field}.* holds half a surrogate pair, .*, at character 2"):
        Task(fields["description"], [(fields["question"], fields["answer"])], fields["instruction"])  # type: ignore[arg-type]


# ---- Task.of


def test_no_task_is_a_general_one() -> None:
    assert Task.of(None) == Task("Answer questions about the documents.")


def test_a_string_is_a_description_even_if_it_mentions_a_file() -> None:
    assert Task.of("Questions about config.toml") == Task("Questions about config.toml")


def test_a_mapping_is_read_as_from_dict() -> None:
    assert Task.of(STAFF.to_dict()) == STAFF


@pytest.mark.parametrize("kind", [str, Path])
def test_the_name_of_a_task_file_is_read(kind: type, tmp_path: Path) -> None:
    path = tmp_path / "a task.toml"
    path.write_text(TOML)
    assert Task.of(kind(path)) == STAFF


def test_a_task_file_that_is_missing_is_an_error_not_a_description() -> None:
    with pytest.raises(TaskError, match=r"cannot read the task file stuff\.toml: No such file or directory"):
        Task.of("stuff.toml")


# ---- files


def test_a_task_file_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "task.toml")
    with pytest.raises(TaskError, match=r"task\.toml is no task file: it is no regular file"):
        Task.of(tmp_path / "task.toml")


def test_json_says_the_same_as_toml(tmp_path: Path) -> None:
    path = tmp_path / "task.json"
    path.write_text(
        '{"description": "Questions about the staff.", "instruction": "Answer in one word.",'
        ' "examples": [{"question": "Who leads Osprey?", "answer": "Ada"}]}',
        encoding="utf-8-sig",
    )
    assert Task.from_file(path) == STAFF


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.toml", "description = ", "t.toml is broken TOML (Invalid value (at"),
        ("t.json", "{", "t.json is broken JSON (Expecting property name"),
        ("t.json", b"\xff", "t.json is broken JSON ('utf-8' codec can't decode byte 0xff"),
        (
            "t.toml",
            "desc = 'x'",
            "t.toml: a task has the unknown key 'desc'; allowed are description, examples, instruction",
        ),
        ("t.toml", "instruction = 'x'", 't.toml: a task has no "description"; say there in a sentence'),
        ("t.json", "[]", "t.json: a task is []; give an object with description, examples, instruction"),
        ("t.toml", TOML + "[[examples]]\nquestion = 'a'", "t.toml: the answer of example 2 is ''"),
        ("t.yaml", "description: x", "t.yaml is no task file: its suffix is '.yaml'; use .toml or .json"),
    ],
)
def test_a_bad_task_file_is_refused_by_name(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(TaskError) as caught:
        Task.from_file(tmp_path / name)
    assert message in str(caught.value)


def test_a_task_survives_the_way_through_plain_data() -> None:
    assert STAFF.to_dict() == {
        "description": "Questions about the staff.",
        "instruction": "Answer in one word.",
        "examples": [{"question": "Who leads Osprey?", "answer": "Ada"}],
    }
    assert Task.from_dict(STAFF.to_dict()) == STAFF


# ---- the form of the examples


@pytest.mark.parametrize(
    ("answers", "form"),
    [
        (["Oslo", "Cairo"], "Answer with 1 to 2 words, such as a name; nothing else."),
        (["a spirit", "yes", "Latin"], "Answer with 1 to 2 words, such as yes or no, a name; nothing else."),
        (["1996", "412 patients"], "Answer with 1 to 2 words, such as a year, a number; nothing else."),
        (["the old miller", "to find his sister"], "Answer with 3 to 4 words; nothing else."),
        (["C", "A"], "Answer with 1 to 2 words, such as a letter; nothing else."),
        (["It was sold to a mill.", "Nobody knows that any more."], "Answer with 5 to 6 words, in sentences."),
        (["東京", "京都です"], "Answer with 2 to 4 characters; nothing else."),
    ],
)
def test_the_form_of_answers_is_told_without_a_word_of_theirs(answers: list[str], form: str) -> None:
    task = Task("Staff", [("Who?", answer) for answer in answers])
    assert task.form == form
    assert task.shown(form) == Task(f"Staff. {form}")
    assert not {word for answer in answers for word in answer.split() if word[0].isupper()} & set(form.split())


def test_labels_that_come_again_and_again_are_named() -> None:
    task = Task("Say how it sounds.", [("Fine!", "good"), ("No.", "bad"), ("Well!", "good"), ("Oh.", "bad")])
    assert task.form == "Answer with good or bad, nothing else."


def test_a_question_as_a_description_is_quoted_before_the_form_of_its_answers() -> None:
    task = Task("Where do people live?", [("Where is Bo?", "Oslo")])
    assert task.line == 'Answer questions like "Where do people live?" about the documents.'
    assert task.shown(task.form).description == f"{task.line} {task.form}"


def test_a_task_without_examples_has_no_form() -> None:
    assert Task("Staff.").form == ""
    assert Task("Staff.").shown("") == Task("Staff.")


# ---- examples from the command line


def test_an_example_is_split_at_its_arrow() -> None:
    assert Task.parse_example(" Who leads Osprey? =>Ada ") == ("Who leads Osprey?", "Ada")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Who?", "the example 'Who?' has 0 times '=>' where one is needed; write 'question => answer'"),
        ("a => b => c", "has 2 times '=>'"),
        (" => Ada", "the question of the example ' => Ada' is ' ', which holds no text"),
        ("Who? =>", "the answer of the example 'Who? =>' is ''"),
    ],
)
def test_an_example_that_cannot_be_split_is_refused(text: str, message: str) -> None:
    with pytest.raises(TaskError) as caught:
        Task.parse_example(text)
    assert message in str(caught.value)
