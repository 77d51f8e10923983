"""Conversations in OpenAI's shape become plain turns; nothing is dropped and what cannot be told is refused."""

from __future__ import annotations

import pytest

from cribsheet.errors import RequestError
from cribsheet.tools import Toolbox
from cribsheet.turns import as_turns


def test_a_text_is_one_question():
    assert as_turns("Who?") == [{"role": "user", "content": "Who?"}]


def test_system_texts_tools_calls_and_results_are_told_in_order():
    turns = as_turns(
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "What "}, "time is it?"]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "12:30"},
        ],
        Toolbox.of([{"name": "clock", "description": "Tell the time."}]),
    )
    assert [turn["role"] for turn in turns] == ["system", "system", "user", "assistant", "user"]
    assert '"clock"' in turns[0]["content"] and "Tell the time." in turns[0]["content"]
    assert turns[2]["content"] == "What time is it?"
    assert turns[3]["content"] == '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    assert turns[4]["content"] == "<tool_response>\nclock: 12:30\n</tool_response>"


def test_a_model_may_have_had_nothing_to_say():
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}, {"role": "user", "content": "!"}]
    assert as_turns(turns) == turns


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "question is empty"),
        ("  ", "question is empty"),
        ([{"role": "user", "content": ""}], "question is empty"),
        ([{"role": "system", "content": ""}, {"role": "user", "content": "?"}], "system's turn is empty"),
        (7, "The question is 7; give a text, or a list of turns"),
        (None, "The question is None"),
        (b"?", "give a text"),
        ("half a character: \ud83d", "half a character, which is no text"),
        ([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], "nothing to answer"),
        ([{"role": "robot", "content": "?"}], "'robot'; use one of system"),
        ([{"content": "?"}], "give a mapping with the texts"),
        (["?"], "give a mapping with the texts"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "'image_url', but the model reads text"),
        ([{"role": "user", "content": 7}], "'int', but the model reads text"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"name": "x", "arguments": "{"}]}], "no JSON"),
        ([{"role": "assistant", "content": "", "tool_calls": ["x"]}], "give a mapping with 'name'"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(turns, message):
    with pytest.raises(RequestError, match=message):
        as_turns(turns)
