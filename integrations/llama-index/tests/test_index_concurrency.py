"""Many at once: answers stay the same, the event loop keeps turning, and whoever leaves frees the engine."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from index_corpus import ANSWER, QUESTION
from llama_index.core.llms import ChatMessage

PLACES = {"Alice Moreno": "Lisbon", "Bob Smith": "Oslo", "Clara Berg": "Cairo", "Hugo Ali": "Quito"}
LONG = [ChatMessage(content="Tell me everything.")]


@pytest.fixture
def endless(kb):
    """Settings of an answer that may not end: its end token is forbidden."""
    return {"max_tokens": 4000, "logit_bias": dict.fromkeys(kb.backbone.eos_ids, -100)}


def free(kb, wanted: int = 0) -> bool:
    """Whether the engine comes to rest, or to so many running answers."""
    engine = kb.session.loaded.engine
    until = time.monotonic() + 10
    while len(engine._started()) != wanted and time.monotonic() < until:
        time.sleep(0.01)
    return len(engine._started()) == wanted


async def test_sixteen_queries_at_once_are_each_answered(engine):
    asked = [name for name in PLACES for _ in range(4)]
    responses = await asyncio.gather(*(engine.aquery(f"Where does {name} live?") for name in asked))
    assert [str(response) for response in responses] == [PLACES[name] for name in asked]
    assert [response.source_nodes[0].text.split(" lives")[0] for response in responses] == asked


def test_threads_may_ask_too(engine):
    asked = [f"Where does {name} live?" for name in PLACES] * 2
    with ThreadPoolExecutor(8) as pool:
        assert [str(response) for response in pool.map(engine.query, asked)] == list(PLACES.values()) * 2


async def test_the_event_loop_is_never_blocked(kb, engine, llm):
    """While an answer is written, other tasks go on; a blocked loop would not turn once."""
    turns = 0

    async def ticker() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    ticking = asyncio.create_task(ticker())
    await engine.aquery(QUESTION)
    asked = turns
    await llm.acomplete(QUESTION, max_tokens=40)
    ticking.cancel()
    assert asked > 20 and turns - asked > 40


def test_closing_a_stream_frees_the_engine(kb, llm, endless):
    stream = llm.stream_chat(LONG, **endless)
    next(stream)
    assert free(kb, 1)
    stream.close()
    assert free(kb)
    unread = llm.stream_chat(LONG, **endless)
    del unread
    gc.collect()
    assert free(kb)


async def test_an_async_stream_that_is_left_frees_the_engine(kb, llm, endless):
    stream = await llm.astream_chat(LONG, **endless)
    async for _ in stream:
        break
    await stream.aclose()
    assert await asyncio.to_thread(free, kb)


async def test_cancelling_a_task_frees_the_engine(kb, llm, endless):
    for coroutine in (llm.achat(LONG, **endless), llm.acomplete(QUESTION, **endless)):
        task = asyncio.create_task(coroutine)
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(free, kb)


async def test_a_streaming_query_that_is_left_midway_frees_the_engine_and_others_go_on(kb, engine):
    streaming = kb.as_query_engine(max_tokens=4000, streaming=True)
    response = await streaming.aquery(QUESTION)
    generator = response.async_response_gen()
    await anext(generator)
    await generator.aclose()
    del response, generator
    gc.collect()
    await asyncio.sleep(0)
    assert str(await engine.aquery(QUESTION)) == ANSWER
    assert await asyncio.to_thread(free, kb)


def test_a_timeout_ends_an_answer(kb, llm, endless):
    with pytest.raises(RuntimeError, match=r"0\.2"):
        llm.complete(QUESTION, timeout=0.2, **endless)
    assert free(kb)


def test_answers_leave_no_threads(kb, llm):
    llm.complete(QUESTION)
    before = threading.active_count()
    for _ in range(20):
        llm.complete(QUESTION, max_tokens=1)
    assert threading.active_count() <= before


def test_answers_are_not_kept(kb, llm):
    from cribsheet.engine.request import Answering

    for _ in range(5):
        llm.complete(QUESTION)
        list(llm.stream_complete(QUESTION))
    assert free(kb)
    gc.collect()
    assert sum(type(each) is Answering for each in gc.get_objects()) <= 1
