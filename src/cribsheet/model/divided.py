"""Tensor parallelism: one model whose weights are divided among the processes of a group.

Projections and feed-forward layers, nearly all of the weights, are divided by transformers' `DistributedConfig`;
queries, keys and values are gathered behind their projections, so attention is whole. There are two ways to work so:

    all alike       every process runs the same program, has the whole sheet, and asks the same in the same order
    one leads       `Leader` in the first process, `follow` in the others: these hold weights and nothing else

A leader tells the others which tokens it is about to read; they compute along with it, layer by layer, and get from it
what attention gives, for only the leader has sheets, questions and sampling. So whatever one process can do with a
model, a server's engine included, a leader can do with a divided one.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from cribsheet.errors import EngineError, ModelError, integration
from cribsheet.model.backbone import Backbone, Keep
from cribsheet.model.llama_weights import LlamaWeights

_ATTENTION = {name: "colwise_gather_output" for name in ("q_proj", "k_proj", "v_proj")}
_ATTENTION |= {"o_proj": "rowwise_split_input"}
_IDLE = timedelta(days=3650)  # how long followers wait for work
_LOAD, _READ, _END = "load", "read", "end"


def divided(name: str | Path, **options: Any) -> DividedBackbone:
    """`Backbone.load`, with the weights divided among the processes of torch's default group.

    Raises `ModelError` outside of a group, for families whose projections are fused (phi3), and where transformers is
    too old for a plan of one's own.
    """
    if not dist.is_initialized():
        raise ModelError("There is no group of processes; start them with torchrun, and call init_process_group first.")
    integration("accelerate", "cribsheet[ray]")  # transformers asks for it
    try:
        from transformers.distributed import DistributedConfig
    except ImportError as error:
        raise ModelError("This version of transformers cannot divide a model by a plan; install 5.23.") from error
    plan = {f"model.layers.*.self_attn.{part}": style for part, style in _ATTENTION.items()}
    config = DistributedConfig(tp_size=dist.get_world_size(), tp_plan=plan)
    backbone = DividedBackbone.load(name, distributed_config=config, **options)
    first = backbone.model.base_model.layers[0].self_attn
    if not all(hasattr(first, part) for part in _ATTENTION):
        raise ModelError(f"The projections of {backbone.config.model_type!r} are fused and cannot be divided so.")
    return backbone


class DividedBackbone(Backbone):
    """A model of which this process has a part of the weights.

    Attributes: `announce` tells the other processes of a forward pass, where one leads; `samples` are those of the
    weights, which all processes must take together, where they were taken.
    """

    announce: Callable[[Tensor, Tensor, Keep], contextlib.AbstractContextManager[None]] | None = None
    samples: Tensor | None = None

    def announced(self, ids: Tensor, positions: Tensor, keep: Keep) -> contextlib.AbstractContextManager[None]:
        """A forward pass, that the others are told of if this process leads."""
        return self.announce(ids, positions, keep) if self.announce else contextlib.nullcontext()

    @property
    def in_step(self) -> bool:
        """Where no process leads."""
        return self.announce is None

    def plain_weights(self) -> LlamaWeights | None:
        """None: this process has not all of them."""
        return None

    def weight_samples(self) -> Tensor:
        """As of any model, taken once where one process leads."""
        return super().weight_samples() if self.samples is None else self.samples

    @torch.no_grad()
    def accompany(self, ids: Tensor, positions: Tensor, keep: Keep) -> None:
        """Compute along with the leader of a divided model, which reads (none) or steps; attention is the leader's."""
        given = {"input_ids": ids.to(self.device), "position_ids": positions.to(self.device), "use_cache": False}
        with self.attached():
            if keep is None:
                self.model.base_model(**given)
            else:
                self.model(**given, logits_to_keep=keep)


class Leader:
    """The process that works with divided models; the others of the group are in `follow`.

    Safe to use from many threads: forward passes take turns. One that fails halfway leaves the others waiting in the
    middle of it: it raises `EngineError`, as do all later ones, and `lost` is called first, if it is given.
    """

    def __init__(self, lost: Callable[[], None] | None = None) -> None:
        """Lead torch's default group. Raises `ModelError` outside of one, and in any process of it but the first."""
        if not dist.is_initialized() or dist.get_rank() != 0:
            raise ModelError("Only the first process of a group leads; call `follow` in the others.")
        self._orders = _orders()
        self._models: dict[str, DividedBackbone] = {}
        self._lock = threading.RLock()
        self._lost, self._over = lost, False

    def load(self, name: str | Path, **options: Any) -> DividedBackbone:
        """`divided`, in all processes; each model once. Raises as `divided`."""
        said = {key: _plain(value) for key, value in options.items() if value is not None}
        key = json.dumps([str(name), said], sort_keys=True)
        with self._lock:
            if key not in self._models:
                with self._together([_LOAD, str(name), said]):
                    backbone, trouble = _loaded(self._orders, str(name), said)
                if backbone is None:
                    raise trouble or ModelError(f"Another process could not load its part of {str(name)!r}.")
                backbone.announce = partial(self._read, len(self._models))
                backbone.attached().share = _give
                self._models[key] = backbone
            return self._models[key]

    def close(self) -> None:
        """Let the others go; safe to call twice."""
        with self._lock:
            if not self._over:
                with contextlib.suppress(EngineError), self._together([_END]):
                    self._over = True

    def __enter__(self) -> Self:
        """The leader."""
        return self

    def __exit__(self, *error: object) -> None:
        """Let the others go."""
        self.close()

    def _read(self, number: int, ids: Tensor, positions: Tensor, keep: Keep) -> contextlib.AbstractContextManager[None]:
        """A forward pass of that model."""
        return self._together([_READ, number, ids.tolist(), positions.tolist(), _as_json(keep)])

    @contextlib.contextmanager
    def _together(self, order: list[Any]) -> Iterator[None]:
        """Tell the others what is to be done, and do it with them."""
        with self._lock:
            if self._over:
                raise EngineError("The processes of this divided model have parted; start them again.")
            try:
                _say(self._orders, order)
                yield
            except BaseException as error:
                self._over = True
                if self._lost is not None:
                    self._lost()
                raise EngineError(
                    f"The processes of a divided model lost each other; start them again: {type(error).__name__}: "
                    f"{error}"
                ) from error


def follow() -> None:
    """Hold weights for the leader until it ends. Raises what torch raises when the leader is lost."""
    orders, models = _orders(), []
    while True:
        what, *rest = _heard(orders)
        if what == _END:
            return
        if what == _LOAD:
            backbone, _ = _loaded(orders, *rest)
            if backbone is not None:
                backbone.attached().share = _take
                models.append(backbone)
        else:
            number, ids, positions, keep = rest
            models[number].accompany(
                torch.tensor(ids), torch.tensor(positions), torch.tensor(keep) if isinstance(keep, list) else keep
            )


def _as_json(keep: Keep) -> int | list[int] | None:
    return keep.tolist() if isinstance(keep, Tensor) else keep


def _orders() -> dist.ProcessGroup:
    """A group for what the leader says, which may be long in coming."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=_IDLE)
    return group


def _say(group: dist.ProcessGroup, order: list[Any]) -> None:
    """As JSON: nothing that could run as code goes between the processes."""
    data = torch.frombuffer(bytearray(json.dumps(order).encode()), dtype=torch.uint8)
    dist.broadcast(torch.tensor([len(data)]), 0, group)
    dist.broadcast(data, 0, group)


def _heard(group: dist.ProcessGroup) -> list[Any]:
    size = torch.zeros(1, dtype=torch.int64)
    dist.broadcast(size, 0, group)
    data = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, 0, group)
    order: list[Any] = json.loads(data.numpy().tobytes())
    return order


def _plain(value: Any) -> Any:
    """An option of `Backbone.load` as JSON holds it."""
    return value if isinstance(value, str | int | float) else str(value).removeprefix("torch.")


def _loaded(
    group: dist.ProcessGroup, name: str, options: Mapping[str, Any]
) -> tuple[DividedBackbone | None, Exception | None]:
    """A divided model with samples of its weights, if every process has its part; what went wrong in this one."""
    backbone, trouble = None, None
    try:
        backbone = divided(name, **options)
    except Exception as error:
        trouble = error
    missing = torch.tensor([backbone is None], dtype=torch.int64)
    dist.all_reduce(missing, group=group)
    if backbone is None or missing.any():
        return None, trouble
    backbone.samples = backbone.weight_samples()
    return backbone, None


def _give(out: Tensor | None, query: Tensor) -> Tensor:
    """In the leader: what attention gives (B, T, H, D), for all."""
    assert out is not None
    out = out.to(query.dtype)
    dist.broadcast(out, 0)
    return out


def _take(out: Tensor | None, query: Tensor) -> Tensor:
    """In the others: the same, for queries (B, H, T, D)."""
    given = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    dist.broadcast(given, 0)
    return given
