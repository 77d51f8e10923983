"""Task-agnostic: how much a token is needed to repeat the text (in the manner of KVzip, arXiv 2505.23416)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from cribsheet.attention.attend import column_peak
from cribsheet.compress.scoring.task_attention import carried_on, max_over_group
from cribsheet.compress.scoring.view import LayerView, Reads


class Reconstruction:
    """Largest attention that any token of a repetition of the chunk pays.

    The repetition covers the chunk only, so tokens kept earlier hold on to the score of their own chunk.
    """

    reads: ClassVar[Reads] = Reads(repetition=True)
    pins_preamble: ClassVar[bool] = True

    def score(self, view: LayerView) -> Tensor:
        """Scores (K, S)."""
        peak = column_peak(view.queries, view.keys, view.lse, scale=view.scale, softcap=view.softcap)
        return carried_on(max_over_group(peak, view), view)
