"""Which cached tokens stay: scores and a budget in, indices out; and the one gather of the library."""

from __future__ import annotations

import torch
from torch import Tensor

from cribsheet.errors import BudgetError


def keep_top(scores: Tensor, budget: int) -> Tensor:
    """Indices of the `budget` best tokens of each head, in reading order: (K, S) -> (K, budget).

    Ties go to the earlier token, so that equal scores give equal sheets on every machine.
    """
    if not 0 < budget <= scores.shape[-1]:
        raise BudgetError(
            f"The budget is {budget} tokens but {scores.shape[-1]} are in the cache; "
            f"pass a budget between 1 and {scores.shape[-1]}."
        )
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[..., :budget].sort(-1).values


def take(tokens: Tensor, indices: Tensor) -> Tensor:
    """Pick tokens by head: (K, S) or (K, S, D) with indices (K, P) -> (K, P) or (K, P, D)."""
    if tokens.dim() == 2:
        return tokens.gather(1, indices)
    return tokens.gather(1, indices.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
