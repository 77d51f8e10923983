"""Decoding steps and short questions that are captured once and replayed, on GPUs.

A step of a large model is a thousand kernels that each run for microseconds: launching them one by one from Python
takes several times longer than running them. A CUDA graph launches them all at once. It works on fixed buffers, so
there is one for each bucket of batch sizes and suffix lengths, or of question lengths, captured when the bucket has
been used a few times. `fixed_step` and `padded_prefill` are what is captured; they run on any device.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypedDict, TypeVar

import torch
from torch import Tensor

from cribsheet.attention.agreement import agrees, relative_error
from cribsheet.attention.cache import PrefixLayer, prefix_cache
from cribsheet.attention.captures import Captures
from cribsheet.attention.prefix import Prefix
from cribsheet.attention.recorder import Glance
from cribsheet.attention.slots import Rows, SlotLayer, prefill_cache, step_cache
from cribsheet.model.backbone import Backbone
from cribsheet.model.llama_weights import BOUND
from cribsheet.model.passes import is_prepared, logits_after

R = TypeVar("R")

_prefills: weakref.WeakKeyDictionary[Backbone, weakref.WeakSet[PrefillGraph]] = weakref.WeakKeyDictionary()

_USES = 3  # steps of a bucket before it is captured
_FIRST_TOKENS = 256  # suffix tokens of the smallest bucket; they double
_MOST_TOKENS = 8192  # longer suffixes are not worth reading whole at every step
_PREFILL_USES = 1  # questions of a bucket before it is captured
_FIRST_QUESTION, _MOST_QUESTION = 32, 2048  # tokens of the shortest and longest questions that are captured
_ASKING = 128  # rows that are looked at of longer ones that begin with passages, if these are enough
_MOST_LONG = 8  # longer ones of a model, over all of its prefixes: each holds keys and values of its own
_DOUBLES_TO = 512  # tokens up to which buckets of questions double; longer ones are as many times as long


def fixed_step(
    backbone: Backbone,
    layers: Sequence[SlotLayer],
    rows: Rows,
    inputs: Tensor,
    tokens: int,
    *,
    evidence: bool,
    told: bool = False,
) -> tuple[Tensor, list[Tensor] | None]:
    """Logits (B, V) of one step, and what each row looked at (M, K, P), if there is to be evidence.

    Where passages were `told`, it is (M, K, P + tokens), what it looked at in the whole suffix too. `inputs` (3, B) are
    the rows' newest tokens, their positions, and how long the suffixes were before, below `tokens`: nothing but the
    device needs to know them.
    """
    rows.fix(inputs[2], tokens)
    glance = Glance(layers, backbone.full, [(0, 0)] * inputs.shape[1], whole=told) if evidence else None
    logits = logits_after(backbone, inputs[0, :, None], inputs[1, :, None], step_cache(layers))
    return logits, glance.masses if glance else None


def padded_prefill(
    backbone: Backbone,
    prefix: Prefix,
    inputs: Tensor,
    weights: Tensor,
    *,
    evidence: bool,
    told: bool = False,
    rows: int = 0,
) -> tuple[Tensor, Tensor | None, Sequence[object]]:
    """Logits (1, V) after a question, what it looked at (M, K, P) if there is to be evidence, and its cache layers.

    Where passages were `told`, it is (M, K, P + T), what it looked at in all of itself too.
    `inputs` (T + 1,) are its tokens, anything behind them, and the place of the last one. No row sees what stands
    behind it, so padding at the end changes nothing. `weights` (T,) are those of its rows, 0 for the padding; where
    none but the last so many `rows` of the question weigh anything, the others need not be looked at.
    """
    size = len(weights)
    cache = prefill_cache(prefix.layers, prefix.tokens, None)
    glance: Glance | None = None
    if evidence:
        asking: Tensor | None = None
        if rows:
            places = inputs[size:] + torch.arange(1 - rows, 1, device=inputs.device)  # (rows,)
            asking = places.clamp(min=0)
            weights = weights[asking].masked_fill(places < 0, 0.0)
        glance = Glance(cache.layers, backbone.full, [(0, size if told else 0)], [weights], rows=asking)
    positions = torch.arange(prefix.tokens, prefix.tokens + size, device=inputs.device)
    logits = logits_after(backbone, inputs[None, :size], positions[None], cache, inputs[size:])
    return logits, glance.masses[0] if glance else None, cache.layers


class _Staged:
    """A tensor on the device that is filled from the host without waiting for the device."""

    def __init__(self, *shape: int, dtype: torch.dtype, device: torch.device) -> None:
        self.there = torch.zeros(*shape, dtype=dtype, device=device)
        self.here = torch.zeros(*shape, dtype=dtype, pin_memory=True)
        self._copied = torch.cuda.Event()

    def send(self, fill: Callable[[Tensor], object]) -> None:
        """Let `fill` write the host's side and copy it over, once the copy before is done with it."""
        self._copied.synchronize()
        fill(self.here)
        self.there.copy_(self.here, non_blocking=True)
        self._copied.record()


@functools.cache
def _side(device: int) -> torch.cuda.Stream:
    """Where computations are made before they are captured: one for all, as cuBLAS keeps 32 MiB for every stream."""
    return torch.cuda.Stream(device)


class _Captured(Generic[R]):
    """A computation on fixed buffers that is replayed; `found` holds its results after each replay."""

    def __init__(self, run: Callable[[], R], pool: Any = None) -> None:
        """Capture it, in the `pool` of others if their results are not needed any more when it is replayed."""
        side = _side(torch.cuda.current_device())
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # whatever is made at a first use must be made before the capture
            run()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.found = run()

    @property
    def pool(self) -> Any:
        """The memory in which it works, for others to share."""
        return self._graph.pool()

    def replay(self) -> R:
        """Its results, in the same tensors every time."""
        self._graph.replay()
        return self.found


class StepGraph:
    """One decoding step of B sequences with suffixes of fewer than `tokens` tokens, as the GPU replays it."""

    def __init__(
        self,
        backbone: Backbone,
        layers: Sequence[SlotLayer],
        rows: Rows,
        slots: int,
        *,
        evidence: bool,
        told: bool = False,
    ) -> None:
        tokens = layers[0].keys.shape[2]
        self._inputs = _Staged(3, slots, dtype=torch.int64, device=backbone.device)
        self._inputs.there[1].fill_(layers[0].start)
        self._inputs.there[2].fill_(tokens - 1)  # where nobody has written yet
        self._step = _Captured(
            lambda: fixed_step(backbone, layers, rows, self._inputs.there, tokens, evidence=evidence, told=told)
        )

    def replay(
        self, ids: Sequence[int], positions: Sequence[int], lengths: Sequence[int]
    ) -> tuple[Tensor, list[Tensor] | None]:
        """Logits (B, V) and what each row looked at (M, K, P), if it was captured with it."""
        count = len(ids)

        def fill(inputs: Tensor) -> None:
            inputs[:, :count] = torch.tensor([ids, positions, lengths])
            inputs[2, count:] = 0  # slots that nobody has may be written to

        self._inputs.send(fill)
        logits, masses = self._step.replay()
        return logits[:count], None if masses is None else masses[:count]


class StepGraphs:
    """The captured steps of one batch, by batch size and by whether evidence is gathered."""

    def __init__(self) -> None:
        self._graphs: Captures[StepGraph] = Captures()
        self._place = 0

    def __bool__(self) -> bool:
        """Whether anything was captured."""
        return bool(self._graphs)

    def find(
        self, backbone: Backbone, layers: Sequence[SlotLayer], rows: Rows, *, evidence: bool, told: bool
    ) -> StepGraph | None:
        """The graph for the batch as it is, capturing it if it is time; none if this step is run kernel by kernel."""
        longest = max(rows.lengths) + 1
        if not _may_capture(backbone) or longest > _MOST_TOKENS:
            return None
        slots = 1 << (len(rows.lengths) - 1).bit_length()
        tokens = max(_FIRST_TOKENS, 1 << (longest - 1).bit_length())
        for layer in layers:
            layer.reserve(slots, tokens, layer.keys)
        if self._place != layers[0].keys.data_ptr():  # buffers have grown, and graphs write to the old ones
            self._graphs, self._place = Captures(), layers[0].keys.data_ptr()
        return self._graphs.find(
            ("a step", slots, evidence, told),
            _USES,
            lambda: StepGraph(backbone, layers, rows, slots, evidence=evidence, told=told),
            way=is_prepared(backbone),
        )


class _How(TypedDict):
    """How a captured question is looked at, as `padded_prefill` takes it."""

    evidence: bool
    told: bool
    rows: int


class PrefillGraph:
    """Reading one question of at most `tokens` tokens on a prefix, as the GPU replays it."""

    def __init__(
        self,
        backbone: Backbone,
        prefix: Prefix,
        tokens: int,
        *,
        evidence: bool,
        told: bool = False,
        rows: int = 0,
        pool: Any = None,
    ) -> None:
        self.tokens = tokens
        self._how = _How(evidence=evidence, told=told, rows=rows)
        inputs = self._inputs = _Staged(tokens + 1, dtype=torch.int64, device=backbone.device)
        weights = self._weights = _Staged(tokens, dtype=torch.float32, device=backbone.device)
        how = self._how
        self._prefill = _Captured(lambda: padded_prefill(backbone, prefix, inputs.there, weights.there, **how), pool)

    @property
    def pool(self) -> Any:
        """As of what is captured."""
        return self._prefill.pool

    def errors(self, backbone: Backbone, prefix: Prefix, question: Tensor, weights: Tensor) -> dict[str, float]:
        """Relative L2 errors on a question: of what is replayed, by kind, and against the model's own layers."""
        logits, mass, layers = self.replay(question, weights)
        again, seen, other = padded_prefill(backbone, prefix, self._inputs.there, self._weights.there, **self._how)
        found = {"replayed": relative_error(logits, again)}
        if mass is not None and seen is not None:
            found["evidence"] = relative_error(mass, seen)
        last, same = layers[-1], other[-1]
        assert isinstance(last, PrefixLayer) and isinstance(same, PrefixLayer)
        found["keys"], found["values"] = relative_error(last.keys, same.keys), relative_error(last.values, same.values)
        positions = torch.arange(prefix.tokens, prefix.tokens + len(question)).unsqueeze(0)
        plain = backbone.step(question.unsqueeze(0), positions, prefix_cache(prefix.layers, prefix.tokens))
        return found | {"logits": relative_error(logits, plain[:, -1])}

    def replay(self, question: Tensor, weights: Tensor) -> tuple[Tensor, Tensor | None, Sequence[object]]:
        """As `padded_prefill` for the tokens (n,) of a question and weights (n,) of its rows; valid until the next."""
        count = len(question)

        def fill(inputs: Tensor) -> None:
            inputs[:count], inputs[-1] = question, count - 1

        def weigh(rows: Tensor) -> None:
            rows[:count], rows[count:] = weights, 0.0

        self._inputs.send(fill)
        self._weights.send(weigh)
        return self._prefill.replay()


def _may_capture(backbone: Backbone) -> bool:
    """Whether all of a computation is made by one GPU of this process."""
    return backbone.device.type == "cuda" and backbone.attached().share is None


def bucket(tokens: int) -> int:
    """How long the graph is that reads a question of so many tokens."""
    if tokens > _DOUBLES_TO:
        return -(-tokens // _DOUBLES_TO) * _DOUBLES_TO
    return max(_FIRST_QUESTION, 1 << (tokens - 1).bit_length())


def find_prefill(
    backbone: Backbone, prefix: Prefix, question: Tensor, weights: Tensor, *, evidence: bool, told: bool = False
) -> PrefillGraph | None:
    """The graph that reads a question (n,) whose rows weigh so much, captured if it is time; none if it goes without.

    Graphs of one model share the memory in which they work, because what one has found is used before another is
    replayed. One that does not agree with the model's own layers on the question at hand is not used.
    """
    sliding, most = len(backbone.full) < backbone.num_layers, _MOST_QUESTION if is_prepared(backbone) else _DOUBLES_TO
    if not _may_capture(backbone) or len(question) > most or sliding:
        return None  # a long one that is captured before it is known how to compute is captured twice
    size, others = bucket(len(question)), _prefills.setdefault(backbone, weakref.WeakSet())
    rows = _ASKING if size > _ASKING and evidence and not weights[:-_ASKING].any() else 0

    def make() -> PrefillGraph | None:
        pool = next((graph.pool for graph in others), None)
        graph = PrefillGraph(backbone, prefix, size, evidence=evidence, told=told, rows=rows, pool=pool)
        path = f"captured questions of up to {size} tokens"
        if not agrees(path, lambda: graph.errors(backbone, prefix, question, weights), BOUND):
            return None
        others.add(graph)
        return graph

    key = "a question", size, evidence, told, rows
    has_room = _has_room(size, others)  # again as soon as another sheet is closed, and its graphs with it
    return prefix.prefills.find(key, _PREFILL_USES, make, way=is_prepared(backbone), has_room=has_room)


def _has_room(size: int, others: Iterable[PrefillGraph]) -> bool:
    """Whether one of so many tokens may be captured beside others of a model."""
    return size <= _DOUBLES_TO or sum(graph.tokens > _DOUBLES_TO for graph in others) < _MOST_LONG
