"""Taking a sheet apart into its segments; putting together is in `segments.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cribsheet.backbone import Backbone
from cribsheet.errors import SheetError
from cribsheet.prefix import LayerPrefix
from cribsheet.rope import rotate
from cribsheet.segments import Segment, end_positions, held, joined_indices, read_head, shifted
from cribsheet.selection import ABSENT
from cribsheet.sheet import Sheet, mean_kept, segment_bounds
from cribsheet.stored import StoredLayer
from cribsheet.tokens import Encoder


def cut(backbone: Backbone, sheet: Sheet) -> tuple[Segment, list[Segment]]:
    """The head and the segments of an independent sheet; a sequential one is one segment. The guide is left out.

    The template's head is read again where not every head of a sequential sheet keeps all of it. Raises `SheetError`
    for a sequential sheet with sliding windows.
    """
    made = sheet.manifest
    independent = made.mode == "independent"
    whole = (len(made.documents), made.corpus_tokens - made.head_tokens)
    segments = [(each.documents, each.read) for each in made.segments] if independent else [whole]
    stretches = [(0, made.head_tokens), *segments]
    bounds = segment_bounds(sheet.indices, made.guide_tokens, [read for _, read in stretches])
    layers = sheet.layers if independent else _unrotated(backbone, sheet)
    sliding = [0] * len(layers)  # tokens so far of each layer with a window
    found: list[Segment] = []
    read = number = 0
    for place, (documents, tokens) in enumerate(stretches):
        first, last = bounds[..., place], bounds[..., place + 1]
        kept = mean_kept(last - first)
        rows = torch.searchsorted(sheet.origins[:, 0].contiguous(), torch.tensor([read, read + tokens]).int())
        parts, full = [], iter(zip(first, last, strict=True))
        for layer_number, layer in enumerate(layers):
            if layer.window is None:
                a, b = (_rows(layer, each, sheet.length) for each in next(full))
            else:
                a = [sliding[layer_number]] * backbone.kv_heads
                b = [begin + held(kept, layer.window) for begin in a]
                sliding[layer_number] = b[0]
            parts.append(layer.part(a, b))
        found.append(
            Segment(
                parts,
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
    return found[0] if is_whole else _head_of(backbone, sheet), found[1:]


def _head_of(backbone: Backbone, sheet: Sheet) -> Segment:
    """The whole head of the template that a sequential sheet begins with."""
    made = sheet.manifest
    ids, spans = Encoder(backbone.tokenizer).left(made.head + "x")
    return read_head(backbone, ids[spans[:, 1] <= len(made.head)], made.dtype)


def _rows(layer: StoredLayer, places: Tensor, length: int) -> list[int]:
    """Which row of its head each place (K,) of the sheet's indices is: heads end where the sheet does."""
    sizes = layer.counts or [layer.keys.shape[1]] * len(places)
    return [place - length + size for place, size in zip(places.tolist(), sizes, strict=True)]


def _stretch(indices: Tensor, first: Tensor, last: Tensor, read: int) -> Tensor:
    """Indices (F, K, p) of what stands at places `first` to `last` (F, K) of each head, counted from `read`."""
    low, high = int(first.min()), int(last.max())
    places = torch.arange(low, high)
    inside = (places >= first.unsqueeze(-1)) & (places < last.unsqueeze(-1))
    return joined_indices([torch.where(inside, indices[..., low:high] - read, ABSENT)])


def _unrotated(backbone: Backbone, sheet: Sheet) -> Sequence[StoredLayer]:
    """The layers of a sequential sheet with their keys turned back to no rotation."""
    made = sheet.manifest
    if any(window is not None for window in made.fingerprint.windows):
        raise SheetError(
            "Layers with a sliding window hold only the end of a sequential sheet, so it cannot be joined to another; "
            "build both with mode='independent'."
        )
    turned = []
    for layer, inv_freq in zip(sheet.layers, backbone.inv_freqs, strict=True):
        plain = layer.restored(torch.device("cpu"), torch.float32)
        keys = rotate(plain.keys, -end_positions(plain, sheet.length), inv_freq.cpu())
        turned.append(StoredLayer.of(LayerPrefix(keys, plain.values, None, plain.counts), made.dtype))
    return turned
