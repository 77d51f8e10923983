"""Two sheets behind one question, and the one sheet of several that fits it."""

from __future__ import annotations

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT, QUESTION, ZERO_SHOT, OneHead
from reference import full_context_logits

from cribsheet import CompressedKnowledgeLLM, Document, Task, load_sheet, save_sheet
from cribsheet.asking.router import Router, likelihood
from cribsheet.attention.rope import move
from cribsheet.build import build_sheet
from cribsheet.errors import DocumentError, RequestError, SheetError
from cribsheet.living import edits
from cribsheet.living.combine import combine
from cribsheet.living.segments import cut, sheet_layers
from cribsheet.prompt.chunks import TokenizedCorpus
from cribsheet.prompt.template import ChatLayout
from cribsheet.testing import tiny_backbone

ALICE, BOB, CLARA, HUGO = DOCUMENTS
SEQUENTIAL, INDEPENDENT = {"mode": "sequential"}, {"mode": "independent"}


def build(backbone, documents, task=FEW_SHOT, **options):
    return build_sheet(backbone, documents, task, **{"rate": 2, "guide": "dropped", "scorer": "task", **options})


@pytest.mark.parametrize("mode", [SEQUENTIAL, INDEPENDENT], ids=["sequential", "independent"])
def test_combined_sheets_keep_every_key_and_value_at_positions_of_their_own(tiny, mode):
    first, second = build(tiny, [ALICE, BOB], **mode), build(tiny, [CLARA, HUGO], **mode)
    both = combine(tiny, [first, second])
    preamble = first.manifest.head_tokens
    assert both.tokens == first.tokens + second.tokens - preamble
    for mine, one, two in zip(*(sheet_layers(tiny, sheet) for sheet in (both, first, second)), strict=True):
        assert torch.equal(mine.values, torch.cat([one.values, two.values[:, preamble:]], 1))
        torch.testing.assert_close(mine.keys[:, : first.tokens], one.keys, atol=1e-4, rtol=1e-4)
    assert [document.id for document in both.documents] == ["alice", "bob", "clara", "hugo"]
    assert both.kept_per_document() == {**first.kept_per_document(), **second.kept_per_document()}


@pytest.mark.parametrize("mode", [SEQUENTIAL, INDEPENDENT], ids=["sequential", "independent"])
@pytest.mark.parametrize(
    ("guides", "shown"),
    [
        (("form", "form"), "form"),
        (("form", "dropped"), "form"),
        (("form", "resident"), "examples"),
        (("dropped",) * 2, ""),
    ],
)
def test_combined_sheets_show_examples_if_any_does_and_otherwise_their_form(tiny, mode, guides, shown):
    parts = zip(guides, ([ALICE, BOB], [CLARA, HUGO]), strict=True)
    both = combine(tiny, [build(tiny, part, rate=1, guide=guide, **mode) for guide, part in parts])
    made = both.manifest
    assert made.guide == ("resident" if shown else "dropped")
    assert made.form == (FEW_SHOT.form if shown == "form" else "")
    layout = ChatLayout(tiny.tokenizer)
    guide = layout.encoder.after(layout.guide(both.shown_task).resident, continues=True)
    assert made.guide_tokens == (len(guide) if shown else 0)


def test_examples_whose_form_stays_do_not_come_back_beside_a_sheet_without_any(tiny):
    first, second = (
        build(tiny, documents, task, guide=guide, rate=1)
        for documents, task, guide in (([ALICE, BOB], ZERO_SHOT, "resident"), ([CLARA, HUGO], FEW_SHOT, "form"))
    )
    assert combine(tiny, [first, second]).manifest.form == FEW_SHOT.form


def test_keys_of_the_second_sheet_are_moved_as_if_they_had_been_rotated_there(tiny):
    first, second = build(tiny, [ALICE, BOB]), build(tiny, [CLARA, HUGO])
    both, preamble = combine(tiny, [first, second]), first.manifest.head_tokens
    old = torch.arange(preamble, second.tokens)
    for mine, theirs, inv_freq in zip(
        sheet_layers(tiny, both), sheet_layers(tiny, second), tiny.inv_freqs, strict=True
    ):
        moved = move(theirs.keys[:, preamble:], old, old + first.tokens - preamble, inv_freq)
        torch.testing.assert_close(mine.keys[:, first.tokens :], moved, atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize("first", [SEQUENTIAL, INDEPENDENT], ids=["sequential", "independent"])
@pytest.mark.parametrize("second", ["uniform", "adaptive"])
def test_heads_that_keep_different_numbers_of_tokens_keep_them_all_when_sheets_are_combined(tiny, first, second):
    one = build(tiny, [ALICE, BOB], rate=3, allocation="adaptive", **first)
    two = build(tiny, [CLARA, HUGO], rate=3, allocation=second)
    both, preamble = combine(tiny, [one, two]), one.manifest.head_tokens
    assert both.manifest.allocation == "adaptive"
    opening = build(tiny, [ALICE], rate=1, allocation="uniform")
    opened = [[(sheet.indices[layer] >= 0) & (sheet.indices[layer] < preamble) for layer in range(tiny.num_layers)]
              for sheet in (one, two)]  # fmt: skip
    layers = zip(*(sheet_layers(tiny, sheet) for sheet in (both, one, two, opening)), *opened, strict=True)
    for mine, before, behind, whole, *own in layers:
        parts = zip(
            *map(heads_of, (mine, before, behind, whole)), *(each.sum(-1).tolist() for each in own), strict=True
        )
        for (keys, values), (_, left), (_, right), (_, read), m, n in parts:
            expected = torch.cat([read[:preamble], left[m:], right[n:]])
            torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-5)
            assert len(keys) == len(values)
    assert both.kept_per_document() == {**one.kept_per_document(), **two.kept_per_document()}
    kb = CompressedKnowledgeLLM(tiny, both)
    assert kb.ask(QUESTION, max_tokens=6).sources
    apart = cut(tiny, both)[1]
    again = edits.remove(tiny, both, "alice") if first is INDEPENDENT else both
    assert len(apart) == (3 if first is INDEPENDENT else 2) and again.length <= both.length


def test_heads_that_keep_nothing_of_the_documents_hold_the_head_when_sheets_are_combined(tiny, tmp_path):
    options = {"rate": 4, "scorer": OneHead(), "allocation": "adaptive"}
    both = combine(tiny, [build(tiny, [ALICE, BOB], **options), build(tiny, [CLARA, HUGO], **options)])
    preamble = both.manifest.head_tokens
    assert ((both.indices >= 0).sum(-1) == preamble).any()
    again = load_sheet(save_sheet(both, tmp_path / "both.sheet"))
    assert torch.equal(again.indices, both.indices)
    asked = [CompressedKnowledgeLLM(tiny, each).ask(QUESTION, max_tokens=6) for each in (both, again)]
    assert asked[0].text == asked[1].text
    assert len(cut(tiny, again)[1]) == 2


def heads_of(layer):
    """Keys and values (P, D) of each head of a layer."""
    return layer.each


def test_combining_independent_sheets_of_one_task_is_merging_them(family):
    sheets = [build(family, part, guide="resident", **INDEPENDENT) for part in ([ALICE, BOB], [CLARA, HUGO])]
    combined, merged = combine(family, sheets), edits.merge(family, *sheets)
    for mine, theirs in zip(combined.layers, merged.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)
    assert combined.manifest.digest == merged.manifest.digest


def test_a_combined_model_answers_under_the_tasks_of_both_and_leaves_them_alone(tiny):
    other = Task("Answer questions about hobbies.", examples=(("What does Eve like?", "Chess"),))
    one = CompressedKnowledgeLLM(tiny, build(tiny, [ALICE, BOB], guide="resident", rate=1))
    two = CompressedKnowledgeLLM(tiny, build(tiny, [CLARA, HUGO], other, **INDEPENDENT))
    before = one.ask(QUESTION, max_tokens=8, logprobs=0)
    both = one.combine(two)
    task = both.sheet.task
    assert task.description == f"{FEW_SHOT.description} {other.description}"
    assert task.examples == (*FEW_SHOT.examples, *other.examples) and both.sheet.resident
    answer = both.ask(QUESTION, max_tokens=8)
    assert {source.document_id for source in answer.sources} <= {"alice", "bob", "clara", "hugo"}
    assert one.ask(QUESTION, max_tokens=8, logprobs=0).logprobs == before.logprobs
    assert both.combine(task="Say who lives where.").sheet.task.description == "Say who lives where."


def test_what_came_from_a_sequential_sheet_leaves_as_a_whole(tiny):
    both = combine(tiny, [build(tiny, [ALICE, BOB]), build(tiny, [CLARA], **INDEPENDENT)])
    with pytest.raises(SheetError, match="together with 1 others"):
        edits.remove(tiny, both, "alice")
    assert [document.id for document in edits.remove(tiny, both, "clara").documents] == ["alice", "bob"]


def test_four_bits_are_joined_without_another_rounding(tiny):
    settings = {"dtype": "int4", "scorer": "task", "guide": "dropped", "allocation": "uniform"}
    first, second = build(tiny, [ALICE, BOB], **settings), build(tiny, [CLARA], **{**settings, **INDEPENDENT})
    both = combine(tiny, [first, second])
    assert both.manifest.dtype == "int4" and both.manifest.format == 2
    for whole, part in zip(both.layers, first.layers, strict=True):
        mine, own = (layer.restored(torch.device("cpu"), torch.float32) for layer in (whole, part))
        assert torch.equal(mine.keys[:, : first.tokens], own.keys)
        assert torch.equal(mine.values[:, : first.tokens], own.values)
    assert [document.id for document in edits.remove(tiny, both, "clara").documents] == ["alice", "bob"]


def test_sheets_that_do_not_belong_together_are_refused_by_name(tiny):
    sheet = build(tiny, [ALICE])
    with pytest.raises(SheetError, match="instruction"):
        combine(tiny, [sheet, build(tiny, [BOB], Task("Cities.", instruction="Be brief."))])
    with pytest.raises(SheetError, match="storage type"):
        combine(tiny, [sheet, build(tiny, [BOB], dtype="int8")])
    with pytest.raises(DocumentError, match="'alice'"):
        combine(tiny, [sheet, build(tiny, [Document(text=BOB.text, id="alice")])])
    with pytest.raises(SheetError, match="weights"):
        combine(tiny, [sheet, build(tiny_backbone(seed=1), [BOB])])
    gemma = tiny_backbone("gemma2")
    with pytest.raises(SheetError, match="sliding window"):
        combine(gemma, [build(gemma, [ALICE]), build(gemma, [BOB])])
    with pytest.raises(RequestError, match="several models"):
        Router([CompressedKnowledgeLLM(b, build(b, [ALICE])) for b in (tiny, gemma)])
    with pytest.raises(RequestError, match="at least one"):
        Router([])


def test_a_likelihood_is_that_of_the_question_s_own_tokens_after_everything_before_them(tiny):
    kb = CompressedKnowledgeLLM.build(DOCUMENTS, ZERO_SHOT, model=tiny, rate=1, guide="dropped")
    corpus = TokenizedCorpus.build(DOCUMENTS, kb.sheet.manifest.head, kb.session.layout.encoder).ids
    ids, question = kb.question_tokens(QUESTION), kb.session.layout.encoder.plain(QUESTION)
    logprobs = full_context_logits(tiny, torch.cat([corpus, ids])).log_softmax(-1)
    at = next(n for n in range(len(ids)) if ids[n : n + len(question) - 1].tolist() == question[:-1].tolist())
    own = range(max(1, at), at + len(question) - 1)  # the question mark is shared with every question
    expected = sum(float(logprobs[len(corpus) + n - 1, ids[n]]) for n in own) / len(own)
    assert likelihood(kb.session, QUESTION) == pytest.approx(expected, abs=2e-3)


def test_a_router_asks_the_sheet_after_which_the_question_is_likeliest(tiny):
    kbs = [CompressedKnowledgeLLM(tiny, build(tiny, [document])) for document in (ALICE, HUGO)]
    router = Router(kbs)
    scores = router.scores(QUESTION)
    assert len(set(scores)) == 2
    best = kbs[scores.index(max(scores))]
    assert router.route(QUESTION) is best
    assert router.ask(QUESTION, max_tokens=6).text == best.ask(QUESTION, max_tokens=6).text
