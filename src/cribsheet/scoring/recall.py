"""What the task looks at, then what a repetition of the text needs: few facts are lost, and those of the task least.

A repetition (in the manner of KVzip, arXiv 2505.23416) leaves nothing out but knows no task; task and examples know
what is asked but look at what they name themselves. Both are read as the guide's rows, and a token counts by the row
that needs it most; rows of the repetition count less, so that they decide about what is left over.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from cribsheet.attention import column_peak
from cribsheet.scoring.task_attention import carried_on, max_over_group, value_norm
from cribsheet.scoring.view import Guide, LayerView

REPEATED = 0.3  # what a row of the repetition counts


class Recall:
    """Largest attention of a row of task, examples and, counting less, the repeated chunk, times value norm."""

    guide: ClassVar[Guide] = "task and repeat"
    pins_head: ClassVar[bool] = True
    repeated: ClassVar[float] = REPEATED

    def score(self, view: LayerView) -> Tensor:
        """Scores (K, S)."""
        rows = view.queries.shape[1]
        weight = torch.ones(rows, device=view.queries.device)
        weight[rows - view.repeated :] = self.repeated
        peak = column_peak(view.queries, view.keys, view.lse, scale=view.scale, row_weight=weight, softcap=view.softcap)
        return carried_on(max_over_group(peak, view) * value_norm(view), view)


class RecallNotes(Recall):
    """`Recall` whose rows before the repetition are task, notes (CacheNotes, EACL 2026) and examples."""

    guide: ClassVar[Guide] = "notes and repeat"
