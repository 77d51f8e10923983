"""The scorer behind the bench's query-aware ceiling: what the rows of a guide look at most, and nothing else."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from cribsheet.attention.attend import column_peak
from cribsheet.compress.scoring.task_attention import max_over_group, value_norm
from cribsheet.compress.scoring.view import LayerView, Reads


class TaskPeak:
    """Largest attention of any guide row, times the value norm.

    A token that one example needs badly is kept even if no other row looks at it.
    """

    reads: ClassVar[Reads] = Reads(task=True)
    pins_preamble: ClassVar[bool] = True

    def score(self, view: LayerView) -> Tensor:
        """Scores (K, S)."""
        peak = column_peak(view.queries, view.keys, view.lse, scale=view.scale, softcap=view.softcap)
        return max_over_group(peak, view) * value_norm(view)
