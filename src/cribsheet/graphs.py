"""Decoding steps that are captured once and replayed, on GPUs.

A step of a large model is a thousand kernels that each run for microseconds: launching them one by one from Python
takes several times longer than running them. A CUDA graph launches them all at once. It works on fixed buffers, so
there is one for each bucket of batch sizes and suffix lengths, captured when the bucket has been used a few times.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from cribsheet.backbone import Backbone
from cribsheet.batch import Rows, SlotLayer, step_cache
from cribsheet.glance import Glance

logger = logging.getLogger(__name__)

_USES = 3  # steps of a bucket before it is captured
_FIRST_TOKENS = 256  # suffix tokens of the smallest bucket; they double
_MOST_TOKENS = 8192  # longer suffixes are not worth reading whole at every step


class StepGraph:
    """One decoding step of B sequences with suffixes of fewer than `tokens` tokens, as the GPU replays it."""

    def __init__(self, backbone: Backbone, layers: Sequence[SlotLayer], rows: Rows, slots: int, evidence: bool) -> None:
        tokens = layers[0].keys.shape[2]
        self._inputs = torch.zeros(3, slots, dtype=torch.int64, device=backbone.device)
        self._host = torch.zeros(3, slots, dtype=torch.int64, pin_memory=True)
        ids, positions, index = self._inputs[0, :, None], self._inputs[1, :, None], self._inputs[2]

        def step() -> tuple[Tensor, list[Tensor] | None]:
            rows.fix(index, tokens)
            glance = Glance(layers, backbone.full, [(0, 0)] * slots) if evidence else None
            logits = backbone.step(ids, positions, step_cache(layers))[:, -1]
            return logits, glance.masses if glance else None

        self._inputs[1].fill_(layers[0].start)
        self._inputs[2].fill_(tokens - 1)  # where nobody has written yet
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # whatever is made at a first use must be made before the capture
            step()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._logits, self._masses = step()

    def replay(
        self, ids: Sequence[int], positions: Sequence[int], lengths: Sequence[int]
    ) -> tuple[Tensor, list[Tensor] | None]:
        """Logits (B, V) and what each row looked at (M, K, P), if it was captured with it."""
        count = len(ids)
        self._host[:, :count] = torch.tensor([ids, positions, lengths])
        self._host[2, count:] = 0  # slots that nobody has may be written to
        self._inputs.copy_(self._host, non_blocking=True)
        self._graph.replay()
        masses = None if self._masses is None else self._masses[:count]
        return self._logits[:count], masses


class StepGraphs:
    """The captured steps of one batch, by batch size and by whether evidence is gathered."""

    def __init__(self) -> None:
        self._graphs: dict[tuple[int, bool], StepGraph | None] = {}
        self._uses: dict[tuple[int, bool], int] = {}
        self._place = 0

    def __bool__(self) -> bool:
        """Whether anything was captured."""
        return any(graph is not None for graph in self._graphs.values())

    def find(self, backbone: Backbone, layers: Sequence[SlotLayer], rows: Rows, evidence: bool) -> StepGraph | None:
        """The graph for the batch as it is, capturing it if it is time; none if this step is run kernel by kernel."""
        longest = max(rows.lengths) + 1
        if backbone.device.type != "cuda" or longest > _MOST_TOKENS or backbone.attached().share is not None:
            return None
        slots = 1 << (len(rows.lengths) - 1).bit_length()
        tokens = max(_FIRST_TOKENS, 1 << (longest - 1).bit_length())
        for layer in layers:
            layer.reserve(slots, tokens, layer.keys)
        if self._place != layers[0].keys.data_ptr():  # buffers have grown, and graphs write to the old ones
            self._graphs, self._uses, self._place = {}, {}, layers[0].keys.data_ptr()
        key = slots, evidence
        self._uses[key] = self._uses.get(key, 0) + 1
        if key not in self._graphs and self._uses[key] > _USES:
            try:
                self._graphs[key] = StepGraph(backbone, layers, rows, slots, evidence)
            except Exception:
                logger.warning("a decoding step could not be captured and is run kernel by kernel", exc_info=True)
                self._graphs[key] = None
        return self._graphs.get(key)
