"""A web service in miniature: a real server on loopback that streams answers to clients who come and go."""

from __future__ import annotations

import asyncio
import time

import pytest
from langchain_core.messages import HumanMessage

from cribsheet import CompressedKnowledgeLLM

NEVER_ENDING = {"max_tokens": 4000}


@pytest.fixture
def engine(writer: CompressedKnowledgeLLM):
    return writer.session.loaded.engine


async def served(llm, host="127.0.0.1"):
    """A server that streams an answer to each line, and its port; as FastAPI does, it ends a task whose client left."""

    async def handle(reader, out):
        asked = (await reader.readline()).decode()

        async def answer():
            async for chunk in llm.astream(asked):
                out.write(chunk.text.encode() or b" ")
                await out.drain()

        writing = asyncio.create_task(answer())
        gone = asyncio.create_task(reader.read())
        await asyncio.wait([writing, gone], return_when=asyncio.FIRST_COMPLETED)
        for task in (writing, gone):
            task.cancel()
        await asyncio.gather(writing, gone, return_exceptions=True)
        out.close()

    server = await asyncio.start_server(handle, host, 0)
    return server, server.sockets[0].getsockname()[1]


async def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def test_clients_who_leave_free_the_engine_and_those_who_stay_get_their_answers(writer, engine):
    server, port = await served(writer.as_chat_model(**NEVER_ENDING))
    async with server:
        leaving = []
        for _ in range(6):
            reader, out = await asyncio.open_connection("127.0.0.1", port)
            out.write(b"Who?\n")
            assert await reader.read(1)
            leaving.append(out)
        assert len(engine._started()) == 6  # in one batch
        short = asyncio.create_task(writer.as_chat_model(max_tokens=5).ainvoke("And who else?"))
        for out in leaving:
            out.close()
        assert (await short).usage_metadata["output_tokens"] <= 5
        await until(lambda: not engine._started() and not engine._batches)


async def test_a_timeout_of_the_caller_frees_the_engine(writer, engine):
    llm = writer.as_chat_model(**NEVER_ENDING)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await llm.ainvoke("Who?")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            async for _ in llm.astream("Who?"):
                pass
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await llm.agenerate([[HumanMessage("Who?")]], n=3)
    await until(lambda: not engine._started() and not engine._batches)


async def test_one_caller_s_mistake_or_departure_is_nobody_else_s(writer):
    llm = writer.as_chat_model(max_tokens=6)
    calls = [asyncio.create_task(llm.ainvoke("Who?", **({"banana": 1} if n == 3 else {}))) for n in range(12)]
    await asyncio.sleep(0)
    calls[5].cancel()
    made = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(made[3], ValueError) and isinstance(made[5], asyncio.CancelledError)
    assert len({each.text for n, each in enumerate(made) if n not in (3, 5)}) == 1
