"""A sheet in segments: stretches of the corpus that were read alone, so that each can be put in and taken out.

A segment was read right behind the shared preamble and knows nothing of its neighbours. Its keys are kept before
rotation, so it may stand at any position: the sheet is rotated as a whole when it is put on a device, and a segment
that stays is bit for bit the same whatever comes and goes around it. Only a resident guide sees all segments; it is
read anew whenever they change.

Where heads keep different numbers of tokens they do so in each segment; joined, each head's tokens lie close together
and end where the sheet does. Taking a sheet apart is in `living/cutting.py`.

Letters as in `sheet/sheet.py`: `F` layers that see everything, `K` key/value heads, `P` kept tokens, `D` head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cribsheet.attention.prefix import LayerPrefix, end_positions
from cribsheet.attention.rope import rotate
from cribsheet.compress.loop import Tell, compress, nothing_kept, nothing_read
from cribsheet.errors import BudgetError
from cribsheet.model.backbone import Backbone
from cribsheet.plan.assemble import kept_origins
from cribsheet.plan.describe import corpus_digest, list_documents
from cribsheet.plan.plan import Plan
from cribsheet.sheet.layers import FloatLayer, StoredLayer
from cribsheet.sheet.manifest import DocumentEntry, Manifest, SegmentEntry
from cribsheet.sheet.sheet import Sheet, mean_kept
from cribsheet.vocabulary import ABSENT, StorageDtype


@dataclass(frozen=True, slots=True)
class Segment:
    """Documents that were read together, away from all others; preamble and guide are segments without documents.

    layers
        keys before rotation and values (K, P, D) as they are stored; a layer with a sliding window holds only the last
        tokens, fewer than its window.
    indices
        (F, K, P) int32, counted from the segment's first token; `ABSENT` in front of heads that keep fewer than P.
    kept
        how many tokens of it are kept, on average over the layers and heads that see everything.
    origins
        (U, 4) int32 as in `Sheet`, with indices and documents counted from the segment's first ones.
    read
        how many tokens of the corpus it was.
    """

    layers: Sequence[StoredLayer]
    indices: Tensor
    origins: Tensor
    kept: int
    read: int
    documents: Sequence[DocumentEntry] = ()
    texts: Sequence[str] = ()


def read_preamble(backbone: Backbone, ids: Tensor, dtype: StorageDtype) -> Segment:
    """The preamble's tokens (T,), which see only each other."""
    layers = nothing_read(backbone)
    if len(ids):
        layers = _unrotated(backbone, layers, 0, ids)
    rows = torch.arange(len(ids), dtype=torch.int32)
    nowhere = torch.tensor([-1, 0, 0], dtype=torch.int32).expand(len(ids), -1)
    return Segment(
        _stored(backbone, layers, len(ids), dtype),
        _all_heads(backbone, rows),
        torch.cat([rows[:, None], nowhere], 1),
        len(ids),
        len(ids),
    )


def read_guide(backbone: Backbone, before: Sequence[Segment], ids: Tensor, dtype: StorageDtype) -> Segment:
    """The resident guide's tokens (T,), read behind everything that stands `before` it."""
    joined = _joined_layers(before)
    length = joined_indices([segment.indices for segment in before]).shape[2]
    layers = _unrotated(backbone, placed(backbone, joined, length), length, ids)
    nothing = torch.empty(0, 4, dtype=torch.int32)
    rows = torch.full((len(ids),), -1, dtype=torch.int32)
    return Segment(_stored(backbone, layers, len(ids), dtype), _all_heads(backbone, rows), nothing, len(ids), 0)


def read_segment(backbone: Backbone, plan: Plan, tell: Tell | None = None) -> Segment:
    """Condense the documents of a plan, alone behind their preamble, which is left out of the result."""
    kept = nothing_kept(backbone)
    preamble = plan.corpus.preamble_tokens
    reading = replace(plan.reading, pinned=preamble, least=preamble + 1)  # every head keeps something of every document
    for state in compress(backbone, plan.corpus, reading, tell=tell):
        kept = state.kept
    full = [kept[number].indices.cpu() for number in backbone.full]
    indices = joined_indices([_aligned([torch.where(each < preamble, ABSENT, each - preamble) for each in full])])
    counts = (indices != ABSENT).sum(-1)
    size = mean_kept(counts)
    layers, rows = [], iter(counts.tolist())
    for layer, window in zip(kept, backbone.windows, strict=True):
        last = layer.keys.shape[1]
        own = [held(size, window)] * backbone.kv_heads if window is not None else next(rows)
        (part,) = FloatLayer(layer.keys, layer.values, window).parts([(last - count, last) for count in own])
        layers.append(StoredLayer.of(LayerPrefix(part.keys, part.values, window, part.counts), plan.dtype))
    origins = kept_origins(plan.corpus, torch.where(indices < 0, indices, indices + preamble))
    origins[:, 0] -= preamble
    return Segment(
        layers,
        indices.to(torch.int32),
        origins,
        size,
        len(plan.corpus) - preamble,
        list_documents(plan.corpus),
        [document.text for document in plan.corpus.documents],
    )


def placed(backbone: Backbone, layers: Sequence[StoredLayer], length: int) -> list[LayerPrefix]:
    """Unrotated layers of a sheet of `length` positions as attention reads them, each head's last key at the last."""
    found = []
    for layer, inv_freq in zip(layers, backbone.inv_freqs, strict=True):
        restored = layer.restored(backbone.device, torch.float32)
        if layer.window is not None:
            first = max(0, restored.longest - layer.window + 1)
            restored = replace(restored, keys=restored.keys[:, first:], values=restored.values[:, first:])
        keys = rotate(restored.keys, end_positions(restored, length).to(backbone.device), inv_freq).to(backbone.dtype)
        found.append(replace(restored, keys=keys, values=restored.values.to(backbone.dtype)))
    return found


def sheet_layers(backbone: Backbone, sheet: Sheet) -> list[LayerPrefix]:
    """The layers of any sheet on the model's device and in its dtype."""
    if sheet.manifest.rotated:
        return [layer.restored(backbone.device, backbone.dtype) for layer in sheet.layers]
    return placed(backbone, sheet.layers, sheet.length)


def assemble(
    backbone: Backbone,
    manifest: Manifest,
    preamble: Segment,
    segments: Sequence[Segment],
    resident: Tensor,
    *,
    with_texts: bool = True,
) -> Sheet:
    """The sheet of these segments, with the guide (T,), which may be empty, read behind them.

    What `manifest` says of documents, sizes and segments is replaced. Raises `BudgetError` if they do not fit the
    model's window.
    """
    parts = [preamble, *segments]
    origins, indices, read, number = [], [], 0, 0
    for part in parts:
        origins.append(shifted(part.origins, read, number))
        indices.append(torch.where(part.indices < 0, part.indices, part.indices + read))
        read, number = read + part.read, number + len(part.documents)
    joined = joined_indices(indices)
    check_fits(backbone, joined.shape[2] + len(resident))
    if len(resident):
        parts.append(read_guide(backbone, parts, resident, manifest.dtype))
        joined = torch.cat([joined, parts[-1].indices], 2)
    documents = [entry for segment in segments for entry in segment.documents]
    made = {
        "guide": "resident" if len(resident) else "dropped",
        "guide_tokens": len(resident),
        "form": manifest.form if len(resident) else "",
        "corpus_digest": corpus_digest(documents),
        "corpus_tokens": read,
        "head_tokens": preamble.kept,
        "documents": documents,
        "budget": sum(part.kept for part in parts),
        "mode": "independent",
        "segments": [SegmentEntry(documents=len(s.documents), read=s.read, kept=s.kept) for s in segments],
    }
    texts = [text for segment in segments for text in segment.texts] if with_texts else []
    return Sheet(
        _joined_layers(parts),
        joined,
        torch.cat(origins).to(torch.int32),
        manifest.model_copy(update=made),
        texts,
    )


def check_fits(backbone: Backbone, length: int) -> None:
    """Raise `BudgetError` unless a sheet of so many positions leaves room for a question."""
    if length >= backbone.window:
        raise BudgetError(
            f"The sheet would take {length} tokens of the model's window of {backbone.window}, which leaves no room "
            "for a question; build with a higher rate, or spread the documents over several sheets."
        )


def joined_indices(parts: Sequence[Tensor]) -> Tensor:
    """Indices (F, K, P) of stretches that stand one behind the other, each head's without gaps and at the end."""
    joined = torch.cat(list(parts), 2)
    absent = joined == ABSENT
    if not absent.any():
        return joined
    order = absent.logical_not().to(torch.uint8).sort(dim=-1, stable=True).indices
    return joined.gather(-1, order)[..., int(absent.sum(-1).min()) :].contiguous()


def held(tokens: int, window: int | None) -> int:
    """How many of a segment's `tokens` a layer holds."""
    return tokens if window is None else min(tokens, window - 1)


def shifted(origins: Tensor, tokens: int, documents: int) -> Tensor:
    """Origins (U, 4) with so much added to their indices and documents."""
    inside = (origins[:, 1:2] >= 0) * documents
    return torch.cat([origins[:, :1] + tokens, origins[:, 1:2] + inside, origins[:, 2:]], 1)


def _unrotated(backbone: Backbone, before: Sequence[LayerPrefix], start: int, ids: Tensor) -> list[LayerPrefix]:
    """Keys before rotation and values of tokens (T,) that are read at position `start`."""
    positions = torch.arange(start, start + len(ids), device=backbone.device)
    return [
        LayerPrefix(rotate(layer.chunk_keys, -positions, inv_freq), layer.chunk_values, layer.window)
        for layer, inv_freq in zip(backbone.read(before, start, ids, ids[:0]), backbone.inv_freqs, strict=True)
    ]


def _stored(backbone: Backbone, layers: Sequence[LayerPrefix], tokens: int, dtype: StorageDtype) -> list[StoredLayer]:
    """Layers as they are stored: of a segment of `tokens` tokens, no more than each layer holds."""
    found = []
    for layer, window in zip(layers, backbone.windows, strict=True):
        first = layer.keys.shape[1] - held(tokens, window)
        found.append(StoredLayer.of(LayerPrefix(layer.keys[:, first:], layer.values[:, first:], window), dtype))
    return found


def _all_heads(backbone: Backbone, rows: Tensor) -> Tensor:
    return rows.expand(len(backbone.full), backbone.kv_heads, -1)


def _aligned(layers: Sequence[Tensor]) -> Tensor:
    """Indices (K, P) of layers of different lengths, at the end of the longest: (F, K, P)."""
    longest = max(layer.shape[1] for layer in layers)
    return torch.stack([F.pad(layer, (longest - layer.shape[1], 0), value=ABSENT) for layer in layers])


def _joined_layers(segments: Sequence[Segment]) -> list[StoredLayer]:
    return [StoredLayer.joined(parts) for parts in zip(*(segment.layers for segment in segments), strict=True)]
