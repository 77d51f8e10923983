"""openai-python against a real server."""

from __future__ import annotations

import json
from itertools import pairwise

import openai
import pytest
from pydantic import BaseModel

ASK = [{"role": "user", "content": "Where does Bob live?"}]

NEVER_END = {"2": -100}  # the end token's id


class Home(BaseModel):
    name: str
    city: str


def chat(client, **fields):
    return client.chat.completions.create(**{"model": "oslo", "messages": ASK, **fields})


def test_a_sheet_answers_by_name(client):
    reply = chat(client)
    assert reply.choices[0].message.content == "Bob lives in Oslo."
    assert reply.choices[0].finish_reason == "stop" and reply.model == "oslo"
    usage = reply.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens


def test_the_sheets_are_the_models(client):
    assert {model.id for model in client.models.list()} == {"oslo", "noise"}
    assert client.models.retrieve("oslo").id == "oslo"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nobody")
    assert caught.value.code == "model_not_found"


def test_a_stream_says_what_the_whole_answer_says(client):
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Bob lives in Oslo."
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == chat(client).usage.completion_tokens
    assert all(c.usage is None for c in chunks[:-1])
    assert all(c.usage is None for c in chat(client, stream=True))


def test_noise_streamed_is_noise_at_once(client):
    fields = {"model": "noise", "max_tokens": 20, "temperature": 1.0, "seed": 5}
    whole = chat(client, **fields).choices[0].message.content
    streamed = chat(client, **fields, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == whole
    assert chat(client, **{**fields, "seed": 6}).choices[0].message.content != whole


def test_several_answers_are_several_also_in_a_stream(client):
    fields = {"model": "noise", "n": 3, "max_tokens": 8, "temperature": 1.0, "seed": 1, "logit_bias": NEVER_END}
    reply = chat(client, **fields)
    whole = [choice.message.content for choice in reply.choices]
    assert [choice.index for choice in reply.choices] == [0, 1, 2] and len(set(whole)) == 3
    assert reply.usage.completion_tokens == 24
    texts = ["", "", ""]
    for chunk in chat(client, **fields, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == whole
    assert chat(client, **{**fields, "n": 1, "seed": 2}).choices[0].message.content == whole[1]


def test_stop_and_max_tokens_end_an_answer(client):
    assert chat(client, stop=[" in"]).choices[0].message.content == "Bob lives"
    cut = chat(client, model="noise", max_completion_tokens=3, logit_bias=NEVER_END)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 3


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_come_with_every_token(client, stream):
    fields = {"model": "noise", "max_tokens": 6, "logprobs": True, "top_logprobs": 2, "logit_bias": NEVER_END}
    if stream:
        found = [
            token
            for chunk in chat(client, **fields, stream=True)
            if chunk.choices[0].logprobs
            for token in chunk.choices[0].logprobs.content
        ]
    else:
        found = chat(client, **fields).choices[0].logprobs.content
    assert len(found) == 6
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in found)
    assert all(bytes(token.bytes).decode() == token.token for token in found if token.bytes is not None)
    said = chat(client, logprobs=True).choices[0]
    assert "".join(token.token for token in said.logprobs.content) == said.message.content
    old = client.completions.create(model="oslo", prompt="Where does Bob live?", logprobs=0).choices[0]
    offsets = [*old.logprobs.text_offset, len(old.text)]
    assert old.logprobs.tokens == [old.text[a:b] for a, b in pairwise(offsets)]


def test_penalties_and_bias_have_an_effect(client):
    plain = chat(client, model="noise", max_tokens=12).choices[0].message.content
    shaped = chat(client, model="noise", max_tokens=12, frequency_penalty=2.0, presence_penalty=2.0)
    assert shaped.choices[0].message.content != plain
    first = chat(client, model="noise", max_tokens=1, logprobs=True).choices[0].logprobs.content[0].token
    forbidden = {str(number): -100 for number in range(6, 1000, 2)}
    others = {
        chat(client, model="noise", max_tokens=1, logit_bias=each).choices[0].message.content
        for each in (forbidden, {"2": 0})
    }
    assert first in others and len(others) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_parse_gives_an_instance(client, stream):
    fields = {"model": "noise", "messages": ASK, "response_format": Home, "max_tokens": 60}
    if stream:
        with client.chat.completions.stream(**fields) as events:
            kinds = {event.type for event in events}
            parsed = events.get_final_completion().choices[0].message.parsed
        assert {"chunk", "content.delta", "content.done"} <= kinds
    else:
        parsed = client.chat.completions.parse(**fields).choices[0].message.parsed
    assert isinstance(parsed, Home)


def test_json_mode_gives_json(client):
    text = (
        chat(client, model="noise", response_format={"type": "json_object"}, max_tokens=40).choices[0].message.content
    )
    assert isinstance(json.loads(text), dict)


TOOL = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Find a person.",
        "parameters": Home.model_json_schema(),
    },
}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "find"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call_is_made_and_fits(client, choice, stream):
    fields = {"model": "noise", "messages": ASK, "tools": [TOOL], "tool_choice": choice, "max_tokens": 90}
    if stream:
        with client.chat.completions.stream(**fields) as events:
            reply = events.get_final_completion()
    else:
        reply = client.chat.completions.create(**fields)
    (call,) = reply.choices[0].message.tool_calls
    assert call.function.name == "find" and call.id and reply.choices[0].finish_reason == "tool_calls"
    Home.model_validate_json(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": "Oslo"}
    told = [*ASK, reply.choices[0].message.model_dump(), result]
    assert chat(client, messages=told, tools=[TOOL]).choices[0].message.content == "Bob lives in Oslo."


def test_a_tool_that_is_not_called_changes_nothing_in_the_answer(client):
    for choice in ("auto", "none"):
        reply = chat(client, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False)
        assert reply.choices[0].message.content == "Bob lives in Oslo." and not reply.choices[0].message.tool_calls


def test_completions_answer_every_prompt(client):
    reply = client.completions.create(model="oslo", prompt=["Where?", "Where does Bob live now?"], logprobs=1)
    assert [choice.text for choice in reply.choices] == ["Bob lives in Oslo."] * 2
    logprobs = reply.choices[0].logprobs
    assert "".join(logprobs.tokens) == "Bob lives in Oslo." and logprobs.text_offset[:2] == [0, 3]
    streamed = client.completions.create(model="oslo", prompt="Where?", stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "Bob lives in Oslo."


def test_sources_come_with_the_answer(client):
    extra = {"cribsheet": {"sources": 2}}
    asked = {"model": "noise", "max_tokens": 5, "extra_body": extra}
    (choice,) = chat(client, **asked).choices
    named = {source["document"] for source in choice.cribsheet["sources"]}
    assert named and named <= {"alice", "bob"}
    assert sum(source["weight"] for source in choice.cribsheet["sources"]) == pytest.approx(1)
    last = [chunk.choices[0] for chunk in chat(client, **asked, stream=True)][-1]
    assert last.cribsheet == choice.cribsheet


async def test_the_async_client_works_too(live):
    async with live.aopenai() as client:
        reply = await client.chat.completions.create(model="oslo", messages=ASK)
        assert reply.choices[0].message.content == "Bob lives in Oslo."
