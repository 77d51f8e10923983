"""Conversations in OpenAI's shape become plain turns; nothing is dropped and what cannot be told is refused."""

from __future__ import annotations

import pytest

from cribsheet.errors import RequestError
from cribsheet.prompt.turns import as_turns
from cribsheet.structured.tools import Toolbox

ANSWER = {"role": "assistant", "content": "!"}


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
        ([{"role": "system", "content": ""}], "question is empty"),
        ([{"role": "user", "content": ""}, {"role": "user", "content": "?"}], "user's turn is empty"),
        ([{"role": "user", "content": "?"}, ANSWER, {"role": "system", "content": ""}], "nothing to answer"),
        (7, "The question is 7; give a text, or a list of turns"),
        (None, "The question is None"),
        (b"?", "give a text"),
        ("half a character: \ud83d", "half a character, which is no text"),
        ([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], "nothing to answer"),
        ([{"role": "robot", "content": "?"}], "'robot'; use one of system"),
        ([{"content": "?"}], "give a mapping with the texts"),
        (["?"], "give a mapping with the texts"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "'image_url', but the model reads text"),
        ([{"role": "assistant", "content": [{"type": "image"}]}, {"role": "user", "content": "?"}], "'image', but the"),
        ([{"role": "user", "content": [{"type": "thinking", "thinking": "?"}]}], "'thinking', but the model reads"),
        ([{"role": "user", "content": [{"type": "tool_result", "content": [{"type": "image"}]}]}], "'image', but the"),
        ([{"role": "user", "content": [{"document": {}}]}], "'document', but the model reads"),
        ([{"role": "user", "content": 7}], "'int', but the model reads text"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"name": "x", "arguments": "{"}]}], "no JSON"),
        ([{"role": "assistant", "content": "", "tool_calls": ["x"]}], "give a mapping with 'name'"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(turns, message):
    with pytest.raises(RequestError, match=message):
        as_turns(turns)


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize("nothing", ["", " \n", None, [], [{"type": "text", "text": ""}]])
def test_a_system_turn_without_a_text_is_left_out_wherever_it_stands(role, nothing):
    system, asked = {"role": role, "content": nothing}, {"role": "user", "content": "?"}
    assert as_turns([system, asked]) == as_turns([asked, system]) == as_turns([asked])
    assert as_turns([asked, system, asked]) == [asked, asked]


CLOCK = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
AT_TWO = '<tool_call>\n{"name": "clock", "arguments": {"at": 2}}\n</tool_call>'
SAYS = {"type": "text", "text": "Oslo."}


@pytest.mark.parametrize(
    ("turn", "told"),
    [
        # a refusal is what was said
        ({"content": None, "refusal": "I will not."}, "I will not."),
        ({"content": [{"type": "refusal", "refusal": "I will not."}]}, "I will not."),
        ({"refusal": "I will not."}, "I will not."),
        ({"content": "Oslo.", "refusal": None}, "Oslo."),
        # thoughts are not
        ({"content": [{"type": "thinking", "thinking": "Hm.", "signature": "x"}, SAYS]}, "Oslo."),
        ({"content": [{"type": "redacted_thinking", "data": "x"}, SAYS]}, "Oslo."),
        ({"content": [{"type": "reasoning", "summary": [], "id": "rs_1"}, SAYS]}, "Oslo."),
        ({"content": [{"type": "reasoning_content", "reasoning_content": {"text": "Hm."}}, SAYS]}, "Oslo."),
        ({"content": [{"reasoningContent": {}}, {"text": "Oslo."}, {"cachePoint": {"type": "default"}}]}, "Oslo."),
        ({"content": "Oslo.", "reasoning_content": "Hm.", "reasoning": "Hm."}, "Oslo."),
        ({"content": "<think>\nHm.\n</think>\n\nOslo."}, "Oslo."),
        ({"content": "Say <think> to think.</think>"}, "Say <think> to think.</think>"),
        ({"content": [{"type": "thinking", "thinking": "Hm."}]}, ""),
        # nor what a provider's own tools did
        ({"content": [{"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}, SAYS]}, "Oslo."),
        ({"content": [{"type": "web_search_tool_result", "tool_use_id": "s", "content": []}, SAYS]}, "Oslo."),
        ({"content": [{"type": "mcp_tool_use"}, {"type": "mcp_tool_result"}, SAYS]}, "Oslo."),
        ({"content": [{"type": "web_search_call"}, {"type": "code_interpreter_call"}, SAYS]}, "Oslo."),
        ({"content": [{"type": "executable_code"}, {"type": "code_execution_result"}, SAYS]}, "Oslo."),
        ({"content": [{"type": "server_tool_call"}, {"type": "server_tool_result"}, SAYS]}, "Oslo."),
        ({"content": [{"type": "invalid_tool_call"}, {"type": "non_standard"}, SAYS]}, "Oslo."),
        ({"content": [{"type": "output_text", "text": "Oslo.", "annotations": [1]}]}, "Oslo."),
        # a call is told once, wherever it stands
        ({"tool_calls": [{"id": "c", "function": {"name": "clock", "arguments": None}}]}, CLOCK),
        ({"tool_calls": [{"id": "c", "function": {"name": "clock", "arguments": "null"}}]}, CLOCK),
        ({"content": None, "function_call": {"name": "clock", "arguments": "{}"}}, CLOCK),
        ({"content": [{"type": "tool_use", "id": "c", "name": "clock", "input": {"at": 2}}]}, AT_TWO),
        ({"content": [{"type": "tool_call", "id": "c", "name": "clock", "args": {"at": 2}}]}, AT_TWO),
        ({"content": [{"type": "function_call", "call_id": "c", "name": "clock", "arguments": '{"at": 2}'}]}, AT_TWO),
        (
            {
                "content": [SAYS, {"type": "tool_use", "id": "c", "name": "clock", "input": {}}],
                "tool_calls": [{"id": "c", "name": "clock", "args": {"at": 2}}],
            },
            f"Oslo.\n{AT_TWO}",
        ),
        (
            {"tool_calls": [{"id": "c", "type": "custom", "custom": {"name": "shell", "input": "ls"}}]},
            '<tool_call>\n{"name": "shell", "arguments": {"input": "ls"}}\n</tool_call>',
        ),
        (
            {"tool_calls": [{"function": {"name": "clock", "arguments": '{"at": 2}'}, "custom": None}]},
            AT_TWO,
        ),
    ],
)
def test_turns_that_other_providers_models_wrote_are_told_as_far_as_they_were_said(turn, told):
    asked = {"role": "user", "content": "?"}
    assert as_turns([asked, {"role": "assistant", **turn}, asked])[1] == {"role": "assistant", "content": told}


@pytest.mark.parametrize(
    "result",
    [
        {"role": "tool", "tool_call_id": "c", "content": "12:30"},
        {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "12:30"}]},
        {"role": "function", "name": "clock", "content": "12:30"},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "12:30"}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": [{"text": "12:30"}]}]},
        {"role": "user", "content": [{"type": "function_call_output", "call_id": "c", "output": "12:30"}]},
    ],
)
def test_a_result_is_told_in_any_form_with_the_name_of_its_tool(result):
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "clock", "input": {}}]}
    assert as_turns([call, result])[1]["content"] == "<tool_response>\nclock: 12:30\n</tool_response>"
