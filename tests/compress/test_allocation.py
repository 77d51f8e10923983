"""Adaptive allocation: heads that need more tokens keep more, and everything else is as it was."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT, QUESTION, OneHead
from torch import Tensor

from cribsheet import CompressedKnowledgeLLM, load_sheet, save_sheet
from cribsheet.asking.evidence import looked_at
from cribsheet.attention.plain import attend_plain
from cribsheet.attention.prefix import LayerPrefix
from cribsheet.build import build_sheet
from cribsheet.compress.loop import compress
from cribsheet.compress.scoring.view import Reads, Scorer
from cribsheet.compress.selection import keep_best
from cribsheet.corpus.documents import Document
from cribsheet.errors import BudgetError, SheetError
from cribsheet.forecast import forecast
from cribsheet.plan.options import BuildOptions
from cribsheet.plan.plan import plan
from cribsheet.prompt.template import ChatLayout
from cribsheet.sheet.sheet import Sheet
from cribsheet.vocabulary import ABSENT

BUILD = {"scorer": "reconstruction", "allocation": "adaptive", "chunk_tokens": 50}


def test_the_best_scores_stay_wherever_they_are():
    first = torch.tensor([[9.0, 1, 8, 7], [0.1, 0.2, 0.3, 0.4]])
    second = torch.tensor([[0.0, 0, 6, 0], [0.0, 0, 0, 0]])
    kept = keep_best([first, second], 2, least=1, most=4)
    assert kept[0].places.tolist() == [[0, 1, 2, 3], [-1, -1, 2, 3]]  # each head its best, then 8, 7, 1 and 0.3
    assert kept[1].places.tolist() == [[2], [0]]
    assert [layer.counts for layer in kept] == [(4, 2), (1, 1)]


def test_no_head_keeps_more_than_the_most_and_none_less_than_the_least():
    scores = [torch.stack([torch.full((20,), 9.0), torch.zeros(20)]) for _ in range(2)]
    kept = keep_best(scores, 6, least=2, most=8)
    counts = [[int((head >= 0).sum()) for head in layer.places] for layer in kept]
    assert counts == [list(layer.counts) for layer in kept]
    assert [count[0] for count in counts] == [8, 8] and min(min(count) for count in counts) >= 2
    assert sum(map(sum, counts)) == 4 * 6


def test_what_is_absent_is_never_kept():
    scores = torch.tensor([[float("-inf"), 1.0, 2.0], [5.0, 4.0, 3.0]])
    (kept,) = keep_best([scores], 3, least=1, most=3)
    assert kept.places.tolist() == [[-1, 1, 2], [0, 1, 2]] and kept.counts == (2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_over_packed_heads_is_attention_with_the_absent_masked_out(dtype):
    torch.manual_seed(1)
    keys, values, q = torch.randn(3, 9, 8), torch.randn(3, 9, 8), torch.randn(2, 6, 5, 8)
    absent = torch.arange(9) < torch.tensor([[0], [4], [7]])
    layer = LayerPrefix.of(keys.to(dtype), values.to(dtype), [9, 5, 2])
    assert layer.counts == (9, 5, 2) and layer.longest == 9 and layer.heads == 3
    out, lse = layer.attend(q.to(dtype), 0.3)
    mask = ~absent.repeat_interleave(2, 0)[None, :, None]  # (1, H, 1, P)
    for head in range(6):
        k, v = keys[None, head // 2, None], values[None, head // 2, None]
        expected = attend_plain(q[:, head : head + 1], k, v, scale=0.3, mask=mask[:, head : head + 1])
        close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 3e-2}
        torch.testing.assert_close(out[:, head : head + 1].float(), expected[0], **close)
        torch.testing.assert_close(lse[:, head : head + 1].float(), expected[1], **close)


def test_a_head_that_matters_keeps_everything_and_some_of_the_others_one_token(tiny):
    sheet = build_sheet(tiny, DOCUMENTS, FEW_SHOT, rate=4, scorer=OneHead(), allocation="adaptive", guide="dropped")
    counts = (sheet.indices != ABSENT).sum(-1)
    assert counts[0, 0] == counts.max() and counts[0, 0] > 3 * sheet.tokens
    assert counts.min() == 1 and (sheet.indices[..., -1] != ABSENT).all()
    assert sheet.tokens == sheet.manifest.budget and sheet.length == counts.max()
    heads = counts.numel()
    assert int(counts.sum()) == sheet.manifest.budget * heads  # not a token more or less than uniform would keep
    assert sheet.nbytes == build_sheet(tiny, DOCUMENTS, FEW_SHOT, rate=4, guide="dropped").nbytes


class Alike:
    """A scorer by which all heads want the same tokens, the earliest most."""

    reads: ClassVar[Reads] = Reads()
    pins_preamble: ClassVar[bool] = True

    def score(self, view):
        return 1 / (1 + view.positions.float().clamp(min=0))


class Spread(Alike):
    """The same, spread over the heads, and as a second need nothing."""

    def needs(self, view):
        wanted = self.score(view)
        return torch.stack([wanted, torch.zeros_like(wanted)])


@pytest.mark.parametrize("chunk", [0, 40])
def test_needs_are_spread_over_more_tokens_in_fewer_heads_each(tiny, chunk):
    def kept(scorer: Scorer) -> Tensor:
        more = {"allocation": "adaptive", "guide": "dropped", "chunk_tokens": chunk}
        indices = build_sheet(tiny, DOCUMENTS, FEW_SHOT, budget=30, scorer=scorer, **more).indices
        return indices[indices >= 0]

    alike, spread = kept(Alike()), kept(Spread())
    assert alike.numel() == spread.numel()  # at the same cost
    assert len(alike.unique()) == 30 < len(spread.unique())


def test_what_is_kept_as_scores_is_not_spread_and_not_with_each_chunk_again(tiny):
    layout = ChatLayout(tiny.tokenizer)
    options = BuildOptions(budget=30, guide="dropped", chunk_tokens=40, allocation="adaptive", scorer=Spread())
    planned = plan(tiny, layout, DOCUMENTS, FEW_SHOT, options)
    *_, last = compress(tiny, planned.corpus, planned.reading)
    for layer in last.kept:
        there = layer.indices != ABSENT
        assert torch.equal(layer.scores[0][there], 1 / (1 + layer.indices[there].float()))
        assert not layer.scores[1][there].any() and layer.scores[:, ~there].isneginf().all()


@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
def test_needs_are_asked_for_only_where_heads_share_a_budget(tiny, allocation):
    how = {"allocation": allocation, "guide": "dropped", "chunk_tokens": 0}
    plain, spread = (
        build_sheet(tiny, DOCUMENTS, FEW_SHOT, budget=30, scorer=scorer, **how) for scorer in (Alike(), Spread())
    )
    same = plain.indices.shape == spread.indices.shape and torch.equal(plain.indices, spread.indices)
    assert same == (allocation == "uniform")


@pytest.mark.parametrize(("rate", "spread"), [(40, True), (60, False)])
def test_needs_are_not_spread_where_there_is_no_place_for_a_little_of_everything(tiny, rate, spread):
    text = " ".join(f"Person {number} lives in house {number * 7 % 31}." for number in range(400))
    how = {"allocation": "adaptive", "guide": "dropped", "rate": rate}
    plain, needing = (
        build_sheet(tiny, [Document(text=text, id="street")], FEW_SHOT, scorer=scorer, **how)
        for scorer in (Alike(), Spread())
    )
    same = plain.indices.shape == needing.indices.shape and torch.equal(plain.indices, needing.indices)
    assert same == (not spread)


def test_the_whole_corpus_in_one_head_looks_as_the_full_context_does_to_it(tiny):
    kb = CompressedKnowledgeLLM.build(
        DOCUMENTS, FEW_SHOT, model=tiny, rate=3, scorer=OneHead(), allocation="adaptive", guide="dropped"
    )
    full = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=tiny, rate=1, scorer="recent")
    whole, mine = full.prefix.layers[0].each[0], kb.prefix.layers[0].each[0]
    torch.testing.assert_close(mine[0], whole[0], atol=1e-4, rtol=1e-4)
    assert torch.equal(mine[1], whole[1])


@pytest.mark.parametrize("guide", ["resident", "dropped"])
def test_asking_twice_streaming_and_batches_give_the_same(family, guide):
    kb = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=family, rate=2, guide=guide, **BUILD)
    questions = [QUESTION, "Where does Clara Berg live? Say it slowly.", "Who?"]
    alone = [kb.ask(question, max_tokens=12, logprobs=0) for question in questions]
    streams = [kb.stream(question, max_tokens=12, logprobs=0) for question in questions]
    for stream, expected in zip(streams, alone, strict=True):
        assert "".join(stream) == expected.text
        got, wanted = ([token.logprob for token in answer.logprobs] for answer in (stream.answer, expected))
        assert got == pytest.approx(wanted, abs=1e-3)
    assert alone[0].sources and {source.document_id for source in alone[0].sources} <= {d.id for d in DOCUMENTS}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_save_then_load_is_bit_equal(tiny, tmp_path, dtype):
    sheet = build_sheet(tiny, DOCUMENTS, FEW_SHOT, rate=3, dtype=dtype, **BUILD)
    loaded = load_sheet(save_sheet(sheet, tmp_path / "staff.sheet"))
    assert loaded.manifest == sheet.manifest and torch.equal(loaded.indices, sheet.indices)
    assert any(layer.counts for layer in loaded.layers) and loaded.nbytes == sheet.nbytes
    for mine, theirs in zip(sheet.layers, loaded.layers, strict=True):
        assert mine.counts == theirs.counts
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)
    first, second = (CompressedKnowledgeLLM(tiny, each).ask(QUESTION, max_tokens=8).text for each in (sheet, loaded))
    assert first == second


def test_layers_whose_heads_all_keep_few_come_back_too(tiny, tmp_path):
    sheet = build_sheet(tiny, DOCUMENTS, FEW_SHOT, rate=3, scorer=OneHead(), allocation="adaptive", guide="dropped")
    loaded = load_sheet(save_sheet(sheet, tmp_path / "staff.sheet"))
    assert [bool(layer.counts) for layer in loaded.layers] == [True, False, False]
    assert loaded.layers[1].keys.shape[1] < loaded.length
    first, second = (CompressedKnowledgeLLM(tiny, each).ask(QUESTION, max_tokens=8).text for each in (sheet, loaded))
    assert first == second


@pytest.mark.parametrize("harm", ["in the middle", "a whole head", "in a uniform sheet"])
def test_tokens_that_lack_where_none_may_are_damage(tiny, tmp_path, harm):
    sheet = build_sheet(tiny, DOCUMENTS, FEW_SHOT, rate=3, guide="dropped", **BUILD)
    indices, manifest = sheet.indices.clone(), sheet.manifest
    if harm == "in the middle":
        indices[0, 0, -2] = ABSENT
    elif harm == "a whole head":
        indices[0, 0] = ABSENT
    else:
        manifest = manifest.model_copy(update={"allocation": "uniform"})
    broken = Sheet(sheet.layers, indices, sheet.origins, manifest, sheet.texts)
    with pytest.raises(SheetError, match="do not fit its manifest"):
        load_sheet(save_sheet(broken, tmp_path / "broken.sheet"))


def test_an_interrupted_build_goes_on_bit_for_bit(tiny, tmp_path):
    whole = build_sheet(tiny, DOCUMENTS, FEW_SHOT, rate=2, **BUILD)

    def stop(done, total):
        if 0 < done < total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_sheet(tiny, DOCUMENTS, FEW_SHOT, rate=2, progress=stop, checkpoint=tmp_path / "part", **BUILD)
    resumed = build_sheet(tiny, DOCUMENTS, FEW_SHOT, rate=2, checkpoint=tmp_path / "part", **BUILD)
    assert torch.equal(resumed.indices, whole.indices)
    for mine, theirs in zip(whole.layers, resumed.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)


def test_what_an_answer_looks_at_is_the_same_as_if_absent_tokens_were_there_and_unseen(tiny):
    """Masses of heads that keep fewer tokens stand at the end, over the tokens that they keep."""
    kb = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=tiny, rate=3, **BUILD)
    looked = looked_at(tiny, kb.prefix, kb.session.render(QUESTION), torch.tensor([5]))
    assert looked.shape[1:] == kb.sheet.indices.shape[1:]
    absent = kb.sheet.indices[-len(looked) :] == ABSENT
    assert absent.any() and (looked[absent] == 0).all() and (looked[~absent] > 0).all()


def test_the_first_token_stays_in_every_head_and_the_rest_of_the_preamble_competes(tiny):
    sheet = build_sheet(tiny, DOCUMENTS, FEW_SHOT, rate=5, **BUILD)
    kept = [head[head != ABSENT].tolist() for layer in sheet.indices for head in layer]
    assert {head[0] for head in kept} == {0}
    opening = list(range(sheet.manifest.head_tokens))
    assert any(head[: len(opening)] != opening for head in kept)


@pytest.mark.parametrize("budget", [2, 3, 5])
def test_where_heads_share_a_budget_it_may_be_less_than_the_preamble(tiny, tmp_path, budget):
    options = {"budget": budget, "guide": "dropped", "chunk_tokens": 40}
    with CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=tiny, **options) as kb:
        assert kb.sheet.tokens == budget < kb.sheet.manifest.head_tokens
        kept = [head[head != ABSENT].tolist() for layer in kb.sheet.indices for head in layer]
        assert {head[0] for head in kept} == {0}  # where attention rests
        path = kb.save(tmp_path / "a.sheet")
        answer = kb.ask(QUESTION, max_tokens=5).text
    with CompressedKnowledgeLLM(tiny, load_sheet(path)) as again:
        assert again.ask(QUESTION, max_tokens=5).text == answer
    with pytest.raises(BudgetError, match=r"preamble takes \d+; .* at least \d+ or a lower rate\.$"):
        build_sheet(tiny, DOCUMENTS, FEW_SHOT, allocation="uniform", **options)
    with pytest.raises(BudgetError, match=r"preamble takes 1; pass a budget of at least 2 or a lower rate"):
        build_sheet(tiny, DOCUMENTS, FEW_SHOT, **{**options, "budget": 1})


@pytest.mark.parametrize(
    ("asked", "made"),
    [
        ({}, ("recall", "profiled")),
        ({"allocation": "adaptive"}, ("recall", "adaptive")),
        ({"scorer": "finch"}, ("finch", "uniform")),
        ({"allocation": "uniform"}, ("recall", "uniform")),
        ({"scorer": "task", "allocation": "adaptive"}, ("task", "adaptive")),
        ({"mode": "independent"}, ("recall", "adaptive")),
        ({"mode": "independent", "rate": 1.2, "allocation": "uniform"}, ("recall", "uniform")),
    ],
)
def test_the_default_is_adaptive_and_published_methods_are_as_published(tiny, asked, made):
    manifest = build_sheet(tiny, DOCUMENTS, FEW_SHOT, **{"rate": 2, **asked}).manifest
    assert (manifest.scorer, manifest.allocation) == made


def test_the_forecast_of_a_uniform_sheet_is_of_the_scorer_that_makes_it(tiny):
    def peak(**options):
        return forecast(tiny, DOCUMENTS, FEW_SHOT, rate=2, allocation="uniform", **options).peak_bytes

    assert peak() == peak(scorer="recall") > peak(scorer="task")


def test_room_is_what_the_longest_head_leaves(tiny):
    kb = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=tiny, rate=4, scorer=OneHead(), allocation="adaptive")
    assert kb.room == tiny.window - kb.sheet.length < tiny.window - kb.sheet.tokens


def test_an_unknown_allocation_is_refused_by_name(tiny):
    with pytest.raises(BudgetError, match="allocation is 'fair'; use uniform, profiled, adaptive"):
        build_sheet(tiny, DOCUMENTS, FEW_SHOT, allocation="fair")
