"""The tiny models that our users' tests stand on."""

from __future__ import annotations

import pytest
import torch
from corpus import DOCUMENTS
from reference import full_context_answer, full_context_logits

from cribsheet import CompressedKnowledgeLLM
from cribsheet.model.backbone import Backbone
from cribsheet.model.support import FAMILIES
from cribsheet.testing import echo_backbone, save_tiny_model, tiny_backbone, tiny_config, tiny_tokenizer

IDS = torch.arange(100, 130)


def test_a_tiny_model_is_the_same_every_time_and_another_for_another_seed():
    first, second, other = tiny_backbone(), tiny_backbone(), tiny_backbone(seed=1)
    assert torch.equal(full_context_logits(first, IDS), full_context_logits(second, IDS))
    assert not torch.equal(full_context_logits(first, IDS), full_context_logits(other, IDS))


def test_making_one_leaves_the_random_numbers_of_the_caller_alone():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    tiny_backbone()
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_change_far_back_changes_what_a_tiny_model_says(name):
    """Their attention is far from uniform, so that a wrong key shows."""
    backbone = tiny_backbone(name)
    changed = IDS.clone()
    changed[2] = 77
    assert full_context_answer(backbone, IDS, 20) != full_context_answer(backbone, changed, 20)


def test_settings_reach_the_configuration():
    assert tiny_config("llama", num_hidden_layers=5).num_hidden_layers == 5
    assert tiny_backbone(num_key_value_heads=4).kv_heads == 4


def test_half_precision_leaves_the_rotary_frequencies_in_float32():
    backbone = tiny_backbone(dtype=torch.bfloat16)
    assert backbone.dtype == torch.bfloat16
    rotary, expected = (each.model.base_model.rotary_emb for each in (backbone, tiny_backbone()))
    assert rotary.inv_freq.dtype == torch.float32 and torch.equal(rotary.inv_freq, expected.inv_freq)


def test_the_tokenizer_tells_turns_apart_and_loses_no_text():
    tokenizer = tiny_tokenizer()
    text = "Zoë 漢字 👩‍👩‍👧\n\nlives"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    turns = [{"role": "user", "content": "Where?"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "<|bos|><|user|>Where?<|end|><|assistant|>"
    )
    assert len(tokenizer) == 1000 and tiny_tokenizer(None).chat_template is None


def test_a_saved_tiny_model_loads_as_any_other(tmp_path):
    backbone = Backbone.load(save_tiny_model(tmp_path / "m", "qwen3"), device="cpu")
    assert torch.equal(full_context_logits(backbone, IDS), full_context_logits(tiny_backbone("qwen3"), IDS))
    assert backbone.tokenizer.chat_template == tiny_tokenizer().chat_template


def test_an_unknown_family_is_refused_with_those_that_exist():
    with pytest.raises(ValueError, match="There is no tiny model of family 'gpt2'; use one of llama, "):
        tiny_backbone("gpt2")


@pytest.mark.parametrize(
    "answer",
    [
        "Oslo.",
        "Bob lives in Oslo.",
        "no no no, no and no",
        "Zoë 漢字 👩‍👩‍👧",
        "two\nlines\n\n  indented",
        "a" * 300,
        "é è é è é",
    ],
)
def test_the_echo_model_says_what_it_was_told_and_ends(answer):
    kb = CompressedKnowledgeLLM.build(DOCUMENTS, model=echo_backbone(answer), rate=2)
    first = kb.ask("Where does Bob live?")
    assert (first.text, first.finish_reason) == (answer, "stop")
    assert kb.ask("And who?", temperature=1.0, seed=1).text == answer
    pieces = list(kb.stream("Again?"))
    assert "".join(pieces) == answer and (len(pieces) > 1) == (len(set(answer.split())) > 1)


def test_an_echo_of_nothing_is_refused():
    with pytest.raises(ValueError, match="an empty answer; give it something to say"):
        echo_backbone("")
