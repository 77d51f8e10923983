"""A layer that stays in four bits holds the numbers that opening it in floats gives, bit for bit."""

from __future__ import annotations

import pytest
import torch

from cribsheet.attention.packed import layout
from cribsheet.attention.packed.prefix import PackedPrefix, Room
from cribsheet.attention.prefix import LayerPrefix
from cribsheet.kernels.codes import TILE
from cribsheet.living.segments import placed_layer
from cribsheet.sheet.layers import Int4Layer, StoredLayer

CPU = torch.device("cpu")
LENGTH = 400
COUNTS = {"uniform": (), "ragged": (300, 129, 7), "a head of nothing": (0, 140, 3), "full tiles": (256, 128, 384)}


def stored(counts=(), size=32, tokens=200):
    random = torch.Generator().manual_seed(0)
    shape = (sum(counts), size) if counts else (3, tokens, size)
    keys, values = (torch.randn(shape, generator=random) for _ in "kv")
    return Int4Layer.made_of(LayerPrefix(keys, values, None, counts), "int4")


def frequencies(size=32):
    return 1e4 ** (-torch.arange(0, size, 2) / size)


def packed(layer, dtype=torch.float32, length=LENGTH):
    freqs = frequencies(2 * layer.keys.shape[-1])
    codes = layer.tiled(CPU, length, (freqs, layout.turns(freqs, dtype)))
    return PackedPrefix(codes, layer.kept, dtype, Room(sum(layer.kept), len(freqs) * 2, dtype, CPU))


def as_floats(layer, dtype=torch.float32, length=LENGTH):
    return placed_layer(layer, length, frequencies(2 * layer.keys.shape[-1]), CPU, dtype)


def same(one, two):
    return torch.equal(one.keys, two.keys) and torch.equal(one.values, two.values) and one.counts == two.counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_numbers_are_those_of_a_layer_in_floats(counts, dtype):
    layer = stored(counts)
    mine, wanted = packed(layer, dtype), as_floats(layer, dtype)
    assert same(mine, wanted) and mine.keys.dtype == dtype
    assert (mine.heads, mine.longest, mine.device) == (wanted.heads, wanted.longest, wanted.device)
    assert torch.equal(mine.starts, wanted.starts) and mine.none_behind().shape == wanted.none_behind().shape
    for own, theirs in zip(mine.each, wanted.each, strict=True):
        assert torch.equal(own[0], theirs[0]) and torch.equal(own[1], theirs[1])


@pytest.mark.parametrize("size", [64, 128, 96, 48])
def test_values_share_the_ranges_of_their_group(size):
    layer = stored((130, 60, 5), size)
    assert layout.takes(size, layer.value_scales.shape[-1], frequencies(size))
    assert same(packed(layer), as_floats(layer))


def test_stretches_that_were_cut_and_joined_keep_their_blocks():
    parts = stored((150, 140, 20)).parts([[0, 100, 150], [0, 3, 140], [0, 10, 20]])
    layer = StoredLayer.joined([parts[1], parts[0], parts[1]])
    assert len(set(layer.key_blocks.tolist())) > 4 and same(packed(layer), as_floats(layer))


def test_blocks_that_are_longer_than_a_tile_become_several():
    layer = stored((250, 129))
    longer = layer.with_tensors(
        {
            **layer.tensors(),
            "key_blocks": torch.tensor([250, 129], dtype=torch.uint8),
            "key_scales": layer.key_scales[[0, 2]],
            "key_offsets": layer.key_offsets[[0, 2]],
        },
        layer.counts,
    )
    mine = packed(longer)
    assert mine.codes.tiles[:, 1].tolist() == [TILE, 250 - TILE, TILE, 1]
    assert same(mine, as_floats(longer))


@pytest.mark.parametrize("tokens", [1, 7, 130])
@pytest.mark.parametrize("counts", [(), (300, 131, 130)])
def test_the_last_tokens_are_taken_off_without_a_copy(counts, tokens):
    layer = stored(counts)
    mine, wanted = packed(layer), as_floats(layer)
    for own, theirs in zip(mine.last(tokens), wanted.last(tokens), strict=True):
        assert torch.equal(own, theirs)
    shorter = mine.without_last(tokens)
    assert same(shorter, wanted.without_last(tokens)) and shorter.longest == wanted.longest - tokens
    assert shorter.codes.keys.data_ptr() == mine.codes.keys.data_ptr()
    assert same(shorter.without_last(0), shorter) and same(mine, wanted)


def test_codes_take_little_more_than_they_do_in_a_file():
    layer = stored((4000, 2500, 1000), size=128)
    tiles = -(-4000 // TILE) - (-2500 // TILE) - (-1000 // TILE)
    spare = tiles * TILE - 7500
    assert packed(layer).nbytes < layer.nbytes + spare * (128 + 8) + 16 * tiles + 100
    assert packed(layer).nbytes < as_floats(layer, torch.bfloat16).nbytes / 3.4


def test_more_tokens_behind_it_are_floats():
    layer, random = stored((60, 20, 9)), torch.Generator().manual_seed(1)
    more = torch.randn(3, 4, 32, generator=random)
    assert same(packed(layer).followed_by(more, more), as_floats(layer).followed_by(more, more))


@pytest.mark.parametrize(("size", "groups", "turning"), [(32, 1, 16), (192, 3, 192), (24, 1, 24), (256, 4, 256)])
def test_what_kernels_do_not_read_is_not_taken(size, groups, turning):
    assert not layout.takes(size, groups, torch.ones(turning // 2))
