"""A sheet as questions stand on it: on the model's device, and there in four bits if it is stored so, large, and read.

Whoever changes, studies or exports a sheet takes its numbers from `segments.sheet_layers`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from cribsheet.attention.packed import check, layout
from cribsheet.attention.packed.prefix import PackedPrefix, Room
from cribsheet.attention.prefix import LayerPrefix, Prefix
from cribsheet.attention.rope import OfAlike
from cribsheet.kernels.codes import TILE
from cribsheet.living.segments import placed_layer, sheet_layers
from cribsheet.model.backbone import Backbone
from cribsheet.model.passes import prepare
from cribsheet.sheet.layers import Int4Layer, StoredLayer
from cribsheet.sheet.sheet import Sheet

_LOUDEST, _WIDEST = 1e4, 255.0  # numbers of keys, and scales of values, that kernels hold (`kernels/packed.py`)


def opened(backbone: Backbone, sheet: Sheet) -> Prefix:
    """The prefix of a sheet, in the model's dtype; layers in int4 that see everything stay in it where they can."""
    like, kept = _query(backbone), list[Int4Layer | None]()
    if _may_pack(backbone, sheet, like):
        kept = [_packable(layer, turn) for layer, turn in zip(sheet.layers, backbone.inv_freqs, strict=True)]
    if not any(kept):
        return Prefix(sheet_layers(backbone, sheet), sheet.length)
    prepare(backbone, codes=True)
    reads = partial(check.usable, like, backbone.kv_heads)
    most = max(sum(layer.kept) for layer in kept if layer)
    room = Room(most, backbone.head_size, backbone.dtype, backbone.device)
    turns = OfAlike(backbone.inv_freqs, partial(_turns, backbone))
    layers: list[LayerPrefix] = []
    for number, (layer, own) in enumerate(zip(sheet.layers, kept, strict=True)):
        if own is None:
            freqs = backbone.inv_freqs[number]
            layers.append(placed_layer(layer, sheet.length, freqs, backbone.device, backbone.dtype))
        else:
            codes = own.tiled(backbone.device, sheet.length, turns.of(number))
            layers.append(PackedPrefix(codes, own.kept, backbone.dtype, room, reads))
    return Prefix(layers, sheet.length)


def _turns(backbone: Backbone, freqs: Tensor) -> tuple[Tensor, Tensor]:
    """Frequencies on the device, and what kernels turn the keys of a tile by."""
    there = freqs.to(backbone.device, torch.float32).contiguous()
    return there, layout.turns(there, backbone.dtype)


def _may_pack(backbone: Backbone, sheet: Sheet, like: Tensor) -> bool:
    """Whether it is large enough, and the model one whose kernels may read codes."""
    if sheet.opened_bytes(2) < backbone.packs_from or sheet.manifest.rotated or backbone.softcap is not None:
        return False
    return not check.is_ruled_out(like, backbone.kv_heads)


def is_out_of_place(backbone: Backbone, prefix: Prefix) -> bool:
    """Whether it is in four bits and was found out since that kernels do not read them: it is to be opened again."""
    packed = any(isinstance(layer, PackedPrefix) for layer in prefix.layers)
    return packed and check.is_ruled_out(_query(backbone), backbone.kv_heads)


def _query(backbone: Backbone) -> Tensor:
    """A query (1, H, 1, D) of a model, of anything."""
    return torch.empty(1, backbone.num_heads, 1, backbone.head_size, dtype=backbone.dtype, device=backbone.device)


def _in_half(layer: Int4Layer) -> bool:
    """Whether kernels hold its keys, rotated, and the scales of its values in float16."""
    loudest = layer.key_offsets.float().abs().max() + 15 * layer.key_scales.float().max()
    return float(loudest) < _LOUDEST and float(layer.value_scales.max()) < _WIDEST


def _packable(layer: StoredLayer, freqs: Tensor) -> Int4Layer | None:
    """A layer that may stay in four bits: of full tiles for the most part, so that it takes less than 16 bits would."""
    if not isinstance(layer, Int4Layer) or layer.window is not None or not sum(layer.kept):
        return None
    tiles = int((-(-layer.key_blocks.long() // TILE)).sum())
    fits = layout.takes(2 * layer.keys.shape[-1], layer.value_scales.shape[-1], freqs)
    return layer if fits and tiles * TILE <= 2 * sum(layer.kept) and _in_half(layer) else None
