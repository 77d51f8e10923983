"""A GGUF is the sheet's model, or is refused by what differs."""

from __future__ import annotations

import logging

import pytest
import torch
from gguf_files import plain_backbone, save_gguf, settings_of, tensors_of, write_gguf

from cribsheet.engines.gguf import Gguf
from cribsheet.engines.same_model import check_same_model
from cribsheet.errors import MismatchError, ModelError
from cribsheet.model.fingerprint import fingerprint
from cribsheet.prompt.template import ChatLayout
from cribsheet.testing import tiny_backbone


def print_of(backbone):
    return fingerprint(backbone, ChatLayout(backbone.tokenizer))


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_the_file_of_the_same_weights_is_taken_in_any_type(engine_family, kind, tmp_path, caplog):
    file = write_gguf(tmp_path / "same.gguf", settings_of(engine_family), tensors_of(engine_family, kind))
    with caplog.at_level(logging.WARNING):
        check_same_model(Gguf.open(file), print_of(engine_family))
    assert not caplog.records


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"block_count": 4}, "by its number of layers: the sheet has 3, the file 4"),
        ({"attention__head_count": 8}, "by its number of heads: the sheet has 4, the file 8"),
        ({"attention__head_count_kv": 4}, "by its number of key/value heads: the sheet has 2, the file 4"),
        ({"attention__key_length": 32}, "by its head size: the sheet has 16, the file 32"),
        ({"rope__dimension_count": 8}, "by its share of a head that turns: the sheet has 16, the file 8"),
        ({"rope__freq_base": 5e5}, "by its rotary base: the sheet has 10000.0, the file 500000.0"),
        ({"rope__scaling__type": "linear"}, "by its rotary scaling: the sheet has none, the file linear"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_another_shape_is_refused_by_name(qwen3, changed, said, tmp_path):
    file = save_gguf(qwen3, tmp_path / "other.gguf", **changed)
    with pytest.raises(MismatchError, match=f"another model than the sheet's .*tiny-qwen3.*{said}.*Give the GGUF"):
        check_same_model(Gguf.open(file), print_of(qwen3))


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


def test_channels_that_a_file_turns_at_other_speeds_are_refused(tmp_path):
    backbone = tiny_backbone("llama", rope_parameters=LLAMA3)
    plain = 10000.0 ** -(torch.arange(0, backbone.head_size, 2) / backbone.head_size)
    factors = plain / backbone.inv_freqs[0]  # as transformers has them
    assert factors.min() == 1 and factors.max() == pytest.approx(8) and ((factors > 1.01) & (factors < 7.99)).any()
    settings, tensors = settings_of(backbone), tensors_of(backbone)
    for name, value, refused in (
        ("same", factors, None),
        ("other", factors.clamp(max=4.0), r"rotary scaling of the pair of channels 3: the sheet has 4.78\d*, the"),
        ("fewer", factors[:6], "number of channels that turn: the sheet has 16, the file 12"),
    ):
        file = Gguf.open(write_gguf(tmp_path / name, settings, tensors | {"rope_freqs.weight": value.contiguous()}))
        if refused is None:
            check_same_model(file, print_of(backbone))
        else:
            with pytest.raises(MismatchError, match=f"by its {refused}"):
                check_same_model(file, print_of(backbone))
    before = print_of(backbone).model_copy(update={"rotary_scaling": {}})  # a sheet that does not say
    check_same_model(file, before)


def test_a_file_that_knows_fewer_tokens_is_refused(qwen3, tmp_path):
    settings = settings_of(qwen3)
    for name in ("tokens", "token_type"):
        settings[f"tokenizer.ggml.{name}"] = settings[f"tokenizer.ggml.{name}"][:-1]
    file = Gguf.open(write_gguf(tmp_path / "a.gguf", settings, tensors_of(qwen3)))
    size = len(qwen3.tokenizer)
    with pytest.raises(MismatchError, match=f"by its vocabulary: the sheet has {size} tokens, the file {size - 1}"):
        check_same_model(file, print_of(qwen3))
    check_same_model(file, print_of(qwen3).model_copy(update={"vocabulary": 0}))  # a sheet that does not say


def test_another_family_is_refused_by_name(qwen3, tmp_path):
    file = save_gguf(plain_backbone("llama"), tmp_path / "llama.gguf")
    with pytest.raises(MismatchError, match="by its model family: the sheet has qwen3, the file llama"):
        check_same_model(Gguf.open(file), print_of(qwen3))


def test_one_part_of_a_divided_file_is_refused_with_the_way_out(qwen3, tmp_path):
    """Its tensors are some of the model's, so the places of values that are compared would be others."""
    settings, tensors = settings_of(qwen3) | {"split.count": 2}, tensors_of(qwen3)
    part = write_gguf(tmp_path / "a-00001-of-00002.gguf", settings, dict(list(tensors.items())[:5]))
    with pytest.raises(ModelError, match=r"is one part of 2, .*`llama-gguf-split`"):
        check_same_model(Gguf.open(part), print_of(qwen3))


def test_other_weights_of_the_same_shape_are_refused_by_the_tensor_that_differs(engine_family, tmp_path):
    other = plain_backbone(engine_family.config.model_type, seed=1)
    file = save_gguf(other, tmp_path / "other.gguf")
    with pytest.raises(MismatchError, match=r"by its weights \(.*(norm|bias).*\): the sheet has [\d.-]+, the file"):
        check_same_model(Gguf.open(file), print_of(engine_family))


def test_a_head_that_the_file_has_of_its_own_changes_nothing(tmp_path):
    """Where embeddings are the head too, quantised files hold it twice."""
    tied = plain_backbone("qwen3")
    tied.model.config.tie_word_embeddings = True
    tied.model.lm_head.weight = tied.model.model.embed_tokens.weight
    tensors = tensors_of(tied)
    file = write_gguf(tmp_path / "tied.gguf", settings_of(tied), tensors)
    check_same_model(Gguf.open(file), print_of(tied))
    both = {**tensors, "output.weight": tensors["token_embd.weight"]}
    check_same_model(Gguf.open(write_gguf(tmp_path / "both.gguf", settings_of(tied), both)), print_of(tied))


def test_a_file_by_which_nothing_can_be_known_is_warned_of(qwen3, tmp_path, caplog):
    file = save_gguf(qwen3, tmp_path / "blocks.gguf")
    whole = Gguf.open(file)
    blocks = {name: type(each)(each.shape, 8, each.start) for name, each in whole.tensors.items()}
    with caplog.at_level(logging.WARNING):
        check_same_model(Gguf(file, whole.values, blocks), print_of(qwen3))
    assert "cannot be known" in caplog.text
