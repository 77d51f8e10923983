"""Which cached tokens stay: scores and a budget in, indices out; and the one gather of the library.

What is chosen of several layers is chosen in one go: heads of all layers are rows of one sort, because a GPU takes as
long to begin one as to end it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cribsheet.errors import BudgetError
from cribsheet.vocabulary import ABSENT

_HALVINGS = 60  # until two factors differ by less than a float can say
_SPREAD = 2  # power of a head's rank by which a token counts less in it


def keep_top(scores: Tensor, budget: int) -> Tensor:
    """Indices of the `budget` best tokens of each head, in reading order: (..., S) -> (..., budget).

    Ties go to the earlier token, so that equal scores give equal sheets on every machine.
    """
    if not 0 < budget <= scores.shape[-1]:
        raise BudgetError(
            f"The budget is {budget} tokens but {scores.shape[-1]} are in the cache; "
            f"pass a budget between 1 and {scores.shape[-1]}."
        )
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[..., :budget].sort(-1).values


class Chosen(NamedTuple):
    """What each head of a layer keeps: places (K, P) in reading order behind -1, and how many they are (K,)."""

    places: Tensor
    counts: tuple[int, ...]


def keep_best(scores: Sequence[Tensor], budget: int, *, least: int, most: int) -> list[Chosen]:
    """As `keep_top` for several layers (K, S) at once, where a head that needs more tokens gets more.

    All heads together keep `budget` tokens times their number, each between `least` and `most` of its best; the rest
    goes to the highest scores wherever they are. Tokens stand in reading order behind as many -1 as a head keeps fewer
    than the longest of its layer. Scores of minus infinity are never kept.
    """
    rows = _rows(scores)
    ranked = torch.sort(rows, dim=-1, descending=True, stable=True)
    free = len(rows) * (budget - least)
    best = ranked.values[:, least:most].flatten().sort(descending=True, stable=True)
    chosen = torch.zeros_like(best.values, dtype=torch.bool)
    chosen[best.indices[:free]] = best.values[:free] > float("-inf")
    there = (ranked.values[:, :least] > float("-inf")).sum(-1)
    counts = there + chosen.view(len(rows), -1).sum(-1)
    return _first_of_each(scores, ranked.indices, counts, _by_layer(scores, counts.tolist()))  # a GPU is waited for


def keep_counts(scores: Sequence[Tensor], counts: Sequence[Sequence[int]]) -> list[Chosen]:
    """As `keep_best`, where it is said how many of its tokens each head of each layer keeps."""
    rows = _rows(scores)
    ranked = torch.sort(rows, dim=-1, descending=True, stable=True).indices
    kept = torch.tensor([count for layer in counts for count in layer]).to(rows.device, non_blocking=True)
    return _first_of_each(scores, ranked, kept, counts)


def best_of_all(scores: Sequence[Tensor], total: int) -> Tensor:
    """How many of the `total` highest scores of all heads (K, S) of some layers together each head has: (R,)."""
    flat = torch.cat([layer.flatten() for layer in scores])
    return _sums(flat >= flat.topk(min(total, len(flat))).values[-1], scores)


def present(places: Sequence[Tensor]) -> Tensor:
    """How many tokens there are in each head (R,), given the indices (K, S) of those of some layers."""
    return _sums(torch.cat([layer.flatten() for layer in places]) != ABSENT, places)


def _sums(flat: Tensor, layers: Sequence[Tensor]) -> Tensor:
    """Of what is true or not for all tokens of all heads, how many are true in each head (R,)."""
    if len({layer.shape for layer in layers}) == 1:
        return flat.view(-1, layers[0].shape[-1]).sum(-1)
    return torch.cat([layer.sum(-1) for layer in split_like(flat, layers)])


def _rows(scores: Sequence[Tensor]) -> Tensor:
    """Scores (K, S) of several layers as rows (R, S) of the longest, minus infinity before those of shorter ones."""
    longest = max(layer.shape[1] for layer in scores)
    missing = [longest - layer.shape[1] for layer in scores]
    padded = [
        F.pad(layer, (n, 0), value=float("-inf")) if n else layer for n, layer in zip(missing, scores, strict=True)
    ]
    return torch.cat(padded)


def _by_layer(scores: Sequence[Tensor], each: Sequence[int]) -> list[Sequence[int]]:
    """What there is for each row, by layers."""
    ends = list(itertools.accumulate(len(layer) for layer in scores))
    return [each[end - len(layer) : end] for end, layer in zip(ends, scores, strict=True)]


def apportion(weights: Sequence[float], limits: Sequence[int], total: int, *, least: int = 0) -> list[int]:
    """How many of `total` tokens each head keeps: in proportion to its weight, between `least` and its limit.

    Heads that reach their limit leave the rest to the others. Weights are above zero; the sum is `total`, or that of
    all limits if it is less.
    """
    total = min(total, sum(limits))

    def wanted(factor: float) -> list[float]:
        pairs = zip(weights, limits, strict=True)
        return [min(limit, max(least, factor * weight)) for weight, limit in pairs]

    low, high = 0.0, max(limits, default=0) / min(weights, default=1.0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(wanted(middle)) < total else (low, middle)
    exact = wanted(high)
    counts = [int(each) for each in exact]
    by_rest = sorted(range(len(counts)), key=lambda n: (counts[n] - exact[n], n))  # the largest rest first
    missing = total - sum(counts)
    while missing > 0:
        for n in by_rest:
            if missing > 0 and counts[n] < limits[n]:
                counts[n], missing = counts[n] + 1, missing - 1
    return counts


def _first_of_each(
    scores: Sequence[Tensor], ranked: Tensor, counts: Tensor, known: Sequence[Sequence[int]]
) -> list[Chosen]:
    """The first so many (R,) of each row's ranked tokens (R, S); `known` are the same counts by layer.

    Tokens of rows are counted as in the longest layer, whose end is that of all, those of layers from their beginning.
    """
    longest = [max(layer) for layer in known]
    most = max(longest)
    rank = torch.arange(most, device=ranked.device)
    kept = ranked[:, :most].masked_fill(rank >= counts.unsqueeze(-1), -1).sort(-1).values
    layers = kept.split([len(layer) for layer in scores])
    missing = [ranked.shape[1] - layer.shape[1] for layer in scores]
    parts = [layer[:, most - size :] for layer, size in zip(layers, longest, strict=True)]
    found = [(part - n).clamp(min=-1) if n else part for part, n in zip(parts, missing, strict=True)]
    return [Chosen(part, tuple(each)) for part, each in zip(found, known, strict=True)]


def spread_out(scores: Sequence[Tensor], places: Sequence[Tensor]) -> list[Tensor]:
    """Scores (K, S) of several layers in which a token counts less in each further head: 1, 1/4, 1/9, ...

    Several heads look for the same token where one would do, and a token that no head looks at sharply would find no
    place beside them. `places` (K, S) say which token of the corpus each is; a token's ranks are its heads from the
    one that scores it highest, from 1. Scores are zero or more, or minus infinity, which they stay.
    """
    shared = spread(*(torch.cat([layer.flatten() for layer in part]) for part in (scores, places)))
    return split_like(shared, scores)


def split_like(flat: Tensor, layers: Sequence[Tensor]) -> list[Tensor]:
    """A tensor of all tokens of all heads, as the layers are shaped."""
    parts = flat.split([layer.numel() for layer in layers])
    return [part.view_as(layer) for part, layer in zip(parts, layers, strict=True)]


def spread(flat: Tensor, token: Tensor) -> Tensor:
    """As `spread_out`, of scores (N,) and places (N,) of all layers in one row."""
    best_first = flat.sort(descending=True, stable=True).indices
    by_token = best_first[token[best_first].sort(stable=True).indices]
    ordered, number = token[by_token], torch.arange(len(token), device=token.device)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    rank = number - number.where(begins, 0).cummax(0).values + 1
    shared = torch.empty_like(flat)
    shared[by_token] = flat[by_token] / rank.to(flat.dtype) ** _SPREAD
    return shared


def take(tokens: Tensor, indices: Tensor) -> Tensor:
    """Pick tokens by head: (K, S) or (K, S, D) with indices (K, P) -> (K, P) or (K, P, D), any where they are -1."""
    return picked(tokens, indices.clamp(min=0))


def picked(tokens: Tensor, indices: Tensor) -> Tensor:
    """`take`, where no index is -1."""
    if tokens.dim() == 2:
        return tokens.gather(1, indices)
    return tokens.gather(1, indices.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
