"""Which tokens of a sheet learn, and the sheet with what they have learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cribsheet.attention.prefix import LayerPrefix, turned_back
from cribsheet.living.segments import exchanged, segments_of, sheet_layers
from cribsheet.model.backbone import Backbone
from cribsheet.sheet.layers import StoredLayer
from cribsheet.sheet.sheet import Sheet
from cribsheet.study.exercises import Exercise
from cribsheet.study.trainer import Trainer
from cribsheet.vocabulary import ABSENT

_SINKS = 4  # first tokens of a sheet, on which attention rests: they stay


def trainer_of(
    backbone: Backbone,
    sheet: Sheet,
    questions: Sequence[Exercise],
    texts: Sequence[Exercise],
    held: Sequence[Exercise],
    seed: int = 0,
    documents: Sequence[str] = (),
) -> Trainer:
    """What learns the layers of a sheet, or of some of its documents, seen as it is stored."""
    layers, free = sheet_layers(backbone, sheet, torch.float32), free_places(backbone, sheet, documents)
    return Trainer(
        backbone, layers, sheet.length, free, questions, texts, held, seed, rounded=sheet.manifest.dtype == "int4"
    )


def free_places(backbone: Backbone, sheet: Sheet, documents: Sequence[str] = ()) -> list[Tensor | None]:
    """Of each layer that is learnt, which tokens (N,) may change: those of documents, and not the first few."""
    first = max(_SINKS, sheet.manifest.head_tokens)
    numbers = [number for number, entry in enumerate(sheet.manifest.documents) if entry.id in documents]
    inside = torch.full((sheet.manifest.corpus_tokens,), -1)
    inside[sheet.origins[:, 0].long()] = sheet.origins[:, 1].long()
    found: list[Tensor | None] = [None] * backbone.num_layers
    for layer, indices in zip(backbone.full, sheet.indices, strict=True):
        held = indices[indices != ABSENT].long()
        found[layer] = held >= first
        if documents:
            found[layer] = (held >= first) & torch.isin(inside[held.clamp(min=0)], torch.tensor(numbers))
    return found


def with_layers(
    backbone: Backbone, sheet: Sheet, layers: Sequence[LayerPrefix], documents: Sequence[str] = ()
) -> Sheet:
    """The sheet with other keys and values, in its storage type, in the layers that are learnt."""
    stored = list(sheet.layers)
    for number in backbone.full:
        layer = layers[number]
        if not sheet.manifest.rotated:
            layer = turned_back(layer, sheet.length, backbone.inv_freqs[number])
        stored[number] = StoredLayer.of(layer, sheet.manifest.dtype)
    if documents and sheet.manifest.mode == "independent":
        stored = exchanged(backbone, sheet, stored, segments_of(sheet.manifest, documents))
    return replace(sheet, layers=stored)
