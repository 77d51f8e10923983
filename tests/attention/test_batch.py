"""Sequences of different lengths over one prefix: padded prefill, ragged slots."""

from __future__ import annotations

import pytest
import torch
from reference import full_context_logits
from test_prefix import LEFT, read_prefix
from transformers.cache_utils import Cache

from cribsheet.attention.plain import attend_plain
from cribsheet.attention.prefix import AttentionInputs, LayerPrefix
from cribsheet.attention.slots import _BLOCK, Rows, SlotLayer, padded_batch, prefill_cache
from cribsheet.testing import tiny_backbone

QUESTIONS = [torch.tensor(ids) for ids in ([200, 7, 31, 205], [44], [301, 302])]


@pytest.fixture(scope="module", params=["llama", "phi3", "qwen2", "gemma2", "gemma3_text"])
def family(request):
    return tiny_backbone(request.param)


def test_questions_are_padded_on_the_left_at_their_own_positions():
    ids, positions, mask = padded_batch(QUESTIONS, 10)
    assert ids.tolist() == [[200, 7, 31, 205], [0, 0, 0, 44], [0, 0, 301, 302]]
    assert positions.tolist() == [[10, 11, 12, 13], [10, 10, 10, 10], [10, 10, 10, 11]]
    assert mask.shape == (3, 1, 4, 4)
    assert mask[0, 0].tolist() == torch.ones(4, 4).tril().bool().tolist()
    assert mask[2, 0].tolist() == [
        [False] * 4,
        [False] * 4,
        [False, False, True, False],
        [False, False, True, True],
    ]


def test_questions_of_one_length_need_no_mask():
    assert padded_batch([QUESTIONS[0], QUESTIONS[0] + 1], 10)[2] is None


def test_a_padded_prefill_equals_each_question_alone(family):
    ids, positions, mask = padded_batch(QUESTIONS, len(LEFT))
    logits = family.step(ids, positions, prefill_cache(read_prefix(family), len(LEFT), mask))[:, -1]
    for row, question in zip(logits, QUESTIONS, strict=True):
        alone = full_context_logits(family, torch.cat([LEFT, question]))[-1]
        torch.testing.assert_close(row, alone, atol=2e-3, rtol=1e-3)


def test_slots_of_different_lengths_decode_as_each_would_alone_while_others_come_and_go(tiny):
    prefix, rows = read_prefix(tiny), Rows()
    layers = [SlotLayer(layer, len(LEFT), rows) for layer in prefix]
    texts: list[list[int]] = []

    def enter(question):
        cache = prefill_cache(prefix, len(LEFT), None)
        tiny.step(question[None], torch.arange(len(LEFT), len(LEFT) + len(question))[None], cache)
        for layer, filled in zip(layers, cache.layers, strict=True):
            layer.insert(len(texts), filled.keys[0], filled.values[0])
        rows.lengths.append(len(question))
        texts.append(question.tolist())

    def leave(slot):
        last = len(texts) - 1
        for layer in layers:
            layer.vacate(slot, last)
        texts[slot], rows.lengths[slot] = texts[last], rows.lengths[last]
        texts.pop(), rows.lengths.pop()

    def decode(tokens):
        rows.prepare(torch.device("cpu"))
        positions = torch.tensor([[len(LEFT) + n] for n in rows.lengths])
        logits = tiny.step(torch.tensor(tokens)[:, None], positions, Cache(layers=list(layers)))[:, -1]
        rows.lengths = [n + 1 for n in rows.lengths]
        for text, token, row in zip(texts, tokens, logits, strict=True):
            text.append(token)
            alone = full_context_logits(tiny, torch.cat([LEFT, torch.tensor(text)]))[-1]
            torch.testing.assert_close(row, alone, atol=2e-3, rtol=1e-3)

    enter(QUESTIONS[0])
    decode([5])
    enter(QUESTIONS[1])
    enter(QUESTIONS[2])
    decode([6, 7, 8])
    decode([9, 10, 11])
    leave(0)
    decode([12, 13])
    enter(torch.arange(400, 400 + 2 * _BLOCK))
    decode([14, 15, 16])
    leave(2)
    leave(1)
    decode([17])


def test_what_an_earlier_sequence_left_in_a_slot_is_never_seen():
    """Even an overflow that left NaN behind harms nobody else."""
    rows = Rows()
    nothing = torch.zeros(2, 0, 4)
    layer = SlotLayer(LayerPrefix(nothing, nothing), 0, rows)
    broken = torch.full((2, 30, 4), float("nan"))
    layer.insert(0, torch.ones(2, 2, 4), torch.ones(2, 2, 4))
    layer.insert(1, broken, broken)
    rows.lengths = [2]
    layer.vacate(1, 1)
    layer.insert(1, torch.ones(2, 1, 4), torch.ones(2, 1, 4))
    rows.lengths = [2, 1]
    rows.prepare(torch.device("cpu"))
    new = torch.full((2, 2, 1, 4), 2.0)
    keys, values = layer.update(new, new)
    query = torch.randn(2, 4, 1, 4, generator=torch.Generator().manual_seed(0))
    out = layer.attend(AttentionInputs(query, keys, values, None, 0.5))
    for row, length in enumerate((3, 2)):
        k, v = keys[row : row + 1, :, :length], values[row : row + 1, :, :length]
        expected, _ = attend_plain(query[row : row + 1], k, v, scale=0.5)
        torch.testing.assert_close(out[row : row + 1], expected, atol=1e-5, rtol=1e-5)
