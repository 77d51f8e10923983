"""`ChatCribsheetLlamaCpp`: a chain over a sheet in llama.cpp says what llama.cpp says."""

from __future__ import annotations

import json

import pytest
from corpus import DOCUMENTS, FEW_SHOT, QUESTION
from gguf_files import plain_backbone, save_gguf
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_cribsheet import ChatCribsheetLlamaCpp
from pydantic import BaseModel

from cribsheet import CompressedKnowledgeLLM, RequestError
from cribsheet.asking.llama_cpp.llm import OPTIONS
from cribsheet.testing import save_tiny_model

pytest.importorskip("xllamacpp", reason="the extra llama-cpp is not installed")


@pytest.fixture(scope="module")
def kb():
    return CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=plain_backbone("qwen3"), budget=96, for_engines=True)


@pytest.fixture(scope="module")
def gguf(kb, tmp_path_factory):
    return save_gguf(kb.backbone, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def chat(kb, gguf):
    chat = kb.as_chat_model(engine="llama.cpp", gguf=gguf, slots=2, room=256, threads=1, max_tokens=8)
    yield chat
    chat.llama.close()


def test_its_answer_is_the_engines_with_usage_and_without_sources(chat, kb):
    message = chat.invoke(QUESTION)
    assert message.text == chat.llama.ask(QUESTION, max_tokens=8).text
    assert message.text == kb.ask(QUESTION, max_tokens=8, evidence=False).text
    told = message.response_metadata
    assert (told["engine"], told["sources"], told["finish_reason"]) == ("llama.cpp", [], "length")
    assert message.usage_metadata["input_token_details"] == {"cache_read": 96}
    assert message.usage_metadata["output_tokens"] == 8


def test_it_streams_batches_and_takes_conversations(chat):
    whole = chat.invoke(QUESTION).text
    chunks = list(chat.stream(QUESTION))
    assert "".join(chunk.text for chunk in chunks) == whole and chunks[-1].usage_metadata["output_tokens"] == 8
    assert [message.text for message in chat.batch([QUESTION] * 3)] == [whole] * 3
    talk = [HumanMessage(QUESTION), AIMessage("Quito."), HumanMessage("And Bob?")]
    asked = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "Quito."}]
    said = chat.llama.ask([*asked, {"role": "user", "content": "And Bob?"}], max_tokens=8).text
    assert chat.invoke(talk).text == said


def test_cached_answers_are_those_of_one_sheet_and_one_gguf(kb, gguf, tmp_path):
    folder = save_tiny_model(tmp_path / "model", "qwen3")
    path, keys = str(tmp_path / "a.sheet"), []
    for budget in (96, 80):
        with CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=folder, budget=budget, for_engines=True) as there:
            there.save(path)
            file = save_gguf(there.backbone, tmp_path / "a.gguf")
        lazy = ChatCribsheetLlamaCpp(sheet=path, gguf=str(file), threads=1)
        keys.append(lazy._get_llm_string())
        assert keys[-1] == lazy._get_llm_string()
        lazy.llama.close()
    copied = tmp_path / "copied.gguf"
    copied.write_bytes(gguf.read_bytes())
    for file in (gguf, copied):
        with kb.in_llama_cpp(file, threads=1) as served:
            keys.append(ChatCribsheetLlamaCpp(served=served)._get_llm_string())
    assert len(set(keys)) == 4


async def test_it_answers_in_an_event_loop(chat):
    assert (await chat.ainvoke(QUESTION)).text == chat.invoke(QUESTION).text


def test_it_stands_in_a_chain_with_settings_of_the_call(chat):
    chain = ChatPromptTemplate.from_template("{question}") | chat.bind(max_tokens=3)
    message = chain.invoke({"question": QUESTION})
    assert message.usage_metadata["output_tokens"] == 3
    assert len(chat.invoke(QUESTION, stop=[chat.invoke(QUESTION).text[2:4]]).text) == 2


def test_structured_answers_fit_their_class(chat):
    class Home(BaseModel):
        lives: bool

    model = ChatCribsheetLlamaCpp(served=chat.llama, max_tokens=60)
    home = model.with_structured_output({"enum": [True, False]}).invoke(QUESTION)
    assert home in (True, False)
    with pytest.raises(RequestError, match="calls no tools; use method='json_schema'"):
        chat.with_structured_output(Home, method="function_calling")


def test_from_paths_it_starts_with_the_first_question(kb, gguf, tmp_path):
    kb.backbone.tokenizer.save_pretrained(tmp_path / "tokenizer")
    sheet = kb.save(tmp_path / "a.sheet")
    chat = ChatCribsheetLlamaCpp(
        sheet=str(sheet), gguf=str(gguf), model=str(tmp_path / "tokenizer"), max_tokens=8, threads=1
    )
    assert chat.served is None
    assert chat.invoke(QUESTION).text == kb.ask(QUESTION, max_tokens=8, evidence=False).text
    chat.llama.close()
    assert set(OPTIONS) <= set(ChatCribsheetLlamaCpp.model_fields)


def test_what_is_missing_or_too_much_is_refused(chat):
    with pytest.raises(ValueError, match="Give sheet= and gguf=, the paths"):
        ChatCribsheetLlamaCpp(sheet="a.sheet")
    with pytest.raises(ValueError, match="Both served= and gguf= were given"):
        ChatCribsheetLlamaCpp(served=chat.llama, gguf="a.gguf")
    with pytest.raises(RequestError, match=r"llama.cpp answers without tools"):
        chat.invoke(QUESTION, tools=[{"name": "look"}])
    assert json.loads(json.dumps(chat._identifying_params))["digest"]
