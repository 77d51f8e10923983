"""Kernels that read codes beside what they stand for, interpreted on a CPU: `make kernels`."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("make kernels runs these", allow_module_level=True)

import ptx
from triton.runtime.interpreter import InterpreterBuilder

from cribsheet.attention import dispatch
from cribsheet.attention.packed import check, layout
from cribsheet.attention.packed.prefix import PackedPrefix, Room
from cribsheet.attention.prefix import AttentionInputs, LayerPrefix, Prefix
from cribsheet.attention.slots import Rows, SlotLayer
from cribsheet.engine.graphs import fixed_step, padded_prefill
from cribsheet.kernels import packed as kernels
from cribsheet.kernels import step_attention
from cribsheet.kernels.codes import TILE
from cribsheet.kernels.step_attention import Cut
from cribsheet.model import llama_step
from cribsheet.testing import tiny_backbone

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")  # the interpreter's
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def kernels_are_used(monkeypatch):
    monkeypatch.setattr(dispatch, "usable", lambda q, kv_heads, softcap=None: softcap is None)


def layer(kept, size=64, dtype=torch.float32):
    codes = check.example(torch.Generator().manual_seed(3), size, CPU, dtype, kept)
    return PackedPrefix(codes, kept, dtype, Room(sum(kept), size, dtype, CPU), lambda: True)


def in_floats(prefix):
    return LayerPrefix(prefix.keys, prefix.values, None, prefix.counts)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-4), (torch.float16, 3e-3)])
@pytest.mark.parametrize("size", [64, 128])
def test_kernels_give_what_floats_give(size, dtype, bound, monkeypatch):
    monkeypatch.setattr(check, "_KEPT", (150, 30))
    errors = check.errors(CPU, dtype, size, 3)
    assert len(errors) == 9 and max(errors.values()) < bound, errors


@pytest.mark.parametrize("size", [64, 128])
def test_what_a_device_does_by_name_is_what_triton_says(size, monkeypatch):
    monkeypatch.setattr(check, "_KEPT", (150, 30))
    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", ptx.create_inline_asm)
    asked = []
    for module in (kernels, step_attention):
        monkeypatch.setattr(module, "is_fast", lambda codes: asked.append(codes) or True)
    errors = check.errors(CPU, torch.float16, size, 3)
    assert asked and max(errors.values()) < 3e-3, errors


@pytest.mark.parametrize("part", ["unpack", "attend"])
def test_a_planted_bug_is_found(part, monkeypatch):
    monkeypatch.setattr(check, "_KEPT", (150, 30))
    right = kernels.unpack

    def wrong(codes, keys, values):
        right(codes, keys, values)
        keys *= 1.1

    if part == "unpack":
        monkeypatch.setattr(kernels, "unpack", wrong)
    else:
        attend = step_attention.attend
        monkeypatch.setattr(step_attention, "attend", lambda *given: (attend(*given)[0] * 1.1, attend(*given)[1]))
    assert max(check.errors(CPU, torch.float32, 64, 2).values()) > dispatch._BOUND


@pytest.mark.parametrize("tokens", [0, 9, 150])
@pytest.mark.parametrize("kept", [(300, 300), (290, 160), (155, 300)])
def test_unpacked_numbers_are_those_of_torch(kept, tokens):
    prefix = layer(kept).without_last(tokens)
    keys, values = torch.empty(2, sum(kept) - 2 * tokens, 64)
    kernels.unpack(prefix.codes, keys, values)
    torch.testing.assert_close(keys, layout.keys(prefix.codes, torch.float32), atol=2e-6, rtol=1e-6)
    assert torch.equal(values, layout.values(prefix.codes, torch.float32))


@pytest.mark.parametrize("cut", [(16, 264), (64, 3)])
@pytest.mark.parametrize("kept", [(300, 300), (300, 7), (0, 70)])
def test_attention_in_parts_over_codes_is_attention(kept, cut):
    prefix, random = layer(kept), torch.Generator().manual_seed(6)
    rows, batch = Rows(), 15
    rows.fix(torch.tensor([70, 0, 3, 66, 127] * 3), 128)
    slots = SlotLayer(in_floats(prefix), 5000, rows)
    slots.keys, slots.values = (torch.randn(16, 2, 128, 64, generator=random) for _ in "kv")
    q = torch.randn(batch, 6, 1, 64, generator=random)
    wanted = slots.look(AttentionInputs(q, slots.keys, slots.values, None, 0.3))
    suffix, (count, programs) = (slots.keys, slots.values, rows.index), cut
    got = step_attention.attend(q, prefix.codes, suffix, 0.3, cut=Cut(count, TILE, 4, 2, programs))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kept", [(150, 150), (150, 23)])
def test_answers_and_what_they_look_at_are_the_same_over_codes(kept, batch):
    backbone = tiny_backbone("llama", head_dim=64, num_hidden_layers=1)
    codes = layer(kept)
    length = check._LENGTH
    inputs = torch.stack(
        [torch.arange(20, 20 + batch), torch.arange(length, length + batch), torch.arange(5, 5 + batch)]
    )
    found = []
    for prefix in (in_floats(codes), codes):
        layers = [prefix] * backbone.num_layers
        for step in (None, llama_step.unchecked(backbone)):
            llama_step.use(backbone, step)
            rows = Rows()
            slots = [SlotLayer(each, length, rows) for each in layers]
            for each in slots:
                each.reserve(batch, 64, each.keys)
            logits, masses = fixed_step(backbone, slots, rows, inputs, slots[0].keys.shape[2], evidence=True)
            found.append([logits, *masses])
        for size in (20, 200):
            asked = torch.cat([torch.arange(20, 20 + size), torch.tensor([size - 1])])
            weights = torch.linspace(0, 1, size)
            logits, mass, _ = padded_prefill(backbone, Prefix(layers, length), asked, weights, evidence=True)
            found.append([logits, mass])
    for got, wanted in zip(found[4:], found[:4], strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-3)
