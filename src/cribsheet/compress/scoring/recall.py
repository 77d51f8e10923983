"""What the task looks at, then what a repetition of the text needs: few facts are lost, and those of the task least.

A repetition (in the manner of KVzip, arXiv 2505.23416) leaves nothing out but knows no task; task and examples know
what is asked but look at what they name themselves. Both are read as the guide's rows, and a token counts by the row
that needs it most; rows of the repetition count less, so that they decide about what is left over. Where both are
spread over heads, they need not.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cribsheet.attention import dispatch
from cribsheet.attention.attend import column_peak
from cribsheet.compress.scoring.task_attention import carried_on, max_over_group, value_norm
from cribsheet.compress.scoring.view import LayerView, Reads

REPEATED = 0.3  # what a row of the repetition counts
_BLOCK, _MARGIN = 64, 16  # tokens scored at once by the rows that repeat them, and rows more on either side


class Recall:
    """Largest attention of a row of task, examples and, counting less, the repeated chunk, times the value norm.

    A row of the repetition counts for the tokens about the one that it repeats: that is where a token is copied from,
    and all other products of rows and tokens need not be made. Where heads share a budget, what is asked and what is
    repeated are needs of their own, both are spread over the heads, and the repetition counts as much.
    """

    reads: ClassVar[Reads] = Reads(task=True, repetition=True)
    pins_preamble: ClassVar[bool] = True

    def score(self, view: LayerView) -> Tensor:
        """Scores (K, S)."""
        peak, again = peaks(view)
        return carried_on(max_over_group(peak.maximum(REPEATED * again), view) * value_norm(view), view)

    def needs(self, view: LayerView) -> Tensor:
        """Scores (2, K, S) for what is asked and for what is repeated."""
        both = torch.stack([max_over_group(peak, view) for peak in peaks(view)])
        return carried_on(both * value_norm(view), view)


def peaks(view: LayerView) -> tuple[Tensor, Tensor]:
    """Largest attention (H, S) of what stands before the repetition, and of the repetition, about the chunk only."""
    asked = view.queries.shape[1] - view.repeated
    queries, lse = view.queries[:, :asked], view.lse[:, :asked]
    peak = column_peak(queries, view.keys, lse, scale=view.scale, softcap=view.softcap)
    return peak, F.pad(copied(view), (view.keys.shape[1] - view.repeated, 0))


def copied(view: LayerView) -> Tensor:
    """Largest attention that each of the R repeated tokens gets from the rows about its repetition: (H, R).

    Blocks of tokens are so many more key/value heads; rows beyond the ends have a log-sum-exp of infinity.
    """
    (h, t, d), (kv_heads, s, _), size = view.queries.shape, view.keys.shape, view.repeated
    if dispatch.usable(view.queries, kv_heads, view.softcap):
        repeating = view.queries[:, t - size :], view.lse[:, t - size :]
        return dispatch.around(*repeating, view.keys[:, s - size :], _BLOCK, _MARGIN, view.scale)
    blocks = -(-size // _BLOCK)
    missing, width = blocks * _BLOCK - size, _BLOCK + 2 * _MARGIN
    if not blocks:
        return view.lse[:, :0]
    keys = F.pad(view.keys[:, s - size :], (0, 0, 0, missing)).reshape(-1, _BLOCK, d)
    around = (_MARGIN, _MARGIN + missing)
    rows = F.pad(view.queries[:, t - size :], (0, 0, *around)).unfold(1, width, _BLOCK)  # (H, blocks, D, width)
    lse = F.pad(view.lse[:, t - size :], around, value=float("inf")).unfold(1, width, _BLOCK)
    rows = rows.reshape(kv_heads, -1, blocks, d, width).permute(0, 2, 1, 4, 3).reshape(-1, width, d)
    lse = lse.reshape(kv_heads, -1, blocks, width).transpose(1, 2).reshape(-1, width)
    peak = column_peak(rows, keys, lse, scale=view.scale, softcap=view.softcap)
    return peak.reshape(kv_heads, blocks, -1, _BLOCK).transpose(1, 2).reshape(h, -1)[:, :size]
