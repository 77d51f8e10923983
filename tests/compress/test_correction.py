"""Correction: what is kept stands for what was dropped, and nothing but numbers differs from a plain sheet."""

from __future__ import annotations

import json

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT, QUESTION
from safetensors.torch import load_file, save_file

from cribsheet import CompressedKnowledgeLLM, load_sheet, save_sheet
from cribsheet.attention.rope import rotate
from cribsheet.build import build_sheet
from cribsheet.compress.keeping import Turns, condense, kept_tokens
from cribsheet.compress.kept import Kept
from cribsheet.compress.loop import choose, correct, nothing_kept, nothing_read, places, score
from cribsheet.errors import BudgetError, SheetError
from cribsheet.living.combine import combine
from cribsheet.plan.options import BuildOptions
from cribsheet.plan.plan import plan
from cribsheet.prompt.template import ChatLayout
from cribsheet.vocabulary import ABSENT

BUILD = {"scorer": "recall", "allocation": "adaptive", "guide": "dropped", "rate": 4}


def read_and_kept(backbone, rate=4.0):
    """The only chunk as it was read, and what is kept of it."""
    options = BuildOptions(rate=rate, guide="dropped", chunk_tokens=0, allocation="adaptive", scorer="recall")
    made = plan(backbone, ChatLayout(backbone.tokenizer), DOCUMENTS, FEW_SHOT, options)
    (chunk,) = made.corpus.split(made.reading.chunk_tokens)
    before = nothing_kept(backbone)
    layers = backbone.read(nothing_read(backbone), 0, chunk.ids, made.reading.behind(chunk))
    indices, again = places(before, chunk), made.reading.repeated(chunk)
    scores = [score(backbone, layers[n], old, indices[n], made.reading, again, n) for n, old in enumerate(before)]
    keep = choose(backbone, scores, indices, made.reading, made.reading.budget)
    turn = Turns(backbone, 0, len(chunk.ids), -1)
    turns = [turn.of(number) for number in range(len(layers))]
    parts = zip(layers, before, indices, scores, keep, turns, strict=True)
    return layers, [condense(*each) for each in parts]


def outputs(backbone, layer, number, kept: Kept, size):
    """What each query head's guide rows see (H, T, D), of everything and of what is kept: by loops, in float64."""
    group = layer.guide_queries.shape[0] // layer.chunk_keys.shape[0]
    stood = layer.chunk_keys.shape[1]
    found = [], []
    for head, queries in enumerate(layer.guide_queries):
        own = head // group
        present = kept.indices[own] != ABSENT
        at = torch.arange(size - len(present), size)
        keys = rotate(kept.keys[own], at, backbone.inv_freqs[number])[present].double()
        moved = rotate(queries, torch.full((len(queries),), size - stood), backbone.inv_freqs[number]).double()
        for out, q, k, v in (
            (found[0], queries.double(), layer.chunk_keys[own].double(), layer.chunk_values[own].double()),
            (found[1], moved, keys, kept.values[own][present].double()),
        ):
            rows = []
            for row in range(len(queries)):
                logits = torch.cat([k @ q[row], layer.guide_keys[own, : row + 1].double() @ queries[row].double()])
                values = torch.cat([v, layer.guide_values[own, : row + 1].double()])
                rows.append((logits * backbone.scale).softmax(0) @ values)
            out.append(torch.stack(rows))
    return torch.stack(found[0]), torch.stack(found[1])


def test_rows_that_scored_the_corpus_see_more_nearly_what_they_saw_of_everything(tiny):
    layers, kept = read_and_kept(tiny)
    size, corrected = kept_tokens(tiny, kept), correct(tiny, layers, kept, 0)
    for number, (layer, plain, fitted) in enumerate(zip(layers, kept, corrected, strict=True)):
        whole, before = outputs(tiny, layer, number, plain, size)
        _, after = outputs(tiny, layer, number, fitted, size)
        assert (after - whole).norm() < 0.7 * (before - whole).norm()


def test_values_are_those_of_least_squares_shrunk_towards_the_plain_ones(tiny):
    """No small step in any direction lowers the error with its ridge: checked by its gradient in float64."""
    from cribsheet.compress.correction import _VALUE_SHRINKAGE

    layers, kept = read_and_kept(tiny)
    size, corrected = kept_tokens(tiny, kept), correct(tiny, layers, kept, 0)
    layer, plain, fitted = layers[1], kept[1], corrected[1]
    present = plain.indices[0] != ABSENT
    group = layer.guide_queries.shape[0] // layer.chunk_keys.shape[0]
    wanted, _ = outputs(tiny, layer, 1, plain, size)
    columns = []
    for one in range(int(present.sum())):  # the rows' weights, found by what they see if one value is ones, others none
        values = torch.zeros_like(plain.values)
        values[0, int((~present).sum()) + one] = 1.0
        blind = Kept(fitted.keys, values, plain.indices, plain.scores)
        held = layer.guide_values
        layer.guide_values = torch.zeros_like(held)
        columns.append(outputs(tiny, layer, 1, blind, size)[1][:group, :, 0].flatten())
        layer.guide_values = held
    weights = torch.stack(columns, 1)
    without = Kept(fitted.keys, torch.zeros_like(plain.values), plain.indices, plain.scores)
    target = (wanted - outputs(tiny, layer, 1, without, size)[1])[:group].flatten(0, 1)
    new, old = fitted.values[0][present].double(), plain.values[0][present].double()
    ridge = _VALUE_SHRINKAGE * (weights**2).sum(0).mean()
    gradient = weights.T @ (weights @ new - target) + ridge * (new - old)
    assert gradient.norm() < 1e-3 * (weights.T @ target).norm()
    assert (new - old).norm() > 0.05 * old.norm()


def test_only_values_and_the_first_token_s_keys_differ_from_a_plain_sheet(tiny):
    plain, fitted = (build_sheet(tiny, DOCUMENTS, FEW_SHOT, **BUILD, correction=c) for c in ("none", "refit"))
    assert torch.equal(plain.indices, fitted.indices) and plain.nbytes == fitted.nbytes
    for mine, theirs in zip(plain.layers, fitted.layers, strict=True):
        counts = mine.counts or (mine.keys.shape[1],) * mine.keys.shape[0]
        changed = (mine.keys.reshape(-1, mine.keys.shape[-1]) != theirs.keys.reshape(-1, mine.keys.shape[-1])).any(-1)
        firsts = torch.tensor([0, *counts[:-1]]).cumsum(0)
        assert set(changed.nonzero().flatten().tolist()) <= set(firsts.tolist()) and changed.any()
        assert not torch.equal(mine.values, theirs.values)


def test_a_corpus_of_which_nothing_is_dropped_stays_as_it_is(tiny):
    plain, fitted = (
        build_sheet(tiny, DOCUMENTS, FEW_SHOT, **{**BUILD, "rate": 1}, correction=c) for c in ("none", "refit")
    )
    for mine, theirs in zip(plain.layers, fitted.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(mine.values, theirs.values, atol=1e-3, rtol=1e-3)


def test_every_family_answers_from_a_corrected_sheet_that_comes_back_from_its_file(family, tmp_path):
    sheet = build_sheet(family, DOCUMENTS, FEW_SHOT, **BUILD, correction="refit")
    loaded = load_sheet(save_sheet(sheet, tmp_path / "staff.sheet"))
    assert loaded.manifest.correction == "refit"
    first, second = (CompressedKnowledgeLLM(family, each).ask(QUESTION, max_tokens=6).text for each in (sheet, loaded))
    assert first == second
    for layer in sheet.layers:
        assert layer.keys.isfinite().all() and layer.values.isfinite().all()


def test_a_file_from_before_there_were_corrections_is_a_plain_sheet(tiny, tmp_path):
    path = save_sheet(build_sheet(tiny, DOCUMENTS, FEW_SHOT, **BUILD), tmp_path / "old.sheet")
    from safetensors import safe_open

    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    manifest = json.loads(metadata["cribsheet"])
    assert manifest.pop("correction") == "none"
    save_file(load_file(path), path, metadata={**metadata, "cribsheet": json.dumps(manifest)})
    assert load_sheet(path).manifest.correction == "none"


def test_an_interrupted_build_goes_on_bit_for_bit_in_chunks(tiny, tmp_path):
    build = {**BUILD, "correction": "refit", "chunk_tokens": 50}
    whole = build_sheet(tiny, DOCUMENTS, FEW_SHOT, **build)

    def stop(done, total):
        if 0 < done < total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_sheet(tiny, DOCUMENTS, FEW_SHOT, **build, progress=stop, checkpoint=tmp_path / "part")
    with pytest.raises(SheetError, match="belongs to another build"):
        build_sheet(tiny, DOCUMENTS, FEW_SHOT, **{**build, "correction": "none"}, checkpoint=tmp_path / "part")
    resumed = build_sheet(tiny, DOCUMENTS, FEW_SHOT, **build, checkpoint=tmp_path / "part")
    for mine, theirs in zip(whole.layers, resumed.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"correction": "bias"}, "correction is 'bias'; use none, refit"),
        ({"correction": "refit", "scorer": "recent"}, "reads no task by which to correct"),
        ({"correction": "refit", "scorer": "reconstruction"}, "reads no task by which to correct"),
        ({"correction": "refit", "mode": "independent"}, "cannot be corrected"),
    ],
)
def test_what_cannot_be_corrected_is_refused(tiny, options, message):
    with pytest.raises(BudgetError, match=message):
        build_sheet(tiny, DOCUMENTS, FEW_SHOT, **{**BUILD, **options})


def test_corrected_sheets_are_not_combined(tiny):
    sheets = [build_sheet(tiny, DOCUMENTS[n : n + 2], FEW_SHOT, **BUILD, correction="refit") for n in (0, 2)]
    with pytest.raises(SheetError, match="stands for its corpus alone"):
        combine(tiny, sheets)
