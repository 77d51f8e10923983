"""Prompts for other engines: the sheet's ids, then exactly the question that our engine reads."""

from __future__ import annotations

import pytest
from corpus import DOCUMENTS, FEW_SHOT, QUESTION

from cribsheet import CompressedKnowledgeLLM, build_sheet, save_sheet
from cribsheet.asking.outside.prompts import Prompts
from cribsheet.asking.outside.vllm import VllmRequests
from cribsheet.engines.placeholders import placeholders
from cribsheet.errors import MismatchError, RequestError
from cribsheet.testing import tiny_tokenizer

CONVERSATION = [
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": "Quito."},
    {"role": "user", "content": "And Bob?"},
]


@pytest.mark.parametrize("guide", ["dropped", "resident"])
@pytest.mark.parametrize("question", [QUESTION, CONVERSATION], ids=["question", "conversation"])
def test_a_prompt_is_the_sheets_ids_and_the_question_that_our_engine_reads(qwen3, guide, question, tmp_path):
    sheet = build_sheet(qwen3, DOCUMENTS, FEW_SHOT, budget=160, for_engines=True, guide=guide)
    kb = CompressedKnowledgeLLM(qwen3, sheet)
    prompts = Prompts(save_sheet(sheet, tmp_path / "a.sheet"), qwen3.tokenizer)
    ids = placeholders(sheet.manifest.digest, sheet.length)
    assert prompts.whole(question) == ids + kb.question_tokens(question).tolist()
    assert (prompts.ids, prompts.vocabulary) == (ids, len(qwen3.tokenizer))


def test_requests_to_vllm_are_greedy_name_the_sheet_and_take_other_settings(qwen3, qwen3_sheet):
    asks = VllmRequests(qwen3_sheet, "staff", model="tiny", tokenizer=qwen3.tokenizer)
    whole = asks.prompts.whole(QUESTION)
    body = asks.completion(QUESTION, max_tokens=9, temperature=0.5)
    assert body["prompt"] == whole and body["kv_transfer_params"] == {"cribsheet": "staff"}
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("tiny", 9, 0.5)
    assert body["repetition_penalty"] == 1.0  # which the model's own settings would make of the ids otherwise
    body = asks.chat(CONVERSATION)
    assert body["kv_transfer_params"] == {"cribsheet": "staff", "prompt_token_ids": asks.prompts.whole(CONVERSATION)}
    assert body["messages"] == CONVERSATION and body["temperature"] == 0.0
    with pytest.raises(RequestError, match="The question is empty"):
        asks.completion(" ")


def test_another_models_tokenizer_is_refused(qwen3_sheet):
    with pytest.raises(MismatchError, match="made with another chat template"):
        Prompts(qwen3_sheet, tiny_tokenizer("llama"))
