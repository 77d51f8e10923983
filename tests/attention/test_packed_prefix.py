"""A layer that stays in four bits holds the numbers that opening it in floats gives.

Values bit for bit; of keys, ranges are turned and rounded in between.
"""

from __future__ import annotations

import pytest
import torch

from cribsheet.attention.packed import layout
from cribsheet.attention.packed.prefix import PackedPrefix, Room
from cribsheet.attention.prefix import LayerPrefix
from cribsheet.kernels.codes import TILE, Codes
from cribsheet.living.segments import placed_layer
from cribsheet.sheet.layers import Int4Layer, StoredLayer

CPU = torch.device("cpu")
LENGTH = 400
COUNTS = {"uniform": (), "ragged": (300, 129, 7), "a head of nothing": (0, 140, 3), "full tiles": (256, 128, 384)}


def stored(counts=(), size=64, tokens=200):
    random = torch.Generator().manual_seed(0)
    shape = (sum(counts), size) if counts else (3, tokens, size)
    keys, values = (torch.randn(shape, generator=random) for _ in "kv")
    return Int4Layer.made_of(LayerPrefix(keys, values, None, counts), "int4")


def frequencies(size=64):
    return 1e4 ** (-torch.arange(0, size, 2) / size)


def packed(layer, dtype=torch.float32, length=LENGTH, reads=False):
    freqs = frequencies(2 * layer.keys.shape[-1])
    codes = layer.tiled(CPU, length, (freqs, layout.turns(freqs, dtype)))
    return PackedPrefix(codes, layer.kept, dtype, Room(sum(layer.kept), len(freqs) * 2, dtype, CPU), lambda: reads)


def as_floats(layer, dtype=torch.float32, length=LENGTH):
    return placed_layer(layer, length, frequencies(2 * layer.keys.shape[-1]), CPU, dtype)


def alike(one, two):
    """Keys of one type, by their relative error."""
    bound = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 5e-3}[one.dtype]
    return one.shape == two.shape and bool((one.float() - two.float()).norm() <= bound * two.float().norm())


def same(one, two):
    return alike(one.keys, two.keys) and torch.equal(one.values, two.values) and one.counts == two.counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_numbers_are_those_of_a_layer_in_floats(counts, dtype):
    layer = stored(counts)
    mine, wanted = packed(layer, dtype), as_floats(layer, dtype)
    assert same(mine, wanted) and mine.keys.dtype == dtype
    assert (mine.heads, mine.longest, mine.device) == (wanted.heads, wanted.longest, wanted.device)
    assert torch.equal(mine.starts, wanted.starts) and mine.none_behind().shape == wanted.none_behind().shape
    for own, theirs in zip(mine.each, wanted.each, strict=True):
        assert alike(own[0], theirs[0]) and torch.equal(own[1], theirs[1])


@pytest.mark.parametrize("size", [64, 128])
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
    assert mine.codes.tiles[:, 1].tolist() == [TILE, TILE, TILE, 250 - 3 * TILE, TILE, TILE, 1]
    assert same(mine, as_floats(longer))


@pytest.mark.parametrize("tokens", [1, 7, 130])
@pytest.mark.parametrize("counts", [(), (300, 131, 130)])
def test_the_last_tokens_are_taken_off_without_a_copy(counts, tokens):
    layer = stored(counts)
    mine, wanted = packed(layer), as_floats(layer)
    (keys, values), (wanted_keys, wanted_values) = mine.last(tokens), wanted.last(tokens)
    assert alike(keys, wanted_keys) and torch.equal(values, wanted_values)
    shorter = mine.without_last(tokens)
    assert same(shorter, wanted.without_last(tokens)) and shorter.longest == wanted.longest - tokens
    assert shorter.codes.keys.data_ptr() == mine.codes.keys.data_ptr()
    assert same(shorter.without_last(0), shorter) and same(mine, wanted)


def test_codes_take_little_more_than_they_do_in_a_file():
    layer = stored((4000, 2500, 1000), size=128)
    slots = sum(-(-count // TILE) for count in layer.kept) * TILE
    assert packed(layer, torch.bfloat16).nbytes < slots * (2 * 64 + 8 + 12.2) + 100
    assert packed(layer, torch.bfloat16).nbytes < as_floats(layer, torch.bfloat16).nbytes / 3.3


def test_plain_torch_reads_codes_where_kernels_do_not():
    layer, random = stored((300, 129, 7)), torch.Generator().manual_seed(2)
    mine, floats = packed(layer), as_floats(layer)
    for batch, tokens in ((3, 1), (1, 50)):
        query = torch.randn(batch, 6, tokens, 64, generator=random)
        (out, lse), (wanted, seen) = mine.attend(query, 0.2), floats.attend(query, 0.2)
        torch.testing.assert_close(out, wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(lse, seen, atol=1e-4, rtol=1e-4)
    assert alike(mine.whole[0], floats.whole[0]) and torch.equal(mine.whole[1], floats.whole[1])
    assert packed(layer, reads=True).whole is not None and not isinstance(mine.whole, Codes)


def test_more_tokens_behind_it_are_floats():
    layer, random = stored((60, 20, 9)), torch.Generator().manual_seed(1)
    more = torch.randn(3, 4, 64, generator=random)
    assert same(packed(layer).followed_by(more, more), as_floats(layer).followed_by(more, more))


@pytest.mark.parametrize(("size", "groups", "turning"), [(64, 1, 32), (192, 3, 192), (96, 1, 96), (256, 4, 256)])
def test_what_kernels_do_not_read_is_not_taken(size, groups, turning):
    assert not layout.takes(size, groups, torch.ones(turning // 2))
