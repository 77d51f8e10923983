"""`CribsheetLlamaCppLLM`: LlamaIndex over a sheet in llama.cpp says what llama.cpp says."""

from __future__ import annotations

import pytest
from corpus import DOCUMENTS, FEW_SHOT, QUESTION
from gguf_files import plain_backbone, save_gguf
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.llms.cribsheet import CribsheetLlamaCppLLM

from cribsheet import CompressedKnowledgeLLM, RequestError, SheetError
from cribsheet.asking.llama_cpp.llm import OPTIONS

pytest.importorskip("xllamacpp", reason="the extra llama-cpp is not installed")


@pytest.fixture(scope="module")
def tiny_kb():
    return CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=plain_backbone("qwen3"), budget=96, for_engines=True)


@pytest.fixture(scope="module")
def gguf(tiny_kb, tmp_path_factory):
    return save_gguf(tiny_kb.backbone, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def served(tiny_kb, gguf):
    served = tiny_kb.as_llama_index_llm(engine="llama.cpp", gguf=gguf, room=1024, threads=1, max_tokens=8)
    yield served
    served.llama.close()


def test_its_answers_are_the_engines_with_usage_and_without_sources(served, tiny_kb):
    expected = tiny_kb.ask(QUESTION, max_tokens=8, evidence=False).text
    completion = served.complete(QUESTION)
    response = served.chat([ChatMessage(role="user", content=QUESTION)])
    assert completion.text == response.message.content == expected
    for raw in (completion.raw, response.raw):
        assert (raw["engine"], raw["sources"]) == ("llama.cpp", [])
        assert raw["usage"]["prompt_tokens_details"] == {"cached_tokens": 96}


def test_it_streams_both_ways(served):
    expected = served.complete(QUESTION).text
    pieces = list(served.stream_complete(QUESTION))
    assert pieces[-1].text == expected == "".join(piece.delta for piece in pieces)
    responses = list(served.stream_chat([ChatMessage(role="user", content=QUESTION)]))
    assert responses[-1].message.content == expected and responses[-1].raw["finish_reason"] == "length"


async def test_it_answers_in_an_event_loop(served):
    assert (await served.acomplete(QUESTION)).text == served.complete(QUESTION).text
    messages = [ChatMessage(role="user", content=QUESTION)]
    assert (await served.achat(messages)).message.content == served.chat(messages).message.content


def test_it_stands_behind_a_chat_engine(served):
    assert str(SimpleChatEngine.from_defaults(llm=served).chat(QUESTION)) == served.complete(QUESTION).text


def test_what_it_is_stands_in_its_metadata(served):
    told = served.metadata
    assert (told.context_window, told.num_output, told.is_function_calling_model) == (1024, 8, False)
    assert told.model_name == "tiny-qwen3" and set(OPTIONS) <= set(CribsheetLlamaCppLLM.model_fields)


def test_from_paths_it_starts_with_the_first_question(tiny_kb, gguf, tmp_path):
    tiny_kb.backbone.tokenizer.save_pretrained(tmp_path / "tokenizer")
    sheet = tiny_kb.save(tmp_path / "a.sheet")
    llm = CribsheetLlamaCppLLM(sheet, gguf, model=str(tmp_path / "tokenizer"), threads=1)
    assert llm.complete(QUESTION, max_tokens=8).text == tiny_kb.ask(QUESTION, max_tokens=8, evidence=False).text
    llm.llama.close()


def test_what_is_missing_or_unknown_is_refused(served):
    with pytest.raises(SheetError, match="Give sheet= and gguf=, the paths"):
        CribsheetLlamaCppLLM("a.sheet")
    with pytest.raises(RequestError, match="CribsheetLlamaCppLLM does not know retriever; use "):
        CribsheetLlamaCppLLM("a.sheet", "a.gguf", retriever="bm25")
    with pytest.raises(RequestError, match="temperature is -1"):
        CribsheetLlamaCppLLM("a.sheet", "a.gguf", temperature=-1)
    with pytest.raises(RequestError, match=r"llama.cpp answers without logprobs"):
        served.complete(QUESTION, logprobs=2)
