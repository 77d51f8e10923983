"""The published score: how much attention the task pays to each cached token (arXiv 2503.04973).

Details follow the authors' later code (CacheNotes, EACL 2026) rather than their first: per key/value head instead of
per layer, the mean over guide rows weighted by how many tokens a row sees, times the norm of the value.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from cribsheet.attention.attend import column_mass
from cribsheet.compress.scoring.view import LayerView, Reads


class TaskAttention:
    """Mean attention of the guide's rows, visible-count weighted, times the value norm."""

    reads: ClassVar[Reads] = Reads(task=True)
    pins_preamble: ClassVar[bool] = True

    def score(self, view: LayerView) -> Tensor:
        """Scores (K, S)."""
        mass = column_mass(
            view.queries,
            view.keys,
            view.lse,
            scale=view.scale,
            softcap=view.softcap,
            row_weight=visible_counts(view),
        )
        return mean_over_group(mass, view) / view.queries.shape[1] * value_norm(view)


def visible_counts(view: LayerView) -> Tensor:
    """How many tokens each guide row sees, relative to the last row: (T,) in (0, 1]."""
    cached, rows = view.keys.shape[1], view.queries.shape[1]
    seen = torch.arange(cached + 1, cached + rows + 1, device=view.keys.device, dtype=torch.float32)
    return seen / (cached + rows)


def mean_over_group(per_query_head: Tensor, view: LayerView) -> Tensor:
    """(H, S) -> (K, S): mean over the query heads that share a key/value head."""
    return per_query_head.reshape(view.keys.shape[0], -1, view.keys.shape[1]).mean(1)


def max_over_group(per_query_head: Tensor, view: LayerView) -> Tensor:
    """(H, S) -> (K, S): maximum over the query heads that share a key/value head."""
    return per_query_head.reshape(view.keys.shape[0], -1, view.keys.shape[1]).amax(1)


def value_norm(view: LayerView) -> Tensor:
    """(K, S): L2 norm of each value, in float32."""
    norms: Tensor = torch.linalg.vector_norm(view.values.float(), dim=-1)
    return norms


def carried_on(scores: Tensor, view: LayerView) -> Tensor:
    """([N,] K, S) scores in which no token kept earlier falls below the score that it was kept with."""
    kept = view.carried.shape[-1]
    return torch.cat([torch.maximum(scores[..., :kept], view.carried), scores[..., kept:]], -1)
