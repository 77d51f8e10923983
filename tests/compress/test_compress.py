"""The loop: read, score, keep, move."""

from __future__ import annotations

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT
from reference import stock_cache
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from cribsheet.attention.rope import rotate, turns
from cribsheet.compress.kept import Kept, State
from cribsheet.compress.loop import compress, earned_budget, nothing_kept
from cribsheet.corpus.documents import Document
from cribsheet.plan.options import BuildOptions
from cribsheet.plan.plan import plan
from cribsheet.prompt.template import ChatLayout
from cribsheet.testing import tiny_backbone


@pytest.fixture(scope="module", params=["llama", "qwen3", "phi3"])
def family(request):
    return tiny_backbone(request.param)


def planned(backbone, documents=DOCUMENTS, **options):
    how = BuildOptions(**{"rate": 3, "guide": "dropped", "scorer": "task", "allocation": "uniform", **options})
    return plan(backbone, ChatLayout(backbone.tokenizer), documents, FEW_SHOT, how)


def states(backbone, made) -> list[State]:
    return list(compress(backbone, made.corpus, made.reading))


@pytest.mark.parametrize("scorer", ["task", "finch", "reconstruction", "recent"])
@pytest.mark.parametrize("chunk_tokens", [1, 37, 10_000])
def test_any_chunk_size_ends_with_the_budget_in_reading_order(tiny, scorer, chunk_tokens):
    documents = DOCUMENTS[:2] if chunk_tokens == 1 else DOCUMENTS
    made = planned(tiny, documents, chunk_tokens=chunk_tokens, scorer=scorer)
    *_, last = states(tiny, made)
    assert last.done == len(made.corpus)
    for layer in last.kept:
        assert layer.indices.shape == (tiny.kv_heads, made.budget)
        assert (layer.indices.diff(dim=1) > 0).all()
        assert int(layer.indices.min()) >= 0 and int(layer.indices.max()) < len(made.corpus)
        if scorer != "finch":
            preamble = torch.arange(made.corpus.preamble_tokens)
            assert (layer.indices[:, : len(preamble)] == preamble).all()


def test_kept_keys_and_values_are_those_of_their_own_tokens(family):
    """In one pass nothing is approximate: every kept token is exactly what a plain forward pass caches."""
    made = planned(family, chunk_tokens=0)
    (state,) = states(family, made)
    stock = stock_cache(family, made.corpus.ids)
    positions = torch.arange(len(made.corpus))
    for kept, cached in zip(state.kept, stock.layers, strict=True):
        raw = rotate(cached.keys[0], -positions, family.inv_freqs[0])
        for head in range(family.kv_heads):
            at = kept.indices[head]
            torch.testing.assert_close(kept.keys[head], raw[head, at], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(kept.values[head], cached.values[0, head, at], atol=1e-4, rtol=1e-4)


def test_keeping_everything_in_chunks_equals_reading_everything_at_once(family):
    whole, parts = (states(family, planned(family, rate=1, chunk_tokens=size))[-1] for size in (0, 29))
    for first, second in zip(whole.kept, parts.kept, strict=True):
        assert torch.equal(first.indices, second.indices)
        torch.testing.assert_close(first.keys, second.keys, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(first.values, second.values, atol=1e-3, rtol=1e-3)


def test_each_head_keeps_tokens_of_its_own(tiny):
    (state,) = states(tiny, planned(tiny, chunk_tokens=0))
    assert not torch.equal(state.kept[1].indices[0], state.kept[1].indices[1])


def test_old_tokens_compete_again_with_new_ones(tiny):
    """Some token of the first chunk is kept at first and gives way later."""
    all_states = states(tiny, planned(tiny, chunk_tokens=40, scorer="finch"))
    early, late = (set(state.kept[0].indices[0].tolist()) for state in (all_states[0], all_states[-1]))
    assert early - late and {token for token in late if token < 40} < early


def test_a_token_that_was_dropped_never_comes_back(tiny):
    dropped: set[int] = set()
    for state in states(tiny, planned(tiny, chunk_tokens=23)):
        kept = set(state.kept[2].indices[1].tolist())
        assert not kept & dropped
        dropped = set(range(state.done)) - kept
    assert dropped


def test_the_budget_is_earned_in_proportion_and_ends_in_full():
    earned = [earned_budget(50, read, 400, 10) for read in range(1, 401)]
    assert earned == sorted(earned)
    assert earned[-1] == 50 and earned[:10] == list(range(1, 11))
    assert earned[204] == 10 + round(40 * 195 / 390)
    assert all(kept <= read for read, kept in enumerate(earned, 1))


@pytest.mark.parametrize(("budget", "total", "pinned"), [(1, 9, 0), (9, 9, 3), (4, 1000, 3), (999, 1000, 0)])
@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_what_is_left_to_read_always_fills_the_budget(budget, total, pinned, chunk):
    cached = 0
    for read in [*range(chunk, total, chunk), total]:
        available = cached + min(chunk, read - (read - 1) // chunk * chunk)
        cached = min(earned_budget(budget, read, total, pinned), available)
    assert cached == budget


def test_after_each_chunk_exactly_the_earned_tokens_are_kept(tiny):
    made = planned(tiny, chunk_tokens=23)
    for state in states(tiny, made):
        expected = earned_budget(made.budget, state.done, len(made.corpus), made.corpus.preamble_tokens)
        assert {layer.indices.shape[1] for layer in state.kept} == {expected}


def test_kept_keys_stand_at_compact_positions_while_the_next_chunk_is_read(family):
    """What stock transformers computes for the second chunk, given a cache of what the first one left."""
    made = planned(family, chunk_tokens=40)
    first, second = states(family, made)[:2]
    size, chunk = first.kept[0].keys.shape[1], made.corpus.ids[40:80]
    cache = DynamicCache()
    for number, kept in enumerate(first.kept):
        cache.update(kept.at(turns(torch.arange(size), family.inv_freqs[0]))[None], kept.values[None], number)
    positions = torch.arange(size, size + len(chunk))
    family.model(input_ids=chunk[None], position_ids=positions[None], use_cache=True, **family.cached(cache))
    for number, (old, new) in enumerate(zip(first.kept, second.kept, strict=True)):
        raw = rotate(cache.layers[number].keys[0, :, size:], -positions, family.inv_freqs[0])
        for head in range(family.kv_heads):
            fresh = new.indices[head] >= 40
            assert 0 < fresh.sum() < len(fresh)
            places = new.indices[head, fresh] - 40
            torch.testing.assert_close(new.keys[head, fresh], raw[head, places], atol=1e-3, rtol=1e-3)
            values = cache.layers[number].values[0, head, size:][places]
            torch.testing.assert_close(new.values[head, fresh], values, atol=1e-3, rtol=1e-3)
            again = torch.isin(old.indices[head], new.indices[head])
            assert torch.equal(new.keys[head, ~fresh], old.keys[head, again])


def test_kept_keys_are_rotated_for_the_positions_that_are_asked():
    keys = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    kept = Kept(keys, keys.to(torch.bfloat16), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3))
    inv_freq, positions = torch.tensor([1.0, 0.5, 0.1, 0.01]), torch.tensor([4, 5, 9])
    found = kept.at(turns(positions, inv_freq))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, rotate(keys, positions, inv_freq).to(torch.bfloat16))


def test_a_run_that_was_interrupted_goes_on_to_the_same_end(tiny):
    made = planned(tiny, chunk_tokens=30)
    whole = states(tiny, made)
    for stop in (0, len(whole) // 2, len(whole) - 1):
        rest = list(compress(tiny, made.corpus, made.reading, whole[stop]))
        assert len(rest) == len(whole) - stop - 1
        for first, second in zip((rest or [whole[stop]])[-1].kept, whole[-1].kept, strict=True):
            assert torch.equal(first.keys, second.keys) and torch.equal(first.indices, second.indices)


def test_a_state_that_was_handed_out_is_not_changed_by_the_chunks_that_follow(tiny):
    seen = []
    made = planned(tiny, chunk_tokens=30)
    for state in compress(tiny, made.corpus, made.reading):
        seen.append((state, [layer.keys.clone() for layer in state.kept]))
    for state, keys in seen:
        assert all(torch.equal(layer.keys, before) for layer, before in zip(state.kept, keys, strict=True))


def test_before_the_first_chunk_nothing_is_kept(tiny):
    assert [tuple(layer.keys.shape) for layer in nothing_kept(tiny)] == [(2, 0, 16)] * 3


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(made, torch.Tensor):
                self.elements = max(self.elements, made.numel())
        return out


@pytest.mark.parametrize("scorer", ["task", "reconstruction"])
def test_memory_is_bounded_by_chunk_and_budget_and_not_by_the_corpus(tiny, scorer):
    largest = []
    for copies in (3, 12):
        documents = [
            Document(text=document.text, id=f"{n}{document.id}") for n in range(copies) for document in DOCUMENTS
        ]
        made = planned(tiny, documents, rate=None, budget=60, chunk_tokens=50, scorer=scorer)
        kept_bytes = []
        with Largest() as watch:
            for state in compress(tiny, made.corpus, made.reading):
                held = {
                    part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
                    for layer in state.kept
                    for part in (layer.keys, layer.values, layer.indices, layer.scores)
                }
                kept_bytes.append(sum(held.values()))
        largest.append((watch.elements, max(kept_bytes)))
    (short, kept_of_short), (long, kept_of_long) = largest
    assert long <= 1.05 * short and kept_of_long == kept_of_short
