"""What every score must beat: key norm, start and recent tokens, and chance."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from cribsheet.scoring.view import Guide, LayerView


class KeyNorm:
    """Small keys attract attention: score by the negated L2 norm (arXiv 2406.11430)."""

    guide: ClassVar[Guide] = "nothing"
    pins_head: ClassVar[bool] = True

    def score(self, view: LayerView) -> Tensor:
        """Scores (K, S)."""
        return -view.keys.float().norm(dim=-1)


class Recent:
    """The head and the latest tokens (StreamingLLM, arXiv 2309.17453)."""

    guide: ClassVar[Guide] = "nothing"
    pins_head: ClassVar[bool] = True

    def score(self, view: LayerView) -> Tensor:
        """Scores (K, S)."""
        return view.positions.float()


class Random:
    """Chance: each token draws its score once and keeps it, so every token is equally likely to stay."""

    guide: ClassVar[Guide] = "nothing"
    pins_head: ClassVar[bool] = True

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def score(self, view: LayerView) -> Tensor:
        """Scores (K, S)."""
        heads, cached = view.keys.shape[:2]
        fresh = torch.rand(heads, cached - view.carried.shape[1], generator=self._generator)
        return torch.cat([view.carried, fresh.to(view.carried.device)], 1)
