"""Sheets and prefixes of random keys and values, for timing."""

from __future__ import annotations

from dataclasses import replace

import torch

from cribsheet.attention.packed.layout import turns
from cribsheet.attention.packed.prefix import PackedPrefix, Room
from cribsheet.attention.prefix import LayerPrefix, Prefix
from cribsheet.build import build_sheet
from cribsheet.corpus.documents import Document
from cribsheet.corpus.task import Task
from cribsheet.living.segments import placed_layer
from cribsheet.sheet.layers import FloatLayer, Int4Layer
from cribsheet.sheet.sheet import Sheet
from cribsheet_bench.speed.setting import Setting


def sheet_of(setting: Setting, tokens: int) -> Sheet:
    """A uniform bfloat16 sheet of so many tokens: a small real one, with larger tensors."""
    text = " ".join(f"House {n} is blue." for n in range(40))
    small = build_sheet(setting.backbone, [Document(text=text, id="a")], Task("Which?"), rate=1, scorer="task")
    shape = (setting.backbone.kv_heads, tokens, setting.backbone.head_size)
    keys = torch.randn(shape).to(torch.bfloat16)
    layers = [FloatLayer(keys.clone(), keys.clone()) for _ in small.layers]
    indices = torch.arange(tokens, dtype=torch.int32).expand(*small.indices.shape[:2], -1).contiguous()
    changed = {"dtype": "bfloat16", "guide": "dropped", "guide_tokens": 0, "corpus_tokens": tokens}
    made = small.manifest.model_copy(update=changed)
    return Sheet(layers, indices, small.origins, made, small.texts)


def in_four_bits(setting: Setting, tokens: int, *, ragged: bool, packed: bool) -> Prefix:
    """A prefix of so many tokens a head as a sheet in int4 has it on the device, as codes or in 16 bits.

    All layers hold the same numbers, each in memory of its own; ragged heads are as in `Setting.prefix`.
    """
    made, generator = setting.backbone, torch.Generator(setting.device).manual_seed(0)
    counts = setting.counts(tokens) if ragged else ()
    shape = (sum(counts),) if ragged else (made.kv_heads, tokens)
    length = max(counts, default=tokens)
    keys, values = (torch.randn(*shape, made.head_size, generator=generator, device=setting.device) for _ in "kv")
    stored = Int4Layer.made_of(LayerPrefix(keys, values, None, counts), "int4")
    freqs = made.inv_freqs[0].to(setting.device, torch.float32)
    if packed:
        room = Room(sum(stored.kept), made.head_size, made.dtype, setting.device)
        codes = stored.tiled(setting.device, length, (freqs, turns(freqs, made.dtype)))
        names = "keys", "values", "key_ranges", "value_ranges", "tiles", "spans"
        layers: list[LayerPrefix] = []
        for _ in range(made.num_layers):
            copied = replace(codes, **{name: getattr(codes, name).clone() for name in names})
            layers.append(PackedPrefix(copied, stored.kept, made.dtype, room, lambda: True))
    else:
        layer = placed_layer(stored, length, freqs, setting.device, made.dtype)
        layers = [LayerPrefix(layer.keys.clone(), layer.values.clone(), None, counts) for _ in range(made.num_layers)]
    return Prefix(layers, length)
