"""Moved keys are the keys that transformers itself would have rotated to the new place."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_partly

from cribsheet.attention.rope import OfAlike, move, rotate
from cribsheet.testing import tiny_backbone, tiny_config

SCALINGS = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "theta": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
}


def keys(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def rotated(embedding, raw, positions):
    """Raw keys (K, S, D) rotated by transformers for positions (S,)."""
    cos, sin = embedding(raw, positions.unsqueeze(0))
    return apply_rotary_pos_emb(raw[None], raw[None], cos, sin)[1][0]


@pytest.mark.parametrize("name", SCALINGS)
def test_a_moved_key_is_the_key_that_transformers_rotates_there(name):
    embedding = LlamaRotaryEmbedding(tiny_config("llama", rope_parameters=SCALINGS[name]))
    raw, old = keys(2, 6, 16), torch.tensor([3, 4, 70, 71, 500, 3000])
    new = torch.tensor([0, 1, 2, 3, 4, 5])
    moved = move(rotated(embedding, raw, old), old, new, embedding.inv_freq)
    torch.testing.assert_close(moved, rotated(embedding, raw, new), atol=2e-4, rtol=1e-4)
    assert (rotated(embedding, raw, old) - rotated(embedding, raw, new)).abs().max() > 0.5


def test_a_yarn_model_keeps_its_attention_factor_in_moved_keys():
    embedding = LlamaRotaryEmbedding(tiny_config("llama", rope_parameters=SCALINGS["yarn"]))
    raw, positions = keys(1, 3, 16), torch.tensor([5, 6, 7])
    back = rotate(rotated(embedding, raw, positions), -positions, embedding.inv_freq)
    factor = 0.1 * math.log(4) + 1
    torch.testing.assert_close(back, raw * factor, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SCALINGS)
def test_a_model_reads_at_any_start_as_if_its_keys_had_been_moved_there(name):
    backbone = tiny_backbone(rope_parameters=SCALINGS[name])
    from cribsheet.compress.loop import nothing_read

    empty = nothing_read(backbone)
    ids = torch.arange(40, 60)
    here, there = (backbone.read(empty, start, ids, ids[:0])[0].chunk_keys for start in (0, 700))
    moved = move(here, torch.arange(20), torch.arange(700, 720), backbone.inv_freqs[0])
    torch.testing.assert_close(moved, there, atol=5e-4, rtol=1e-3)
    assert (here - there).abs().max() > 0.1


def test_dimensions_beyond_a_partial_rotation_stay_as_they_are():
    raw, positions = keys(2, 4, 16), torch.tensor([1, 5, 9, 100])
    inv_freq = 1 / 100 ** (torch.arange(4) / 4)
    angles = positions[:, None] * inv_freq
    cos, sin = (torch.cat([f(angles)] * 2, -1)[None] for f in (torch.cos, torch.sin))
    found = rotate(raw, positions, inv_freq)
    torch.testing.assert_close(found, apply_partly(raw[None], raw[None], cos, sin)[1][0], atol=1e-5, rtol=1e-5)
    assert torch.equal(found[..., 8:], raw[..., 8:])


def test_a_key_turned_by_hand_is_where_geometry_puts_it():
    quarter = torch.tensor([math.pi / 2])
    found = rotate(torch.tensor([[1.0, 0.0]]), torch.tensor([1]), quarter)
    torch.testing.assert_close(found, torch.tensor([[0.0, 1.0]]), atol=1e-6, rtol=0)


def test_negative_positions_turn_back():
    raw, positions, inv_freq = keys(3, 5, 8), torch.tensor([0, 7, 50, 999, 4000]), torch.tensor([1.0, 0.3, 0.1, 0.01])
    back = rotate(rotate(raw, positions, inv_freq), -positions, inv_freq)
    torch.testing.assert_close(back, raw, atol=1e-5, rtol=1e-5)


def test_each_head_may_move_its_own_tokens():
    raw, inv_freq = keys(2, 3, 8), torch.tensor([1.0, 0.3, 0.1, 0.01])
    old, new = torch.tensor([[1, 2, 3], [10, 20, 30]]), torch.tensor([[0, 1, 2], [5, 6, 7]])
    found = move(raw, old, new, inv_freq)
    for head in range(2):
        assert torch.equal(found[head], move(raw[head], old[head], new[head], inv_freq))


def test_half_precision_keys_are_turned_in_float32():
    raw = keys(1, 2, 8).to(torch.bfloat16)
    found = rotate(raw, torch.tensor([3, 4000]), torch.tensor([1.0, 0.3, 0.1, 0.01]))
    assert found.dtype == torch.float32
    assert torch.equal(found, rotate(raw.float(), torch.tensor([3, 4000]), torch.tensor([1.0, 0.3, 0.1, 0.01])))


def test_what_is_made_of_frequencies_is_made_once_for_layers_that_share_them():
    shared, own, made = torch.arange(1.0, 5.0), torch.arange(1.0, 5.0), []
    of_alike = OfAlike([shared, own, shared, shared[:2]], lambda freqs: made.append(freqs) or len(made))
    assert [of_alike.of(layer) for layer in (0, 1, 2, 3, 0)] == [1, 2, 1, 3, 1]
    assert made[2] is not shared and len(made[2]) == 2  # that begin at the same place and are fewer
