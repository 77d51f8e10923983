"""Recalled tokens stand where they are put, as if they had been read there."""

from __future__ import annotations

import torch

from cribsheet.compress.loop import nothing_read
from cribsheet.recall.placing import Recalled


def test_keys_are_turned_to_their_new_positions_in_every_layer_as_if_they_had_been_read_there(family):
    """The values of a deeper layer depend on positions only through what it looks at: the same for all of a shift."""
    ids = torch.arange(10, 30)
    here, there = (family.read(nothing_read(family), start, ids, ids[:0]) for start in (0, 700))
    pieces = [tuple(torch.stack([getattr(layer, half)[:, a:b] for layer in here])
                    for half in ("chunk_keys", "chunk_values")) for a, b in ((0, 7), (7, 20))]  # fmt: skip
    recalled = Recalled(pieces, [7, 13], family.inv_freqs)  # read at 0, so not turned yet but by their own places
    placed = Recalled(
        [(_turned_back(keys, a, family.inv_freqs), values) for (keys, values), a in zip(pieces, (0, 7), strict=True)],
        recalled.sizes,
        family.inv_freqs,
    ).placed(700)
    assert recalled.tokens == 20
    for (keys, values), layer in zip(placed, there, strict=True):
        torch.testing.assert_close(keys, layer.chunk_keys, atol=5e-4, rtol=1e-4)
        torch.testing.assert_close(values, layer.chunk_values, atol=5e-4, rtol=1e-4)


def _turned_back(keys, first, inv_freqs):
    """By the formula, token by token and pair by pair."""
    back = keys.clone()
    for layer, inv_freq in enumerate(inv_freqs):
        half = len(inv_freq)
        for n in range(keys.shape[2]):
            angles = -(first + n) * inv_freq
            cos, sin = angles.cos(), angles.sin()
            a, b = keys[layer, :, n, :half], keys[layer, :, n, half : 2 * half]
            back[layer, :, n, :half], back[layer, :, n, half : 2 * half] = a * cos - b * sin, b * cos + a * sin
    return back
