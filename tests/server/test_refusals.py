"""Every field has an effect or is refused by name; nothing that a stranger sends does harm."""

from __future__ import annotations

import gzip
import json
import socket

import pytest

ASK = {"model": "oslo", "messages": [{"role": "user", "content": "Where?"}]}
FUNCTION = {"type": "function", "function": {"name": "f"}}
WORDY = {"type": "function", "function": {"name": "f", "description": "word " * 5000}}
ONE_TEXT = {"type": "object", "required": ["a"], "additionalProperties": False}


NAMED = {"name": "f", "arguments": "{}"}
IN_PART = "messages[0].content[0].type"


def part(**fields):
    return [{"role": "user", "content": [fields]}]


def called(**fields):
    return [{"role": "assistant", "tool_calls": [fields]}, *ASK["messages"]]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"audio": {"voice": "x"}}, "audio"),
        ({"function_call": "auto"}, "function_call"),
        ({"functions": []}, "functions"),
        ({"prediction": {}}, "prediction"),
        ({"store": True}, "store"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"verbosity": "low"}, "verbosity"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"modalities": ["audio"]}, "modalities[0]"),
        ({"no_such_field": 1}, "no_such_field"),
        ({"n": 0}, "n"),
        ({"n": 100}, "n"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", 5]}, "stop[1]"),
        ({"seed": 1.5}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "stream_options": {"include": 1}}, "stream_options.include"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "owner", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood"),
        ({"messages": part(type="image_url", image_url={"url": "x"})}, "messages[0].content[0].type"),
        ({"messages": part(type="image_url", text="x")}, "messages[0].content[0].type"),
        ({"messages": part(type="text", text="x", mood=1)}, "messages[0].content[0].mood"),
        ({"messages": part(type="refusal")}, "messages[0].content[0].refusal"),
        ({"messages": part(type="thinking", thinking="x")}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "colour"}}}},
            "response_format",
        ),
        ({"tools": [{"type": "browser"}]}, "tools[0].type"),
        ({"tools": [FUNCTION, FUNCTION]}, "tools"),
        ({"tools": [FUNCTION], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"cribsheet": {"mode": "hybird"}}, "cribsheet.mode"),
        ({"cribsheet": {"mode": "hybrid", "top_k": 0}}, "cribsheet.top_k"),
        ({"cribsheet": {"mode": "hybrid", "passage_tokens": 1.5}}, "cribsheet.passage_tokens"),
        ({"cribsheet": {"top_k": 2}}, "cribsheet.top_k"),
        ({"cribsheet": {"mode": "sheet", "passage_tokens": 9}}, "cribsheet.passage_tokens"),
        ({"cribsheet": {"mode": "hybrid", "sure": 0.5}}, "cribsheet.sure"),
        ({"cribsheet": {"mode": "auto", "sure": 2}}, "cribsheet.sure"),
        ({"cribsheet": {"evidence": "yes"}}, "cribsheet.evidence"),
        ({"cribsheet": {"evidence": False, "sources": 2}}, "cribsheet.sources"),
        ({"cribsheet": {"retriever": "bm25"}}, "cribsheet.retriever"),
        ({"cribsheet": {"top_k": 3}}, "cribsheet.top_k"),
    ],
)
def test_a_field_that_cannot_be_served_is_refused_by_name(live, fields, param):
    for stream in ({}, {"stream": True}):
        reply = live.post(**{**ASK, **stream, **fields})
        assert reply.status_code == 400, reply.text
        error = reply.json()["error"]
        assert error["param"] == param and set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error" and error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [[1, 2]]}, "prompt[0]"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": ""}, "prompt"),
        ({"messages": []}, "messages"),
    ],
)
def test_completions_refuse_by_name_too(live, fields, param):
    reply = live.post("/v1/completions", **{"model": "oslo", "prompt": "Where?", **fields})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    "fields",
    [
        {"store": False, "service_tier": "auto", "modalities": ["text"], "reasoning_effort": "none", "n": 1},
        {"user": "u", "metadata": {"a": "b"}, "response_format": {"type": "text"}, "tool_choice": "none"},
        {"stop": None, "seed": None, "temperature": None, "tools": None, "logit_bias": {}, "stream": False},
        {"no_such_field": None, "functions": None, "audio": None, "store": None, "n": None, "stream_options": None},
        {"tools": [], "tool_choice": "auto", "stop": [], "max_tokens": None, "response_format": None},
        {"tools": [{"type": "function", "function": {"name": "f", "description": None, "parameters": None}}]},
        {"top_p": 0, "temperature": 0, "frequency_penalty": 0, "presence_penalty": -0.0},
        {"cribsheet": {"mode": None, "evidence": None, "x": None}},
        {"messages": part(type="text", text="Where?")},
        {"messages": part(type="text", text="Where?", cache_control=None)},
        {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "Where?", "mood": None}]},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hm?", "name": "eve"}]},
    ],
)
def test_a_field_that_asks_for_nothing_else_is_taken(live, fields):
    reply = live.post(**{**ASK, **fields})
    assert reply.json()["choices"][0]["message"]["content"] == "Bob lives in Oslo."


def test_forms_exclude_each_other(live):
    both = {"tools": [FUNCTION], "tool_choice": "required", "response_format": {"type": "json_object"}}
    assert live.post(**ASK, **both).json()["error"]["param"] == "response_format"
    assert "differ" in live.post(**ASK, max_tokens=3, max_completion_tokens=4).json()["error"]["message"]
    assert "stream=true" in live.post(**ASK, stream_options={}).json()["error"]["message"]
    assert "logprobs=true" in live.post(**ASK, top_logprobs=3).json()["error"]["message"]


def test_a_question_longer_than_the_window_is_refused_with_numbers(live):
    reply = live.post(**{**ASK, "messages": [{"role": "user", "content": "word " * 5000}]})
    assert reply.status_code == 400 and "window" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 5000}]}, "messages"),
        ("/v1/chat/completions", {**ASK, "cribsheet": {"mode": "hybrid"}, "tools": [WORDY]}, "messages"),
        ("/v1/completions", {"prompt": "word " * 5000}, "prompt"),
        ("/v1/completions", {"prompt": ["Where?", "word " * 5000]}, "prompt[1]"),
    ],
)
def test_a_question_that_does_not_fit_is_refused_by_name_and_in_the_code_that_clients_know(live, path, fields, param):
    for more in ({}, {"n": 2}, {"stream": True}):
        reply = live.post(path, **{"model": "oslo", **fields, **more})
        error = reply.json()["error"]
        assert (reply.status_code, error["param"], error["code"]) == (400, param, "context_length_exceeded")


def test_a_form_that_no_answer_fits_is_refused_by_name(live):
    schema = {"type": "string", "minLength": 40, "maxLength": 40}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {**ONE_TEXT, "properties": {"a": schema}}}}
    assert live.post(**ASK, response_format=form, max_tokens=2).json()["error"]["param"] == "response_format"
    forced = live.post(**ASK, tools=[tool], tool_choice="required", max_tokens=2)
    assert forced.json()["error"]["param"] == "tool_choice"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ('{"model": "oslo", "messages": [], "model": "noise"}', "model"),
        ('{"model": "oslo", "messages": [{"role": "user", "content": "x", "role": "system"}]}', "messages[0].role"),
        ('{"model": "oslo", "stream_options": {"a": 1, "a": 1}, "messages": []}', "stream_options.a"),
        ('{"a": {"b": 1, "b": 2}, "a": 3}', "a"),
    ],
)
def test_a_name_that_is_given_twice_is_refused_by_name(live, body, param):
    reply = live.http().post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param
    assert "more than once" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe",
        b'{"model": "oslo", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": "oslo", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "oslo", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"model": "oslo", "messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 10_000 + b"}",
    ],
)
def test_what_is_no_request_is_refused_in_the_same_shape(live, body):
    reply = live.http().post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400 and set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_that_is_not_called_json_is_not_read_as_json(live):
    """So that another site's page cannot post without asking first."""
    reply = live.http().post("/v1/chat/completions", content=json.dumps(ASK), headers={"content-type": "text/plain"})
    assert reply.status_code == 400


def test_unknown_places_and_methods_are_refused_in_the_same_shape(live):
    http = live.http()
    assert http.get("/v1/nowhere").json()["error"]["code"] == "not_found"
    assert http.get("/v1/chat/completions").status_code == 405
    assert http.post("/health").status_code == 405
    assert http.get("/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd").status_code == 404
    assert http.get("/v1/sheets/oslo/documents/99").status_code == 404
    assert http.get("/v1/sheets/oslo/documents/x").status_code == 400


@pytest.mark.parametrize("path", ["/health", "/", "/page.js"])
def test_whether_the_server_answers_can_be_asked_by_head(path, live):
    reply = live.http().head(path)
    assert reply.status_code == 200 and reply.content == b""
    assert reply.headers["content-length"] == live.http().get(path).headers["content-length"]


def test_bytes_that_are_not_http_harm_nobody(live):
    host, port = live.url.removeprefix("http://").split(":")
    for sent in (b"\x16\x03\x01\x02\x00", b"GET /" + b"a" * 100_000, b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n"):
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(sent)
    assert live.http().get("/health").json()["status"] == "ok"


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"stop": ["a"] * 1001}, "stop", "1000"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'json_object' or 'json_schema'"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs=true"),
        ({"stream_options": {}}, "stream_options", "stream=true"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "differ"),
        (
            {"messages": part(type="image_url", image_url={"url": "x"})},
            IN_PART,
            "'image_url', but the model reads text",
        ),
        (
            {"messages": part(type="input_audio", input_audio={})},
            IN_PART,
            "'input_audio', but the model reads text only",
        ),
        ({"messages": part(type="file", text="x")}, IN_PART, "the model reads text only"),
        ({"messages": [{"role": "tool", "content": [{"type": "image"}]}]}, IN_PART, "the model reads text only"),
        ({"messages": part(type="input_text", text="x")}, IN_PART, "Input should be 'text'"),
        ({"messages": called(type="custom", id="c")}, "messages[0].tool_calls[0].custom", "missing"),
        ({"messages": called(type="function", id="c")}, "messages[0].tool_calls[0].function", "missing"),
        ({"messages": called(type="mcp", function=NAMED)}, "messages[0].tool_calls[0].type", "'function'"),
        ({"messages": called(type="custom", function=NAMED)}, "messages[0].tool_calls[0].custom", "missing"),
    ],
)
def test_a_refusal_names_the_field_that_was_meant_and_what_it_may_be(fields, param, says, live):
    reply = live.post(**{**ASK, **fields})
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["param"] == param and says in error["message"]


def test_a_body_that_is_not_declared_as_json_is_told_how(live):
    with live.http() as http:
        reply = http.post("/v1/chat/completions", content=b'{"model": "oslo"}')
    assert reply.status_code == 400 and "Content-Type: application/json" in reply.json()["error"]["message"]


def test_a_compressed_body_is_told_to_be_one(live):
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    with live.http() as http:
        reply = http.post("/v1/chat/completions", content=gzip.compress(b'{"model": "oslo"}'), headers=headers)
    assert reply.status_code == 400 and "compressed; send it plain" in reply.json()["error"]["message"]


ASSISTANT = [
    {"content": "Hello! Ask me about our staff."},
    {"content": "Hello!", "name": "bot"},
    {"content": None, "refusal": "I will not."},
    {"content": [{"type": "refusal", "refusal": "I will not."}]},
    {"content": "Hm.", "reasoning_content": "…", "reasoning": "…", "thinking": "…", "annotations": [{"type": "x"}]},
    {"content": "Hm.", "thinking_blocks": [{"type": "thinking"}], "provider_specific_fields": {"a": 1}},
    {"content": [{"type": "thinking", "thinking": "…", "signature": "x"}, {"type": "text", "text": "Hm."}]},
    {"content": [{"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}]},
    {"content": [{"type": "tool_use", "id": "c", "name": "clock", "input": {"at": 2}}]},
    {"content": None, "function_call": {"name": "clock", "arguments": "{}"}},
    {"content": None, "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": None}}]},
    {"tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
    {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]},
    {"tool_calls": [{"id": None, "function": {"name": "f"}}]},
    {"tool_calls": [{"id": "c", "type": "custom", "custom": {"name": "f", "input": "no {JSON"}}]},
    {"tool_calls": [{"type": "custom", "index": 0, "custom": {"name": "f", "input": ""}}]},
    {"tool_calls": [{"custom": {"name": "f", "input": "x"}, "function": None}]},
    {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}, "custom": None}]},
    {
        "tool_calls": [
            {
                "id": "c",
                "type": "function",
                "function": {"name": "f", "arguments": "{}"},
                "extra_content": {"google": {"thought_signature": "x"}},
                "provider_specific_fields": {"a": [1]},
            }
        ]
    },
    {"content": [{"type": "text", "text": "Hm.", "cache_control": {"type": "ephemeral"}}]},
]


@pytest.mark.parametrize("turn", ASSISTANT)
def test_a_conversation_may_begin_with_the_assistant_s_turn_whoever_wrote_it(turn, live):
    turns = [{"role": "assistant", **turn}, {"role": "user", "content": "Where?"}]
    for messages in (turns, [turns[1], *turns], [{"role": "system", "content": ""}, *turns]):
        reply = live.post(model="oslo", messages=messages)
        assert reply.status_code == 200, reply.text
        assert reply.json()["choices"][0]["message"]["content"] == "Bob lives in Oslo."


def test_results_of_functions_and_of_other_providers_tools_are_told(live):
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "clock", "input": {}}]}
    results = [
        {"role": "function", "name": "clock", "content": "12:30"},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "12:30"}]},
    ]
    for result in results:
        reply = live.post(model="oslo", messages=[{"role": "user", "content": "When?"}, call, result])
        assert reply.status_code == 200, reply.text
