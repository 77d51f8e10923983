"""The processes that divide a model: one that leads, a replica or a worker, and Ray tasks of its own that follow."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import ray
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from cribsheet.errors import EngineError
from cribsheet.model.divided import Leader, follow


class Team:
    """A leader and its followers, which need as much as it does; in the same placement group, if it is in one."""

    def __init__(self, processes: int, *, cpus: float, gpus: float, lost: Callable[[], None]) -> None:
        """Start the others; `lost` is called when one of them is lost. Blocks until all are there."""
        address = ray.util.get_node_ip_address()
        listening = socket.create_server((address, 0))
        port = listening.getsockname()[1]
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0, max_calls=1)(_follow)  # its process ends with it
        self._followers = [task.remote(address, port, rank, processes) for rank in range(1, processes)]
        descriptor = listening.detach()  # bound to one address, where a store of its own accord listens at all
        store = TCPStore(address, port, processes, True, wait_for_workers=False, master_listen_fd=descriptor)
        _join(store, 0, processes)
        self.leader = Leader(lost)

    def check(self) -> None:
        """Raise `EngineError` if a follower is gone."""
        if ray.wait(self._followers, timeout=0)[0]:
            raise EngineError("A process of the divided model is gone.")


def _follow(address: str, port: int, rank: int, processes: int) -> None:
    """In a task: hold weights until the leader ends, or is lost."""
    _join(TCPStore(address, port, processes, False), rank, processes)
    follow()


def _join(store: TCPStore, rank: int, processes: int) -> None:
    os.environ["LOCAL_RANK"] = "0"  # Ray shows each process its own accelerators only
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=processes)
