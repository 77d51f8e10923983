"""Several accelerators of one machine learn together: `torchrun ... -m cribsheet_pocket_training.train ...`."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The place of a process among those of the run; alone unless torchrun started it."""

    def __init__(self) -> None:
        self.index = int(os.environ.get("RANK", "0"))
        self.count = int(os.environ.get("WORLD_SIZE", "1"))

    def device(self, wanted: str) -> torch.device:
        """The device of this process, of the wanted type."""
        return torch.device(wanted, self.index) if wanted == "cuda" else torch.device(wanted)

    def join(self, device: torch.device) -> None:
        """Meet the others; to be called after worker processes were forked."""
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if self.count > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    def agreed(self, value: float, device: torch.device) -> float:
        """The first process's value."""
        if self.count == 1:
            return value
        held = torch.tensor([value], dtype=torch.float64, device=device)
        dist.broadcast(held, 0)
        return float(held.item())

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Put the mean over the processes into each tensor."""
        if self.count == 1:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        flat /= self.count
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(part.view_as(t))

    def leave(self) -> None:
        """Part from the others."""
        if self.count > 1:
            dist.barrier()
            dist.destroy_process_group()
