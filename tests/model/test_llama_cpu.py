"""Passes with weights laid out for a CPU give what the models' own layers give, over every kind of cache layer."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from cribsheet import CompressedKnowledgeLLM
from cribsheet.attention.cache import PrefixLayer, cache_of, prefix_cache
from cribsheet.attention.prefix import LayerPrefix
from cribsheet.engine.pool import LoadedModel
from cribsheet.model import llama_cpu
from cribsheet.model.backbone import Backbone
from cribsheet.model.llama_cpu import LlamaPass, chosen_dtype, errors, may_be_copied, padded_rows, parameters
from cribsheet.model.llama_weights import BOUND
from cribsheet.testing import save_tiny_model, tiny_backbone

FULL = {"sliding_window": None, "layer_types": ["full_attention"] * 3, "use_sliding_window": False}
OWN = {"llama": {}, "mistral": {}, "qwen2": FULL, "qwen3": {}}


def in_bfloat16(family="llama", **settings):
    """A model in bfloat16 whose norms and biases are not ones and zeros."""
    backbone = tiny_backbone(family, **(OWN[family] | settings))
    generator = torch.Generator().manual_seed(4)
    for name, weight in backbone.model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            weight.data += torch.randn(weight.shape, generator=generator) / 3
    backbone.model.to(torch.bfloat16)
    return backbone


@pytest.fixture(scope="module")
def can_be_laid_out():
    try:
        LlamaPass(in_bfloat16().plain_weights())
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        pytest.skip(f"this processor or torch has no such products: {error}")


def own_step(backbone):
    return lambda ids, positions, layers, keep: backbone.step(ids, positions, cache_of(layers), keep)


@pytest.mark.parametrize("family", OWN)
def test_a_pass_is_a_pass_of_the_models_own_layers(family, can_be_laid_out):
    backbone = in_bfloat16(family)
    found = errors(LlamaPass(backbone.plain_weights()), own_step(backbone))
    assert max(found.values()) < 0.02, found


@pytest.mark.parametrize("family", OWN)
def test_in_float32_it_differs_by_rounding_alone(family, can_be_laid_out):
    backbone = in_bfloat16(family)
    backbone.model.float()
    found = errors(LlamaPass(backbone.plain_weights()), own_step(backbone))
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([4, 2])])
def test_logits_are_those_of_the_tokens_that_were_named(keep, can_be_laid_out):
    backbone = in_bfloat16()
    backbone.model.float()
    shape = (2, 1, backbone.head_size)
    layers = [LayerPrefix(torch.ones(shape), torch.ones(shape))] * backbone.num_layers
    given = torch.arange(6)[None], torch.arange(1, 7)[None], [PrefixLayer(layer, 1) for layer in layers]
    got = LlamaPass(backbone.plain_weights()).step(*given, keep)
    wanted = backbone.step(*given[:2], prefix_cache(layers, 1), 6)
    wanted = wanted[:, -keep:] if isinstance(keep, int) else wanted[:, keep]
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("part", ["_normed", "_turned", "_product"])
def test_a_planted_bug_in_a_pass_is_seen(part, can_be_laid_out, monkeypatch):
    backbone = in_bfloat16()
    right = getattr(llama_cpu, part)
    monkeypatch.setattr(llama_cpu, part, lambda *given: right(*given) * 1.3)
    assert max(errors(LlamaPass(backbone.plain_weights()), own_step(backbone)).values()) > BOUND


@pytest.mark.parametrize("guide", [0, 1, 17])
@pytest.mark.parametrize("counts", [(), (30, 7)])
def test_a_read_leaves_in_its_layers_what_the_models_own_read_does(counts, guide, can_be_laid_out):
    backbone = in_bfloat16()
    random = torch.Generator().manual_seed(8)
    shape = (sum(counts), backbone.head_size) if counts else (2, 30, backbone.head_size)
    pair = [torch.randn(shape, generator=random).bfloat16() for _ in "kv"]
    prefix = [LayerPrefix(*pair, None, counts)] * backbone.num_layers
    ids, rest = torch.arange(30, 70), torch.arange(5, 5 + guide)
    wanted = backbone.read(prefix, 30, ids, rest)
    backbone.may_copy = True
    got = backbone.read(prefix, 30, ids, rest)
    assert backbone.laid_out() is not None
    for name in ("chunk_keys", "chunk_values", "guide_queries", "guide_lse"):
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=0.05, rtol=0.05)


def test_answers_are_those_of_the_models_own_layers(can_be_laid_out):
    texts = []
    for copies in (False, True):
        backbone = in_bfloat16()
        backbone.may_copy = copies
        with CompressedKnowledgeLLM.build("Alice lives in Lisbon. Bob lives in Oslo.", model=backbone, rate=1) as kb:
            assert (backbone.laid_out() is not None) == copies
            one = kb.ask("Where does Bob live?", max_tokens=8).text
            several = [each.text for each in kb.ask_many("Where does Alice live now?", 3, max_tokens=8, seed=1)]
        texts.append((one, several))
    assert texts[0] == texts[1]


def test_changed_weights_are_laid_out_again(can_be_laid_out):
    backbone = in_bfloat16()
    backbone.may_copy = True
    before = backbone.laid_out()
    assert backbone.laid_out() is before
    with torch.no_grad():
        backbone.model.lm_head.weight.mul_(2)
    after = backbone.laid_out()
    assert after is not before
    backbone.may_copy, backbone._laid_out = False, None
    assert max(errors(after, own_step(backbone)).values()) < 0.02 < max(errors(before, own_step(backbone)).values())


def add_adapter(model):
    """What LoRA does: another module stands where a product was."""
    attention = model.model.layers[0].self_attn
    attention.q_proj = torch.nn.Sequential(attention.q_proj, torch.nn.Linear(*[attention.q_proj.out_features] * 2))
    model.to(torch.bfloat16)


def in_another_parameter(model):
    model.model.norm.weight = torch.nn.Parameter(2 * model.model.norm.weight.detach())


def other_data(model):
    model.lm_head.weight.data = 2 * model.lm_head.weight.data


CHANGES = {
    "data in place, which nobody counts": lambda model: model.lm_head.weight.data.mul_(2),
    "other data": other_data,
    "another parameter": in_another_parameter,
    "an adapter": add_adapter,
    "a hook": lambda model: model.model.layers[0].mlp.register_forward_hook(lambda module, given, out: 2 * out),
    "another type": lambda model: model.float(),
    "a longer vocabulary": lambda model: model.resize_token_embeddings(1003, mean_resizing=False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_answers_as_its_own_layers_do(change, can_be_laid_out):
    backbone = in_bfloat16()
    backbone.may_copy = True

    def logits():
        shape = (2, 1, backbone.head_size)
        layers = [LayerPrefix(torch.ones(shape).to(backbone.dtype), torch.ones(shape).to(backbone.dtype))] * 3
        return backbone.step(torch.arange(9)[None], torch.arange(1, 10)[None], prefix_cache(layers, 1), 4).float()

    before = logits()
    assert backbone.laid_out() is not None
    CHANGES[change](backbone.model)
    after = logits()
    backbone.may_copy, backbone._laid_out = False, None
    own = logits()
    assert before.shape != own.shape or not torch.allclose(before, own, atol=0.02, rtol=0.02)
    torch.testing.assert_close(after, own, atol=0.02, rtol=0.02)


def test_products_of_all_numbers_of_rows_are_made_by_those_of_few(can_be_laid_out):
    asked = range(1, 4097)
    made = [padded_rows(rows) for rows in asked]
    assert all(rows <= more <= 1.125 * rows for rows, more in zip(asked, made, strict=True))
    assert len(set(made)) <= 80 and made == sorted(made)
    random = torch.Generator().manual_seed(3)
    weight, bias = (torch.randn(*shape, generator=random).bfloat16() for shape in ((24, 16), (24,)))
    product = llama_cpu.PackedLinear((weight, bias))
    for shape in ((1, 1, 16), (1, 37, 16), (5, 7, 16)):
        rows = torch.randn(*shape, generator=random).bfloat16()
        torch.testing.assert_close(product(rows), torch.nn.functional.linear(rows, weight, bias), atol=0.05, rtol=0.02)


def test_what_is_laid_out_is_counted_with_the_weights(can_be_laid_out):
    backbone = in_bfloat16()
    once = backbone.weight_bytes
    assert once == sum(weight.nbytes for weight in backbone.model.parameters())
    backbone.may_copy = True
    assert 1.5 * once < backbone.weight_bytes <= 2 * once
    assert backbone.laid_out() is not None
    assert 1.5 * once < backbone.weight_bytes <= 2 * once


def test_gradients_go_through_the_models_own_layers(can_be_laid_out):
    backbone = in_bfloat16()
    backbone.may_copy = True
    shape = (2, 4, backbone.head_size)
    keys = torch.randn(shape).bfloat16().requires_grad_()
    layers = [LayerPrefix(keys, torch.randn(shape).bfloat16())] * backbone.num_layers
    logits = backbone.step(torch.arange(3)[None], torch.arange(4, 7)[None], prefix_cache(layers, 4), grad=True)
    logits.float().sum().backward()
    assert keys.grad is not None and keys.grad.abs().sum() > 0


def test_a_model_that_cannot_be_laid_out_keeps_its_own_layers(caplog, monkeypatch):
    def refuse(weight):
        raise RuntimeError("no such products here")

    monkeypatch.setattr(llama_cpu, "laid_out", refuse)
    backbone = in_bfloat16()
    backbone.may_copy = True
    with caplog.at_level(logging.WARNING):
        assert backbone.laid_out() is None
    assert "no such products here" in caplog.text
    assert not backbone.may_copy


def config_of(**changed):
    plain = {
        "model_type": "llama", "hidden_act": "silu", "dtype": torch.bfloat16, "hidden_size": 2048, "head_dim": 64,
        "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256, "max_position_embeddings": 8192, "sliding_window": None,
    }  # fmt: skip
    return SimpleNamespace(**(plain | changed))


def test_bfloat16_is_chosen_only_where_it_is_faster_and_rounds_no_weight(monkeypatch):
    for faster in (False, True):
        monkeypatch.setattr(llama_cpu, "_is_faster", lambda width, inner, faster=faster: faster)
        assert chosen_dtype(config_of()) == (torch.bfloat16 if faster else torch.float32)
    small = {"num_hidden_layers": 0, "vocab_size": 900}
    quantised = {"quantization_config": {"quant_method": "awq"}}
    for changed in ({"dtype": torch.float32}, {"model_type": "gemma2"}, small, quantised):
        assert chosen_dtype(config_of(**changed)) == torch.float32
    assert parameters(config_of()) == pytest.approx(1.24e9, rel=0.01)  # Llama 3.2 1B


def test_what_a_user_says_is_what_is_computed_in(tmp_path, monkeypatch, can_be_laid_out):
    monkeypatch.setattr(llama_cpu, "LEAST_PARAMETERS", 0)
    monkeypatch.setattr(llama_cpu, "_is_faster", lambda width, inner: True)
    folder = save_tiny_model(tmp_path / "model", dtype=torch.bfloat16)
    assert Backbone.load(folder, device="cpu", dtype="float32").dtype == torch.float32
    said = Backbone.load(folder, device="cpu", dtype="bfloat16")
    assert said.dtype == torch.bfloat16 and not said.may_copy  # who asks for it may want the memory
    chosen = Backbone.load(folder, device="cpu")
    assert chosen.dtype == torch.bfloat16 and chosen.may_copy
    loaded = LoadedModel.get(folder, device="cpu")
    assert LoadedModel.get(folder, device="cpu", dtype="bfloat16") is loaded
    assert LoadedModel.get(folder, device="cpu", dtype="float32") is not loaded


def test_a_small_model_is_laid_out_in_float32_unless_its_user_says_a_type(tmp_path, can_be_laid_out):
    folder = save_tiny_model(tmp_path / "model")
    said, unsaid = (Backbone.load(folder, device="cpu", dtype=dtype) for dtype in ("float32", None))
    assert said.dtype == unsaid.dtype == torch.float32
    assert said.laid_out() is None and unsaid.laid_out() is not None
    texts = []
    for backbone in (said, unsaid):
        with CompressedKnowledgeLLM.build("Alice lives in Lisbon. " * 40, model=backbone, rate=1) as kb:
            texts.append([kb.ask(question, max_tokens=12).text for question in ("Where does Alice live?", "Who?")])
    assert texts[0] == texts[1]


def test_of_larger_models_only_those_in_bfloat16_are_held_twice():
    assert may_be_copied(config_of(), torch.bfloat16) and not may_be_copied(config_of(), torch.float32)
    small = config_of(num_hidden_layers=2, vocab_size=900, intermediate_size=64, hidden_size=128)
    assert may_be_copied(small, torch.float32)
    assert not may_be_copied(SimpleNamespace(**vars(small) | {"model_type": "gemma2"}), torch.float32)


def test_timing_says_yes_or_no_and_once(can_be_laid_out):
    llama_cpu._is_faster.cache_clear()
    assert llama_cpu._is_faster(64, 128) in (True, False)
    assert llama_cpu._is_faster(64, 128) in (True, False)
    assert llama_cpu._is_faster.cache_info().hits == 1


def test_timing_waits_for_no_other_thread_and_leaves_threads_and_numbers_as_they_were(can_be_laid_out, monkeypatch):
    seen, times = set(), llama_cpu._product

    def watched(*given):
        seen.add(torch.get_num_threads())
        return times(*given)

    monkeypatch.setattr(llama_cpu, "_product", watched)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(7)
    wanted = torch.randn(3)
    torch.manual_seed(7)
    try:
        llama_cpu._is_faster.__wrapped__(64, 128)
        assert seen == {1} and torch.get_num_threads() == 2
        assert torch.equal(torch.randn(3), wanted)
    finally:
        torch.set_num_threads(before)
