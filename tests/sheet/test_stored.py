"""How keys and values lie in a sheet: what int8 and int4 cost in accuracy and save in bytes."""

from __future__ import annotations

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT, QUESTION

from cribsheet import CompressedKnowledgeLLM
from cribsheet.attention.prefix import LayerPrefix
from cribsheet.build import build_sheet
from cribsheet.engine.pool import LoadedModel
from cribsheet.errors import BudgetError
from cribsheet.sheet.int4 import BLOCK
from cribsheet.sheet.layers import StoredLayer, quantize
from cribsheet.testing import tiny_backbone
from cribsheet_bench.quality.families import Wanted, make_cases

CPU = torch.device("cpu")


def layer(seed=0, scale=1.0, counts=(), head=16):
    draw = torch.Generator().manual_seed(seed)
    shape = (sum(counts), head) if counts else (2, 50, head)
    keys, values = (torch.randn(*shape, generator=draw) * scale for _ in range(2))
    return LayerPrefix(keys, values, None, counts)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e6])
def test_int8_loses_less_than_one_percent_whatever_the_magnitude(scale):
    stored = StoredLayer.of(layer(scale=scale), "int8")
    assert max(stored.loss(layer(scale=scale))) < 0.01


def test_no_number_is_off_by_more_than_half_a_step_of_its_own_token():
    tokens = layer().keys
    whole, scales = quantize(tokens)
    assert whole.dtype == torch.int8 and int(whole.abs().max()) == 127
    assert torch.equal(whole.abs().amax(-1), torch.full((2, 50), 127, dtype=torch.int8))
    off = (whole.float() * scales[..., None] - tokens).abs()
    assert bool((off <= scales[..., None] * 0.5001).all())


def test_a_loud_token_does_not_spoil_its_neighbours():
    tokens = layer().keys
    loud = tokens.clone()
    loud[:, 7] *= 1e6
    quiet = [n for n in range(50) if n != 7]
    assert torch.equal(quantize(loud)[0][:, quiet], quantize(tokens)[0][:, quiet])


def test_a_token_of_zeros_stays_zero():
    nothing = LayerPrefix(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
    stored = StoredLayer.of(nothing, "int8")
    assert torch.equal(stored.restored(CPU, torch.float32).keys, nothing.keys) and stored.loss(nothing) == (0.0, 0.0)


@pytest.mark.parametrize(("dtype", "bytes_"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_a_float_type_costs_its_bytes_and_int8_one_and_a_scale_a_token(dtype, bytes_):
    numbers = 2 * 2 * 50 * 16
    assert StoredLayer.of(layer(), dtype).nbytes == numbers * bytes_
    assert StoredLayer.of(layer(), "int8").nbytes == numbers + 2 * 2 * 50 * 4


def test_float32_is_stored_without_loss():
    assert StoredLayer.of(layer(), "float32").loss(layer()) == (0.0, 0.0)


def test_a_sheet_in_int8_answers_almost_as_the_whole_one_and_says_what_it_lost(tmp_path):
    backbone = tiny_backbone()
    whole, small = (
        CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=backbone, rate=2, dtype=dtype)
        for dtype in ("float32", "int8")
    )
    assert small.sheet.nbytes < whole.sheet.nbytes / 3
    lost = small.sheet.manifest.build
    assert 0 < lost["key_loss"] < 0.01 and 0 < lost["value_loss"] < 0.01
    loaded = CompressedKnowledgeLLM.load(small.save(tmp_path / "small.sheet"), model=backbone)
    first, expected = (kb.ask(QUESTION, max_tokens=1, logprobs=5).logprobs[0] for kb in (loaded, whole))
    assert first.token_id == expected.token_id and first.logprob == pytest.approx(expected.logprob, abs=0.1)
    assert loaded.ask(QUESTION, max_tokens=9).text == small.ask(QUESTION, max_tokens=9).text


UNEQUAL = (3, 0, BLOCK + 1, 2 * BLOCK)


@pytest.mark.parametrize("counts", [(), UNEQUAL])
def test_int4_puts_no_number_off_by_more_than_half_a_step_of_the_range_it_shares(counts):
    """Written out in loops: a key's range is its channel's in a block of its head, a value's that of its channels."""
    wanted = layer(counts=counts, head=128)
    back = StoredLayer.of(wanted, "int4").restored(CPU, torch.float32)
    assert back.counts == counts and back.keys.shape == wanted.keys.shape
    for (keys, values), (near_keys, near_values) in zip(wanted.each, back.each, strict=True):
        for first in range(0, len(keys), BLOCK):
            block = keys[first : first + BLOCK]
            step = (block.amax(0) - block.amin(0)) / 15
            assert bool(((near_keys[first : first + BLOCK] - block).abs() <= step * 0.5 + 4e-3).all())
        for half in (slice(0, 64), slice(64, 128)):
            step = (values[:, half].amax(-1) - values[:, half].amin(-1)) / 15
            assert bool(((near_values[:, half] - values[:, half]).abs() <= step[:, None] * 0.5 + 4e-3).all())


def test_a_channel_that_is_loud_in_every_token_does_not_spoil_the_others_of_a_key():
    quiet = layer()
    loud = LayerPrefix(quiet.keys + torch.tensor([300.0] + [0.0] * 15), quiet.values)
    back = StoredLayer.of(loud, "int4").restored(CPU, torch.float32)
    assert torch.equal(back.keys[..., 1:], StoredLayer.of(quiet, "int4").restored(CPU, torch.float32).keys[..., 1:])
    assert float((back.keys - loud.keys)[..., 0].abs().max()) < 0.5


def test_int4_costs_half_a_byte_a_number_and_its_ranges():
    blocks, numbers = 2, 2 * 50 * 16
    assert StoredLayer.of(layer(), "int4").nbytes == numbers + blocks * (16 * 4 + 1) + 2 * 50 * 4
    blocks, tokens = 1 + 0 + 2 + 2, sum(UNEQUAL)
    stored = StoredLayer.of(layer(counts=UNEQUAL, head=128), "int4")
    assert stored.nbytes == tokens * 128 + blocks * (128 * 4 + 1) + tokens * 2 * 4


@pytest.mark.parametrize("counts", [(), UNEQUAL])
def test_stretches_of_int4_are_the_same_numbers_wherever_a_block_is_cut(counts):
    stored = StoredLayer.of(layer(counts=counts), "int4")
    sizes = counts or (50, 50)
    parts = stored.parts([[0, size // 3, size] for size in sizes])
    wanted = stored.restored(CPU, torch.float32)
    halves = [part.restored(CPU, torch.float32) for part in parts]
    for (keys, values), (first, _), (second, _) in zip(wanted.each, halves[0].each, halves[1].each, strict=True):
        assert torch.equal(torch.cat([first, second]), keys) and len(values) == len(keys)
    again = StoredLayer.joined(parts).restored(CPU, torch.float32)
    assert torch.equal(again.keys, wanted.keys) and torch.equal(again.values, wanted.values)


def test_numbers_that_no_range_of_int4_holds_are_refused():
    with pytest.raises(BudgetError, match=r"beyond 65504 do not fit int4; store them in bfloat16"):
        StoredLayer.of(layer(scale=1e6), "int4")


def test_a_layer_without_tokens_has_no_blocks():
    nothing = LayerPrefix(torch.zeros(2, 0, 4), torch.zeros(2, 0, 4))
    stored = StoredLayer.of(nothing, "int4")
    assert stored.nbytes == 0 and stored.restored(CPU, torch.float32).keys.shape == (2, 0, 4)


@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
def test_the_pocket_model_answers_alike_from_four_bits_and_from_sixteen(allocation):
    (case,) = make_cases(["multi-key"], 1, Wanted(300, 3))
    backbone = LoadedModel.get("pocket").backbone
    half, four = (
        CompressedKnowledgeLLM(backbone, sheet)
        for sheet in (
            build_sheet(
                backbone, case.documents, case.task, rate=3, guide="dropped", allocation=allocation, dtype=dtype
            )
            for dtype in ("bfloat16", "int4")
        )
    )
    assert torch.equal(half.sheet.indices, four.sheet.indices)
    assert four.sheet.nbytes < half.sheet.nbytes / 3
    lost = four.sheet.manifest.build
    assert 0.01 < lost["key_loss"] < 0.15 and 0.01 < lost["value_loss"] < 0.15
    for question in case.questions:
        first, second = (kb.ask(question, max_tokens=12, logprobs=0) for kb in (half, four))
        assert first.text == second.text
        assert second.logprobs[0].logprob == pytest.approx(first.logprobs[0].logprob, abs=0.5)
