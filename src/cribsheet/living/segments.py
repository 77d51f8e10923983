"""A sheet in segments: stretches of the corpus that were read alone, so that each can be put in and taken out.

A segment was read right behind the shared preamble and knows nothing of its neighbours. Its keys are kept before
rotation, so it may stand at any position: the sheet is rotated as a whole when it is put on a device, and a segment
that stays is bit for bit the same whatever comes and goes around it. Only a resident guide sees all segments; it is
read anew whenever they change.

Where heads keep different numbers of tokens they do so in each segment; joined, each head's tokens lie close together
and end where the sheet does.

Letters as in `sheet/sheet.py`: `F` layers that see everything, `K` key/value heads, `P` kept tokens, `D` head size.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from cribsheet.attention.prefix import LayerPrefix, end_positions, turned_back
from cribsheet.attention.rope import rotate
from cribsheet.compress.archiving import Archiving
from cribsheet.compress.loop import Tell, compress, nothing_kept, nothing_read
from cribsheet.errors import BudgetError, SheetError
from cribsheet.living.archives import ArchivePart, readable, with_joined
from cribsheet.model.backbone import Backbone
from cribsheet.plan.assemble import kept_origins
from cribsheet.plan.describe import corpus_digest, list_documents
from cribsheet.plan.plan import Plan
from cribsheet.prompt.encoder import Encoder
from cribsheet.sheet.archive.archive import Archive
from cribsheet.sheet.archive.writer import ArchiveWriter
from cribsheet.sheet.layers import FloatLayer, StoredLayer
from cribsheet.sheet.manifest import DocumentEntry, Manifest, SegmentEntry
from cribsheet.sheet.sheet import Sheet, mean_kept, segment_bounds
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
    archive
        where all that was read of it lies in an archive, if it does.
    """

    layers: Sequence[StoredLayer]
    indices: Tensor
    origins: Tensor
    kept: int
    read: int
    documents: Sequence[DocumentEntry] = ()
    texts: Sequence[str] = ()
    archive: ArchivePart | None = None


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


def in_archive(segments: Sequence[Segment], written: ArchiveWriter, manifest: Manifest) -> list[Segment]:
    """Segments of which an archive was written, of them alone; `manifest` is that of a sheet of the same model."""
    about = {"archive": written.finish(), "corpus_tokens": written.tokens}
    archive = Archive(written.path, manifest.model_copy(update=about), owner=written)
    found: list[Segment] = []
    first = number = 0
    for segment in segments:
        part = ArchivePart(archive, first, first + segment.read, number)
        found.append(replace(segment, archive=part))
        first, number = part.stop, number + len(segment.documents)
    return found


def write_preamble(backbone: Backbone, ids: Tensor, archive: ArchiveWriter) -> None:
    """The preamble's tokens (T,) as the first ones of an archive."""
    layers = _unrotated(backbone, nothing_read(backbone), 0, ids)
    archive.append([StoredLayer.of(LayerPrefix(x.keys, x.values), archive.layout.dtype) for x in layers])


def read_guide(backbone: Backbone, before: Sequence[Segment], ids: Tensor, dtype: StorageDtype) -> Segment:
    """The resident guide's tokens (T,), read behind everything that stands `before` it."""
    joined = _joined_layers(before)
    length = joined_indices([segment.indices for segment in before]).shape[2]
    layers = _unrotated(backbone, placed(backbone, joined, length), length, ids)
    nothing = torch.empty(0, 4, dtype=torch.int32)
    rows = torch.full((len(ids),), -1, dtype=torch.int32)
    return Segment(_stored(backbone, layers, len(ids), dtype), _all_heads(backbone, rows), nothing, len(ids), 0)


def read_segment(
    backbone: Backbone, plan: Plan, tell: Tell | None = None, archive: ArchiveWriter | None = None
) -> Segment:
    """Condense the documents of a plan, alone behind their preamble, which is left out of the result.

    All that is read of them goes to an `archive`.
    """
    kept = nothing_kept(backbone)
    preamble = plan.corpus.preamble_tokens
    reading = replace(plan.reading, pinned=preamble, least=preamble + 1)  # every head keeps something of every document
    keep_all = Archiving(backbone, archive, preamble) if archive else None
    for state in compress(backbone, plan.corpus, reading, tell=tell, keep_all=keep_all):
        kept = state.kept
    full = [kept[number].indices.cpu() for number in backbone.full]
    indices = joined_indices([_aligned([torch.where(each < preamble, ABSENT, each - preamble) for each in full])])
    counts = (indices != ABSENT).sum(-1)
    size = mean_kept(counts)
    layers, rows = [], iter(counts.tolist())
    for layer, window in zip(kept, backbone.windows, strict=True):
        last = layer.keys.shape[1]
        own = [_held(size, window)] * backbone.kv_heads if window is not None else next(rows)
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


def placed(
    backbone: Backbone, layers: Sequence[StoredLayer], length: int, dtype: torch.dtype | None = None
) -> list[LayerPrefix]:
    """Unrotated layers of a sheet of `length` positions as attention reads them, each head's last key at the last."""
    kind = dtype or backbone.dtype
    pairs = zip(layers, backbone.inv_freqs, strict=True)
    return [placed_layer(layer, length, inv_freq, backbone.device, kind) for layer, inv_freq in pairs]


def placed_layer(
    layer: StoredLayer, length: int, inv_freq: Tensor, device: torch.device, dtype: torch.dtype
) -> LayerPrefix:
    """One of them, whose keys turn by `inv_freq`."""
    restored = layer.restored(device, torch.float32)
    if layer.window is not None:
        first = max(0, restored.longest - layer.window + 1)
        restored = replace(restored, keys=restored.keys[:, first:], values=restored.values[:, first:])
    keys = rotate(restored.keys, end_positions(restored, length).to(device), inv_freq)
    return replace(restored, keys=keys.to(dtype), values=restored.values.to(dtype))


def sheet_layers(backbone: Backbone, sheet: Sheet, dtype: torch.dtype | None = None) -> list[LayerPrefix]:
    """The layers of any sheet on the model's device, in its dtype or another."""
    if sheet.manifest.rotated:
        return [layer.restored(backbone.device, dtype or backbone.dtype) for layer in sheet.layers]
    return placed(backbone, sheet.layers, sheet.length, dtype)


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

    What `manifest` says of documents, sizes and segments is replaced, and archives are put together. Raises
    `BudgetError` if the segments do not fit the model's window.
    """
    parts = [preamble, *segments]
    origins, indices, read, number = [], [], 0, 0
    for part in parts:
        origins.append(_shifted(part.origins, read, number))
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
        "archive": None,
        "segments": [SegmentEntry(documents=len(s.documents), read=s.read, kept=s.kept) for s in segments],
    }
    texts = [text for segment in segments for text in segment.texts] if with_texts else []
    sheet = Sheet(
        _joined_layers(parts),
        joined,
        torch.cat(origins).to(torch.int32),
        manifest.model_copy(update=made),
        texts,
    )
    archived = [preamble, *segments]
    return with_joined(sheet, [part.archive for part in archived], [len(part.documents) for part in archived])


def cut(backbone: Backbone, sheet: Sheet) -> tuple[Segment, list[Segment]]:
    """The preamble and the segments of an independent sheet; a sequential one is one segment. The guide is left out.

    The template's preamble is read again where not every head of a sequential sheet keeps all of it. Raises
    `SheetError` for a sequential sheet with sliding windows.
    """
    manifest = sheet.manifest
    independent = manifest.mode == "independent"
    whole = (len(manifest.documents), manifest.corpus_tokens - manifest.head_tokens)
    sizes = [(entry.documents, entry.read) for entry in manifest.segments] if independent else [whole]
    stretches = [(0, manifest.head_tokens), *sizes]
    bounds = segment_bounds(sheet.indices, manifest.guide_tokens, [read for _, read in stretches])
    layers = sheet.layers if independent else _turned_back(backbone, sheet)
    parts = _parts(layers, bounds, backbone, sheet.length)
    archive = readable(sheet)
    segments: list[Segment] = []
    read = number = 0
    for place, (documents, tokens) in enumerate(stretches):
        first, last = bounds[..., place], bounds[..., place + 1]
        kept = mean_kept(last - first)
        rows = torch.searchsorted(sheet.origins[:, 0].contiguous(), torch.tensor([read, read + tokens]).int())
        segments.append(
            Segment(
                [own[place] for own in parts],
                _stretch(sheet.indices, first, last, read),
                _shifted(sheet.origins[int(rows[0]) : int(rows[1])], -read, -number),
                kept,
                tokens,
                manifest.documents[number : number + documents],
                sheet.texts[number : number + documents] if sheet.texts else [""] * documents,
                ArchivePart(archive, read, read + tokens, number) if archive else None,
            )
        )
        read, number = read + tokens, number + documents
    is_whole = bool((bounds[..., 1] - bounds[..., 0] == manifest.head_tokens).all())
    preamble = segments[0] if is_whole else replace(_preamble_of(backbone, sheet), archive=segments[0].archive)
    return preamble, segments[1:]


def segments_of(manifest: Manifest, documents: Collection[str]) -> set[int]:
    """The segments that have any of these documents, by their ids."""
    owner = [number for number, entry in enumerate(manifest.segments) for _ in range(entry.documents)]
    pairs = zip(manifest.documents, owner, strict=True)
    return {number for entry, number in pairs if entry.id in documents}


def exchanged(
    backbone: Backbone, sheet: Sheet, layers: Sequence[StoredLayer], segments: Collection[int]
) -> list[StoredLayer]:
    """Layers of an independent sheet, with other `layers` for the same tokens in these of its segments.

    All others, and layers with sliding windows, stay bit for bit as they were.
    """
    manifest = sheet.manifest
    read = [manifest.head_tokens, *(entry.read for entry in manifest.segments)]
    bounds = segment_bounds(sheet.indices, manifest.guide_tokens, read)
    found = list(sheet.layers)
    for number, own in zip(backbone.full, bounds.tolist(), strict=True):
        old, new = sheet.layers[number], layers[number]
        sizes = old.counts or [old.keys.shape[1]] * backbone.kv_heads
        rows = [[*(place - sheet.length + size for place in head), size] for head, size in zip(own, sizes, strict=True)]
        pairs = zip(old.parts(rows), new.parts(rows), strict=True)
        parts = [theirs if place - 1 in segments else ours for place, (ours, theirs) in enumerate(pairs)]
        found[number] = StoredLayer.joined(parts)
    return found


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


def _held(tokens: int, window: int | None) -> int:
    """How many of a segment's `tokens` a layer holds."""
    return tokens if window is None else min(tokens, window - 1)


def _shifted(origins: Tensor, tokens: int, documents: int) -> Tensor:
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
        first = layer.keys.shape[1] - _held(tokens, window)
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


def _preamble_of(backbone: Backbone, sheet: Sheet) -> Segment:
    """The whole preamble of the template that a sequential sheet begins with."""
    manifest = sheet.manifest
    ids, spans = Encoder(backbone.tokenizer).left(manifest.head + "x")
    return read_preamble(backbone, ids[spans[:, 1] <= len(manifest.head)], manifest.dtype)


def _parts(layers: Sequence[StoredLayer], bounds: Tensor, backbone: Backbone, length: int) -> list[list[StoredLayer]]:
    """Of each layer its stretches; `bounds` (F, K, S + 1) are the places between them in layers without a window."""
    kept = [mean_kept(each) for each in bounds.diff().unbind(-1)]
    full = iter(bounds.tolist())
    found = []
    for layer in layers:
        if layer.window is None:
            # a place is counted in the sheet's indices, where heads end with the sheet
            sizes = layer.counts or [layer.keys.shape[1]] * backbone.kv_heads
            rows = [[place - length + size for place in own] for own, size in zip(next(full), sizes, strict=True)]
        else:
            ends = accumulate((_held(each, layer.window) for each in kept), initial=0)
            rows = [list(ends)] * backbone.kv_heads
        found.append(layer.parts(rows))
    return found


def _stretch(indices: Tensor, first: Tensor, last: Tensor, read: int) -> Tensor:
    """Indices (F, K, p) of what stands at places `first` to `last` (F, K) of each head, counted from `read`.

    Heads with fewer than `p` end where the others do.
    """
    places = last.unsqueeze(-1) + torch.arange(-int((last - first).max()), 0)
    found = indices.gather(-1, places.clamp(min=0)) - read
    return torch.where(places >= first.unsqueeze(-1), found, ABSENT)


def _turned_back(backbone: Backbone, sheet: Sheet) -> Sequence[StoredLayer]:
    """The layers of a sequential sheet with their keys turned back to no rotation."""
    manifest = sheet.manifest
    if any(window is not None for window in manifest.fingerprint.windows):
        raise SheetError(
            "Layers with a sliding window hold only the end of a sequential sheet, so it cannot be joined to another; "
            "build both with mode='independent'."
        )
    if not manifest.rotated:
        return sheet.layers
    restored = [layer.restored(torch.device("cpu"), torch.float32) for layer in sheet.layers]
    return [
        StoredLayer.of(turned_back(layer, sheet.length, inv_freq.cpu()), manifest.dtype)
        for layer, inv_freq in zip(restored, backbone.inv_freqs, strict=True)
    ]
