"""Documents come into an independent sheet, are replaced and leave it, as if it had been built so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT, QUESTION, ZERO_SHOT, OneHead

from cribsheet import CompressedKnowledgeLLM, Document, build_sheet, load_sheet, save_sheet
from cribsheet.attention.cache import prefix_cache
from cribsheet.attention.rope import rotate
from cribsheet.compress.loop import read_through
from cribsheet.compress.scoring import SCORERS
from cribsheet.errors import BudgetError, DocumentError, MismatchError, SheetError
from cribsheet.living import edits
from cribsheet.living.independent import LEAST, share
from cribsheet.living.segments import cut, sheet_layers
from cribsheet.plan.assemble import finish
from cribsheet.plan.options import BuildOptions
from cribsheet.plan.plan import plan
from cribsheet.prompt.chunks import TokenizedCorpus
from cribsheet.prompt.template import ChatLayout
from cribsheet.sheet.file import read_manifest
from cribsheet.testing import tiny_backbone
from cribsheet.vocabulary import ABSENT

ALICE, BOB, CLARA, HUGO = DOCUMENTS
ADAPTIVE = {"allocation": "adaptive", "scorer": "recall"}
SECRET = Document(
    text="Zelda Quorn keeps the passphrase heliotrope-9917 in Ulaanbaatar.",
    id="zelda-file",
    metadata={"owner": "Quorn"},
)


def build(backbone, documents=DOCUMENTS, task=FEW_SHOT, **options):
    settings = {"rate": 2, "guide": "resident", "scorer": "task", "mode": "independent", **options}
    return build_sheet(backbone, documents, task, **settings)


def assert_same(first, second):
    """Two sheets with the same bits, apart from when and how they were made."""
    for mine, theirs in zip(first.layers, second.layers, strict=True):
        assert mine.counts == theirs.counts and mine.tensors().keys() == theirs.tensors().keys()
        assert all(torch.equal(tensor, theirs.tensors()[name]) for name, tensor in mine.tensors().items())
    assert torch.equal(first.indices, second.indices) and torch.equal(first.origins, second.origins)
    assert list(first.texts) == list(second.texts)
    assert first.manifest.digest == second.manifest.digest


@pytest.mark.parametrize("guide", ["resident", "form", "dropped"])
@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
def test_a_sheet_without_a_document_is_the_sheet_that_never_had_it(family, guide, allocation):
    settings = {"guide": guide, "allocation": allocation}
    sheet, never = build(family, **settings), build(family, [ALICE, CLARA, HUGO], **settings)
    assert_same(edits.remove(family, sheet, "bob"), never)
    assert len(sheet.documents) == 4


@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
def test_four_bits_come_and_go_as_any_others(family, allocation):
    settings = {"dtype": "int4", "allocation": allocation}
    sheet, never = build(family, **settings), build(family, [ALICE, CLARA, HUGO], **settings)
    assert_same(edits.remove(family, sheet, "bob"), never)


def test_without_a_rate_an_independent_sheet_is_in_four_bits_as_any_other_and_stays_so(tiny, tmp_path):
    sheet = build(tiny, [ALICE, BOB], rate=None)
    assert (sheet.manifest.dtype, sheet.manifest.format, sheet.manifest.document_rate) == ("int4", 2, 4)
    grown = edits.extend(tiny, load_sheet(save_sheet(sheet, tmp_path / "living.sheet")), [CLARA, HUGO])
    assert_same(grown, build(tiny, rate=None))
    before = build(tiny, [CLARA, HUGO], rate=4)  # as without a rate, until it was int4
    with pytest.raises(SheetError, match="differ in their storage dtype: 'int4' and 'float32'"):
        edits.merge(tiny, sheet, before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
def test_every_change_ends_where_a_build_would_in_every_storage_type(tiny, dtype, allocation, tmp_path):
    settings = {"dtype": dtype, "allocation": allocation}

    def stored(sheet):
        return load_sheet(save_sheet(sheet, tmp_path / "living.sheet"))

    grown = edits.extend(tiny, stored(build(tiny, [ALICE, BOB], **settings)), [CLARA, HUGO])
    assert_same(grown, build(tiny, **settings))
    moved = Document(text="Bob Smith has moved to Riga, where he sells amber.", id="bob")
    replaced = edits.replace(tiny, stored(grown), "bob", moved)
    assert_same(replaced, build(tiny, [ALICE, moved, CLARA, HUGO], **settings))
    merged = edits.merge(tiny, build(tiny, [ALICE], **settings), build(tiny, [moved, CLARA, HUGO], **settings))
    assert_same(merged, replaced)


def test_each_head_of_a_document_keeps_what_it_needs_and_stands_close_behind_the_one_before(family):
    """Written out: of each head the preamble's tokens, then what it keeps of each document, ending with the sheet."""
    sheet = build(family, rate=4, guide="dropped", **ADAPTIVE)
    layers, corpus = sheet_layers(family, sheet), sheet.manifest.corpus_tokens
    alone = [build(family, [document], rate=4, guide="dropped", **ADAPTIVE) for document in DOCUMENTS]
    parts = [sheet_layers(family, each) for each in alone]
    start = sheet.manifest.head_tokens
    for row, number in enumerate(family.full):
        heads = [heads_of(layers[number])] + [heads_of(part[number]) for part in parts]
        for place, (keys, values) in enumerate(heads[0]):
            kept = [part[place] for part in heads[1:]]
            wanted = torch.cat([kept[0][1], *(own[start:] for _, own in kept[1:])])
            torch.testing.assert_close(values, wanted)
            indices = sheet.indices[row, place, -len(values) :]
            assert (indices.diff() > 0).all() and indices[0] >= 0 and indices[-1] < corpus
            unrotated = [rotate(own, -ending(own, each.length), family.inv_freqs[number]) for (own, _), each in
                         zip(kept, alone, strict=True)]  # fmt: skip
            joined = torch.cat([unrotated[0], *(own[start:] for own in unrotated[1:])])
            expected = rotate(joined, ending(joined, sheet.length), family.inv_freqs[number])
            torch.testing.assert_close(keys, expected, atol=1e-4, rtol=1e-4)
    counts = (sheet.indices != ABSENT).sum(-1)
    assert counts.min() < counts.max() == sheet.length and sheet.tokens == sheet.manifest.budget


def heads_of(layer):
    """Keys and values (P, D) of each head of a layer."""
    return layer.each


def ending(tokens, length):
    """Positions of tokens that end where a sheet does."""
    return torch.arange(length - len(tokens), length)


def test_removing_leaves_no_trace_in_the_file(tiny, tmp_path):
    kb = CompressedKnowledgeLLM(tiny, build(tiny, [ALICE, SECRET, HUGO]))
    before = kb.save(tmp_path / "before.sheet").read_bytes()
    after = kb.remove("zelda-file").save(tmp_path / "after.sheet").read_bytes()
    digest = next(entry.digest for entry in read_manifest(tmp_path / "before.sheet").documents if "zelda" in entry.id)
    for trace in ("Zelda", "heliotrope", "9917", "Ulaanbaatar", "zelda-file", "Quorn", digest):
        assert trace.encode() in before and trace.encode() not in after
    assert {source.document_id for source in kb.sources(QUESTION, "in Quito", limit=9)} == {"alice", "hugo"}
    assert "Zelda" not in "".join(kb.sheet.texts)


def test_nothing_of_the_keys_and_values_of_a_removed_document_stays(tiny):
    (_, segments), gone = cut(tiny, build(tiny, [ALICE, SECRET, HUGO])), edits.remove
    left = gone(tiny, build(tiny, [ALICE, SECRET, HUGO]), "zelda-file")
    for number, layer in enumerate(left.layers[1:], 1):  # keys before rotation tell the first layer only the word
        secret = segments[1].layers[number]
        for held, removed in ((layer.keys, secret.keys), (layer.values, secret.values)):
            nearest = torch.cdist(removed, held).amin(-1) / removed.norm(dim=-1)
            assert nearest.min() > 1e-4
    assert_same(left, build(tiny, [ALICE, HUGO]))


@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
def test_one_document_alone_is_kept_as_a_sequential_build_keeps_it_that_pins_the_whole_preamble(family, allocation):
    settings = {"guide": "dropped", "scorer": "task", "allocation": allocation}
    alone = build(family, [BOB], **settings)
    options = BuildOptions(budget=alone.tokens, **settings)
    made = plan(family, ChatLayout(family.tokenizer), [BOB], FEW_SHOT, options)
    preamble = made.corpus.preamble_tokens
    reading = replace(made.reading, pinned=preamble, least=preamble + 1)
    usual = finish(family, made, read_through(family, made.corpus, reading), 0.0)
    assert torch.equal(alone.indices, usual.indices) and torch.equal(alone.origins, usual.origins)
    for mine, theirs in zip(sheet_layers(family, alone), sheet_layers(family, usual), strict=True):
        assert mine.window is not None or mine.counts == theirs.counts
        for own, other in zip(heads_of(mine), heads_of(theirs), strict=True):
            size = min(len(own[0]), len(other[0]))  # a window may reach into the preamble
            assert mine.window is not None or size == len(own[0]) == len(other[0])
            for half, expected in zip(own, other, strict=True):
                torch.testing.assert_close(half[-size:], expected[-size:], atol=5e-4, rtol=1e-3)


def test_an_independent_sheet_of_rate_1_is_every_document_read_behind_the_preamble(family):
    """Block-diagonal attention, written out: each document alone at its own place, the guide over all of them."""
    sheet = build(family, rate=1)
    layers = sheet_layers(family, sheet)
    start = sheet.manifest.head_tokens
    layout = ChatLayout(family.tokenizer)
    for document, segment in zip(DOCUMENTS, sheet.manifest.segments, strict=True):
        corpus = TokenizedCorpus.build([document], layout.preamble(FEW_SHOT.instruction), layout.encoder)
        before = [type(layer)(layer.keys[:, :0], layer.values[:, :0], layer.window) for layer in layers]
        read = family.read(before, 0, corpus.ids, corpus.ids[:0])
        for number in family.full:
            stop = start + segment.kept
            expected = read[number].chunk_values[:, corpus.preamble_tokens :]
            torch.testing.assert_close(layers[number].values[:, start:stop], expected, atol=5e-4, rtol=1e-3)
        start += segment.kept
    assert start + sheet.manifest.guide_tokens == sheet.tokens


def test_a_changed_sheet_answers_at_once_and_running_answers_end_on_the_old_one(tiny):
    kb = CompressedKnowledgeLLM(tiny, build(tiny))
    never = CompressedKnowledgeLLM(tiny, build(tiny, [ALICE, CLARA, HUGO]))
    before = kb.ask(QUESTION, max_tokens=16, logprobs=0)
    with kb.stream(QUESTION, max_tokens=16) as stream:
        pieces = [next(stream)]
        kb.remove("bob")
        pieces += list(stream)
    assert "".join(pieces) == before.text
    after, wanted = (each.ask(QUESTION, max_tokens=16, logprobs=0) for each in (kb, never))
    assert after.text == wanted.text and after.logprobs == wanted.logprobs
    assert after.logprobs[0].logprob != before.logprobs[0].logprob


def test_history_tells_what_was_done_and_nothing_of_what_is_gone(tiny):
    sheet = build(tiny, [ALICE, SECRET])
    sheet = edits.remove(tiny, edits.extend(tiny, sheet, [HUGO]), "zelda-file")
    sheet = edits.merge(tiny, edits.replace(tiny, sheet, "hugo", BOB.text), build(tiny, [CLARA]))
    entries = [(entry.operation, entry.documents) for entry in sheet.manifest.history]
    assert entries == [("built", 2), ("extended", 1), ("removed", 1), ("replaced", 1), ("built", 1), ("merged", 1)]
    assert [entry.id for entry in sheet.manifest.documents] == ["alice", "hugo", "clara"]
    assert "zelda" not in sheet.manifest.model_dump_json()


@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
def test_every_document_keeps_its_share_and_none_vanishes(tiny, allocation):
    short = Document(text="Oslo.", id="short")
    sheet, least = build(tiny, [ALICE, short, BOB], rate=16, allocation=allocation), LEAST[allocation]
    for entry in sheet.manifest.segments:
        assert entry.kept == share(entry.read, 16, allocation) == min(entry.read, max(least, entry.read // 16))
    assert all(kept > 0 for kept in sheet.kept_per_document().values())


def test_a_budget_is_the_most_that_the_whole_sheet_may_have(tiny):
    whole = build(tiny, rate=1, guide="dropped").tokens
    sheet = build(tiny, rate=None, budget=whole // 2, guide="dropped")
    assert whole // 2 - len(DOCUMENTS) <= sheet.tokens <= whole // 2
    with pytest.raises(BudgetError, match="at least"):
        build(tiny, rate=None, budget=sheet.manifest.head_tokens + 3, guide="dropped")


def test_no_head_of_a_long_corpus_keeps_more_than_the_window_has_room_for():
    small = tiny_backbone(max_position_embeddings=400)
    sheet = build(small, rate=4, scorer=OneHead(), allocation="adaptive", guide="dropped")
    assert sheet.manifest.document_most is None and sheet.length > 3 * sheet.tokens
    many = [Document(text=f"{d.text} {n}", id=f"{d.id}{n}") for n in range(4) for d in DOCUMENTS]
    sheet = build(small, many, rate=4, scorer=OneHead(), allocation="adaptive", guide="dropped")
    most = sheet.manifest.document_most
    assert 1 < most < 4 and 250 < sheet.length <= 300
    fewer = edits.remove(small, sheet, "bob2")
    grown = edits.extend(small, fewer, [next(d for d in many if d.id == "bob2")], scorer=OneHead())
    assert grown.manifest.document_most == most and grown.length == sheet.length
    with pytest.raises(BudgetError, match="window"):
        edits.extend(small, sheet, [Document(text=d.text, id=f"{d.id} {n}") for n in range(3) for d in DOCUMENTS],
                      scorer=OneHead())  # fmt: skip


def test_merging_keeps_to_the_lesser_of_two_most():
    small = tiny_backbone(max_position_embeddings=400)
    many = [Document(text=f"{d.text} {n}", id=f"{d.id}{n}") for n in range(3) for d in DOCUMENTS]
    first = build(small, many, rate=4, allocation="adaptive", guide="dropped")
    second = build(small, [HUGO], rate=4, allocation="adaptive", guide="dropped")
    assert second.manifest.document_most is None
    assert edits.merge(small, second, first).manifest.document_most == first.manifest.document_most > 1


@pytest.mark.parametrize("harm", ["order", "kept", "guide", "beyond"])
def test_segments_that_do_not_add_up_are_damage(tiny, tmp_path, harm):
    sheet = build(tiny, **ADAPTIVE)
    indices, manifest = sheet.indices.clone(), sheet.manifest.model_copy(deep=True)
    guide = manifest.guide_tokens
    if harm == "order":
        indices[0, 0, -guide - 2 : -guide] = indices[0, 0, -guide - 2 : -guide].flip(0)
    elif harm == "kept":
        manifest.segments[0].kept += 1
    elif harm == "guide":
        indices[0, 0, -1] = manifest.corpus_tokens - 1
    else:
        indices[0, 0, -guide - 1] = manifest.corpus_tokens
    broken = replace(sheet, indices=indices, manifest=manifest)
    with pytest.raises(SheetError, match="do not fit its manifest"):
        load_sheet(save_sheet(broken, tmp_path / "broken.sheet"))


def test_texts_that_were_left_out_stay_out(tiny, tmp_path):
    bare = load_sheet(save_sheet(build(tiny), tmp_path / "bare.sheet", texts=False))
    grown = edits.extend(tiny, edits.remove(tiny, bare, "bob"), SECRET)
    assert not grown.texts and "heliotrope" not in str(save_sheet(grown, tmp_path / "b.sheet").read_bytes())


def test_what_cannot_be_is_refused_and_nothing_changes(tiny):
    sequential = build_sheet(tiny, DOCUMENTS, FEW_SHOT, rate=2, scorer="task")
    for change in (
        lambda: edits.extend(tiny, sequential, [SECRET]),
        lambda: edits.remove(tiny, sequential, "bob"),
        lambda: edits.replace(tiny, sequential, "bob", "Bob has left."),
        lambda: edits.merge(tiny, sequential, sequential),
    ):
        with pytest.raises(SheetError, match=r"sequential.*mode='independent'"):
            change()
    sheet = build(tiny)
    with pytest.raises(DocumentError, match="'bob'"):
        edits.extend(tiny, sheet, [BOB])
    with pytest.raises(DocumentError, match="'nobody'"):
        edits.remove(tiny, sheet, "alice", "nobody")
    with pytest.raises(DocumentError, match="at least one"):
        edits.remove(tiny, sheet, *(document.id for document in DOCUMENTS))
    with pytest.raises(DocumentError, match="2 documents"):
        edits.replace(tiny, sheet, "bob", [ALICE, SECRET])
    with pytest.raises(SheetError, match="task"):
        edits.merge(tiny, sheet, build(tiny, [SECRET], ZERO_SHOT))
    with pytest.raises(SheetError, match="allocation"):
        edits.merge(tiny, sheet, build(tiny, [SECRET], allocation="adaptive"))
    with pytest.raises(SheetError, match="rate"):
        edits.merge(tiny, sheet, build(tiny, [SECRET], rate=3))
    with pytest.raises(MismatchError):
        edits.remove(tiny_backbone(seed=1), sheet, "bob")
    with pytest.raises(BudgetError, match="window"):
        small = tiny_backbone(max_position_embeddings=200)
        edits.extend(small, build(small, [ALICE], rate=1), [BOB, CLARA, HUGO])


@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
def test_an_interrupted_build_goes_on_and_ends_with_the_same_sheet(tiny, tmp_path, monkeypatch, allocation):
    class Stop(Exception):
        pass

    def stop_at(tokens):
        def progress(done, total):
            if done >= tokens:
                raise Stop

        return progress

    monkeypatch.setattr("cribsheet.living.independent.usual_chunk", lambda backbone: 1)
    file, whole = tmp_path / "half.partial", build(tiny, allocation=allocation)
    reading = whole.manifest.segments
    with pytest.raises(Stop):
        build(tiny, allocation=allocation, checkpoint=file, progress=stop_at(reading[0].read + reading[1].read))
    assert [entry.id for entry in load_sheet(file).manifest.documents] == ["alice", "bob"]
    steps = []
    resumed = build(tiny, allocation=allocation, checkpoint=file, progress=lambda done, total: steps.append(done))
    assert steps[0] == reading[0].read + reading[1].read and len(steps) == 3
    assert_same(resumed, whole)
    with pytest.raises(SheetError, match="another build"):
        build(tiny, rate=3, checkpoint=file)


def test_a_scorer_of_your_own_is_asked_for_again(tiny):
    class Mine(SCORERS["recent"]):
        pass

    sheet = build(tiny, [ALICE], scorer=Mine())
    with pytest.raises(ValueError, match="Mine"):
        edits.extend(tiny, sheet, [BOB])
    assert_same(edits.extend(tiny, sheet, [BOB], scorer=Mine()), build(tiny, [ALICE, BOB], scorer=Mine()))
    with pytest.raises(SheetError, match="'Mine'"):
        edits.extend(tiny, sheet, [BOB], scorer="recent")


@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
def test_long_documents_are_read_in_chunks_and_windows_hold_what_they_can_see(family, allocation):
    long = Document(text=" ".join(f"Room {n} belongs to {d.id}. {d.text}" for n, d in enumerate(DOCUMENTS)), id="long")
    settings = {"chunk_tokens": 50, "allocation": allocation}
    sheet = build(family, [ALICE, long, BOB], **settings)
    assert_same(edits.remove(family, sheet, "alice", "bob"), build(family, [long], **settings))
    for layer, window in zip(sheet_layers(family, sheet), family.windows, strict=True):
        assert window is None or layer.keys.shape[1] == min(sheet.length, window - 1)
    ids = torch.arange(10, 18).unsqueeze(0)
    positions = torch.arange(sheet.length, sheet.length + 8).unsqueeze(0)
    assert family.step(ids, positions, prefix_cache(sheet_layers(family, sheet), sheet.length)).isfinite().all()


def test_documents_that_were_read_whole_can_be_saved_and_added_to(tiny, tmp_path):
    sheet = build(tiny, [ALICE, BOB], chunk_tokens=0)
    opened = load_sheet(save_sheet(sheet, tmp_path / "a.sheet"))
    assert opened.manifest.chunk_tokens == 0
    assert_same(edits.extend(tiny, opened, [CLARA]), build(tiny, [ALICE, BOB, CLARA], chunk_tokens=0))
