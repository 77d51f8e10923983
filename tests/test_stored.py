"""How keys and values lie in a sheet: what int8 costs in accuracy and saves in bytes."""

from __future__ import annotations

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT, QUESTION

from cribsheet import CompressedKnowledgeLLM
from cribsheet.prefix import LayerPrefix
from cribsheet.stored import StoredLayer, quantize
from cribsheet.testing import tiny_backbone

CPU = torch.device("cpu")


def layer(seed=0, scale=1.0):
    draw = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, 50, 16, generator=draw) * scale for _ in range(2))
    return LayerPrefix(keys, values)


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
