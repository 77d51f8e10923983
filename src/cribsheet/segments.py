"""A sheet in segments: stretches of the corpus that were read alone, so that each can be taken out and put in.

A segment was read right behind the shared head and knows nothing of its neighbours. Its keys are kept before rotation,
so it may stand at any position: the sheet is rotated as a whole when it is put on a device, and a segment that stays
is bit for bit the same whatever comes and goes around it. Only a resident guide sees all segments; it is read anew
whenever they change.

Letters as in `sheet.py`: `F` layers that see everything, `K` key/value heads, `P` kept tokens, `D` head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cribsheet.backbone import Backbone
from cribsheet.build import Plan, corpus_digest, kept_origins, list_documents
from cribsheet.compress import compress, nothing_kept
from cribsheet.errors import BudgetError, SheetError
from cribsheet.prefix import LayerPrefix, empty_prefix
from cribsheet.rope import rotate
from cribsheet.sheet import DocumentEntry, Manifest, SegmentEntry, Sheet
from cribsheet.stored import StorageDtype, StoredLayer


@dataclass(frozen=True, slots=True)
class Segment:
    """Documents that were read together, away from all others; the head and the guide are segments without documents.

    layers
        keys before rotation and values (K, P, D) as they are stored; a layer with a sliding window holds only the last
        tokens, fewer than its window.
    indices
        (F, K, P) int32, counted from the segment's first token.
    origins
        (U, 4) int32 as in `Sheet`, with indices and documents counted from the segment's first ones.
    read
        how many tokens of the corpus it was.
    """

    layers: Sequence[StoredLayer]
    indices: Tensor
    origins: Tensor
    read: int
    documents: Sequence[DocumentEntry] = ()
    texts: Sequence[str] = ()

    @property
    def tokens(self) -> int:
        """Tokens of it that are kept."""
        return self.indices.shape[2]


def read_head(backbone: Backbone, ids: Tensor, dtype: StorageDtype) -> Segment:
    """The head's tokens (h,), which see only each other."""
    like = torch.empty(0, dtype=backbone.dtype, device=backbone.device)
    layers = empty_prefix(backbone.num_layers, backbone.kv_heads, backbone.head_size, like)
    if len(ids):
        layers = _unrotated(backbone, layers, 0, ids)
    rows = torch.arange(len(ids), dtype=torch.int32)
    nowhere = torch.tensor([-1, 0, 0], dtype=torch.int32).expand(len(ids), -1)
    return Segment(
        _stored(backbone, layers, len(ids), dtype),
        _all_heads(backbone, rows),
        torch.cat([rows[:, None], nowhere], 1),
        len(ids),
    )


def read_guide(backbone: Backbone, before: Sequence[Segment], ids: Tensor, dtype: StorageDtype) -> Segment:
    """The resident guide's tokens (T,), read behind everything that stands `before` it."""
    tokens = sum(segment.tokens for segment in before)
    layers = _unrotated(backbone, placed(backbone, _joined_layers(before), tokens), tokens, ids)
    nothing = torch.empty(0, 4, dtype=torch.int32)
    rows = torch.full((len(ids),), -1, dtype=torch.int32)
    return Segment(_stored(backbone, layers, len(ids), dtype), _all_heads(backbone, rows), nothing, 0)


def read_segment(backbone: Backbone, plan: Plan, dtype: StorageDtype) -> Segment:
    """Condense the documents of a plan, alone behind their head, which is left out of the result."""
    kept = nothing_kept(backbone)
    for state in compress(backbone, plan.corpus, replace(plan.reading, pins_head=True)):
        kept = state.kept
    head = plan.corpus.head_tokens
    size = plan.reading.budget - head
    layers = [
        LayerPrefix(layer.keys[:, -size:], layer.values[:, -size:], window)
        for layer, window in zip(kept, backbone.windows, strict=True)
    ]
    indices = torch.stack([kept[number].indices[:, head:] for number in backbone.full]).cpu().to(torch.int32)
    origins = kept_origins(plan.corpus, indices)
    origins[:, 0] -= head
    documents = plan.corpus.documents
    return Segment(
        _stored(backbone, layers, size, dtype),
        indices - head,
        origins,
        len(plan.corpus) - head,
        list_documents(plan.corpus),
        [document.text for document in documents],
    )


def placed(backbone: Backbone, layers: Sequence[StoredLayer], tokens: int) -> list[LayerPrefix]:
    """Unrotated layers of a sheet of `tokens` tokens as attention reads them, keys at positions 0 to `tokens` - 1."""
    found = []
    for layer, inv_freq in zip(layers, backbone.inv_freqs, strict=True):
        size = layer.keys.shape[1]
        seen = layer if layer.window is None else layer.part(max(0, size - layer.window + 1), size)
        restored = seen.restored(backbone.device, torch.float32)
        positions = torch.arange(tokens - restored.keys.shape[1], tokens, device=backbone.device)
        keys = rotate(restored.keys, positions, inv_freq).to(backbone.dtype)
        found.append(LayerPrefix(keys, restored.values.to(backbone.dtype), layer.window))
    return found


def sheet_layers(backbone: Backbone, sheet: Sheet) -> list[LayerPrefix]:
    """The layers of any sheet on the model's device and in its dtype."""
    if sheet.manifest.mode == "independent":
        return placed(backbone, sheet.layers, sheet.tokens)
    return [layer.restored(backbone.device, backbone.dtype) for layer in sheet.layers]


def assemble(
    backbone: Backbone,
    manifest: Manifest,
    head: Segment,
    segments: Sequence[Segment],
    resident: Tensor,
    *,
    with_texts: bool = True,
) -> Sheet:
    """The sheet of these segments, with the guide (T,), which may be empty, read behind them.

    What `manifest` says of documents, sizes and segments is replaced. Raises `BudgetError` if they do not fit the
    model's window.
    """
    parts = [head, *segments]
    tokens = sum(part.tokens for part in parts) + len(resident)
    check_fits(backbone, tokens)
    if len(resident):
        parts.append(read_guide(backbone, parts, resident, manifest.dtype))
    documents = [entry for segment in segments for entry in segment.documents]
    origins, indices, read, number = [], [], 0, 0
    for part in parts:
        origins.append(_shifted(part.origins, read, number))
        indices.append(torch.where(part.indices < 0, -1, part.indices + read))
        read, number = read + part.read, number + len(part.documents)
    made = {
        "guide": "resident" if len(resident) else "dropped",
        "guide_tokens": len(resident),
        "corpus_digest": corpus_digest(documents),
        "corpus_tokens": read,
        "head_tokens": head.tokens,
        "documents": documents,
        "budget": tokens,
        "mode": "independent",
        "segments": [SegmentEntry(documents=len(s.documents), read=s.read, kept=s.tokens) for s in segments],
    }
    texts = [text for segment in segments for text in segment.texts] if with_texts else []
    return Sheet(
        _joined_layers(parts),
        torch.cat(indices, 2).to(torch.int32),
        torch.cat(origins).to(torch.int32),
        manifest.model_copy(update=made),
        texts,
    )


def check_fits(backbone: Backbone, tokens: int) -> None:
    """Raise `BudgetError` unless a sheet of so many tokens leaves room for a question."""
    if tokens >= backbone.window:
        raise BudgetError(
            f"The sheet would have {tokens} tokens, which leaves no room for a question in the model's window of "
            f"{backbone.window}; build with a higher rate, or spread the documents over several sheets."
        )


def cut(backbone: Backbone, sheet: Sheet) -> tuple[Segment, list[Segment]]:
    """The head and the segments of an independent sheet; a sequential one is one segment. The guide is left out.

    Raises `SheetError` for a sequential sheet that cannot be cut behind its head or before its guide.
    """
    made = sheet.manifest
    if made.allocation == "adaptive":
        raise SheetError(
            "The heads of this sheet keep different numbers of tokens, so it cannot be taken apart; build it with "
            "allocation='uniform'."
        )
    independent = made.mode == "independent"
    layers = sheet.layers if independent else _cuttable(backbone, sheet)
    entries = made.segments if independent else [_whole(sheet)]
    head = SegmentEntry(documents=0, read=made.head_tokens, kept=made.head_tokens)
    found: list[Segment] = []
    kept = read = number = 0
    sizes = [0] * len(layers)  # tokens of each layer so far
    for entry in (head, *entries):
        last = [size + held(entry.kept, layer.window) for size, layer in zip(sizes, layers, strict=True)]
        rows = torch.searchsorted(sheet.origins[:, 0].contiguous(), torch.tensor([read, read + entry.read]).int())
        texts = sheet.texts[number : number + entry.documents] if sheet.texts else [""] * entry.documents
        found.append(
            Segment(
                [layer.part(a, b) for layer, a, b in zip(layers, sizes, last, strict=True)],
                sheet.indices[:, :, kept : kept + entry.kept] - read,
                _shifted(sheet.origins[int(rows[0]) : int(rows[1])], -read, -number),
                entry.read,
                made.documents[number : number + entry.documents],
                texts,
            )
        )
        kept, read, number, sizes = kept + entry.kept, read + entry.read, number + entry.documents, last
    return found[0], found[1:]


def held(tokens: int, window: int | None) -> int:
    """How many of a segment's `tokens` a layer holds."""
    return tokens if window is None else min(tokens, window - 1)


def _whole(sheet: Sheet) -> SegmentEntry:
    made = sheet.manifest
    kept = sheet.tokens - made.head_tokens - made.guide_tokens
    return SegmentEntry(documents=len(made.documents), read=made.corpus_tokens - made.head_tokens, kept=kept)


def _cuttable(backbone: Backbone, sheet: Sheet) -> list[StoredLayer]:
    """The layers of a sequential sheet with their keys turned back to no rotation."""
    made = sheet.manifest
    if any(window is not None for window in made.fingerprint.windows):
        raise SheetError(
            "Layers with a sliding window hold only the end of a sequential sheet, so it cannot be joined to another; "
            "build both with mode='independent'."
        )
    if (sheet.indices[:, :, : made.head_tokens] != torch.arange(made.head_tokens)).any():
        raise SheetError(
            f"The scorer {made.scorer!r} does not keep the head of the template, which sheets have in common; "
            "build with another scorer, or with mode='independent'."
        )
    turned = []
    for layer, inv_freq in zip(sheet.layers, backbone.inv_freqs, strict=True):
        plain = layer.restored(torch.device("cpu"), torch.float32)
        keys = rotate(plain.keys, -torch.arange(sheet.tokens), inv_freq.cpu())
        turned.append(StoredLayer.of(LayerPrefix(keys, plain.values, None), made.dtype))
    return turned


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


def _joined_layers(segments: Sequence[Segment]) -> list[StoredLayer]:
    return [StoredLayer.joined(parts) for parts in zip(*(segment.layers for segment in segments), strict=True)]


def _shifted(origins: Tensor, tokens: int, documents: int) -> Tensor:
    """Origins (U, 4) with so much added to their indices and documents."""
    inside = (origins[:, 1:2] >= 0) * documents
    return torch.cat([origins[:, :1] + tokens, origins[:, 1:2] + inside, origins[:, 2:]], 1)
