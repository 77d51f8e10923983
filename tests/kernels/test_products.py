"""Attention by products on a CPU beside its definition, and that what it needs to know of lengths is little."""

from __future__ import annotations

import pytest
import torch

from cribsheet.attention import dispatch, prefix
from cribsheet.attention.plain import attend_plain
from cribsheet.attention.prefix import LayerPrefix, Prefix
from cribsheet.attention.recorder import Glance, question_weights
from cribsheet.attention.slots import Rows, SlotLayer, padded_batch, prefill_cache, step_cache
from cribsheet.engine.graphs import padded_prefill
from cribsheet.kernels import products
from cribsheet.testing import tiny_backbone

SIZE, SCALE = 16, 0.3
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def has_products():
    if not products.are_there(torch.float32):
        pytest.skip("this processor or torch has no such products")


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def heads_of(counts, dtype=torch.float32):
    """Keys and values of heads, one behind the other, and the spans that find them."""
    keys, values = (random(sum(counts), SIZE, dtype=dtype, seed=seed) for seed in (1, 2))
    return keys, values, products.spans_of(keys, values, counts)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 7, 9, 40, 300, 1030])
@pytest.mark.parametrize("counts", [(96,), (128,), (130, 257, 96), (1000, 97, 513, 700)])
@torch.no_grad()
def test_attention_over_spans_follows_the_formula(counts, rows, dtype):
    if not products.are_there(dtype):
        pytest.skip("this processor has no products in bfloat16")
    keys, values, spans = heads_of(counts, dtype)
    asked = random(len(counts), rows, SIZE, dtype=dtype)
    out, lse, weights = products.attend(asked, spans, SCALE, noted=True)
    assert out.dtype == dtype and lse.dtype == torch.float32 and weights.lse.shape == (len(counts), rows)
    tolerance = TOLERANCE[dtype]
    for head, (k, v) in enumerate(zip(keys.split(counts), values.split(counts), strict=True)):
        wanted, wanted_lse = attend_plain(asked[None, head : head + 1], k[None, None], v[None, None], scale=SCALE)
        torch.testing.assert_close(out[head].float(), wanted[0, 0].float(), atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(lse[head], wanted_lse[0, 0], atol=1e-4, rtol=1e-4)
        given, span = weights.heads[head], spans[head]
        logits = asked[head].float() @ k.float().t() * SCALE
        torch.testing.assert_close(given[:, span.first : span.last], logits.softmax(-1), atol=1e-5, rtol=1e-3)
        assert not given[:, : span.first].any() and not given[:, span.last :].any()  # neighbours have none
    again, lse_again, none = products.attend(asked, spans, SCALE, noted=False)
    assert none is None and torch.equal(out, again) and torch.equal(lse, lse_again)


def test_spans_share_their_storage_and_come_in_few_lengths():
    keys, _, spans = heads_of((600, 700, 650))
    held = keys.untyped_storage().data_ptr()
    assert all(span.keys.untyped_storage().data_ptr() == held for span in spans)
    both = {count: products.spans_of(*[random(2 * count, 4)] * 2, (count, count)) for count in range(192, 4096, 5)}
    lengths = {len(spans[0].keys) for spans in both.values()}
    assert len(lengths) <= 16
    assert all(products.padded_rows(count, 256) <= max(count + 255, 1.125 * count + 1) for count in range(1, 5000))


def test_rows_come_in_few_numbers():
    found = {rows: products.parts_of(rows) for rows in range(1, 4000)}
    assert len({at_once for _, at_once in found.values()}) <= 10
    assert all(rows <= parts * at_once < rows + 32 * parts for rows, (parts, at_once) in found.items())


@pytest.mark.parametrize("counts", [(1000,), (97, 2100)])
def test_heads_that_hold_too_little_together_are_not_held_twice(counts):
    keys, values, spans = heads_of(counts)
    for span in spans:
        assert span.keys.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr()
        assert span.values.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()


@pytest.mark.parametrize("part", ["times", "_hidden", "_weigh"])
def test_a_planted_bug_is_seen_and_another_way_is_taken(part, monkeypatch):
    right = getattr(products, part)
    if part == "_weigh":
        monkeypatch.setattr(products, part, lambda weights, values, out: right(weights * 1.2, values, out))
    else:
        monkeypatch.setattr(products, part, lambda *given: right(*given) * 0.8 if part == "times" else None)
    monkeypatch.setattr(dispatch, "_spans_agree", dispatch._spans_agree.__wrapped__)
    with torch.no_grad():
        assert not dispatch.can_span(random(1, 2, 3, SIZE))
        monkeypatch.undo()
        assert dispatch.can_span(random(1, 2, 3, SIZE))


def test_gradients_take_another_way():
    layer = LayerPrefix(random(2, 300, SIZE).requires_grad_(), random(2, 300, SIZE, seed=1))
    out, _ = layer.attend(random(1, 4, 3, SIZE, seed=2), SCALE)
    out.sum().backward()
    assert layer.keys.grad.abs().sum() > 0


COUNTS = {"even": (), "ragged": (310, 200)}


def passes(backbone, counts, *, by_spans, monkeypatch, most=prefix._MOST_NOTED):
    """Logits and masses of two questions of different lengths that are read together, and of a step behind them."""
    monkeypatch.setattr(prefix, "_MOST_NOTED", most)
    monkeypatch.setattr(prefix, "_FEW_ROWS", 0)
    monkeypatch.setattr(dispatch, "_spans_agree", lambda dtype: by_spans)
    shape = (sum(counts), backbone.head_size) if counts else (2, 310, backbone.head_size)
    layers = [LayerPrefix(random(*shape, seed=n), random(*shape, seed=9 + n), None, counts) for n in range(3)]
    questions = [torch.arange(20, 31), torch.arange(40, 47)]
    ids, positions, mask = padded_batch(questions, 310)
    cache = prefill_cache(layers, 310, mask)
    weights = [question_weights(len(question), 2) for question in questions]
    glance = Glance(cache.layers, backbone.full, [(0, 0)] * 2, weights)
    found = [backbone.step(ids, positions, cache), *glance.masses]
    rows = Rows()
    slots = [SlotLayer(layer, 310, rows) for layer in layers]
    for slot in slots:
        for number in range(2):
            slot.insert(number, random(2, 5 + number, backbone.head_size, seed=3), random(2, 5 + number, 16, seed=4))
    rows.lengths = [5, 6]
    rows.prepare(backbone.device)
    glance = Glance(slots, backbone.full, [(0, 0)] * 2)
    found.append(backbone.step(torch.tensor([[5], [6]]), torch.tensor([[315], [316]]), step_cache(slots)))
    return [*found, *glance.masses]


@pytest.mark.parametrize("most", [prefix._MOST_NOTED, 0])
@pytest.mark.parametrize("counts", COUNTS)
def test_what_is_looked_at_is_the_same_by_either_way(counts, most, monkeypatch):
    backbone = tiny_backbone("llama", head_dim=16)
    one, other = (
        passes(backbone, COUNTS[counts], by_spans=by_spans, monkeypatch=monkeypatch, most=most)
        for by_spans in (True, False)
    )
    for got, wanted in zip(one, other, strict=True):
        assert got.shape == wanted.shape and wanted.abs().sum() > 0
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("counts", COUNTS)
@torch.no_grad()
def test_a_few_of_the_rows_of_a_pass_are_looked_at_by_either_way(counts, monkeypatch):
    backbone, tokens, asking = tiny_backbone("llama", head_dim=16), 200, 30
    shape = (sum(COUNTS[counts]), 16) if COUNTS[counts] else (2, 310, 16)
    layers = [LayerPrefix(random(*shape, seed=n), random(*shape, seed=9 + n), None, COUNTS[counts]) for n in range(3)]
    inputs = torch.cat([torch.arange(20, 20 + tokens), torch.tensor([tokens - 1])])
    weights = question_weights(tokens, tokens - asking)
    masses = []
    for by_spans in (True, False):
        monkeypatch.setattr(dispatch, "_spans_agree", lambda dtype, by_spans=by_spans: by_spans)
        masses.append(padded_prefill(backbone, Prefix(layers, 310), inputs, weights, evidence=True, rows=asking)[1])
    assert masses[1].abs().sum() > 0
    torch.testing.assert_close(*masses, atol=2e-5, rtol=2e-4)
