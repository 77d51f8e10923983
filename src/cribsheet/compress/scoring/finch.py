"""FINCH exactly as published (TACL 2024), so that results can be compared.

One token set per layer, shared by its heads: attention weights of the guide's rows, summed over rows and over all
query heads; no value norm, no visible-count weighting, nothing pinned.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from cribsheet.attention.attend import column_mass
from cribsheet.compress.scoring.view import LayerView, Reads


class Finch:
    """Attention mass summed over guide rows and heads, the same for every head of a layer."""

    reads: ClassVar[Reads] = Reads(task=True)
    pins_preamble: ClassVar[bool] = False

    def score(self, view: LayerView) -> Tensor:
        """Scores (K, S), equal in every head."""
        mass = column_mass(view.queries, view.keys, view.lse, scale=view.scale, softcap=view.softcap)
        return mass.sum(0, keepdim=True).expand(view.keys.shape[0], -1)
