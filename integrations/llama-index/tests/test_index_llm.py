"""`CribsheetLLM` answers as the sheet does, in all eight forms, and refuses what it cannot do."""

from __future__ import annotations

import asyncio
import json

import pytest
from index_corpus import ANSWER, QUESTION
from llama_index.core.base.llms.types import (
    AudioBlock,
    CachePoint,
    CitableBlock,
    ImageBlock,
    TextBlock,
    ThinkingBlock,
)
from llama_index.core.llms import ChatMessage
from llama_index.llms.cribsheet import CribsheetLLM

from cribsheet.errors import RequestError, SheetError

ASKED = [ChatMessage(role="user", content=QUESTION)]


def test_all_eight_forms_give_the_answer_of_the_sheet(kb, llm):
    expected = kb.ask(QUESTION, max_tokens=12).text
    assert expected == ANSWER

    async def native() -> list[str]:
        streamed = [response async for response in await llm.astream_chat(ASKED)]
        completed = [response async for response in await llm.astream_complete(QUESTION)]
        return [
            (await llm.acomplete(QUESTION)).text,
            (await llm.achat(ASKED)).message.content,
            streamed[-1].message.content,
            completed[-1].text,
            "".join(response.delta for response in streamed),
            "".join(response.delta for response in completed),
        ]

    streamed, completed = list(llm.stream_chat(ASKED)), list(llm.stream_complete(QUESTION))
    answers = [
        llm.complete(QUESTION).text,
        llm.chat(ASKED).message.content,
        streamed[-1].message.content,
        completed[-1].text,
        "".join(response.delta for response in streamed),
        "".join(response.delta for response in completed),
        *asyncio.run(native()),
    ]
    assert answers == [expected] * 12
    assert streamed[0].message.content == streamed[0].delta != expected


def test_usage_is_in_raw_and_holds_only_plain_values(kb, llm):
    whole, last = llm.chat(ASKED), list(llm.stream_chat(ASKED))[-1]
    assert last.raw == whole.raw == llm.complete(QUESTION).raw == json.loads(json.dumps(whole.raw))
    usage = whole.raw["usage"]
    assert usage["prompt_tokens"] == kb.sheet.length + kb.count_tokens(QUESTION)
    assert usage["prompt_tokens_details"] == {"cached_tokens": kb.sheet.length}
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert whole.raw["sheet"] == kb.sheet.manifest.digest and whole.raw["finish_reason"] == "stop"


def test_settings_of_a_call_go_before_those_of_the_llm(llm):
    assert len(llm.complete(QUESTION, max_tokens=1).text) < len(llm.complete(QUESTION).text)
    assert llm.complete(QUESTION, stop=["it"]).text == "Qu"
    drawn = {llm.complete(QUESTION, temperature=3.0, seed=7, max_tokens=6).text for _ in range(2)}
    assert len(drawn) == 1


def test_a_form_binds_the_answer(llm):
    assert llm.complete(QUESTION, choices=["Oslo in Norway", "Quito in Ecuador"]).text == "Quito in Ecuador"
    assert llm.chat(ASKED, regex="[A-Z]{3}").message.content.isupper()


def test_the_roles_of_other_frameworks_are_understood(llm):
    asked = [
        ChatMessage(role="system", content="Answer briefly."),
        ChatMessage(role="user", content="Where does Clara Berg live?"),
        ChatMessage(role="model", content="Cairo"),
        ChatMessage(role="assistant", content=""),
        ChatMessage(role="user", blocks=[TextBlock(text="Where does"), TextBlock(text="Hugo Ali live?")]),
    ]
    assert llm.chat(asked).message.content == ANSWER


def test_a_system_prompt_is_told(kb):
    told = kb.as_llama_index_llm(max_tokens=4, system_prompt="Answer briefly.")
    from llama_index.core.prompts import PromptTemplate

    assert told.predict(PromptTemplate("{q}"), q=QUESTION).startswith(ANSWER)
    assert told._get_messages(PromptTemplate("{q}"), q=QUESTION)[0].content == "Answer briefly."


def test_thoughts_and_cache_marks_are_not_told_and_citable_texts_are(llm):
    blocks = [
        ThinkingBlock(content="Somebody asks."),
        CachePoint(cache_control={"type": "ephemeral"}),
        CitableBlock(title="Staff", source="staff.txt", content=[TextBlock(text="Hugo Ali lives in Quito.")]),
        TextBlock(text=QUESTION),
    ]
    assert llm.chat([ChatMessage(role="user", blocks=blocks)]).message.content == ANSWER


@pytest.mark.parametrize("block", [ImageBlock(image=b"\x89PNG"), AudioBlock(audio=b"RIFF")], ids=["image", "audio"])
def test_what_is_not_text_is_refused_by_name(llm, block):
    with pytest.raises(RequestError, match=f"type '{block.block_type}', but the model reads text only"):
        llm.chat([ChatMessage(role="user", blocks=[TextBlock(text="What is this?"), block])])


def test_alternatives_are_reported_when_asked_for(llm):
    response = llm.chat(ASKED, logprobs=2)
    assert [len(token) for token in response.logprobs] == [3] * response.raw["usage"]["completion_tokens"]
    assert "".join(token[0].token for token in response.logprobs) == ANSWER
    assert llm.chat(ASKED).logprobs is None


def test_metadata_tells_what_is_left_beside_the_sheet(kb, llm):
    told = llm.metadata
    assert told.context_window == kb.room == kb.backbone.window - kb.sheet.length
    assert (told.num_output, told.is_chat_model, told.is_function_calling_model) == (12, True, True)
    assert told.model_name == "pocket"
    assert kb.as_llama_index_llm(max_tokens=10**6).metadata.num_output == kb.room // 2
    assert llm.tokenize(QUESTION) == kb.backbone.tokenizer(QUESTION, add_special_tokens=False)["input_ids"]


def test_unknown_settings_are_refused(kb, llm):
    with pytest.raises(RequestError, match=r"CribsheetLLM does not know max_new_tokens; use .*max_tokens"):
        kb.as_llama_index_llm(max_new_tokens=5)
    with pytest.raises(RequestError, match="messages_to_prompt"):
        kb.as_llama_index_llm(messages_to_prompt=str)
    with pytest.raises(RequestError, match="max_new_tokens"):
        llm.complete(QUESTION, max_new_tokens=5)
    with pytest.raises(RequestError, match="temperature is -1"):
        kb.as_llama_index_llm(temperature=-1)
    with pytest.raises(RequestError, match="completion has no place for calls"):
        llm.complete(QUESTION, tools=[{"name": "add"}])
    with pytest.raises(SheetError, match="No sheet was given"):
        CribsheetLLM()


def test_what_goes_wrong_is_raised_at_once_in_every_form(llm):
    async def fails() -> None:
        with pytest.raises(RequestError, match="question is empty"):
            await llm.acomplete(" ")
        with pytest.raises(RequestError, match="question is empty"):
            await llm.astream_chat([ChatMessage(role="user", content="")])

    asyncio.run(fails())
    with pytest.raises(RequestError, match="question is empty"):
        llm.stream_chat([ChatMessage(role="user", content="")])
    with pytest.raises(RequestError, match=r"ends? with"):
        llm.chat([*ASKED, ChatMessage(role="assistant", content=ANSWER)])


def test_a_prompt_wrapper_is_used_unless_the_prompt_is_formatted(kb):
    wrapped = kb.as_llama_index_llm(max_tokens=4, completion_to_prompt=lambda prompt: f"Where does {prompt} live?")
    assert wrapped.complete("Hugo Ali").text == ANSWER == wrapped.complete(QUESTION, formatted=True).text
