"""What a layer keeps, taken from what was read, and set into the prefix that the next chunk stands on.

On a GPU all that a layer keeps is taken by one kernel, and set by another, where they agree with what is written here
(`kernels/keeping.py`).

Letters as in `compress/loop.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from cribsheet.attention import dispatch
from cribsheet.attention.agreement import relative_error
from cribsheet.attention.backends import on_cuda
from cribsheet.attention.cache import ReadingLayer
from cribsheet.attention.prefix import LayerPrefix
from cribsheet.attention.rope import OfAlike, turned, turns
from cribsheet.compress.kept import Kept
from cribsheet.compress.selection import Chosen, picked
from cribsheet.model.backbone import Backbone
from cribsheet.vocabulary import ABSENT

_ALIGNED = 4  # integers of 16 bytes, at which kernels take them: elsewhere they would be compiled once more


def as_prefix(backbone: Backbone, kept: Sequence[Kept]) -> list[LayerPrefix]:
    """What is kept as a prefix at compact positions 0..P-1; what sliding-window layers keep stands at its end."""
    size, most = kept_tokens(backbone, kept), max(layer.keys.shape[1] for layer in kept)
    turn, each = Turns(backbone, size - most, size), _counts_of(kept)
    if len(backbone.full) == len(kept) and _by_kernels(kept[0]):
        return _set_by_kernels(kept, each, [turn.of(number) for number in range(len(kept))], most)
    prefix = []
    for number, (layer, counts, window) in enumerate(zip(kept, each, backbone.windows, strict=True)):
        cos, sin = (half[most - layer.keys.shape[1] :] for half in turn.of(number))
        prefix.append(LayerPrefix.of(layer.at((cos, sin)), layer.values, counts, window))
    return prefix


class Turns(OfAlike[tuple[Tensor, Tensor]]):
    """Cosines and sines (positions, R/2) of positions, from the first to the last."""

    def __init__(self, backbone: Backbone, first: int, last: int, sign: int = 1) -> None:
        positions = sign * torch.arange(first, last, device=backbone.device)
        super().__init__(backbone.inv_freqs, partial(turns, positions))


def _counts_of(kept: Sequence[Kept]) -> Sequence[Sequence[int]]:
    """How many tokens each head of each layer keeps; a GPU is waited for only if that was not known."""
    known = [layer.counts for layer in kept if layer.counts is not None]
    if len(known) == len(kept):
        return known
    counts: list[list[int]] = torch.stack([(layer.indices != ABSENT).sum(-1) for layer in kept]).tolist()
    return counts


def kept_tokens(backbone: Backbone, kept: Sequence[Kept]) -> int:
    """Length of the prefix: the most tokens that a head keeps in the layers that see everything."""
    return max(kept[number].keys.shape[1] for number in backbone.full)


def condense(
    read: ReadingLayer, old: Kept, indices: Tensor, scores: Tensor, keep: Chosen, turn: tuple[Tensor, Tensor]
) -> Kept:
    """What one layer keeps of its old and new tokens, given their indices (K, S) and scores ([N,] K, S).

    `turn` are cosines and sines (c, R/2) that turn the chunk's keys back from where they stood.
    """
    if _by_kernels(old):
        return _taken_by_kernels(read, old, indices, scores, keep, turn)
    return plainly_condensed(read, old, indices, scores, keep, turn)


def plainly_condensed(
    read: ReadingLayer, old: Kept, indices: Tensor, scores: Tensor, keep: Chosen, turn: tuple[Tensor, Tensor]
) -> Kept:
    """`condense` by PyTorch's operators."""
    before = old.keys.shape[1]
    place = (keep.places - before).clamp(min=0)  # in the chunk, of those that come from there
    cos, sin = (half[place] for half in turn)
    unrotated, values = turned(picked(read.chunk_keys, place), (cos, sin)), picked(read.chunk_values, place)
    if before:
        known, is_new = keep.places.clamp(0, before - 1), (keep.places >= before).unsqueeze(-1)
        unrotated = torch.where(is_new, unrotated, picked(old.keys, known))
        values = torch.where(is_new, values, picked(old.values, known))
    return Kept(unrotated, values, *of_chosen(keep, indices, scores))


def of_chosen(keep: Chosen, indices: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Of a layer's indices (K, S) and scores ([N,] K, S) those that were chosen, and how many of each head."""
    absent, there = keep.places < 0, keep.places.clamp(min=0)
    chosen = scores.gather(-1, there.expand(*scores.shape[:-1], -1)).masked_fill(absent, float("-inf"))
    return picked(indices, there).masked_fill(absent, ABSENT), chosen, keep.counts


def _taken_by_kernels(
    read: ReadingLayer, old: Kept, indices: Tensor, scores: Tensor, keep: Chosen, turn: tuple[Tensor, Tensor]
) -> Kept:
    """`condense` by one kernel."""
    from cribsheet.kernels import keeping

    new = read.chunk_keys, read.chunk_values
    return Kept(*keeping.take(keep.places, (old.keys, old.values), new, turn, indices, scores), keep.counts)


def _set_by_kernels(
    kept: Sequence[Kept], counts: Sequence[Sequence[int]], turn: Sequence[tuple[Tensor, Tensor]], most: int
) -> list[LayerPrefix]:
    """`as_prefix` of layers that see everything, by one kernel for each; `turn` ends with that of the last token."""
    from cribsheet.kernels import keeping

    heads = len(counts[0])
    spare = [0] * (-(heads + 1) % _ALIGNED)
    begins = torch.tensor([[0, *accumulate(each), *spare] for each in counts], dtype=torch.int32)
    starts = begins.to(kept[0].keys.device, non_blocking=True)[:, : heads + 1]
    prefix = []
    for layer, each, own, by in zip(kept, counts, starts, turn, strict=True):
        longest = layer.keys.shape[1]
        halves = keeping.place(layer.keys, layer.values, own, sum(each), by, most - longest)
        if all(count == longest for count in each):
            keys, values = (half.view(layer.keys.shape) for half in halves)
            prefix.append(LayerPrefix(keys, values))
        else:
            prefix.append(LayerPrefix.ragged(*halves, each, own))
    return prefix


def _by_kernels(kept: Kept) -> bool:
    """Whether kernels take what layers like this keep."""
    values = kept.values
    return on_cuda(values) and dispatch.agree(errors, values.device, values.dtype, values.shape[-1], 1)


def errors(device: torch.device, dtype: torch.dtype, size: int, shared_by: int) -> dict[str, float]:
    """Relative L2 errors of the kernels on a small random example, by case, against what is written here."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, kind)

    turn = turns(torch.arange(-70, 0, device=device), 1.0 / torch.arange(1, size // 2 + 1, device=device))
    read = ReadingLayer(LayerPrefix(random(2, 0, size), random(2, 0, size)), 0, 9)
    read.update(random(1, 2, 49, size), random(1, 2, 49, size))
    indices = torch.arange(70, device=device).repeat(2, 1)
    places = torch.arange(-33, 37, 2, device=device).repeat(2, 1).clamp(min=-1)
    places[1, -20:] = torch.arange(50, 70, device=device)
    counts = tuple((places >= 0).sum(-1).tolist())
    found = {}
    for case, before, scores in (("first", 0, random(2, 40).float()), ("next", 30, random(3, 2, 70).float())):
        old = Kept(random(2, before, size).float(), random(2, before, size), indices[:, :before], scores[..., :before])
        chosen = Chosen(places.clamp(max=scores.shape[-1] - 1), counts)
        given = read, old, indices[:, : scores.shape[-1]], scores, chosen, (turn[0][:40], turn[1][:40])
        got, wanted = _taken_by_kernels(*given), plainly_condensed(*given)
        there = wanted.indices != ABSENT
        for name in ("keys", "values"):
            one, other = (getattr(kept, name)[there] for kept in (got, wanted))
            found[f"{case} {name}"] = relative_error(one, other)
        exact = torch.equal(got.indices, wanted.indices) and torch.equal(got.scores, wanted.scores)
        found[f"{case} places"] = 0.0 if exact else 1.0
        by, tokens = (turn[0][-40:], turn[1][-40:]), got.keys.shape[1]
        (mine,) = _set_by_kernels([got], [counts], [by], 40)
        plain = LayerPrefix.of(got.at((by[0][40 - tokens :], by[1][40 - tokens :])), got.values, counts)
        found[f"{case} prefix, keys"] = relative_error(mine.keys, plain.keys)
        found[f"{case} prefix, values"] = relative_error(mine.values, plain.values)
    return found
