"""A sheet in int4 on the device: which layers stay in four bits, and that nobody else notices."""

from __future__ import annotations

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT

from cribsheet import CompressedKnowledgeLLM
from cribsheet.attention.packed import check
from cribsheet.attention.packed.prefix import PackedPrefix
from cribsheet.attention.prefix import LayerPrefix
from cribsheet.build import build_sheet
from cribsheet.kernels.codes import PACKS_FROM
from cribsheet.living.opened import opened
from cribsheet.living.segments import sheet_layers
from cribsheet.recall.placing import taken_off
from cribsheet.testing import tiny_backbone


@pytest.fixture
def codes_are_read(monkeypatch):
    """As on a card of which it is not known yet whether its kernels agree."""
    monkeypatch.setattr(check, "is_ruled_out", lambda like, kv_heads: False)


def built(family="llama", **options):
    backbone = tiny_backbone(family, head_dim=64)
    backbone.packs_from = 0
    settings = {"rate": 1.5, "dtype": "int4", "scorer": "task", "guide": "resident"}
    return backbone, build_sheet(backbone, DOCUMENTS, FEW_SHOT, **(settings | options))


def near(one, two):
    return bool((one - two).norm() <= 1e-6 * two.norm())


def equal(prefix, floats):
    return all(
        near(one.keys, two.keys) and torch.equal(one.values, two.values)
        for one, two in zip(prefix.layers, floats, strict=True)
    )


@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
def test_layers_stay_in_four_bits_where_kernels_read_them(codes_are_read, allocation):
    backbone, sheet = built(allocation=allocation)
    prefix, floats = opened(backbone, sheet), sheet_layers(backbone, sheet)
    assert all(isinstance(layer, PackedPrefix) for layer in prefix.layers) and prefix.tokens == sheet.length
    assert equal(prefix, floats)
    assert sum(layer.nbytes for layer in prefix.layers) < sum(layer.nbytes for layer in floats) / 3
    turns = {layer.codes.turns.data_ptr() for layer in prefix.layers}
    assert len(turns) == 1  # layers that turn alike share them
    guide = sheet.manifest.guide_tokens
    unguided = prefix.without_last(guide)
    assert equal(unguided, [layer.without_last(guide) for layer in floats])
    mine, theirs = (
        taken_off(each, guide, backbone.inv_freqs) for each in (prefix, type(prefix)(floats, prefix.tokens))
    )
    assert near(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])


def test_answers_are_the_same_while_plain_torch_reads_the_codes(codes_are_read, monkeypatch):
    backbone, sheet = built()
    asked = ["What colour is the house of Ann?", "Who?"]
    in_codes = CompressedKnowledgeLLM.load(sheet, model=backbone)
    mine = [in_codes.ask(each, max_tokens=8) for each in asked]
    assert type(in_codes.prefix.layers[0]) is PackedPrefix
    monkeypatch.undo()
    assert type(in_codes.prefix.layers[0]) is LayerPrefix  # by now it is known that none is going to
    in_floats = CompressedKnowledgeLLM.load(sheet, model=backbone)
    theirs = [in_floats.ask(each, max_tokens=8) for each in asked]
    assert type(in_floats.prefix.layers[0]) is LayerPrefix
    assert [each.text for each in mine] == [each.text for each in theirs]
    assert [[s.text for s in each.sources] for each in mine] == [[s.text for s in each.sources] for each in theirs]


def test_only_large_sheets_stay_in_four_bits(codes_are_read):
    backbone, sheet = built()
    taken = sheet.opened_bytes(2)
    assert taken == sum(layer.nbytes for layer in sheet_layers(backbone, sheet, torch.float16))
    for least, kind in ((taken, PackedPrefix), (taken + 1, LayerPrefix), (PACKS_FROM, LayerPrefix)):
        backbone.packs_from = least
        assert type(opened(backbone, sheet).layers[0]) is kind


def test_layers_that_slide_are_floats(codes_are_read):
    backbone, sheet = built("qwen2")
    kinds = [type(layer) is LayerPrefix for layer in opened(backbone, sheet).layers]
    assert kinds == [window is not None for window in backbone.windows] and not all(kinds)
    assert equal(opened(backbone, sheet), sheet_layers(backbone, sheet))


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"dtype": "bfloat16"}, {"budget": 24, "rate": None}])
def test_other_types_and_heads_of_few_tokens_are_floats(codes_are_read, options):
    backbone, sheet = built(guide="dropped", **options)
    assert all(type(layer) is LayerPrefix for layer in opened(backbone, sheet).layers)


def test_layers_that_half_precision_does_not_hold_are_floats(codes_are_read):
    backbone, sheet = built()
    loud, wide, *rest = sheet.layers
    loud.key_offsets[0, 3], wide.value_scales[0] = -4e4, 300
    kinds = [type(layer) is LayerPrefix for layer in opened(backbone, sheet).layers]
    assert kinds == [True, True, *[False] * len(rest)]


def test_without_kernels_a_sheet_is_opened_in_floats():
    backbone, sheet = built()
    assert all(type(layer) is LayerPrefix for layer in opened(backbone, sheet).layers)
