"""Steps of few kernels give what the models' own layers give, in Triton's interpreter: `make kernels`."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("make kernels runs these", allow_module_level=True)

from cribsheet.attention import dispatch
from cribsheet.attention.cache import prefix_cache
from cribsheet.attention.prefix import AttentionInputs, LayerPrefix
from cribsheet.attention.recorder import Glance, question_weights
from cribsheet.attention.slots import Rows, SlotLayer
from cribsheet.engine.graphs import fixed_step
from cribsheet.kernels import rotation, step_attention
from cribsheet.kernels import step as step_kernels
from cribsheet.model import backbone as model_backbone
from cribsheet.model import llama_step
from cribsheet.model.llama_read import LlamaRead
from cribsheet.model.llama_read import errors as read_errors
from cribsheet.model.llama_weights import BOUND
from cribsheet.testing import tiny_backbone

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")  # the interpreter's

FULL = {"sliding_window": None, "layer_types": ["full_attention"] * 3, "use_sliding_window": False}
OWN = {"llama": {}, "mistral": {}, "qwen2": FULL, "qwen3": {}}


@pytest.fixture
def kernels_are_used(monkeypatch):
    monkeypatch.setattr(dispatch, "usable", lambda q, kv_heads, softcap=None: softcap is None)


def shaken(family, **settings):
    """A model whose norms and biases are not ones and zeros."""
    backbone = tiny_backbone(family, **(OWN[family] | settings))
    generator = torch.Generator().manual_seed(4)
    for name, weight in backbone.model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            weight.data += torch.randn(weight.shape, generator=generator) / 3
    return backbone


@pytest.mark.parametrize("own", [64, 0], ids=["own products", "torch's products"])
@pytest.mark.parametrize("family", OWN)
def test_a_step_of_few_kernels_is_a_step(family, own, kernels_are_used):
    backbone = shaken(family)
    errors = llama_step.errors(backbone, llama_step.unchecked(backbone, own=own), (1, 3))
    assert max(errors.values()) < 2e-5, errors


@pytest.mark.parametrize("family", OWN)
def test_a_read_of_few_kernels_is_a_read(family, kernels_are_used):
    backbone = shaken(family)
    own = backbone.read_by_own_layers, backbone.step, backbone.tokenizer
    errors = read_errors(LlamaRead(backbone.plain_weights()), *own)
    assert max(errors.values()) < 2e-5, errors


@pytest.mark.parametrize("guide", [0, 1, 17])
@pytest.mark.parametrize("counts", [(), (30, 7)])
def test_a_read_of_few_kernels_takes_heads_of_different_lengths(counts, guide, kernels_are_used, monkeypatch):
    backbone = shaken("llama", hidden_size=72, intermediate_size=150, head_dim=18)
    random = torch.Generator().manual_seed(8)
    shape = (sum(counts), 18) if counts else (2, 30, 18)
    prefix = [LayerPrefix(*(torch.randn(shape, generator=random) for _ in "kv"), None, counts)] * backbone.num_layers
    ids, rest = torch.arange(30, 70), torch.arange(5, 5 + guide)
    wanted = backbone.read(prefix, 30, ids, rest)
    monkeypatch.setattr(model_backbone, "_LEAST", 0)
    backbone.fast_read = LlamaRead(backbone.plain_weights())
    got = backbone.read(prefix, 30, ids, rest)
    for name in ("chunk_keys", "chunk_values", "guide_queries", "guide_lse"):
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("counts", [(), (30, 7)])
@pytest.mark.parametrize("lengths", [(9,), (5, 3)], ids=["whole", "in pieces"])
@pytest.mark.parametrize("batch", [1, 2])
def test_new_tokens_by_few_kernels_are_a_pass_of_the_model(batch, lengths, counts, kernels_are_used):
    backbone = shaken("qwen2")
    random = torch.Generator().manual_seed(9)
    shape = (sum(counts), 16) if counts else (2, 30, 16)
    prefix = [LayerPrefix(*(torch.randn(shape, generator=random) for _ in "kv"), None, counts)] * backbone.num_layers
    ids = torch.randint(20, 900, (batch, sum(lengths)), generator=random)
    places = torch.arange(30, 30 + sum(lengths)).expand(batch, -1)
    runs = (LlamaRead(backbone.plain_weights()).logits, lambda *given: backbone.step(*given)[:, -1])
    found = []
    for run, own in zip(runs, (False, True), strict=True):
        cache = prefix_cache(prefix, 30)
        for piece, at in zip(ids.split(lengths, 1), places.split(lengths, 1), strict=True):
            glance = Glance(cache.layers, backbone.full, [(0, 0)] * batch, [question_weights(piece.shape[1])] * batch)
            logits = run(piece, at, cache if own else cache.layers)
        found.append((logits, glance.masses, [layer.keys[:, :, : layer.length] for layer in cache.layers]))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("part", ["normed", "silu_times", "turned"])
def test_a_planted_bug_in_a_read_is_seen(part, kernels_are_used, monkeypatch):
    backbone = shaken("llama")
    place = rotation if part == "turned" else step_kernels
    right = getattr(place, part)

    def wrong(*given, **named):
        found = right(*given, **named)
        return tuple(each * 1.2 for each in found) if isinstance(found, tuple) else found * 1.2

    monkeypatch.setattr(place, part, wrong)
    own = backbone.read_by_own_layers, backbone.step, backbone.tokenizer
    errors = read_errors(LlamaRead(backbone.plain_weights()), *own)
    assert max(errors.values()) > BOUND


def test_sizes_that_fit_no_tile(kernels_are_used):
    backbone = shaken("llama", hidden_size=72, intermediate_size=150, head_dim=18)
    for own in (64, 0):
        errors = llama_step.errors(backbone, llama_step.unchecked(backbone, own=own), (1, 17))
        assert max(errors.values()) < 2e-5, errors


def test_more_rows_than_fit_a_tile_and_products_of_several_blocks():
    random = torch.Generator().manual_seed(5)
    x, weights = torch.randn(70, 300, generator=random), [torch.randn(n, 300, generator=random) for n in (50, 20, 33)]
    parts = [(weight, torch.randn(len(weight), generator=random)) for weight in weights]
    wanted = torch.cat([x @ weight.t() + bias for weight, bias in parts], 1)
    torch.testing.assert_close(step_kernels.product(x, parts), wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(step_kernels.product(x[:1], parts), wanted[:1], atol=1e-4, rtol=1e-4)
    for swapped in (False, True):
        tile = step_kernels.Tile(rows=32, entries=64, warps=4, swapped=swapped)
        torch.testing.assert_close(step_kernels.product(x, parts, tile=tile), wanted, atol=1e-4, rtol=1e-4)
        gate, up = weights[0], weights[0].flip(0)
        inner = torch.nn.functional.rms_norm(x, (300,), x[0], 1e-5)
        product = torch.nn.functional.silu(inner @ gate.t()) * (inner @ up.t())
        got = step_kernels.gated(x, gate, up, norm=(x[0].contiguous(), 1e-5), tile=tile)
        torch.testing.assert_close(got, product, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("counts", [(), (300, 7), (0, 70)])
@pytest.mark.parametrize("batch", [1, 5])
def test_attention_in_parts_is_attention(batch, counts, kernels_are_used):
    random = torch.Generator().manual_seed(6)
    shape = (sum(counts),) if counts else (2, 150)
    prefix = LayerPrefix(*(torch.randn(*shape, 24, generator=random) for _ in "kv"), None, counts)
    rows = Rows()
    rows.fix(torch.tensor([70, 0, 3, 66, 127])[:batch], 128)
    layer = SlotLayer(prefix, 400, rows)
    layer.keys, layer.values = (torch.randn(8, 2, 128, 24, generator=random) for _ in "kv")
    q = torch.randn(batch, 6, 1, 24, generator=random)
    wanted = layer.look(AttentionInputs(q, layer.keys, layer.values, None, 0.3))
    packed = (prefix.keys, prefix.values) if counts else (prefix.keys.flatten(0, 1), prefix.values.flatten(0, 1))
    given = (*packed, prefix.starts, prefix.longest), (layer.keys, layer.values, rows.index)
    torch.testing.assert_close(step_attention.attend(q, *given, 0.3), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("evidence", [False, True])
@pytest.mark.parametrize("counts", [(), (70, 23)])
@pytest.mark.parametrize("batch", [1, 5, 33])
def test_what_is_captured_is_the_step_of_few_kernels(batch, counts, evidence, kernels_are_used):
    backbone = shaken("llama")
    random = torch.Generator().manual_seed(7)
    shape = (sum(counts), backbone.head_size) if counts else (backbone.kv_heads, 70, backbone.head_size)
    prefix = [
        LayerPrefix(*(torch.randn(shape, generator=random) for _ in "kv"), None, counts)
        for _ in range(backbone.num_layers)
    ]
    inputs = torch.stack([torch.arange(20, 20 + batch), torch.arange(75, 75 + batch), torch.arange(5, 5 + batch)])
    found = []
    for step in (None, llama_step.unchecked(backbone)):
        llama_step.use(backbone, step)
        rows = Rows()
        layers = [SlotLayer(layer, 70, rows) for layer in prefix]
        for layer in layers:
            layer.reserve(batch, 64, layer.keys)
            layer.keys += torch.linspace(-1, 1, layer.keys.shape[2])[:, None]
            layer.values += torch.linspace(1, -2, layer.keys.shape[2])[:, None]
        logits, masses = fixed_step(backbone, layers, rows, inputs, layers[0].keys.shape[2], evidence=evidence)
        assert (masses is not None) == evidence
        found.append([logits, *(masses or ())])
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("part", ["product", "gated", "placed"])
def test_a_planted_bug_is_seen(part, kernels_are_used, monkeypatch):
    backbone = shaken("llama")
    place = rotation if part == "placed" else step_kernels
    right = getattr(place, part)
    monkeypatch.setattr(place, part, lambda *given, **named: right(*given, **named) * 1.2)
    assert max(llama_step.errors(backbone, llama_step.unchecked(backbone)).values()) > BOUND


def test_models_that_are_not_plain_are_left_to_their_own_layers():
    assert tiny_backbone("llama").plain_weights()
    assert not tiny_backbone("granite").plain_weights()  # whose residuals are scaled
    assert not tiny_backbone("qwen2").plain_weights()  # which slides
    assert not tiny_backbone("llama", hidden_act="gelu").plain_weights()
    assert not tiny_backbone("llama", mlp_bias=True).plain_weights()
    hooked = tiny_backbone("llama")
    hooked.model.model.layers[1].mlp.register_forward_hook(lambda module, given, made: made)
    assert not hooked.plain_weights()
    adapted = tiny_backbone("llama")
    layer = adapted.model.model.layers[2].self_attn
    layer.q_proj = nn.Sequential(layer.q_proj)
    assert tiny_backbone("llama").plain_weights() and not adapted.plain_weights()
