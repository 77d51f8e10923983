"""Memory on the host for what a GPU holds, made before it is needed.

A system gives memory page by page at its first use: 58 MB of a sheet took 50 ms to copy to new memory, and take 8 to
memory that was written to before. So that is done by a thread, while the guide is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cribsheet.attention.prefix import LayerPrefix
from cribsheet.vocabulary import StorageDtype

Halves = tuple[Tensor, Tensor]  # keys and values


def room_for(layers: Sequence[LayerPrefix], more: int, dtype: StorageDtype) -> list[Halves | None]:
    """Zeros for each layer with so many tokens `more` behind each head; none where nothing is to be copied so.

    That is where layers are on the host, have windows, or are stored in forms that are made elsewhere.
    """
    if dtype in ("int8", "int4"):
        return [None] * len(layers)
    kept = getattr(torch, dtype)
    return [zeros(layer, more, kept) if layer.keys.is_cuda and layer.window is None else None for layer in layers]


def zeros(layer: LayerPrefix, more: int, dtype: torch.dtype) -> Halves:
    """For keys and values of a layer, as `LayerPrefix.followed_by` makes them of so many tokens more."""
    size = layer.keys.shape[-1]
    each = (sum(layer.counts) + layer.heads * more,) if layer.counts else (layer.heads, layer.longest + more)
    return torch.zeros(*each, size, dtype=dtype), torch.zeros(*each, size, dtype=dtype)


def moved(layer: LayerPrefix, to: Halves | None) -> LayerPrefix:
    """A layer copied there, in the type that is there, or as it is if there is no room for it."""
    return layer if to is None else replace(layer, keys=to[0].copy_(layer.keys), values=to[1].copy_(layer.values))
