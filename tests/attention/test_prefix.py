"""A sheet inside stock transformers: a cache whose prefix is shared and read-only."""

from __future__ import annotations

import pytest
import torch
from reference import full_context_answer, full_context_logits

from cribsheet.attention.cache import PrefixLayer, ReadingLayer, prefix_cache
from cribsheet.attention.plain import attend_plain
from cribsheet.attention.prefix import AttentionInputs, LayerPrefix, _read_window, _share_window
from cribsheet.compress.loop import nothing_read
from cribsheet.model.backbone import Backbone
from cribsheet.testing import tiny_backbone

LEFT = torch.arange(100, 140)
ASKED = torch.tensor([200, 7, 31, 205, 300])


@pytest.fixture(scope="module", params=["llama", "qwen3", "phi3", "qwen2", "gemma2", "gemma3_text"])
def family(request):
    """Full attention, partial rotation, sliding windows, soft caps."""
    return tiny_backbone(request.param)


def read_prefix(backbone: Backbone, ids: torch.Tensor = LEFT) -> list[LayerPrefix]:
    """A prefix that keeps everything, or in a sliding-window layer all that the next token sees."""
    nothing = torch.zeros(backbone.kv_heads, 0, backbone.head_size)
    read = backbone.read([LayerPrefix(nothing, nothing, window) for window in backbone.windows], 0, ids, ids[:0])
    kept = [slice(window and 1 - window, None) for window in backbone.windows]
    return [
        LayerPrefix(layer.chunk_keys[:, at], layer.chunk_values[:, at], window)
        for layer, at, window in zip(read, kept, backbone.windows, strict=True)
    ]


def test_a_prefix_and_a_suffix_are_one_context(family):
    cache = prefix_cache(read_prefix(family), len(LEFT))
    positions = torch.arange(len(LEFT), len(LEFT) + len(ASKED))[None]
    logits = family.step(ASKED[None], positions, cache, keep=len(ASKED))[0]
    expected = full_context_logits(family, torch.cat([LEFT, ASKED]))[len(LEFT) :]
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-3)
    assert cache.get_seq_length() == len(LEFT) + len(ASKED)


def test_several_tokens_may_follow_several_others(tiny):
    """The second pass has a suffix before it, so its mask is not the plain square."""
    whole = full_context_logits(tiny, torch.cat([LEFT, ASKED]))[len(LEFT) :]
    cache = prefix_cache(read_prefix(tiny), len(LEFT))
    parts = []
    for start, stop in ((0, 2), (2, 5)):
        positions = torch.arange(len(LEFT) + start, len(LEFT) + stop)[None]
        parts.append(tiny.step(ASKED[None, start:stop], positions, cache, keep=stop - start)[0])
    torch.testing.assert_close(torch.cat(parts), whole, atol=2e-3, rtol=1e-3)


def generate(backbone, cache, ids, mask, **options):
    with backbone.attached():
        return backbone.model.generate(
            ids,
            attention_mask=mask,
            **backbone.cached(cache),
            max_new_tokens=70,
            do_sample=False,
            pad_token_id=0,
            **options,
        )


def test_stock_generate_runs_over_a_prefix_and_buffers_grow_as_it_does(family):
    whole = torch.cat([LEFT, ASKED])[None]
    expected = full_context_answer(family, whole[0], 70)
    out = generate(family, prefix_cache(read_prefix(family), len(LEFT)), whole, torch.ones_like(whole))
    found = out[0, whole.shape[1] :].tolist()
    assert found[: len(expected)] == expected and len(expected) > 3


def test_stock_generate_runs_a_left_padded_batch_over_one_prefix(tiny):
    short = ASKED[2:]
    rows = torch.stack([torch.cat([LEFT, ASKED]), torch.cat([LEFT, torch.zeros(2, dtype=torch.int64), short])])
    mask = torch.ones_like(rows)
    mask[1, len(LEFT) : len(LEFT) + 2] = 0
    out = generate(tiny, prefix_cache(read_prefix(tiny), len(LEFT)), rows, mask)[:, rows.shape[1] :].tolist()
    for row, asked in zip(out, (ASKED, short), strict=True):
        expected = full_context_answer(tiny, torch.cat([LEFT, asked]), 70)
        assert row[: len(expected)] == expected


def test_stock_generate_searches_beams_over_one_prefix(tiny):
    whole = torch.cat([LEFT, ASKED])[None]
    options = {"num_beams": 3, "num_return_sequences": 2}
    expected = tiny.model.generate(
        whole, attention_mask=torch.ones_like(whole), max_new_tokens=70, do_sample=False, pad_token_id=0, **options
    )
    prefix = read_prefix(tiny)
    before = [layer.keys.clone() for layer in prefix]
    found = generate(tiny, prefix_cache(prefix, len(LEFT)), whole, torch.ones_like(whole), **options)
    assert torch.equal(found, expected)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(prefix, before, strict=True))


def suffix(layer, tokens, first=0.0):
    keys = torch.full((1, 2, tokens, 4), first)
    return layer.update(keys, keys + 1)


def layer(prefix_tokens=3):
    prefix = torch.full((2, prefix_tokens, 4), 9.0)
    return PrefixLayer(LayerPrefix(prefix, prefix), prefix_tokens)


def test_a_layer_returns_its_suffix_alone_and_grows_past_its_first_buffer():
    here = layer()
    for step in range(150):
        keys, values = suffix(here, 1, float(step))
    assert keys.shape == (1, 2, 150, 4) and here.get_seq_length() == 153
    assert keys[0, 0, :, 0].tolist() == list(range(150))
    assert torch.equal(values, keys + 1)
    assert here.get_mask_sizes(2) == (152, 3)


def test_crop_and_reset_touch_the_suffix_only():
    here = layer()
    suffix(here, 5)
    here.crop(-2)
    assert here.get_seq_length() == 6
    keys, _ = suffix(here, 1, 7.0)
    assert keys[0, 0, :, 0].tolist() == [0, 0, 0, 7]
    here.crop(-100)
    assert here.get_seq_length() == 3
    suffix(here, 2)
    here.reset()
    assert here.get_seq_length() == 3 and (here.prefix.keys == 9).all()


def test_a_prefix_of_no_tokens_is_plain_attention(tiny):
    nothing = prefix_cache(nothing_read(tiny), 0)
    logits = tiny.step(LEFT[None], torch.arange(len(LEFT))[None], nothing, keep=len(LEFT))[0]
    torch.testing.assert_close(logits, full_context_logits(tiny, LEFT), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("window", [3, 6, 40])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_sequences_share_a_window_s_prefix_and_see_what_each_would_see_alone(window, rows, softcap):
    torch.manual_seed(0)
    prefix = LayerPrefix(torch.randn(2, min(window - 1, 9), 8), torch.randn(2, min(window - 1, 9), 8), window)
    here = PrefixLayer(prefix, 9)
    query, key, value = torch.randn(3, 4, rows, 8), torch.randn(3, 2, rows + 2, 8), torch.randn(3, 2, rows + 2, 8)
    mask = torch.ones(3, 1, rows, rows + 2, dtype=torch.bool).tril(2)
    mask[1, :, :, 0] = False
    places = here.suffix_positions(rows, rows + 2, query.device)
    found = _share_window(prefix, AttentionInputs(query, key, value, mask, 0.3, softcap), *places, window)
    for n in range(3):
        one = slice(n, n + 1)
        inputs = AttentionInputs(query[one], key[one], value[one], mask[one], 0.3, softcap)
        alone = _read_window(prefix, inputs, *places, window)
        for got, wanted in zip(found, alone, strict=True):
            torch.testing.assert_close(got[one], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("guide", [0, 1, 6])
@pytest.mark.parametrize("counts", [(), (9, 4), (0, 0)])
def test_a_read_that_is_concluded_remembers_what_one_that_goes_on_does(counts, guide):
    torch.manual_seed(0)
    shape = (sum(counts), 8) if counts else (2, 9, 8)
    prefix = LayerPrefix(torch.randn(shape), torch.randn(shape), None, counts)
    query, key, value = torch.randn(1, 4, 20, 8), torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8)
    steps = []
    whole, concluded = (ReadingLayer(prefix, 9, guide, lambda: steps.append(1)) for _ in range(2))
    whole.attend(AttentionInputs(query, *whole.update(key, value), None, 0.3))
    concluded.conclude(query, key, value, 0.3)
    for name in ("chunk_keys", "chunk_values", "guide_keys", "guide_values", "guide_queries"):
        assert torch.equal(getattr(concluded, name), getattr(whole, name)), name
    torch.testing.assert_close(concluded.guide_lse, whole.guide_lse, atol=1e-5, rtol=1e-5)
    assert len(steps) == 2


def test_the_last_tokens_of_a_prefix_and_what_is_before_them_are_all_of_it(tiny):
    size = tiny.kv_heads, 9, tiny.head_size
    keys, values = torch.randn(size), torch.randn(size)
    for layer in (LayerPrefix(keys, values), LayerPrefix.of(keys, values, [9, 5])):
        before, (last_keys, last_values) = layer.without_last(3), layer.last(3)
        assert torch.equal(last_keys, keys[:, 6:]) and torch.equal(last_values, values[:, 6:])
        for head, (own, whole) in enumerate(zip(before.each, layer.each, strict=True)):
            assert torch.equal(torch.cat([own[0], last_keys[head]]), whole[0])
            assert torch.equal(torch.cat([own[1], last_values[head]]), whole[1])


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("before", [1, 5, 40])
def test_new_tokens_behind_earlier_ones_see_them_all_and_each_other_in_order(before, softcap):
    random, rows = torch.Generator().manual_seed(before), 7
    query = torch.randn(2, 4, rows, 16, generator=random)
    key, value = (torch.randn(2, 2, before + rows, 16, generator=random) for _ in "kv")
    order = torch.arange(before + rows) <= torch.arange(before, before + rows)[:, None]
    wanted = attend_plain(query, key, value, scale=0.3, mask=order[None, None], softcap=softcap)
    got = AttentionInputs(query, key, value, None, 0.3, softcap).attend()
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_keys_of_heads_of_different_lengths_stand_at_the_end_of_the_longest():
    keys = torch.arange(15.0).reshape(3, 5, 1)
    found = LayerPrefix.of(keys, keys, [5, 2, 0]).padded_keys()
    assert torch.equal(found[0], keys[0]) and torch.equal(found[1, 3:], keys[1, 3:]) and found.shape == keys.shape
