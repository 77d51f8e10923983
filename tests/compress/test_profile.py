"""How many tokens each head looks up when it is asked, and budgets that are shared by it."""

from __future__ import annotations

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT

from cribsheet import CompressedKnowledgeLLM
from cribsheet.build import build_sheet
from cribsheet.compress import profile
from cribsheet.compress.loop import nothing_read
from cribsheet.compress.profile import LEAST, Profile, profile_of
from cribsheet.compress.selection import apportion, keep_best, keep_counts, keep_top
from cribsheet.engine.pool import LoadedModel
from cribsheet.errors import BudgetError
from cribsheet.prompt.template import ChatLayout
from cribsheet.sheet.file import load, save
from cribsheet.testing import tiny_backbone
from cribsheet.vocabulary import ABSENT


@pytest.fixture(scope="module")
def pocket():
    return LoadedModel.get("pocket").backbone


def counts(sheet):
    """Tokens that each head of each layer keeps of the corpus."""
    return (sheet.indices >= 0).sum(-1)


def test_a_profile_is_of_every_head_and_measured_once(pocket):
    layout = ChatLayout(pocket.tokenizer)
    found = profile_of(pocket, layout)
    layers, heads, tokens = found.peaks.shape
    assert (layers, heads) == (len(pocket.full), pocket.kv_heads) and tokens > 1000
    assert (found.peaks[..., 1:] <= found.peaks[..., :-1]).all()  # highest first
    assert profile_of(pocket, ChatLayout(pocket.tokenizer)) is found
    assert profile_of(pocket, ChatLayout(pocket.tokenizer, system="Be brief.")) is not found


def test_weights_have_a_mean_of_one_a_floor_and_differ_less_the_more_is_kept(pocket):
    found = profile_of(pocket, ChatLayout(pocket.tokenizer))
    spread = []
    for share in (1 / 32, 1 / 8, 1 / 2, 1.0):
        weights = torch.tensor(found.weights(share))
        assert weights.mean().item() == pytest.approx(1) and len(weights) == len(pocket.full) * pocket.kv_heads
        assert weights.min().item() >= LEAST / (1 + LEAST) - 1e-6
        spread.append(weights.std().item())
    assert spread == sorted(spread, reverse=True) and spread[-1] == pytest.approx(0, abs=1e-6)


def test_it_is_the_models_own_whatever_the_documents_are(pocket, monkeypatch):
    """Half of the rehearsal says of the heads what the other half says."""
    halves = []
    texts = profile._rehearsal()
    for half in (texts[:4], texts[4:]):
        monkeypatch.setattr(profile, "_rehearsal", lambda half=half: half)
        halves.append(torch.tensor(profile._measured(pocket, ChatLayout(pocket.tokenizer)).weights(1 / 8)))
    assert torch.corrcoef(torch.stack(halves))[0, 1] > 0.9


def test_a_window_without_room_for_it_gives_every_head_the_same_half():
    small = tiny_backbone("llama", max_position_embeddings=256)
    assert profile_of(small, ChatLayout(small.tokenizer)) is None
    sheet = build_sheet(small, DOCUMENTS[:1], FEW_SHOT, rate=2, guide="dropped")
    assert sheet.manifest.allocation == "profiled" and counts(sheet).min().item() >= sheet.manifest.budget // 2


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
def test_what_is_read_first_has_the_models_windows(family):
    """A profile is measured by a read on nothing, in which sliding layers must see no more than in any other."""
    backbone = tiny_backbone(family)
    assert [layer.window for layer in nothing_read(backbone)] == backbone.windows
    assert all(layer.longest == 0 for layer in nothing_read(backbone))


@pytest.mark.parametrize("chunk", [None, 40])
def test_heads_keep_half_by_the_profile_and_half_by_scores_and_the_budget_is_the_mean(pocket, chunk):
    sheet = build_sheet(pocket, DOCUMENTS, FEW_SHOT, rate=3, guide="dropped", chunk_tokens=chunk)
    kept, budget = counts(sheet).flatten(), sheet.manifest.budget
    assert kept.sum().item() == budget * len(kept)
    share = budget / sheet.manifest.corpus_tokens
    weights = torch.tensor(profile_of(pocket, ChatLayout(pocket.tokenizer)).weights(share))
    assert (kept >= (weights * budget / 2).floor()).all()  # the other half goes by scores
    by_scores = build_sheet(
        pocket, DOCUMENTS, FEW_SHOT, rate=3, guide="dropped", chunk_tokens=chunk, allocation="adaptive"
    )
    assert sheet.length == kept.max().item() != by_scores.length


def test_such_a_sheet_goes_through_a_file_and_answers_the_same(pocket, tmp_path):
    kb = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=pocket, rate=2)
    said = kb.ask("Where does Hugo Ali live?", max_tokens=8).text
    found = load(save(kb.sheet, tmp_path / "staff.sheet"))
    assert found.manifest.allocation == "profiled" and (found.indices[..., 0] == ABSENT).any()
    assert CompressedKnowledgeLLM(pocket, found).ask("Where does Hugo Ali live?", max_tokens=8).text == said


def test_nothing_said_of_the_size_is_rate_four_in_four_bits(pocket):
    made = build_sheet(pocket, DOCUMENTS, FEW_SHOT).manifest
    assert made.dtype == "int4" and made.budget == made.corpus_tokens // 4
    assert build_sheet(pocket, DOCUMENTS, FEW_SHOT, rate=4).manifest.dtype == "float32"


def test_documents_that_come_and_go_do_not_share_by_it(pocket):
    with pytest.raises(BudgetError, match="allocation='adaptive'"):
        build_sheet(pocket, DOCUMENTS, FEW_SHOT, rate=3, mode="independent", allocation="profiled")


@pytest.mark.parametrize(
    ("weights", "limits", "total", "least", "expected"),
    [
        ([1, 1, 2], [100, 100, 100], 40, 0, [10, 10, 20]),
        ([1, 1, 2], [100, 100, 12], 40, 0, [14, 14, 12]),  # the rest goes to the others
        ([1, 0.01, 1], [100, 100, 100], 21, 3, [9, 3, 9]),
        ([1, 1, 1], [100, 100, 100], 20, 0, [7, 7, 6]),  # what cannot be divided goes to the first
        ([1, 3], [5, 5], 40, 0, [5, 5]),
    ],
)
def test_tokens_are_apportioned_by_weight_between_bounds(weights, limits, total, least, expected):
    assert apportion(weights, limits, total, least=least) == expected


def test_counts_of_one_size_keep_the_top_of_each_head_in_reading_order():
    scores = [torch.rand(2, 30, generator=torch.Generator().manual_seed(layer)) for layer in range(3)]
    alike = keep_counts(scores, [[7, 7]] * 3)
    assert all(torch.equal(each.places, keep_top(layer, 7)) for each, layer in zip(alike, scores, strict=True))
    best = keep_best(scores, 7, least=0, most=30)
    again = keep_counts(scores, [each.counts for each in best])
    assert all(torch.equal(mine.places, theirs.places) for mine, theirs in zip(again, best, strict=True))


def test_peaks_decide_which_heads_get_more():
    peaks = torch.tensor([[[0.9, 0.8, 0.7, 0.6], [0.5, 0.1, 0.1, 0.1]]])
    assert Profile(peaks).weights(0.5) == pytest.approx([2 / (2 + LEAST) * 2, LEAST / (2 + LEAST) * 2])
