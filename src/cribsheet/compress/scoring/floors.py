"""What every score must beat: start and recent tokens, and chance."""

from __future__ import annotations

import random
from typing import ClassVar

import torch
from torch import Tensor

from cribsheet.compress.scoring.view import LayerView, Reads


class Recent:
    """The preamble and the latest tokens (StreamingLLM, arXiv 2309.17453)."""

    reads: ClassVar[Reads] = Reads()
    pins_preamble: ClassVar[bool] = True

    def score(self, view: LayerView) -> Tensor:
        """Scores (K, S)."""
        return view.positions.float()


class Random:
    """Chance: every token is equally likely to stay.

    The budget grows with the text read, so tokens kept earlier stay and each chunk fills its own share by lot; were
    they all to compete, earlier chunks, whose winners had been cut to their share, would come off worse.
    """

    reads: ClassVar[Reads] = Reads()
    pins_preamble: ClassVar[bool] = True

    def score(self, view: LayerView) -> Tensor:
        """Scores (K, S)."""
        heads, kept = view.carried.shape
        first_new = int(view.positions[0, kept])
        draw = random.Random(f"{view.seed}/{view.layer}/{first_new}").getrandbits(63)
        generator = torch.Generator().manual_seed(draw)
        fresh = torch.rand(heads, view.keys.shape[1] - kept, generator=generator)
        return torch.cat([torch.ones_like(view.carried), fresh.to(view.carried.device)], 1)
