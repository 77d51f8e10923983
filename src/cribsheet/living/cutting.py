"""Taking a sheet apart into its segments; putting together is in `living/segments.py`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from cribsheet.attention.prefix import turned_back
from cribsheet.errors import SheetError
from cribsheet.living.segments import Segment, held, read_preamble, shifted
from cribsheet.model.backbone import Backbone
from cribsheet.prompt.encoder import Encoder
from cribsheet.sheet.layers import StoredLayer
from cribsheet.sheet.sheet import Sheet, mean_kept, segment_bounds
from cribsheet.vocabulary import ABSENT


def cut(backbone: Backbone, sheet: Sheet) -> tuple[Segment, list[Segment]]:
    """The preamble and the segments of an independent sheet; a sequential one is one segment. The guide is left out.

    The template's preamble is read again where not every head of a sequential sheet keeps all of it. Raises
    `SheetError` for a sequential sheet with sliding windows.
    """
    made = sheet.manifest
    independent = made.mode == "independent"
    whole = (len(made.documents), made.corpus_tokens - made.head_tokens)
    segments = [(each.documents, each.read) for each in made.segments] if independent else [whole]
    stretches = [(0, made.head_tokens), *segments]
    bounds = segment_bounds(sheet.indices, made.guide_tokens, [read for _, read in stretches])
    layers = sheet.layers if independent else _unrotated(backbone, sheet)
    parts = _parts(layers, bounds, backbone, sheet.length)
    found: list[Segment] = []
    read = number = 0
    for place, (documents, tokens) in enumerate(stretches):
        first, last = bounds[..., place], bounds[..., place + 1]
        kept = mean_kept(last - first)
        rows = torch.searchsorted(sheet.origins[:, 0].contiguous(), torch.tensor([read, read + tokens]).int())
        found.append(
            Segment(
                [own[place] for own in parts],
                _stretch(sheet.indices, first, last, read),
                shifted(sheet.origins[int(rows[0]) : int(rows[1])], -read, -number),
                kept,
                tokens,
                made.documents[number : number + documents],
                sheet.texts[number : number + documents] if sheet.texts else [""] * documents,
            )
        )
        read, number = read + tokens, number + documents
    is_whole = bool((bounds[..., 1] - bounds[..., 0] == made.head_tokens).all())
    return found[0] if is_whole else _preamble_of(backbone, sheet), found[1:]


def _preamble_of(backbone: Backbone, sheet: Sheet) -> Segment:
    """The whole preamble of the template that a sequential sheet begins with."""
    made = sheet.manifest
    ids, spans = Encoder(backbone.tokenizer).left(made.head + "x")
    return read_preamble(backbone, ids[spans[:, 1] <= len(made.head)], made.dtype)


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
            ends = accumulate((held(each, layer.window) for each in kept), initial=0)
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


def _unrotated(backbone: Backbone, sheet: Sheet) -> Sequence[StoredLayer]:
    """The layers of a sequential sheet with their keys turned back to no rotation."""
    made = sheet.manifest
    if any(window is not None for window in made.fingerprint.windows):
        raise SheetError(
            "Layers with a sliding window hold only the end of a sequential sheet, so it cannot be joined to another; "
            "build both with mode='independent'."
        )
    if not made.rotated:
        return sheet.layers
    restored = [layer.restored(torch.device("cpu"), torch.float32) for layer in sheet.layers]
    return [
        StoredLayer.of(turned_back(layer, sheet.length, inv_freq.cpu()), made.dtype)
        for layer, inv_freq in zip(restored, backbone.inv_freqs, strict=True)
    ]
