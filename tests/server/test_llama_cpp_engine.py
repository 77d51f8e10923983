"""Our server over llama.cpp: the same routes and the same words, and what it refuses by the field's name."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from corpus import QUESTION
from live import serving

from cribsheet import CompressedKnowledgeLLM
from cribsheet.asking.llama_cpp.llm import LlamaStream
from cribsheet.asking.llama_cpp.served import AsyncLlamaStream, ServedLlamaCpp
from cribsheet.cli import run
from cribsheet.errors import EngineError

QUESTIONS = [QUESTION, "Where is Alice?", "Who speaks Greek?", "What is 40213?"]


@pytest.fixture(scope="module")
def kb(qwen3, qwen3_sheet):
    return CompressedKnowledgeLLM(qwen3, qwen3_sheet)


@pytest.fixture(scope="module")
def llama(qwen3, qwen3_sheet, qwen3_gguf):
    pytest.importorskip("xllamacpp", reason="the extra llama-cpp is not installed")
    served = ServedLlamaCpp.load(qwen3_sheet, gguf=qwen3_gguf, slots=2, tokenizer=qwen3.tokenizer)
    yield served
    served.close()


@pytest.fixture(scope="module")
def live(llama):
    with serving({"staff": llama}, max_tokens=8) as server:
        yield server


def asked(question, **more):
    return {"model": "staff", "messages": [{"role": "user", "content": question}], "temperature": 0, **more}


def words(kb, question):
    return kb.ask(question, max_tokens=8, evidence=False).text.rstrip("\ufffd")


def test_chats_and_completions_say_what_our_engine_says_more_of_them_than_there_are_slots(live, kb):
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda each: live.post(**asked(each)).json(), QUESTIONS * 3))
    said = [reply["choices"][0]["message"]["content"].rstrip("\ufffd") for reply in replies]
    assert said == [words(kb, question) for question in QUESTIONS] * 3
    assert replies[0]["usage"]["prompt_tokens_details"]["cached_tokens"] == 96
    reply = live.post("/v1/completions", model="staff", prompt=QUESTION, temperature=0, n=2).json()
    assert [each["text"].rstrip("\ufffd") for each in reply["choices"]] == [words(kb, QUESTION)] * 2


def test_a_stream_is_the_answer_in_pieces_and_who_leaves_frees_the_slot(live, kb):
    client = live.openai()
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(**asked(QUESTION), stream=True)
        if chunk.choices
    ]
    assert len([piece for piece in pieces if piece]) > 2
    assert "".join(pieces).rstrip("\ufffd") == words(kb, QUESTION)
    for _ in range(5):
        with client.chat.completions.create(**asked(QUESTION, max_tokens=200), stream=True) as stream:
            next(iter(stream))
    assert live.post(**asked(QUESTION)).status_code == 200


@pytest.mark.parametrize(
    ("field", "said", "named"),
    [
        ({"cribsheet": {"evidence": True}}, "without evidence and sources", "cribsheet.evidence"),
        ({"cribsheet": {"sources": 2}}, "without evidence and sources", "cribsheet.evidence"),
        ({"response_format": {"type": "json_object"}}, "without forms", "response_format"),
        ({"logit_bias": {"5": 1}}, "without logit_bias", "logit_bias"),
        ({"logprobs": True}, "without logprobs", "logprobs"),
        ({"frequency_penalty": 1.0}, "without penalties", "frequency_penalty"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {}}}]}, "without tools", "tools"),
        ({"cribsheet": {"mode": "hybrid"}}, "without modes with passages", "cribsheet.mode"),
        ({"messages": [{"role": "user", "content": "word " * 4000}]}, "room=", "messages"),
    ],
    ids=["evidence", "sources", "form", "bias", "logprobs", "penalty", "tools", "mode", "too long"],
)
def test_what_llama_cpp_does_not_do_is_refused_by_the_fields_name(live, field, said, named):
    reply = live.post(**{**asked(QUESTION), **field})
    told = reply.json()["error"]
    assert reply.status_code == 400 and said in told["message"] and told["param"] == named


def test_settings_that_ask_for_nothing_are_no_fault(live, kb):
    nothing = {"frequency_penalty": 0, "presence_penalty": 0.0, "logprobs": False, "cribsheet": {"evidence": False}}
    reply = live.post(**asked(QUESTION, tools=[], response_format={"type": "text"}, **nothing))
    assert reply.json()["choices"][0]["message"]["content"].rstrip("\ufffd") == words(kb, QUESTION)


def test_what_a_sheet_holds_is_told_as_for_our_engine(live, qwen3_sheet):
    told = live.http().get("/v1/sheets/staff").json()
    assert (told["digest"], told["tokens"]) == (qwen3_sheet.manifest.digest, 96) and told["room"] > 100


def test_an_answer_that_takes_too_long_gets_504(llama):
    with serving({"staff": llama}, answer_seconds=0.001) as server:
        reply = server.post(**asked(QUESTION, max_tokens=200))
    assert reply.status_code == 504


def test_what_nobody_waits_for_any_longer_is_not_asked():
    asked = []

    def said(name):
        asked.append(name)
        yield {"content": name, "stop": True}

    async def streamed():
        loop, busy = asyncio.get_running_loop(), threading.Event()
        with ThreadPoolExecutor(1) as threads:
            threads.submit(busy.wait)
            gone, _, kept = (
                AsyncLlamaStream(LlamaStream(said(name), 0, 0, timeout), timeout, loop, threads)
                for name, timeout in (("gone", None), ("late", 0.0), ("kept", None))
            )
            gone.cancel()
            busy.set()
            assert [text async for text in kept] == ["kept"]

    asyncio.run(streamed())
    assert asked == ["kept"]


def test_a_closed_one_answers_no_more(qwen3, qwen3_sheet, qwen3_gguf, llama):
    served = ServedLlamaCpp.load(qwen3_sheet, gguf=qwen3_gguf, tokenizer=qwen3.tokenizer)
    served.close()
    with pytest.raises(EngineError, match=r"This llama\.cpp was closed"):
        served.astream_many(QUESTION, 1, loop=None)


def test_the_command_says_which_options_go_together(tmp_path, capsys):
    for flags, said in (
        (["--engine", "llama.cpp"], "--engine llama.cpp and --gguf FILE go together"),
        (["--gguf", "a.gguf"], "--engine llama.cpp and --gguf FILE go together"),
        (["--slots", "4"], "--slots is of llama.cpp"),
        (["--engine", "llama.cpp", "--gguf", "a.gguf", "--dtype", "bfloat16"], "--dtype is of our own engine"),
        (["--engine", "llama.cpp", "--gguf", "a.gguf", "--ray"], "--ray is of our own engine"),
    ):
        assert run(["serve", "a.sheet", *flags]) == 2
        assert said in capsys.readouterr().err
