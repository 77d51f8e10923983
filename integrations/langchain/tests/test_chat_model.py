"""What LangChain's users take for granted, on the pocket model over a real sheet."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from pathlib import Path

import pytest
import torch
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache
from langchain_core.load import dumps, load
from langchain_core.messages import AIMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.runnables import ConfigurableField
from langchain_cribsheet import ChatCribsheet
from langchain_cribsheet.knowledge import Knowledge
from pydantic import BaseModel, Field

from cribsheet import CompressedKnowledgeLLM
from cribsheet.errors import CribsheetError, RequestError, SheetError

WHERE = "Where does Alice Moreno live?"
WHO = "Who does Bob Smith work for?"


@pytest.fixture
def llm(kb: CompressedKnowledgeLLM) -> ChatCribsheet:
    return kb.as_chat_model()


def busy(kb):
    return len(kb._loaded.engine._started())


def settle(kb):
    deadline = time.monotonic() + 30
    while (busy(kb) or kb._loaded.engine._groups) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert busy(kb) == 0 and kb._loaded.engine._groups == []


def test_an_answer_comes_with_usage_and_metadata(llm, kb):
    message = llm.invoke(WHERE)
    assert message.content == "Lisbon"
    usage = message.usage_metadata
    assert usage["input_token_details"] == {"cache_read": kb.sheet.tokens}
    assert usage["input_tokens"] == kb.sheet.tokens + llm.get_num_tokens_from_messages([HumanMessage(WHERE)])
    meta = message.response_metadata
    assert meta["finish_reason"] == "stop" and meta["model_name"] == "pocket" and meta["model_provider"] == "cribsheet"
    assert meta["sheet"] == kb.sheet.manifest.digest and meta["corpus_tokens"] == kb.sheet.manifest.corpus_tokens


def test_a_system_message_is_read_and_not_dropped(llm):
    plain = llm.invoke([HumanMessage(WHERE)]).usage_metadata["input_tokens"]
    told = llm.invoke([SystemMessage("Be brief."), HumanMessage(WHERE)])
    assert told.usage_metadata["input_tokens"] > plain and told.content == "Lisbon"


def test_settings_bind_per_call_over_fields(kb):
    llm = kb.as_chat_model(max_tokens=1)
    assert llm.invoke(WHO).response_metadata["finish_reason"] == "length"
    assert llm.bind(max_tokens=20).invoke(WHO).content == "Karst Foods"
    assert llm.invoke(WHO, max_tokens=20, stop=[" Foods"]).content == "Karst"
    assert llm.bind(max_tokens=20).invoke(WHO, stop=["Foods"]).response_metadata["finish_reason"] == "stop"
    assert kb.as_chat_model(stop=["Foods"]).invoke(WHO).content == "Karst "
    sampled = [kb.as_chat_model(temperature=3.0, seed=5, max_tokens=8).invoke(WHO).content for _ in range(2)]
    assert sampled[0] == sampled[1] != "Karst Foods"


def test_log_probabilities_are_reported_as_openai_does(llm):
    content = llm.invoke(WHERE, logprobs=True, top_logprobs=2).response_metadata["logprobs"]["content"]
    assert "".join(bytes(each["bytes"]).decode() for each in content).strip() == "Lisbon"
    assert all(each["logprob"] <= 0 and len(each["top_logprobs"]) == 2 for each in content)


def test_several_answers_at_once_are_several_generations(llm):
    made = llm.generate([[HumanMessage(WHERE)]], n=3).generations[0]
    assert [each.text for each in made] == ["Lisbon"] * 3


def test_streams_add_up_to_the_answer_and_leaving_one_frees_the_engine(llm, kb):
    chunks = list(llm.stream(WHO))
    assert len(chunks) > 2 and "".join(chunk.text for chunk in chunks) == "Karst Foods"
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.usage_metadata == llm.invoke(WHO).usage_metadata
    assert whole.response_metadata["model_name"] == "pocket"
    stream = llm.stream("List everything.", max_tokens=2000, logit_bias={5: -100})
    next(stream)
    while not busy(kb):  # the first text comes just before its slot
        time.sleep(0.001)
    stream.close()
    settle(kb)


async def test_cancelling_and_closing_async_work_frees_the_engine(llm, kb):
    endless = llm.bind(max_tokens=3000, logit_bias={5: -100})
    task = asyncio.create_task(endless.ainvoke("List everything."))
    while not busy(kb):
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    settle(kb)
    async for _ in endless.astream("List everything."):
        break
    gc.collect()
    await asyncio.sleep(0.1)
    settle(kb)
    assert (await llm.ainvoke(WHERE)).content == "Lisbon"


async def test_the_event_loop_goes_on_while_many_ask_and_they_share_a_batch(llm, kb):
    ticks, most = 0, 0

    async def tick() -> None:
        nonlocal ticks, most
        while True:
            await asyncio.sleep(0.002)
            ticks, most = ticks + 1, max(most, busy(kb))

    ticking = asyncio.create_task(tick())
    answers = await asyncio.gather(*(llm.ainvoke(WHERE if n % 2 else WHO) for n in range(32)))
    ticking.cancel()
    assert [each.content for each in answers] == ["Karst Foods", "Lisbon"] * 16
    assert most > 8 and ticks > 5


def test_a_batch_is_answered_together_and_keeps_its_order(llm, kb):
    most, stop = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not stop.wait(0.002):
            most = max(most, busy(kb))

    watching = threading.Thread(target=watch)
    watching.start()
    answers = llm.batch([WHERE, WHO] * 12)
    stop.set()
    watching.join()
    assert [each.content for each in answers] == ["Lisbon", "Karst Foods"] * 12 and most > 8
    mixed = llm.batch([WHERE, []], return_exceptions=True)
    assert mixed[0].content == "Lisbon" and isinstance(mixed[1], RequestError)


async def test_events_name_the_model_and_carry_every_token(llm):
    events = [event async for event in llm.astream_events(WHO, version="v2")]
    kinds = [event["event"] for event in events]
    assert kinds[0] == "on_chat_model_start" and kinds[-1] == "on_chat_model_end"
    said = "".join(e["data"]["chunk"].text for e in events if e["event"] == "on_chat_model_stream")
    assert said == "Karst Foods"
    assert events[0]["metadata"]["ls_provider"] == "cribsheet" and events[0]["metadata"]["ls_model_name"] == "pocket"


class Person(BaseModel):
    """Where somebody is."""

    name: str = Field(description="full name")
    age: int | None = None
    tags: list[str] = Field(default_factory=list, max_length=2)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("limit", [60, 120])
def test_structured_answers_are_complete_whatever_the_limit(llm, method, limit):
    bound = llm.with_structured_output(Person, method=method)
    made = [bound.invoke(WHERE, max_tokens=limit), *bound.stream(WHERE, max_tokens=limit)]
    assert made and all(isinstance(each, Person) for each in made)
    raw = llm.with_structured_output(Person.model_json_schema(), method=method, include_raw=True)
    result = raw.invoke(WHERE, max_tokens=limit)
    assert result["parsing_error"] is None and set(result["parsed"]) <= {"name", "age", "tags"}
    assert isinstance(result["raw"], AIMessage)


def test_a_forced_call_fits_its_schema_and_a_result_goes_back_in(llm):
    def lookup(city: str, floor: int) -> str:
        """Look a city up."""
        return f"{city} {floor}"

    message = llm.bind_tools([lookup], tool_choice="any").invoke(WHERE, max_tokens=80)
    (call,) = message.tool_calls
    assert (
        call["name"] == "lookup" and set(call["args"]) == {"city", "floor"} and isinstance(call["args"]["floor"], int)
    )
    assert message.response_metadata["finish_reason"] == "tool_calls"
    done = ToolMessage("Lisbon 3", tool_call_id=call["id"])
    assert llm.bind_tools([lookup]).invoke([HumanMessage(WHERE), message, done]).usage_metadata["output_tokens"] > 0


def test_two_sheets_never_share_a_cached_answer(kb, llm):
    other = CompressedKnowledgeLLM.build(["Alice Moreno lives in Quito."], "Answer.", rate=1, scorer="recent")
    set_llm_cache(InMemoryCache())
    try:
        for _ in range(2):
            assert llm.invoke(WHERE).content == "Lisbon"
            assert other.as_chat_model().invoke(WHERE).content == "Quito"
        first = llm.invoke(WHERE)
        assert first.usage_metadata["total_cost"] == 0  # LangChain's mark of an answer from its cache
        assert "total_cost" not in llm.invoke(WHERE, max_tokens=7).usage_metadata
    finally:
        set_llm_cache(None)
        other.close()


def test_fields_can_be_configured_without_loading_again(here, kb):
    kb.save(here / "pocket.sheet")
    made = ChatCribsheet(sheet="pocket.sheet")
    assert not made.knowledge.is_open
    llm = made.configurable_fields(
        max_tokens=ConfigurableField(id="max_tokens"),
        sheet=ConfigurableField(id="sheet"),
        model=ConfigurableField(id="model"),
    )
    assert llm.with_config(configurable={"max_tokens": 20}).invoke(WHERE).content == "Lisbon"
    opened = made.knowledge.llm
    assert llm.with_config(configurable={"max_tokens": 3}).invoke(WHERE).content == "Lisbon"
    assert made.knowledge.llm is opened and ChatCribsheet(sheet="pocket.sheet").knowledge.llm is opened
    elsewhere = {"sheet": "people.sheet", "model": "fitted"}
    assert llm.with_config(configurable=elsewhere).invoke("Who?").content == "Alice and Bob."
    again = Knowledge.of("people.sheet", "fitted", {})
    assert again.is_open  # the configurable model keeps what it was asked for


@pytest.mark.filterwarnings("ignore:The function `load` is in beta")
def test_it_survives_serialisation_and_copies(here, kb):
    kb.save(here / "pocket.sheet")
    llm = ChatCribsheet(sheet="pocket.sheet", temperature=0.0, api_key="secret", max_retries=2)
    text = dumps(llm)
    assert "secret" not in text
    twin = load(json.loads(text), valid_namespaces=["langchain_cribsheet"], allowed_objects="all")
    assert twin.invoke(WHERE).content == "Lisbon" and twin.knowledge is llm.knowledge
    assert llm.model_copy(update={"max_tokens": 1}).invoke(WHO).response_metadata["finish_reason"] == "length"
    assert json.loads(dumps(kb.as_chat_model()))["type"] == "not_implemented"


def test_a_fallback_takes_over_when_a_question_cannot_be_served(llm):
    with pytest.raises(RequestError):
        llm.invoke("x " * 20000)
    backup = llm | (lambda message: message)
    steady = llm.with_fallbacks([(lambda _: WHERE) | backup])
    assert steady.invoke("x " * 20000).content == "Lisbon"


def test_a_profile_and_tokens_come_from_the_model_itself(llm, kb):
    assert llm.profile["max_input_tokens"] == kb.room and llm.profile["structured_output"]
    assert llm.get_num_tokens("Lisbon Oslo") == len(
        kb.backbone.tokenizer("Lisbon Oslo", add_special_tokens=False)["input_ids"]
    )


def test_a_tool_answers_from_the_sheet(kb):
    tool = kb.as_tool("people", "Knows where people live.")
    assert tool.name == "people" and tool.invoke({"question": WHERE}) == "Lisbon"
    assert asyncio.run(tool.ainvoke({"question": WHO})) == "Karst Foods"


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


@pytest.mark.parametrize(
    ("asked", "settings", "message"),
    [
        ([HumanMessage([IMAGE])], {}, "model reads text only"),
        (
            [HumanMessage([{"type": "audio", "base64": "AA==", "mime_type": "audio/wav"}])],
            {},
            "cannot be told|reads text only",
        ),
        ([ChatMessage("hi", role="robot")], {}, "'robot'; use one of"),
        ([HumanMessage("")], {}, "question is empty"),
        ([], {}, "question is empty"),
        (WHERE, {"banana": 1}, "Unknown sampling settings banana"),
        (WHERE, {"response_format": {"type": "xml"}}, "use the type 'json_schema'"),
        (WHERE, {"tools": [{"name": "a"}], "tool_choice": "b"}, "one of the tools a"),
        (WHERE, {"temperature": -1}, "temperature is -1"),
        (WHERE, {"timeout": 0}, "timeout is 0"),
        (WHERE, {"n": 0}, "n is 0"),
        ("x " * 20000, {}, "leaves"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(llm, asked, settings, message):
    with pytest.raises(RequestError, match=message):
        llm.invoke(asked, **settings)


@pytest.mark.parametrize(
    "schema", [{"type": "object", "not": {}}, {"title": "x", "type": "array", "uniqueItems": True}]
)
def test_a_schema_that_no_grammar_can_enforce_is_refused_when_bound(llm, schema):
    with pytest.raises(RequestError, match="cannot be used"):
        llm.with_structured_output(schema)


def test_mistakes_in_making_one_are_refused(kb, here, monkeypatch):
    monkeypatch.delenv("CRIBSHEET_SHEET", raising=False)
    with pytest.raises(ValueError, match="temprature"):
        ChatCribsheet(sheet="people.sheet", temprature=1)
    with pytest.raises(ValueError, match=r"Both knowledge= and sheet='people\.sheet'"):
        ChatCribsheet(knowledge=kb, sheet="people.sheet")
    with pytest.raises(ValueError, match="knowledge is a int"):
        ChatCribsheet(knowledge=3)
    with pytest.raises(SheetError, match="set CRIBSHEET_SHEET"):
        ChatCribsheet().invoke(WHERE)
    with pytest.raises(SheetError, match=r"There is no sheet 'nowhere\.sheet'"):
        ChatCribsheet(sheet="nowhere.sheet").invoke(WHERE)
    with pytest.raises(CribsheetError, match="made with another"):
        ChatCribsheet(sheet="people.sheet").invoke("Who?", model="pocket")
    with pytest.raises(RequestError, match="args_schema"):
        kb.as_chat_model().as_tool(args_schema=Person)
    monkeypatch.setenv("CRIBSHEET_SHEET", str(Path("people.sheet").resolve()))
    assert ChatCribsheet(knowledge=kb).invoke(WHERE).content == "Lisbon"  # what is given wins over the environment


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_threads_and_tensors_are_flat_over_many_calls(llm, kb, count):
    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    llm.batch([WHERE] * 20)
    settle(kb)
    threads, held = threading.active_count(), tensors()
    for _ in range(count // 20):
        llm.batch([WHERE] * 20)
    settle(kb)
    assert tensors() <= held + 5 and threading.active_count() <= threads
