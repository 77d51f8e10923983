"""A sheet in llama.cpp: the words of our own engine, one slot or many, and what it refuses."""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from corpus import DOCUMENTS, FEW_SHOT, QUESTION, ZERO_SHOT
from gguf_files import plain_backbone, save_gguf, settings_of, tensors_of, write_gguf

from cribsheet import CompressedKnowledgeLLM, build_sheet, save_sheet
from cribsheet.asking import options
from cribsheet.asking.llama_cpp import llm as served
from cribsheet.asking.llama_cpp.llm import LlamaCpp
from cribsheet.cli import run
from cribsheet.errors import (
    EngineError,
    IntegrationError,
    MismatchError,
    ModelError,
    RequestError,
    SheetError,
    WindowError,
)
from cribsheet.testing import save_tiny_model, tiny_tokenizer

SAID = (QUESTION, "Quito.", "And Bob?")
ROLES = ("user", "assistant", "user")
QUESTIONS = [QUESTION, "Where is Alice?", "Who speaks Greek?", "What is 40213?", "Who repairs clocks, and when?"]


@pytest.fixture(scope="session")
def wheel():
    return pytest.importorskip("xllamacpp", reason="the extra llama-cpp is not installed")


@pytest.fixture(scope="module")
def kb(qwen3, qwen3_sheet):
    return CompressedKnowledgeLLM(qwen3, qwen3_sheet)


@pytest.fixture(scope="module")
def llama(wheel, kb, qwen3_gguf):
    with kb.in_llama_cpp(qwen3_gguf, slots=3, room=256, threads=1) as llama:
        yield llama


def words(kb, question, **settings):
    """What our engine says; half a character at the end, which llama.cpp does not tell, is left out."""
    return kb.ask(question, evidence=False, **settings).text.rstrip("\ufffd")


def told(llama, question, **settings):
    return llama.ask(question, **settings).text.rstrip("\ufffd")


def first_tie(kb, question, text, **settings):
    """How much more probable than the next our own token was where another text goes on otherwise, as a logarithm."""
    answer, length = kb.ask(question, evidence=False, logprobs=2, **settings), 0
    for token in answer.logprobs:
        length += len(token.token)
        if answer.text[:length] != text[:length]:
            return token.top[0][1] - token.top[1][1]
    return 0.0


def test_answers_are_those_of_our_own_engine_word_for_word(wheel, engine_family, tmp_path):
    """Families whose files hold keys in another order too. Of two tokens that are as probable, either may come."""
    sheet = build_sheet(engine_family, DOCUMENTS, FEW_SHOT, budget=96, for_engines=True)
    kb = CompressedKnowledgeLLM(engine_family, sheet)
    conversation = [{"role": role, "content": text} for role, text in zip(ROLES, SAID, strict=True)]
    asked, same = [*QUESTIONS, conversation], 0
    with kb.in_llama_cpp(save_gguf(engine_family, tmp_path / "model.gguf"), threads=1) as llama:
        for question in asked:
            theirs, ours = llama.ask(question, max_tokens=12), kb.ask(question, max_tokens=12, evidence=False)
            assert (theirs.usage, theirs.finish_reason) == (ours.usage, ours.finish_reason)
            assert theirs.mode == "sheet" and theirs.sources == ()
            if theirs.text.rstrip("\ufffd") == ours.text.rstrip("\ufffd"):
                same += 1
            else:
                assert first_tie(kb, question, theirs.text, max_tokens=12) < 0.01
    assert same >= len(asked) - 1


def test_without_the_sheet_it_says_something_else(wheel, kb, qwen3_gguf):
    """A control: the placeholders' own keys are not the sheet's."""
    prompt = kb.question_tokens(QUESTION).tolist()
    with kb.in_llama_cpp(qwen3_gguf, threads=1) as llama:
        with llama.server.complete(0, [300, 301, 302], {"n_predict": 1}) as said:  # somebody else's prompt
            list(said)
        with llama.server.complete(0, [*llama.prefix, *prompt], {"n_predict": 12, "temperature": 0}) as said:
            text = "".join(piece["content"] for piece in said)
    assert text.strip() != words(kb, QUESTION, max_tokens=12).strip()


def test_a_stream_is_the_answer_in_pieces_and_frees_its_slot_when_it_is_left(llama, kb):
    with llama.stream(QUESTION, max_tokens=12) as stream:
        pieces = list(stream)
    assert len(pieces) > 3 and "".join(pieces) == stream.answer.text == words(kb, QUESTION, max_tokens=12)
    assert 0 < stream.answer.first_token_seconds <= stream.answer.seconds
    for _ in range(4):  # more often than there are slots
        with llama.stream(QUESTION, max_tokens=200) as stream:
            assert next(iter(stream))
        with pytest.raises(RequestError, match="not complete; iterate over the stream first"):
            _ = stream.answer


def test_many_at_once_on_few_slots_never_see_each_other(llama, kb):
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda question: told(llama, question, max_tokens=10), QUESTIONS * 2))
    assert answers == [words(kb, question, max_tokens=10) for question in QUESTIONS] * 2


def test_two_sheets_at_once_answer_each_for_itself(wheel, llama, kb, qwen3, qwen3_gguf):
    sheet = build_sheet(qwen3, DOCUMENTS[:2], ZERO_SHOT, budget=64, for_engines=True)
    with LlamaCpp(sheet, qwen3_gguf, tokenizer=qwen3.tokenizer, threads=1) as other:
        for question in QUESTIONS[:2]:
            assert told(llama, question, max_tokens=10) == words(kb, question, max_tokens=10)
            expected = words(CompressedKnowledgeLLM(qwen3, sheet), question, max_tokens=10)
            assert told(other, question, max_tokens=10) == expected


def test_stop_strings_and_a_schema_bind_the_answer(llama, kb):
    whole = words(kb, QUESTION, max_tokens=12)
    mark = whole[4:7]
    assert llama.ask(QUESTION, max_tokens=12, stop=mark).text == whole[: whole.index(mark)]
    schema = {"enum": ["Oslo", "Quito"]}
    assert json.loads(llama.ask(QUESTION, json_schema=schema).text) in schema["enum"]
    seeded = [llama.ask(QUESTION, temperature=1.0, seed=5, max_tokens=8).text for _ in range(2)]
    assert seeded[0] == seeded[1]


def test_what_it_does_not_have_is_refused_by_name(llama):
    with pytest.raises(RequestError, match=r"llama.cpp answers without logprobs, retriever; use max_tokens, .*here"):
        llama.ask(QUESTION, logprobs=1, retriever="bm25")
    for name in ("frequency_penalty", "presence_penalty"):
        with pytest.raises(RequestError, match=f"{name} is -0.5, and llama.cpp would count the ids that stand for"):
            llama.ask(QUESTION, **{name: -0.5})
        assert llama.ask(QUESTION, max_tokens=4, **{name: 0.0}).text
    with pytest.raises(RequestError, match="max_tokens is 0"):
        llama.ask(QUESTION, max_tokens=0)
    with pytest.raises(WindowError, match=r"takes \d+ tokens, and there is room=256 .* behind the sheet of 96"):
        llama.ask("word " * 300)
    assert llama.count_tokens(QUESTION) < 100
    with pytest.raises(EngineError, match="not complete after timeout=1e-09 seconds"):
        llama.ask(QUESTION, timeout=1e-9)
    assert set(served.SETTINGS) == set(options.LlamaCppSampling.__annotations__)
    assert set(served.OPTIONS) == set(options.LlamaCppOptions.__annotations__)


def test_room_ends_where_the_models_window_does(wheel, qwen3, qwen3_sheet, tmp_path):
    file = save_gguf(qwen3, tmp_path / "small.gguf", context_length=160)
    with LlamaCpp(qwen3_sheet, file, tokenizer=qwen3.tokenizer, threads=1) as llama:
        assert llama.room == 160 - 96
        answer = llama.ask(QUESTION, max_tokens=1000)
        assert answer.usage.total_tokens <= 160 and answer.finish_reason in ("length", "stop")


def test_a_slot_that_lost_the_sheet_answers_nothing_and_gets_it_again(wheel, qwen3, qwen3_sheet, qwen3_gguf, kb):
    with LlamaCpp(qwen3_sheet, qwen3_gguf, tokenizer=qwen3.tokenizer, threads=1) as llama:
        expected = llama.ask(QUESTION, max_tokens=8).text
        with llama.server.complete(0, [300, 301, 302], {"n_predict": 1}) as said:  # somebody else's prompt
            list(said)
        with pytest.raises(EngineError, match="lost the sheet of this slot; ask again"):
            llama.ask(QUESTION, max_tokens=8)
        assert llama.ask(QUESTION, max_tokens=8).text == expected


def test_closing_ends_it_and_removes_what_was_exported(wheel, kb, qwen3_gguf):
    llama = kb.in_llama_cpp(qwen3_gguf)
    folder = llama.folder
    assert [path.name for path in folder.iterdir()] == ["sheet.state"] and "230 tokens became 96" in repr(llama)
    llama.close()
    llama.close()
    assert not folder.exists()
    with pytest.raises(EngineError, match="was closed; open the sheet in it again"):
        llama.ask(QUESTION)


def test_who_waits_for_a_slot_waits_no_longer_than_the_timeout(wheel, kb, qwen3_gguf):
    with kb.in_llama_cpp(qwen3_gguf, room=256, threads=1) as llama:
        with llama.stream(QUESTION, max_tokens=100) as stream:
            next(iter(stream))
            with pytest.raises(EngineError, match=r"No slot .* became free within timeout=0\.2 seconds"):
                llama.ask(QUESTION, timeout=0.2)
        assert llama.ask(QUESTION, max_tokens=4, timeout=60).usage.completion_tokens


def test_an_answer_that_is_cut_by_closing_is_an_error(wheel, kb, qwen3_gguf):
    llama = kb.in_llama_cpp(qwen3_gguf, room=1024, threads=1)
    pieces = iter(llama.stream(QUESTION, max_tokens=900))
    next(pieces)
    began = time.monotonic()
    llama.close()
    assert time.monotonic() - began < 5  # it does not wait for somebody to read the rest
    with pytest.raises(EngineError, match="was closed"):
        list(pieces)


def test_another_model_tokenizer_or_sheet_is_refused_before_llama_cpp_starts(qwen3, qwen3_sheet, qwen3_gguf, tmp_path):
    other = save_gguf(plain_backbone("qwen3", seed=1), tmp_path / "other.gguf")
    with pytest.raises(MismatchError, match="by its weights"):
        LlamaCpp(qwen3_sheet, other, tokenizer=qwen3.tokenizer)
    with pytest.raises(MismatchError, match=r"made with another chat template: the sheet has .*, the tokenizer given"):
        LlamaCpp(qwen3_sheet, qwen3_gguf, tokenizer=tiny_tokenizer(qwen3.tokenizer.chat_template + " "))
    with pytest.raises(ModelError, match="There is no GGUF file"):
        LlamaCpp(qwen3_sheet, tmp_path / "nothing.gguf", tokenizer=qwen3.tokenizer)
    with pytest.raises(SheetError, match="build it again with for_engines=True"):
        LlamaCpp(build_sheet(qwen3, DOCUMENTS, FEW_SHOT, rate=2), qwen3_gguf, tokenizer=qwen3.tokenizer)
    small = save_gguf(qwen3, tmp_path / "small.gguf", context_length=96)
    with pytest.raises(WindowError, match=r"takes 96 positions, and the window of .*small.gguf' has 96; build it at"):
        LlamaCpp(qwen3_sheet, small, tokenizer=qwen3.tokenizer)
    settings = settings_of(qwen3) | {"tokenizer.ggml.tokens": ["a", "b"]}
    few = write_gguf(tmp_path / "few.gguf", settings, tensors_of(qwen3))
    with pytest.raises(MismatchError, match="knows 2 tokens and the sheet's tokenizer 1000"):
        LlamaCpp(qwen3_sheet, few, tokenizer=qwen3.tokenizer)
    with pytest.raises(RequestError, match="slots is 0; use a whole number of at least 1"):
        LlamaCpp(qwen3_sheet, qwen3_gguf, tokenizer=qwen3.tokenizer, slots=0)


def test_a_file_that_llama_cpp_cannot_load_is_said_to_be(wheel, qwen3, qwen3_sheet, qwen3_gguf, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(qwen3_gguf.read_bytes()[:-40])
    with pytest.raises(EngineError, match=r"llama.cpp cannot load '.*cut.gguf' for 1 slots of 2144 positions"):
        LlamaCpp(qwen3_sheet, cut, tokenizer=qwen3.tokenizer)


def test_without_the_extra_the_way_to_it_is_named(kb, qwen3_gguf, monkeypatch):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(IntegrationError, match=r"pip install 'cribsheet\[llama-cpp\]'"):
        kb.in_llama_cpp(qwen3_gguf)


def test_an_engine_that_is_not_there_is_refused(kb):
    with pytest.raises(RequestError, match=r"engine is 'ollama' and gguf 'a'; use engine='llama.cpp'"):
        kb.as_chat_model(engine="ollama", gguf="a")
    with pytest.raises(RequestError, match="engine is None and gguf 'a'"):
        kb.as_llama_index_llm(gguf="a")


def test_the_command_asks_llama_cpp_without_loading_weights(wheel, tmp_path, capsys):
    folder = save_tiny_model(tmp_path / "model", "qwen3")
    kb = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=folder, budget=96, for_engines=True)
    sheet, expected = save_sheet(kb.sheet, tmp_path / "a.sheet"), words(kb, QUESTION, max_tokens=8)
    gguf = save_gguf(kb.backbone, tmp_path / "model.gguf")
    kb.close()
    (folder / "model.safetensors").unlink()  # only the tokenizer is needed
    asked = ["ask", str(sheet), QUESTION, "--gguf", str(gguf), "--max-tokens", "8"]
    assert run(asked) == 0
    assert capsys.readouterr().out == expected + "\n"
    assert run([*asked, "--stream"]) == 0
    assert capsys.readouterr().out == expected + "\n"
    assert run([*asked, "--retriever", "bm25"]) == 2
    assert "--retriever is of our own engine" in capsys.readouterr().err
    assert run([*asked, "--sources"]) == 2
    assert "--sources is of our own engine" in capsys.readouterr().err


def test_the_pocket_model_says_what_it_says_here(wheel, tmp_path):
    """A model that learnt to answer, and ends its answers by itself."""
    kb = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model="pocket", rate=2, for_engines=True)
    asked = [f"Where does {name} live?" for name in ("Alice Moreno", "Bob Smith", "Clara Berg", "Hugo Ali")]
    ours = [kb.ask(question, max_tokens=12, evidence=False) for question in asked]
    assert {answer.finish_reason for answer in ours} == {"stop"}
    with kb.in_llama_cpp(save_gguf(kb.backbone, tmp_path / "pocket.gguf"), threads=1) as llama:
        theirs = [llama.ask(question, max_tokens=12) for question in asked]
    assert [answer.text for answer in theirs] == [answer.text for answer in ours]
    assert {answer.finish_reason for answer in theirs} == {"stop"}


@pytest.mark.slow
def test_a_real_model_says_the_same_in_llama_cpp(wheel, tmp_path):
    """CRIBSHEET_GGUF_MODEL: a folder of a model that can talk; CRIBSHEET_GGUF: its file in float16 or finer."""
    model, gguf = (os.environ.get(name) for name in ("CRIBSHEET_GGUF_MODEL", "CRIBSHEET_GGUF"))
    if not model or not gguf or not Path(gguf).is_file():
        pytest.skip("CRIBSHEET_GGUF_MODEL and CRIBSHEET_GGUF name no model and its GGUF")
    kb = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=model, rate=2, for_engines=True)
    asked = [*QUESTIONS, *(f"Where does {name} live?" for name in ("Alice Moreno", "Bob Smith", "Clara Berg"))]
    ours = [words(kb, question, max_tokens=24) for question in asked]
    with kb.in_llama_cpp(gguf) as llama:
        assert [llama.ask(question, max_tokens=24).text for question in asked] == ours
