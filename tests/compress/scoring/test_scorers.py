"""Every scorer beside the formula in its docstring, written as loops."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT
from reference import attention_weights

from cribsheet.build import build_sheet
from cribsheet.compress.scoring import SCORERS, LayerView, Reads, make_scorer
from cribsheet.compress.scoring.recall import copied
from cribsheet.errors import CribsheetError
from cribsheet.plan.options import BuildOptions
from cribsheet.plan.plan import plan
from cribsheet.prompt.template import ChatLayout

H, K, P, S, T, D = 6, 2, 3, 8, 4, 16
REPEATED = 3  # of the T rows
SCALE = 0.4


@pytest.fixture
def scene():
    """A view of 3 kept and 5 new tokens under a guide of 4 rows, and the attention weights (H, T, S) of those rows."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(H, T, D, generator=generator), torch.randn(K, S + T, D, generator=generator)
    lse = torch.zeros(H, T)
    for head in range(H):
        for row in range(T):
            seen = keys[head // (H // K), : S + row + 1].double()
            lse[head, row] = (seen @ queries[head, row].double() * SCALE).logsumexp(0)
    view = LayerView(
        keys=keys[:, :S],
        values=torch.randn(K, S, D, generator=generator),
        positions=torch.tensor([[0, 4, 9, 20, 21, 22, 23, 24], [0, 2, 7, 20, 21, 22, 23, 24]]),
        queries=queries,
        lse=lse,
        carried=torch.rand(K, P, generator=generator),
        scale=SCALE,
        layer=1,
        repeated=REPEATED,
    )
    return SimpleNamespace(view=view, weights=attention_weights(queries, keys, SCALE, S + 1)[:, :, :S])


def group(kv_head):
    return range(kv_head * H // K, (kv_head + 1) * H // K)


def task(view, weights):
    """Mean over rows, each weighted by how many tokens it sees, mean over the group, times the value's length."""
    scores = torch.zeros(K, S, dtype=torch.float64)
    for head in range(K):
        for token in range(S):
            total = 0.0
            for query_head in group(head):
                for row in range(T):
                    total += weights[query_head, row, token] * (S + row + 1) / (S + T)
            mean = total / (len(group(head)) * T)
            scores[head, token] = mean * view.values[head, token].double().norm()
    return scores


def task_peak(view, weights):
    """The largest weight of any row and head of the group, times the value's length."""
    scores = torch.zeros(K, S, dtype=torch.float64)
    for head in range(K):
        for token in range(S):
            peak = max(weights[query_head, row, token] for query_head in group(head) for row in range(T))
            scores[head, token] = peak * view.values[head, token].double().norm()
    return scores


def finch(view, weights):
    """The sum over all rows and all query heads, the same for every key/value head."""
    return torch.stack([sum(weights[head, row] for head in range(H) for row in range(T))] * K)


def reconstruction(view, weights):
    """The largest weight; tokens kept before never fall below what they had."""
    scores = torch.zeros(K, S, dtype=torch.float64)
    for head in range(K):
        for token in range(S):
            peak = max(weights[query_head, row, token] for query_head in group(head) for row in range(T))
            scores[head, token] = max(peak, float(view.carried[head, token])) if token < P else peak
    return scores


def recent(view, weights):
    """The place in the corpus."""
    return view.positions


def held(reference):
    """As the reference, but tokens kept before never fall below what they had."""

    def scores(view, weights):
        found = reference(view, weights)
        for head in range(K):
            for token in range(P):
                found[head, token] = max(found[head, token], float(view.carried[head, token]))
        return found

    return scores


def recall(view, weights):
    """As `task_peak`, with the rows that repeat the chunk counting less, and for the tokens that they repeat alone."""
    counted = torch.ones(T, S)
    counted[T - REPEATED :] = torch.tensor([0.3 if token >= S - REPEATED else 0.0 for token in range(S)])
    return task_peak(view, weights * counted)


REFERENCES = {
    "recall": held(recall),
    "task": task,
    "finch": finch,
    "reconstruction": reconstruction,
    "recent": recent,
}


def test_the_needs_of_recall_are_what_stands_before_the_repetition_and_the_repetition_at_full_weight(scene):
    told, again = torch.ones(T, S), torch.zeros(T, S)
    told[T - REPEATED :] = 0
    again[T - REPEATED :, S - REPEATED :] = 1
    needs = make_scorer("recall")[1].needs(scene.view)
    expected = [held(task_peak)(scene.view, scene.weights * rows) for rows in (told, again)]
    torch.testing.assert_close(needs.double(), torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_every_scorer_of_the_table_has_a_reference_here():
    assert set(REFERENCES) | {"random"} == set(SCORERS)


@pytest.mark.parametrize("name", REFERENCES)
def test_a_score_is_what_its_formula_says(scene, name):
    found = make_scorer(name)[1].score(scene.view)
    expected = REFERENCES[name](scene.view, scene.weights)
    assert found.shape == (K, S)
    torch.testing.assert_close(found.double(), expected.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 64, 150])
def test_a_repeated_token_counts_by_the_rows_about_its_repetition(scene, size):
    generator = torch.Generator().manual_seed(1)
    queries, keys = torch.randn(H, size + 2, D, generator=generator), torch.randn(K, size + 5, D, generator=generator)
    lse = torch.randn(H, size + 2, generator=generator) + 4
    found = copied(replace(scene.view, queries=queries, keys=keys, lse=lse, repeated=size))
    assert found.shape == (H, size)
    for token in range(size):
        block = token // 64 * 64
        rows = slice(max(0, block - 16) + 2, block + 64 + 16 + 2)
        for head in range(H):
            logits = queries[head, rows].double() @ keys[head // (H // K), token + 5].double() * SCALE
            assert float(found[head, token]) == pytest.approx(float((logits - lse[head, rows]).exp().max()), rel=1e-5)


def test_nothing_was_repeated_of_a_chunk_that_is_all_preamble(scene):
    view = replace(scene.view, repeated=0)
    torch.testing.assert_close(make_scorer("recall")[1].score(view), held(task_peak)(view, scene.weights).float())


@pytest.mark.parametrize("name", SCORERS)
def test_scores_are_finite_float32_and_leave_the_view_as_it_was(scene, name):
    view = scene.view
    before = [part.clone() for part in (view.keys, view.values, view.positions, view.queries, view.lse, view.carried)]
    scores = make_scorer(name)[1].score(view)
    assert scores.dtype == torch.float32 and scores.isfinite().all()
    after = (view.keys, view.values, view.positions, view.queries, view.lse, view.carried)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_tokens_are_equally_likely_to_stay_by_chance_whatever_chunk_they_came_in(tiny):
    counts = torch.zeros(0)
    for seed in range(40):
        sheet = build_sheet(
            tiny, DOCUMENTS, FEW_SHOT, rate=4, scorer="random", seed=seed, guide="dropped", chunk_tokens=40
        )
        counts = torch.zeros(sheet.manifest.corpus_tokens) if not len(counts) else counts
        counts += torch.bincount(sheet.indices.flatten(), minlength=len(counts))
        preamble, budget = sheet.manifest.head_tokens, sheet.manifest.budget
    draws = 40 * tiny.num_layers * tiny.kv_heads
    assert (counts[:preamble] == draws).all()
    share = counts[preamble:] / draws
    expected = (budget - preamble) / len(share)
    assert abs(float(share.mean()) - expected) < 1e-6
    thirds = [float(part.mean()) for part in share.tensor_split(3)]
    assert max(thirds) - min(thirds) < 0.12 * expected
    deviation = (expected * (1 - expected) / draws) ** 0.5
    assert (share - expected).abs().max() < 5.5 * deviation


def test_chance_depends_on_seed_layer_and_place_alone(scene):
    scorer = make_scorer("random")[1]
    first = scorer.score(scene.view)
    assert torch.equal(first, make_scorer("random")[1].score(scene.view))
    fields = {name: getattr(scene.view, name) for name in LayerView.__dataclass_fields__}
    for other in ({"seed": 1}, {"layer": 0}, {"positions": scene.view.positions + 1}):
        assert not torch.equal(first, scorer.score(LayerView(**{**fields, **other})))


def test_recent_keeps_the_preamble_and_the_end(tiny):
    sheet = build_sheet(tiny, DOCUMENTS, FEW_SHOT, rate=3, scorer="recent", guide="dropped", chunk_tokens=25)
    made = sheet.manifest
    tail = made.budget - made.head_tokens
    kept = [*range(made.head_tokens), *range(made.corpus_tokens - tail, made.corpus_tokens)]
    assert (sheet.indices == torch.tensor(kept)).all()


def test_finch_keeps_the_same_tokens_in_every_head_and_pins_nothing(tiny):
    sheet = build_sheet(tiny, DOCUMENTS, FEW_SHOT, rate=3, scorer="finch", guide="dropped", chunk_tokens=60)
    assert torch.equal(sheet.indices[:, 0], sheet.indices[:, 1])
    preamble = set(range(sheet.manifest.head_tokens))
    assert any(not preamble <= set(layer[0].tolist()) for layer in sheet.indices)


@pytest.mark.parametrize("name", sorted(set(SCORERS) - {"finch"}))
def test_all_scorers_but_finch_pin_the_preamble(tiny, name):
    options = {"rate": 5, "guide": "dropped", "chunk_tokens": 33, "allocation": "uniform"}
    sheet = build_sheet(tiny, DOCUMENTS, FEW_SHOT, scorer=name, **options)
    preamble = torch.arange(sheet.manifest.head_tokens, dtype=torch.int32)
    assert len(preamble) > 3
    assert (sheet.indices[..., : len(preamble)] == preamble).all()


@pytest.mark.parametrize("name", ["task", "finch"])
def test_a_token_the_task_looks_at_is_kept(scene, name):
    view = scene.view
    fields = {field: getattr(view, field) for field in LayerView.__dataclass_fields__}
    keys = view.keys.clone()
    keys[:, 5] = view.queries.unflatten(0, (K, -1)).mean((1, 2)) * 40  # one token that every row looks at
    logits = view.queries @ keys.repeat_interleave(H // K, 0).transpose(1, 2) * SCALE
    seen = LayerView(**{**fields, "keys": keys, "lse": logits.logsumexp(-1)})
    assert (make_scorer(name)[1].score(seen).argmax(1) == 5).all()


def test_an_unknown_scorer_is_refused_with_the_names_that_exist():
    with pytest.raises(
        CribsheetError,
        match=r"There is no scorer 'tasks'; use one of recall, reconstruction, task, finch, recent, random",
    ):
        make_scorer("tasks")


def test_a_scorer_of_your_own_needs_one_method(tiny):
    class Earliest:
        reads = Reads()
        pins_preamble = False

        def score(self, view):
            return -view.positions.float()

    sheet = build_sheet(tiny, DOCUMENTS, FEW_SHOT, budget=30, scorer=Earliest(), guide="dropped", chunk_tokens=0)
    assert sheet.manifest.scorer == "Earliest"
    assert (sheet.indices == torch.arange(30)).all()
    Earliest.reads = "nothing"
    with pytest.raises(CribsheetError, match=r"Earliest reads 'nothing' after a chunk; set its `reads` to Reads\(task"):
        make_scorer(Earliest())


@pytest.mark.parametrize("name", SCORERS)
def test_a_plan_holds_of_the_guide_what_its_scorer_reads_and_nothing_else(tiny, name):
    layout = ChatLayout(tiny.tokenizer)
    for rate in (1, 4):
        reading = plan(tiny, layout, DOCUMENTS, FEW_SHOT, BuildOptions(rate=rate, scorer=name, guide="dropped")).reading
        assert (len(reading.guide) > 0, len(reading.repeat) > 0) == (
            reading.scorer.reads.task,
            reading.scorer.reads.repetition,
        )
