"""The clock of the step bench, and what there is to read at best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cribsheet_bench.speed.setting import Setting


def timed(setting: Setting, run: Callable[[], Any], repeats: int = 20, rounds: int = 4) -> float:
    """Seconds of one call, best of several rounds of many."""
    if setting.device.type != "cuda":
        return setting.once(run)
    best = float("inf")
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / repeats / 1e3)
    return best


def graphed(setting: Setting, run: Callable[[], Any]) -> Callable[[], Any]:
    """A computation as a CUDA graph, on a GPU."""
    if setting.device.type != "cuda":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def body(setting: Setting) -> int:
    """Bytes of the weights that a step reads."""
    return sum(each.nbytes for name, each in setting.backbone.model.named_parameters() if "embed_tokens" not in name)


def copy_rate(setting: Setting) -> float:
    """Bytes a second that a copy reads and writes together."""
    source = torch.empty(1 << (29 if setting.device.type == "cuda" else 20), device=setting.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(setting, lambda: target.copy_(source))
