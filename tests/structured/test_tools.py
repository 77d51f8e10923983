"""Tools are told after the sheet; forced calls are always complete, free ones are found in the text."""

from __future__ import annotations

import json
import random

import pytest
from corpus import DOCUMENTS, FEW_SHOT

from cribsheet import CompressedKnowledgeLLM
from cribsheet.errors import RequestError
from cribsheet.structured import tools as cribsheet_tools
from cribsheet.structured.grammar import Constraint, Grammar
from cribsheet.structured.grammar_tokens import GrammarTokens
from cribsheet.structured.tools import CallReader, Tool, Toolbox, ToolCall
from cribsheet.testing import echo_backbone, tiny_backbone

ADD = Tool(
    "add",
    "Add two numbers.",
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]},
)
CLOCK = {"type": "function", "function": {"name": "clock", "description": "Tell the time."}}
NOTE = {
    "name": "note",
    "parameters": {
        "type": "object",
        "properties": {"who": {"$ref": "#/$defs/Who"}},
        "required": ["who"],
        "$defs": {"Who": {"enum": ["Alice", "Bob"]}},
    },
}


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "note", "arguments": {"who": "A\\ud83d"}}',
        '<tool_call>{"name": "note", "arguments": {"who": "A\\ude00"}}</tool_call>',
        json.dumps({"name": "note", "arguments": '{"who": "A\\ud83d"}'}),
    ],
)
def test_half_a_pair_that_a_model_escapes_in_a_call_is_replaced(text):
    reader = CallReader(Toolbox.of([NOTE]))
    reader.push(text)
    reader.finish()
    assert reader.calls[0].arguments == {"who": "A\ufffd"}
    assert str(reader.calls[0]).encode()


TOLD = {"name": "add", "description": "Add two numbers.", "parameters": ADD.parameters}
TOLD_BACK = [
    json.dumps(TOLD),
    json.dumps({"type": "function", "function": TOLD}),
    f"```json\n{json.dumps(TOLD)}\n```",
    f"<tools>{json.dumps(TOLD)}</tools>",
    f"<tool_call>\n{json.dumps(TOLD)}\n</tool_call>",
    json.dumps({"name": "add", "arguments": ADD.parameters}),
    json.dumps({"name": "add", "arguments": ADD.parameters["properties"]}),
    json.dumps({"name": "add", "parameters": {**ADD.parameters, "required": ["a"]}}),
    json.dumps({"name": "add", "description": "Add two numbers."}),
    json.dumps({"name": "clock", "description": "Tell the time.", "parameters": {"type": "object", "properties": {}}}),
    json.dumps([TOLD, {"name": "clock"}]),
]


def read(toolbox, text, size=1):
    reader = CallReader(toolbox)
    shown = [reader.push(text[at : at + size]) for at in range(0, len(text), size)]
    return "".join(shown) + reader.finish(), [(call.name, call.arguments) for call in reader.calls]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "shown", "calls"),
    [
        ("It is late.", "It is late.", []),
        ('<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>', "", [("add", {"a": 1, "b": 2})]),
        (
            'Let me see.\n<tool_call>{"name": "clock", "arguments": {}}</tool_call>\n'
            '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>',
            "Let me see.",
            [("clock", {}), ("add", {"a": 1, "b": 2})],
        ),
        ('{"name": "clock", "parameters": {}}', "", [("clock", {})]),
        ('{"name": "add", "arguments": "{\\"a\\": 3}"}', "", [("add", {"a": 3})]),
        ('[TOOL_CALLS] [{"name": "clock", "arguments": {}}, {"name": "clock"}]', "", [("clock", {}), ("clock", {})]),
        ('<tool_call>{"name": "add", "arguments": {"a": 1}}', "", [("add", {"a": 1})]),
        (
            '<tool_call>{"name": "launch", "arguments": {}}</tool_call>',
            '<tool_call>{"name": "launch", "arguments": {}}</tool_call>',
            [],
        ),
        ('{"name": "launch", "arguments": {}}', '{"name": "launch", "arguments": {}}', []),
        ("[1] says so, 2 < 3 and <tool_", "[1] says so, 2 < 3 and <tool_", []),
        ('<tool_call>{"name": "add", "argu', '<tool_call>{"name": "add", "argu', []),
        # a whole answer in a fence or in tags
        ('```json\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n```', "", [("add", {"a": 1, "b": 2})]),
        ('\n```\n{"name": "clock"}\n```\n', "", [("clock", {})]),
        (
            '```json\n[{"name": "clock"}, {"name": "add", "arguments": {"a": 1}}]',
            "",
            [("clock", {}), ("add", {"a": 1})],
        ),
        ('<tools>\n{"name": "clock", "arguments": {}}\n</tools>', "", [("clock", {})]),
        ('<tools>{"name": "clock"}\n{"name": "add", "arguments": {"a": 1}}', "", [("clock", {}), ("add", {"a": 1})]),
        ('```xml\n<tool_call>\n{"name": "clock"}\n</tool_call>\n```', "", [("clock", {})]),
        ('```json\n{"name": "clock"}\n```\n```json\n{"name": "clock"}\n```', "", [("clock", {}), ("clock", {})]),
        ('{"name": "clock"}\n{"name": "clock"}', "", [("clock", {}), ("clock", {})]),
        ('{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}', "", [("add", {"a": 1})]),
        # arguments that are nothing
        ('{"name": "clock", "arguments": null}', "", [("clock", {})]),
        ('<tool_call>{"name": "clock", "arguments": null}</tool_call>', "", [("clock", {})]),
        ('{"name": "clock", "arguments": "null"}', "", [("clock", {})]),
        ('{"name": "clock", "parameters": null}', "", [("clock", {})]),
        ('{"name": "add", "arguments": null, "parameters": {"a": 1}}', "", [("add", {"a": 1})]),
        # what looks alike and is text
        *((text, text, []) for text in TOLD_BACK),
        ('```python\nprint({"name": "clock"})\n```', '```python\nprint({"name": "clock"})\n```', []),
        ('```json\n{"name": "clock"}\n```\nThat is it.', '```json\n{"name": "clock"}\n```\nThat is it.', []),
        ('So:\n```json\n{"name": "clock"}\n```', 'So:\n```json\n{"name": "clock"}\n```', []),
        ('```json\n{"city": "Oslo"}\n```', '```json\n{"city": "Oslo"}\n```', []),
        ("```", "```", []),
        ("<tools></tools>", "<tools></tools>", []),
        ('{"name": ["clock"]}', '{"name": ["clock"]}', []),
        ("[" * 9_000, "[" * 9_000, []),
        ("<tools>" * 900, "<tools>" * 900, []),
        ("```" + " " * 9_000 + "x", "```" + " " * 9_000 + "x", []),
        ('{"name": "clock"} and {"name": "clock"}', '{"name": "clock"} and {"name": "clock"}', []),
        ("", "", []),
    ],
)
def test_calls_are_parted_from_text_however_it_arrives(text, shown, calls, size):
    assert read(Toolbox.of([ADD, CLOCK]), text, size) == (shown, calls)


def test_a_call_written_out_is_read_back():
    call = ToolCall("add", {"a": 1, "who": "日本 é"})
    assert "日本 é" in str(call)
    assert read(Toolbox.of([ADD]), str(call)) == ("", [(call.name, call.arguments)])


def test_a_tool_that_takes_a_schema_may_be_given_one():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    takes = {"type": "object", "properties": {"type": {"type": "string"}, "properties": {"type": "object"}}}
    call = json.dumps({"name": "form", "arguments": schema})
    assert read(Toolbox.of([Tool("form", "", takes)]), call) == ("", [("form", schema)])


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["```", "py", "thon\n", "x = 1"], ["", "", "", "```python\nx = 1"]),
        (["<", "b", ">", "late"], ["", "", "<b>", "late"]),
        (["<to", "wn> is"], ["", "<town> is"]),
        (["`a`", " is"], ["`a`", " is"]),
    ],
)
def test_what_begins_like_a_call_is_shown_once_it_is_none(pieces, shown):
    reader = CallReader(Toolbox.of([ADD]))
    assert [reader.push(piece) for piece in pieces] == shown


def test_text_is_shown_as_soon_as_it_can_be_no_call():
    reader = CallReader(Toolbox.of([ADD]))
    assert [reader.push(piece) for piece in ["It", " is ", "<", "b> ", "late"]] == ["It", " is", "", " <b>", " late"]


OPENINGS = [
    "```",
    "`",
    "json",
    " ",
    "\n",
    "<tool_call>",
    "</tool_call>",
    "<tool_",
    "call>",
    "[TOOL",
    "_CALLS]",
    "<tools>",
]
OPENINGS += ["</tools>", "[", '{"name": "clock"}', "x", "-", "<", "</", "<b>"]


def test_what_is_shown_depends_on_the_text_alone_and_not_on_its_pieces():
    rng = random.Random(0)
    for _ in range(2000):
        pieces = rng.choices(OPENINGS, k=rng.randrange(1, 9))
        reader, shown = CallReader(Toolbox.of([CLOCK])), ""
        for number, piece in enumerate(pieces, 1):
            shown += reader.push(piece)
            assert shown == CallReader(Toolbox.of([CLOCK])).push("".join(pieces[:number])), pieces
        assert read(Toolbox.of([CLOCK]), "".join(pieces)) == (
            shown + reader.finish(),
            [(call.name, call.arguments) for call in reader.calls],
        )


class Counted:
    """Something that reads text, and how much it was given."""

    read = 0

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, text, *more):
        Counted.read += len(text)
        return self.inner(text, *more)

    def match(self, text, at=0):
        Counted.read += len(text) - at
        return self.inner.match(text, at)

    def fullmatch(self, text):
        Counted.read += len(text)
        return self.inner.fullmatch(text)


@pytest.mark.parametrize(
    "pieces",
    [
        ["<tool_call>"] * 4000,
        ["x", *["<tool_call>"] * 4000],
        ["```\n"] * 4000,
        ["```", *["a"] * 4000],
        ["<tools>"] * 4000,
        [" "] * 4000,
        ["x", *[" "] * 4000],
        ["<", *["a"] * 4000],
        ["{"] * 4000,
        ["x<tool_"] * 4000,
        ["late "] * 4000,
    ],
    ids=lambda pieces: "".join(pieces[:2])[:12],
)
def test_an_answer_is_read_in_proportion_to_its_length(pieces, monkeypatch):
    for name in ("_mark", "_BEFORE", "_BEGUN"):
        monkeypatch.setattr(cribsheet_tools, name, Counted(getattr(cribsheet_tools, name)))
    reader = CallReader(Toolbox.of([CLOCK]))
    Counted.read = 0
    assert "".join([reader.push(piece) for piece in pieces]) + reader.finish() == "".join(pieces)
    assert Counted.read < 8 * (len("".join(pieces)) + 16 * len(pieces))  # thousands of times the length before


@pytest.mark.parametrize(
    ("choice", "forced"),
    [(None, []), ("auto", []), ("any", ["add", "clock"]), ("required", ["add", "clock"]), (True, ["add", "clock"]),
     ("clock", ["clock"]), ({"type": "function", "function": {"name": "add"}}, ["add"])],
)  # fmt: skip
def test_a_choice_says_which_tools_must_be_called(choice, forced):
    assert [tool.name for tool in Toolbox.of([ADD, CLOCK], choice).forced] == forced


def test_none_of_the_tools_and_no_tools_are_no_toolbox():
    assert Toolbox.of([ADD], "none") is None and Toolbox.of([], "auto") is None and Toolbox.of(None) is None


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        ([ADD], "divide", "use 'auto', 'none', 'any', or one of the tools add"),
        ([], "any", "no tools were given"),
        ([ADD, ADD], None, "Two tools have one name"),
        ([{"description": "?"}], None, "give a mapping with 'name'"),
        ([{"name": "x", "parameters": [1]}], None, "give a JSON schema"),
        (["add"], None, "give a mapping with 'name'"),
    ],
)
def test_tools_that_make_no_sense_are_refused(tools, choice, message):
    with pytest.raises(RequestError, match=message):
        Toolbox.of(tools, choice)


@pytest.fixture(scope="module")
def kb():
    return CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=tiny_backbone(), rate=3, scorer="task")


@pytest.mark.parametrize("choice", ["any", "add", "clock", "note"])
@pytest.mark.parametrize("temperature", [0, 2])
def test_a_forced_call_is_complete_and_valid_whatever_the_model(kb, choice, temperature):
    answer = kb.ask(
        "What is one and two?",
        tools=[ADD, CLOCK, NOTE],
        tool_choice=choice,
        max_tokens=60,
        temperature=temperature,
        seed=1,
    )
    assert answer.finish_reason == "tool_calls" and answer.text == ""
    (call,) = answer.tool_calls
    assert call.name == choice or choice == "any"
    assert set(call.arguments) == {"add": {"a", "b"}, "clock": set(), "note": {"who"}}[call.name]


def test_a_free_call_comes_out_of_a_real_model_and_its_result_goes_back_in():
    call = json.dumps({"name": "clock", "arguments": {}})
    kb = CompressedKnowledgeLLM.build(
        DOCUMENTS,
        FEW_SHOT,
        model=echo_backbone(f"One moment. <tool_call> {call} </tool_call>"),
        rate=2,
        scorer="recent",
    )
    stream = kb.stream("What time is it?", tools=[CLOCK])
    assert "".join(stream) == "One moment."
    answer = stream.answer
    assert answer.finish_reason == "tool_calls" and [each.name for each in answer.tool_calls] == ["clock"]
    history = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": answer.text, "tool_calls": list(answer.tool_calls)},
        {"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": "12:30"},
    ]
    assert kb.ask(history, tools=[CLOCK]).usage.prompt_tokens > answer.usage.prompt_tokens
    assert kb.ask("What time is it?").tool_calls == ()
    assert kb.ask("What time is it?", tools=[CLOCK], tool_choice="none").text.startswith("One moment. <tool_call>")


def test_a_forced_call_and_another_form_are_refused(kb):
    with pytest.raises(RequestError, match="regex and tool_choice were given"):
        kb.ask("?", tools=[ADD], tool_choice="any", regex="a+")


def test_a_form_beside_tools_takes_an_answer_or_a_call_and_nothing_else(kb):
    schema = {"type": "object", "properties": {"city": {"$ref": "#/$defs/City"}}, "required": ["city"]}
    schema["$defs"] = {"City": {"enum": ["Oslo", "Quito"]}}
    grammar = Grammar.json_schema(Toolbox.of([ADD, NOTE]).beside(schema))
    tokenizer = kb.backbone.tokenizer
    tokens = GrammarTokens.of(tokenizer, kb.backbone.eos_ids, kb.backbone.config.vocab_size)

    def taken(text):
        form = Constraint(grammar, tokens, 400)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return all(form.accept(token) for token in [*ids, min(kb.backbone.eos_ids)])

    assert taken('{"city": "Oslo"}') and taken('{"name": "add", "arguments": {"a": 1, "b": 2}}')
    assert taken('{"name": "note", "arguments": {"who": "Bob"}}')
    assert not taken('{"city": "Rome"}') and not taken('{"name": "sub", "arguments": {}}')
    other = Toolbox.of([NOTE]).beside({"$defs": {"Who": {"const": "Eve"}}, "$ref": "#/$defs/Who"})
    grammar = Grammar.json_schema(other)
    assert taken('"Eve"') and taken('{"name": "note", "arguments": {"who": "Bob"}}') and not taken('"Bob"')


PERSON = {
    "$defs": {
        "Person": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 4},
                "children": {"type": "array", "items": {"$ref": "#/$defs/Person"}, "maxItems": 2},
            },
            "required": ["name", "children"],
        }
    },
    "$ref": "#/$defs/Person",
}
TREE = {
    "type": "object",
    "properties": {"children": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}},
    "required": ["children"],
}
OLDER = {
    "type": "object",
    "definitions": {"n": {"type": "integer"}},
    "properties": {"a": {"$ref": "#/definitions/n"}, "b": {"$ref": "#/properties/a"}},
    "required": ["a", "b"],
}
EITHER = {"anyOf": [OLDER, {"type": "object", "properties": {"c": {"const": "$ref"}}, "required": ["c"]}]}
EITHER["anyOf"][0] = {**OLDER, "properties": {"a": {"type": "integer"}, "$ref": {"type": "null"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("parameters", "fits", "fits_not"),
    [
        (PERSON, {"name": "A", "children": [{"name": "B", "children": []}]}, {"name": "A", "children": [1]}),
        (PERSON, {"name": "A", "children": []}, {}),
        (TREE, {"children": [{"children": []}]}, {"children": [{"name": "tree", "arguments": {"children": []}}]}),
        (OLDER, {"a": 1, "b": 2}, {"a": 1, "b": "2"}),
        (EITHER, {"a": 1, "$ref": None}, {"a": "x"}),
        (EITHER, {"c": "$ref"}, {"c": "#"}),
    ],
)
def test_arguments_may_refer_to_themselves_alone_and_beside_others(kb, parameters, fits, fits_not):
    tool = {"name": "tree", "parameters": {"$id": "https://example.org/x", **parameters}}
    backbone = kb.backbone
    tokens = GrammarTokens.of(backbone.tokenizer, backbone.eos_ids, backbone.config.vocab_size)
    for tools in ([tool], [ADD, tool], [tool, {**tool, "name": "other"}]):
        grammar = Grammar.json_schema(Toolbox.of(tools, "tree" if len(tools) == 1 else "any").schema)

        def taken(arguments, grammar=grammar):
            form = Constraint(grammar, tokens, 400)
            text = json.dumps({"name": "tree", "arguments": arguments})
            ids = backbone.tokenizer(text, add_special_tokens=False)["input_ids"]
            return all(form.accept(token) for token in [*ids, min(backbone.eos_ids)])

        assert taken(fits) and not taken(fits_not)
        answer = kb.ask("?", tools=tools, tool_choice="tree", max_tokens=80, temperature=2, seed=1)
        assert answer.finish_reason == "tool_calls"
