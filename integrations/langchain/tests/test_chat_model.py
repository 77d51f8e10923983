"""What LangChain's users take for granted, on the pocket model over a real sheet."""

from __future__ import annotations

import asyncio
import copy
import gc
import json
import pickle
import threading
import time
from pathlib import Path

import pytest
import torch
from langchain.chat_models import init_chat_model
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import get_usage_metadata_callback
from langchain_core.globals import set_llm_cache
from langchain_core.load import dumps, load
from langchain_core.messages import (
    AIMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
    trim_messages,
)
from langchain_core.runnables import ConfigurableField
from langchain_cribsheet import ChatCribsheet
from langchain_cribsheet.knowledge import Knowledge
from langchain_cribsheet.messages import as_conversation

from cribsheet import CompressedKnowledgeLLM
from cribsheet.errors import CribsheetError, RequestError, SheetError
from cribsheet.prompt.turns import as_turns

WHERE = "Where does Alice Moreno live?"
WHO = "Who does Bob Smith work for?"


@pytest.fixture
def llm(kb: CompressedKnowledgeLLM) -> ChatCribsheet:
    return kb.as_chat_model()


def busy(kb):
    return len(kb.session.loaded.engine._started())


def settle(kb):
    deadline = time.monotonic() + 30
    while (busy(kb) or kb.session.loaded.engine._batches) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert busy(kb) == 0 and kb.session.loaded.engine._batches == []


def test_an_answer_comes_with_usage_and_metadata(llm, kb):
    message = llm.invoke(WHERE)
    assert message.content == "Lisbon"
    usage = message.usage_metadata
    assert usage["input_token_details"] == {"cache_read": kb.sheet.length}
    assert usage["input_tokens"] == kb.sheet.length + llm.get_num_tokens_from_messages([HumanMessage(WHERE)])
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

    def sampled(seed: int) -> str:
        return kb.as_chat_model(temperature=5.0, seed=seed, max_tokens=8).invoke(WHO).content

    drawn = [sampled(seed) for seed in range(4)]
    assert len(set(drawn)) > 1 and sampled(0) == drawn[0]


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
        ([RemoveMessage("y")], {}, "type 'remove' cannot be told"),
        ([HumanMessage([{"type": "image", "url": "x"}])], {}, "'image', but the model reads text only"),
        ([AIMessage([{"type": "image", "url": "x"}]), HumanMessage(WHERE)], {}, "'image', but the model reads"),
        ([HumanMessage(WHERE), AIMessage("Lisbon")], {}, "end with a question"),
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
        kb.as_chat_model().as_tool(args_schema=dict)
    monkeypatch.setenv("CRIBSHEET_SHEET", str(Path("people.sheet").resolve()))
    assert ChatCribsheet(knowledge=kb).invoke(WHERE).content == "Lisbon"  # what is given wins over the environment


def test_copies_share_what_is_loaded_and_other_processes_open_the_file_themselves(here, kb):
    kb.save(here / "pocket.sheet")
    llm = ChatCribsheet(sheet="pocket.sheet")
    assert copy.deepcopy(llm).knowledge is copy.copy(llm).knowledge is llm.knowledge
    there = pickle.loads(pickle.dumps(llm))
    assert there.invoke(WHERE).content == "Lisbon" and there.sheet == "pocket.sheet"
    with pytest.raises(TypeError, match="save the sheet"):
        pickle.dumps(kb.as_chat_model())


def test_a_path_means_the_file_that_is_there_now(here, kb, tmp_path, monkeypatch):
    kb.save(here / "pocket.sheet")
    first = ChatCribsheet(sheet="pocket.sheet")
    key = first._get_llm_string()
    monkeypatch.chdir(tmp_path)
    other = CompressedKnowledgeLLM.build(["Alice Moreno lives in Quito."], "Answer.", rate=1, scorer="recent")
    other.save("pocket.sheet")
    elsewhere = ChatCribsheet(sheet="pocket.sheet")
    assert elsewhere.invoke(WHERE).content == "Quito" and first.invoke(WHERE).content == "Lisbon"
    assert first._get_llm_string() == key != elsewhere._get_llm_string()
    kb.save("pocket.sheet")
    assert ChatCribsheet(sheet="pocket.sheet").invoke(WHERE).content == "Lisbon"
    changed = elsewhere.model_copy(update={"sheet": str(here / "pocket.sheet")})
    assert changed.invoke(WHERE).content == "Lisbon"
    other.close()


def test_a_profile_learns_its_sizes_when_the_model_is_loaded(here):
    llm = ChatCribsheet(sheet="people.sheet", model="fitted")
    if not llm.knowledge.is_open:
        assert "max_input_tokens" not in llm.profile
    llm.invoke("Who?")
    assert llm.profile["max_input_tokens"] == llm.llm.room
    own = ChatCribsheet(sheet="people.sheet", model="fitted", profile={"tool_calling": False})
    own.invoke("Who?")
    assert own.profile == {"tool_calling": False}


def test_histories_are_trimmed_by_the_model_s_own_count(llm):
    history = [SystemMessage("Be brief."), HumanMessage(WHERE), AIMessage("Lisbon"), HumanMessage(WHO)]
    count = llm.get_num_tokens_from_messages
    counts = [count(history[:n]) for n in range(5)]
    assert counts[0] == 0 and counts == sorted(counts)
    limit = count([history[0]]) + count([history[3]])
    kept = trim_messages(history, max_tokens=limit, token_counter=llm, include_system=True, start_on="human")
    assert kept == [history[0], history[3]]
    assert trim_messages(history, max_tokens=1000, token_counter=llm) == history


async def test_answers_come_as_completed_and_batches_longer_than_the_engine_s_queue_are_served(echo):
    llm = echo.as_chat_model()
    assert sorted((n, each.text) for n, each in llm.batch_as_completed(["a", "b"])) == [
        (0, "In Lisbon."),
        (1, "In Lisbon."),
    ]
    assert sorted([n async for n, _ in llm.abatch_as_completed(["a"] * 5)]) == [0, 1, 2, 3, 4]
    short = llm.bind(max_tokens=1)
    assert len(await short.abatch(["Where?"] * 1100)) == 1100


async def test_callbacks_add_usage_up_and_a_model_s_own_cache_serves_every_form(llm):
    with get_usage_metadata_callback() as used:
        first = await llm.ainvoke(WHERE)
        list(llm.stream(WHERE))
    assert used.usage_metadata["pocket"]["total_tokens"] == 2 * first.usage_metadata["total_tokens"]
    cached = llm.model_copy(update={"cache": InMemoryCache()})
    await cached.ainvoke(WHERE)
    for again in (await cached.ainvoke(WHERE), cached.invoke(WHERE)):
        assert again.content == "Lisbon" and again.usage_metadata["total_cost"] == 0


def test_a_stream_falls_back_before_it_began(here, llm):
    steady = ChatCribsheet(sheet="nowhere.sheet").with_fallbacks([llm])
    assert "".join(chunk.text for chunk in steady.stream(WHERE)) == "Lisbon"
    assert llm.with_retry(stop_after_attempt=2).with_config(tags=["x"]).invoke(WHERE).content == "Lisbon"


def test_anthropic_s_shape_of_a_conversation_is_understood(llm):
    call = {"type": "tool_use", "id": "1", "name": "look", "input": {"who": "Alice"}}
    done = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "Lisbon"}]}
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "s"}
    said = AIMessage(
        [thought, {"type": "text", "text": "One moment."}, call],
        tool_calls=[{"name": "look", "args": {"who": "Alice"}, "id": "1"}],
    )
    asked = HumanMessage([{"type": "text", "text": WHERE, "cache_control": {"type": "ephemeral"}}])
    told = [asked, said, HumanMessage([done]), HumanMessage(WHERE)]
    assert "Lisbon" in llm.invoke(told).content


SAYS = {"type": "text", "text": "Hello! Ask me where people live."}
TURNS = {
    "a welcome": AIMessage("Hello! Ask me where people live."),
    "nothing": AIMessage(""),
    "a refusal beside": AIMessage("", additional_kwargs={"refusal": "I will not."}),
    "a refusal": AIMessage([{"type": "refusal", "refusal": "I will not."}]),
    "OpenAI's responses": AIMessage(
        [
            {"type": "reasoning", "summary": [], "id": "rs"},
            {"type": "web_search_call", "id": "ws"},
            {"type": "function_call", "name": "look", "call_id": "1", "arguments": "{}"},
            {"type": "text", "text": "Hello!", "annotations": []},
        ],
        tool_calls=[{"name": "look", "args": {}, "id": "1"}],
    ),
    "OpenAI's functions": AIMessage(
        "", additional_kwargs={"function_call": {"name": "look", "arguments": '{"who": "Alice"}'}}
    ),
    "Anthropic's": AIMessage(
        [
            {"type": "redacted_thinking", "data": "x"},
            {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
            {"type": "web_search_tool_result", "tool_use_id": "s", "content": []},
            {"type": "input_json_delta", "partial_json": "{}"},
            {"type": "text", "text": "Hello!", "citations": []},
        ]
    ),
    "Bedrock's": AIMessage([{"type": "reasoning_content", "reasoning_content": {"text": "Hm."}}, SAYS]),
    "Google's": AIMessage([{"type": "executable_code"}, {"type": "code_execution_result"}, SAYS]),
    "LangChain's own": AIMessage(
        [{"type": "server_tool_call"}, {"type": "server_tool_result"}, {"type": "non_standard", "value": {}}, SAYS]
    ),
}


@pytest.mark.parametrize("turn", TURNS)
def test_a_conversation_may_begin_with_the_model_s_turn_whichever_model_wrote_it(llm, turn):
    for before in ([], [SystemMessage("")], [HumanMessage(WHO)]):
        assert llm.invoke([*before, TURNS[turn], HumanMessage(WHERE)]).content


def test_a_greeting_does_not_change_what_is_answered_and_a_trimmed_history_is_answered(llm):
    assert llm.invoke([TURNS["a welcome"], HumanMessage(WHERE)]).content == "Lisbon"
    assert llm.invoke([SystemMessage(""), HumanMessage(WHERE)]).content == "Lisbon"
    history = [HumanMessage(WHO), AIMessage("Karst Foods"), HumanMessage(WHERE)]
    kept = trim_messages(history, max_tokens=2, token_counter=len)
    assert kept == history[1:] and llm.invoke(kept).content == "Lisbon"
    empty = [SystemMessage(""), *history]
    assert trim_messages(empty, max_tokens=1000, token_counter=llm, include_system=True) == empty


def test_calls_and_results_are_told_whichever_way_they_are_kept(llm):
    call = AIMessage("", additional_kwargs={"function_call": {"name": "look", "arguments": '{"who": "Alice"}'}})
    tool_call = AIMessage("", tool_calls=[{"name": "look", "args": {"who": "Alice"}, "id": "1"}])
    by_function = [HumanMessage(WHO), call, FunctionMessage("Lisbon", name="look")]
    by_tool = [HumanMessage(WHO), tool_call, ToolMessage("Lisbon", tool_call_id="1")]
    told = [as_turns(as_conversation(messages)) for messages in (by_function, by_tool)]
    assert told[0] == told[1] and '"who": "Alice"' in told[0][1]["content"] and "look: Lisbon" in told[0][2]["content"]
    assert llm.invoke(by_function).content == llm.invoke(by_tool).content


def test_init_chat_model_knows_no_provider_of_ours():
    with pytest.raises(ValueError, match="cribsheet"):
        init_chat_model("cribsheet:staff")


def test_threads_and_tensors_are_flat_over_a_thousand_calls(echo):
    def held() -> tuple[int, int]:
        settle(echo)
        for thread in threading.enumerate():  # a frame of the engine that has not returned still holds its last step
            if thread.name == "cribsheet-engine":
                thread.join()
        gc.collect()
        return threading.active_count(), sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    llm = echo.as_chat_model()
    llm.batch([WHERE] * 20)
    before = held()
    for _ in range(50):
        llm.batch([WHERE] * 20)
        list(llm.stream(WHO))
    assert held() == before
