"""What the notes need first, then what a repetition of the text needs: few facts are lost, and those of the task least.

Notes (CacheNotes, EACL 2026) name what the task asks for but leave things out; a repetition (in the manner of KVzip,
arXiv 2505.23416) leaves nothing out but knows no task. Each is read as the guide's rows, and a token counts by the row
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
    """Largest attention of a row of task, notes, examples and, counting less, the repeated chunk, times value norm."""

    guide: ClassVar[Guide] = "notes and repeat"
    pins_head: ClassVar[bool] = True
    repeated: ClassVar[float] = REPEATED

    def score(self, view: LayerView) -> Tensor:
        """Scores (K, S)."""
        rows, chunk = view.queries.shape[1], view.keys.shape[1] - view.carried.shape[1]
        weight = torch.ones(rows, device=view.queries.device)
        weight[max(0, rows - chunk) :] = self.repeated
        peak = column_peak(view.queries, view.keys, view.lse, scale=view.scale, row_weight=weight, softcap=view.softcap)
        return carried_on(max_over_group(peak, view) * value_norm(view), view)
