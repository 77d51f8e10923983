"""Which cached tokens stay: scores and a budget in, indices out; and the one gather of the library."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cribsheet.errors import BudgetError

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


def keep_best(scores: Sequence[Tensor], budget: int, *, least: int, most: int) -> list[Tensor]:
    """As `keep_top` for several layers (K, S) at once, where a head that needs more tokens gets more: (K, P) each.

    All heads together keep `budget` tokens times their number, each between `least` and `most` of its best; the rest
    goes to the highest scores wherever they are. Tokens stand in reading order behind as many -1 as a head keeps fewer
    than the longest of its layer. Scores of minus infinity are never kept.
    """
    ranked = [torch.sort(layer, dim=-1, descending=True, stable=True) for layer in scores]
    open_ = [layer.values[:, least:most] for layer in ranked]
    free = sum(layer.shape[0] * (budget - least) for layer in scores)
    best = torch.cat([layer.flatten() for layer in open_]).sort(descending=True, stable=True)
    chosen = torch.zeros_like(best.values, dtype=torch.bool)
    chosen[best.indices[:free]] = best.values[:free] > float("-inf")
    parts = chosen.split([layer.numel() for layer in open_])
    counts = [least + part.view(len(layer.values), -1).sum(-1) for layer, part in zip(ranked, parts, strict=True)]
    longest = torch.stack([each.max() for each in counts]).tolist()  # of all layers at once: a GPU is waited for
    parts_kept = zip(ranked, counts, longest, strict=True)
    return [_first_of_each(layer.indices, count, most_kept) for layer, count, most_kept in parts_kept]


def keep_counts(scores: Sequence[Tensor], counts: Sequence[Sequence[int]]) -> list[Tensor]:
    """As `keep_best`, where it is said how many of its tokens each head of each layer keeps."""
    found = []
    for layer, each in zip(scores, counts, strict=True):
        best = torch.sort(layer, dim=-1, descending=True, stable=True).indices
        found.append(_first_of_each(best, torch.tensor(each, device=layer.device), max(each)))
    return found


def best_of_all(scores: Sequence[Tensor], total: int) -> list[int]:
    """How many of the `total` highest scores of all heads (K, S) of some layers together each head has."""
    flat = torch.cat([layer.flatten() for layer in scores])
    limit = flat.topk(min(total, len(flat))).values[-1]
    counts: list[int] = torch.cat([(layer >= limit).sum(-1) for layer in scores]).tolist()
    return counts


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


def _first_of_each(ranked: Tensor, counts: Tensor, longest: int) -> Tensor:
    """The first so many (K,) of each head's ranked tokens (K, S) in reading order: (K, longest), -1 in front."""
    rank = torch.arange(longest, device=ranked.device)
    return ranked[:, :longest].masked_fill(rank >= counts.unsqueeze(-1), -1).sort(-1).values


def spread_out(scores: Sequence[Tensor], places: Sequence[Tensor]) -> list[Tensor]:
    """Scores (K, S) of several layers in which a token counts less in each further head: 1, 1/4, 1/9, ...

    Several heads look for the same token where one would do, and a token that no head looks at sharply would find no
    place beside them. `places` (K, S) say which token of the corpus each is; a token's ranks are its heads from the
    one that scores it highest, from 1. Scores are zero or more, or minus infinity, which they stay.
    """
    flat = torch.cat([layer.flatten() for layer in scores])
    token = torch.cat([layer.flatten() for layer in places])
    best_first = flat.sort(descending=True, stable=True).indices
    by_token = best_first[token[best_first].sort(stable=True).indices]
    ordered, number = token[by_token], torch.arange(len(token), device=token.device)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    rank = number - number.where(begins, 0).cummax(0).values + 1
    shared = torch.empty_like(flat)
    shared[by_token] = flat[by_token] / rank.to(flat.dtype) ** _SPREAD
    parts = shared.split([layer.numel() for layer in scores])
    return [part.view_as(layer) for part, layer in zip(parts, scores, strict=True)]


def take(tokens: Tensor, indices: Tensor) -> Tensor:
    """Pick tokens by head: (K, S) or (K, S, D) with indices (K, P) -> (K, P) or (K, P, D), any where they are -1."""
    indices = indices.clamp(min=0)
    if tokens.dim() == 2:
        return tokens.gather(1, indices)
    return tokens.gather(1, indices.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
