"""A sheet fits the model that made it and is refused by every other, with the two values side by side."""

from __future__ import annotations

import json

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT, QUESTION
from tokenizers import decoders, normalizers

from cribsheet import CompressedKnowledgeLLM, build_sheet
from cribsheet.errors import MismatchError
from cribsheet.model.fingerprint import Fingerprint, fingerprint, tokenizer_digest
from cribsheet.prompt.template import ChatLayout
from cribsheet.testing import tiny_backbone


def taken(backbone):
    return fingerprint(backbone, ChatLayout(backbone.tokenizer))


@pytest.fixture(scope="module")
def mine():
    return taken(tiny_backbone())


@pytest.fixture(scope="module")
def sheet():
    return build_sheet(tiny_backbone(), DOCUMENTS, FEW_SHOT, rate=3)


def test_the_same_weights_have_the_same_print(mine):
    assert taken(tiny_backbone()) == mine
    mine.check(taken(tiny_backbone()))


def test_a_sheet_that_does_not_say_what_later_ones_do_is_the_same_sheet(sheet):
    told = sheet.manifest.model_dump(mode="json")
    assert told["fingerprint"].pop("vocabulary") == len(tiny_backbone().tokenizer)
    assert told["fingerprint"].pop("rotary_scaling") == {}
    before = type(sheet.manifest).model_validate(told)
    assert before.digest == sheet.manifest.digest and before.fingerprint.vocabulary == 0
    before.fingerprint.check(sheet.manifest.fingerprint)


def another_tokenizer():
    backbone = tiny_backbone()
    backbone.tokenizer.add_tokens(["zzzz"])
    return backbone


def another_template():
    backbone = tiny_backbone()
    backbone.tokenizer.chat_template += " "
    return backbone


def one_changed_tensor():
    backbone = tiny_backbone()
    with torch.no_grad():
        backbone.model.model.layers[2].mlp.up_proj.weight.add_(1e-3)
    return backbone


ROPE = {"rope_type": "default", "rope_theta": 20000.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
OTHERS = {
    "weights": lambda: tiny_backbone(seed=1),
    "weights of one layer": one_changed_tensor,
    "weights in another dtype": lambda: tiny_backbone(seed=1, dtype=torch.bfloat16),
    "model family": lambda: tiny_backbone("mistral"),
    "number of layers": lambda: tiny_backbone(num_hidden_layers=2),
    "number of heads": lambda: tiny_backbone(num_attention_heads=8),
    "number of key/value heads": lambda: tiny_backbone(num_key_value_heads=4),
    "head size": lambda: tiny_backbone(head_dim=32),
    "rotary setting": lambda: tiny_backbone(rope_parameters=ROPE),
    "rotary setting by kind": lambda: tiny_backbone(rope_parameters=LINEAR),
    "tokenizer": another_tokenizer,
    "chat template": another_template,
}


@pytest.mark.parametrize("what", OTHERS)
def test_every_other_model_is_refused_by_what_differs(sheet, what):
    expected = what.split(" of one")[0].split(" in another")[0].split(" by kind")[0]
    with pytest.raises(MismatchError, match=f"This sheet was made with another {expected}: the sheet has ") as refused:
        CompressedKnowledgeLLM(OTHERS[what](), sheet)
    assert "the loaded model has " in str(refused.value)
    assert "Load the model that made it, or build the sheet again." in str(refused.value)


def test_the_two_values_stand_side_by_side(mine):
    with pytest.raises(
        MismatchError, match=r"the sheet has 3 \(model tiny-llama\), the loaded model has 2 \(model tiny"
    ):
        mine.check(taken(tiny_backbone(num_hidden_layers=2)))


def test_a_revision_is_part_of_the_name_in_the_message(mine):
    pinned = mine.model_copy(update={"revision": "abc123", "layers": 9})
    with pytest.raises(MismatchError, match="tiny-llama@abc123"):
        pinned.check(mine)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_weights_in_another_dtype_are_accepted_both_ways(mine, dtype):
    other = taken(tiny_backbone(dtype=dtype))
    mine.check(other)
    other.check(mine)


def test_a_sheet_of_float32_weights_answers_on_bfloat16_weights(sheet):
    kb = CompressedKnowledgeLLM(tiny_backbone(dtype=torch.bfloat16), sheet)
    assert kb.prefix.layers[0].keys.dtype == torch.bfloat16
    assert kb.ask(QUESTION, max_tokens=4).usage.completion_tokens > 0


def test_using_a_tokenizer_does_not_change_its_print(mine):
    backbone = tiny_backbone()
    backbone.tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert taken(backbone).tokenizer == mine.tokenizer


def test_a_print_survives_json(mine):
    assert Fingerprint.model_validate_json(mine.model_dump_json()) == mine


def test_moving_a_folder_does_not_change_a_model(tmp_path, sheet):
    from cribsheet.testing import save_tiny_model

    for name in ("here", "there"):
        CompressedKnowledgeLLM(
            CompressedKnowledgeLLM.build(
                DOCUMENTS, FEW_SHOT, model=save_tiny_model(tmp_path / name), model_options={"device": "cpu"}, rate=8
            ).backbone,
            sheet,
        )


class Coarse(torch.Tensor):
    """As libraries for quantised weights have them: hardly any operation works on it."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def reshape(self, *_):
        raise NotImplementedError

    def detach(self):
        return self

    def dequantize(self):
        return self.as_subclass(torch.Tensor).detach() * 2


def test_quantised_weights_in_a_class_of_their_own_are_part_of_the_print(mine):
    backbone = tiny_backbone()
    weight = backbone.model.lm_head.weight.detach().as_subclass(Coarse)
    named = dict(backbone.model.named_parameters()) | {"lm_head.weight": weight}
    backbone.model.named_parameters = lambda **_: named.items()
    coarse = taken(backbone)
    assert coarse.weights != mine.weights and coarse.weights_probe != mine.weights_probe


def test_a_tokenizer_is_gone_through_once_and_again_after_every_change(monkeypatch):
    tokenizer, read = tiny_backbone().tokenizer, []
    right = json.loads
    monkeypatch.setattr(json, "loads", lambda text: read.append(len(text)) or right(text))
    first = tokenizer_digest(tokenizer)
    assert tokenizer_digest(tokenizer) == first and len(read) == 1
    changes = [
        lambda: tokenizer.add_tokens(["a token that was never there"]),
        lambda: setattr(tokenizer.backend_tokenizer, "normalizer", normalizers.Lowercase()),
        lambda: setattr(tokenizer.backend_tokenizer, "decoder", decoders.Fuse()),
    ]
    found = [first]
    for change in changes:
        change()
        found.append(tokenizer_digest(tokenizer))
    assert len(set(found)) == len(read) == 4
