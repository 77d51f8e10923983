"""Room on the host fits what is copied there, with a guide behind it."""

from __future__ import annotations

import pytest
import torch

from cribsheet.attention.prefix import LayerPrefix
from cribsheet.plan.room import moved, room_for, zeros


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


UNIFORM = LayerPrefix(random(2, 7, 4), random(2, 7, 4) + 1)
RAGGED = LayerPrefix(random(9, 4), random(9, 4) + 1, None, (4, 5))


@pytest.mark.parametrize("layer", [UNIFORM, RAGGED], ids=["uniform", "ragged"])
@pytest.mark.parametrize("more", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_with_its_guide_fits_the_room_that_was_made_for_it(layer, more, dtype):
    whole = layer.followed_by(random(2, more, 4), random(2, more, 4))
    found = moved(whole, zeros(layer, more, dtype))
    assert found.counts == whole.counts and found.keys.dtype == found.values.dtype == dtype
    assert torch.equal(found.keys, whole.keys.to(dtype)) and torch.equal(found.values, whole.values.to(dtype))


def test_what_is_on_the_host_stays_where_it_is():
    layers = [UNIFORM, RAGGED]
    for dtype in ("float32", "int8", "int4"):
        assert room_for(layers, 3, dtype) == [None, None]
    assert moved(RAGGED, None) is RAGGED
