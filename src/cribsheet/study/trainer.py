"""The learning itself: Adam on what a sheet's keys and values are shifted by, until what it writes is the teacher's.

The model's weights stay. Each step takes some exercises; the divergence of the teacher's distribution from the sheet's
is what falls. Exercises that are held out say whether what is learnt holds for others, and of the states that were
measured on them the best one is taken, the first included.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from cribsheet.attention.cache import cache_of
from cribsheet.attention.prefix import LayerPrefix
from cribsheet.model.backbone import Backbone
from cribsheet.study.exercises import Exercise, padded
from cribsheet.study.layer import Learnt, StudiedLayer
from cribsheet.study.rounding import Rounding

logger = logging.getLogger(__name__)

_BATCH, _BATCH_ON_GPU = (
    16,
    32,
)  # exercises of a step; what the larger one learns holds better, but a CPU makes few steps
_TEXTS = 0.35  # share of them that are texts to go on with
_WARM_UP = 20  # steps until the learning rate is what it shall be
_FALL = 0.7  # share of the time in which it falls to nothing
_BETAS = (0.9, 0.95)
_EVERY = 25  # steps after which the exercises that are held out are tried
_PATIENCE = 6  # times that they may come out no better before it ends


@dataclass
class State:
    """How far a study is: what is learnt, with Adam's moments; the best so far; and what was measured.

    `curve` has, by steps, the divergence on what is held out, in nats a token. `seconds` are those spent.
    """

    shifts: list[Tensor]
    moments: list[Tensor]  # of each shift the first and the second
    best: list[Tensor]
    step: int = 0
    best_step: int = 0
    seconds: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)

    @property
    def lowest(self) -> float:
        """The divergence of the best."""
        return min(divergence for _, divergence in self.curve)

    @property
    def is_stale(self) -> bool:
        """Whether what is held out has not become better for long."""
        return self.step - self.best_step >= _PATIENCE * _EVERY


@dataclass(frozen=True, slots=True)
class Pace:
    """When a study ends: after so many `steps` or `seconds`; `learning_rate` is Adam's, at its highest."""

    steps: int
    seconds: float = float("inf")
    learning_rate: float = 0.02

    def progress(self, state: State) -> float:
        """How much of it is done, 0 to 1."""
        return min(1.0, max(state.step / self.steps, state.seconds / self.seconds))

    def learning_rate_at(self, state: State) -> float:
        """The learning rate of the next step."""
        rising, falling = (state.step + 1) / _WARM_UP, (1 - self.progress(state)) / _FALL
        return self.learning_rate * min(1.0, rising) * min(1.0, max(0.02, falling))


def batch_size(backbone: Backbone) -> int:
    """Exercises of a step."""
    return _BATCH_ON_GPU if backbone.device.type == "cuda" else _BATCH


class Trainer:
    """Learns the layers of a sheet of `length` positions on a model; `free` (N,) of each layer says what may change.

    A sheet that is stored in four bits is `rounded` to them wherever it is measured, so that what is taken is what is
    stored; steps do without, as less was learnt with it (decisions/0028).
    """

    def __init__(
        self,
        backbone: Backbone,
        layers: Sequence[LayerPrefix],
        length: int,
        free: Sequence[Tensor | None],
        questions: Sequence[Exercise],
        texts: Sequence[Exercise],
        held: Sequence[Exercise],
        seed: int = 0,
        rounded: bool = False,
    ) -> None:
        self._backbone, self._layers, self._length = backbone, layers, length
        self._size = batch_size(backbone)
        self.learnt = [
            None
            if places is None
            else Learnt(layer, places.to(layer.keys.device), Rounding(layer, length, inv_freq) if rounded else None)
            for layer, places, inv_freq in zip(layers, free, backbone.inv_freqs, strict=True)
        ]
        self._questions, self._texts, self.held, self._seed = questions, texts, held, seed

    @property
    def shifts(self) -> list[Tensor]:
        """All that is learnt."""
        return [shift for each in self.learnt if each is not None for shift in each.shifts]

    def begin(self) -> State:
        """The state before the first step; what is held out was tried already."""
        began = time.monotonic()
        nothing = [torch.zeros_like(shift) for shift in self.shifts]
        moments = [torch.zeros_like(shift) for shift in self.shifts for _ in range(2)]
        state = State(nothing, moments, [each.clone() for each in nothing], curve=[(0, self.divergence(self.held))])
        state.seconds = time.monotonic() - began
        return state

    def run(self, state: State, pace: Pace, tell: Callable[[State], None] = lambda state: None) -> State:
        """Go on from a state until the pace says that it is enough, or nothing comes; `tell` hears of each step."""
        self._take(state.shifts)
        state.shifts = [shift.detach() for shift in self.shifts]  # the same memory, whatever is learnt
        with weights_fixed(self._backbone):
            while pace.progress(state) < 1 and not state.is_stale:
                began = time.monotonic()
                self._step(state, pace.learning_rate_at(state))
                if state.step % _EVERY == 0:
                    self._measure(state)
                state.seconds += time.monotonic() - began
                tell(state)
        if state.curve[-1][0] != state.step:
            self._measure(state)
        return state

    def best_layers(self, state: State) -> list[LayerPrefix]:
        """The sheet's layers at their best, in float32."""
        self._take(state.best)
        pairs = zip(self._layers, self.learnt, strict=True)
        return [layer if learnt is None else learnt.learnt() for layer, learnt in pairs]

    @torch.no_grad()
    def divergence(self, exercises: Sequence[Exercise]) -> float:
        """Of the teacher's distribution from the sheet's as it is now and as it would be stored, in nats a token."""
        total, tokens, learnt = 0.0, 0, [each for each in self.learnt if each is not None]
        for layer in learnt:
            layer.round()
        for first in range(0, len(exercises), self._size):
            batch = exercises[first : first + self._size]
            count = sum(len(each.tops) for each in batch)
            total, tokens = total + float(self._loss(batch)) * count, tokens + count
        for layer in learnt:
            layer.loosen()
        return total / max(1, tokens)

    def _take(self, shifts: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for own, given in zip(self.shifts, shifts, strict=True):
                own.copy_(given)

    def _step(self, state: State, learning_rate: float) -> None:
        gradients = self.gradients(self._batch(state.step))
        state.step += 1
        _adam(self.shifts, gradients, state, learning_rate)

    def gradients(self, exercises: Sequence[Exercise]) -> Sequence[Tensor]:
        """Those of the divergence by what is learnt."""
        return torch.autograd.grad(self._loss(exercises), self.shifts)

    def _measure(self, state: State) -> None:
        divergence = self.divergence(self.held)
        if divergence < state.lowest:
            state.best, state.best_step = [shift.detach().clone() for shift in self.shifts], state.step
        state.curve.append((state.step, divergence))
        logger.info("after %d steps the divergence on what is held out is %.3f", state.step, divergence)

    def _batch(self, step: int) -> list[Exercise]:
        """The exercises of a step; those of a number are the same whatever was before."""
        texts = round(self._size * _TEXTS) if self._texts else 0
        questions = self._size - texts
        return [
            *_drawn(self._questions, step * questions, questions, self._seed),
            *_drawn(self._texts, step * texts, texts, self._seed + 1),
        ]

    def _loss(self, batch: Sequence[Exercise]) -> Tensor:
        """Mean divergence of the tokens to write."""
        backbone = self._backbone
        ids = padded([each.ids[:-1] for each in batch])
        positions = torch.arange(self._length, self._length + ids.shape[1]).expand_as(ids).to(backbone.device)
        first = min(each.asked for each in batch) - 1
        keep = torch.arange(first, ids.shape[1], device=backbone.device)
        pairs = zip(self._layers, self.learnt, strict=True)
        cache = cache_of([StudiedLayer(layer, self._length, learnt) for layer, learnt in pairs])
        logits = backbone.step(ids, positions, cache, keep, grad=True)
        rows = [
            row[each.asked - 1 - first : each.asked - 1 - first + len(each.tops)]
            for row, each in zip(logits, batch, strict=True)
        ]
        written = torch.cat(rows).float()
        width = max(each.tops.shape[1] for each in batch)
        tops, weights = (
            torch.cat([torch.nn.functional.pad(half, (0, width - half.shape[1])) for half in halves]).to(written.device)
            for halves in ([each.tops for each in batch], [each.weights for each in batch])
        )
        said = written.gather(1, tops) - written.logsumexp(-1, keepdim=True)
        wanted = torch.where(weights > 0, weights.clamp(min=1e-30).log(), 0.0)
        return (weights * (wanted - said)).sum() / len(written)


def _adam(shifts: Sequence[Tensor], gradients: Sequence[Tensor], state: State, learning_rate: float) -> None:
    """One step of Adam (arXiv 1412.6980); written out, so that its state is plain tensors that can be saved."""
    first, second = _BETAS
    with torch.no_grad():
        for number, (shift, gradient) in enumerate(zip(shifts, gradients, strict=True)):
            mean, square = state.moments[2 * number : 2 * number + 2]
            mean.lerp_(gradient, 1 - first)
            square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
            size = (square / (1 - second**state.step)).sqrt_().add_(1e-8)
            shift.addcdiv_(mean / (1 - first**state.step), size, value=-learning_rate)


def _drawn(exercises: Sequence[Exercise], first: int, count: int, seed: int) -> Iterator[Exercise]:
    """Exercises number `first` and on of a row that has all of them, shuffled, again and again."""
    for number in range(first, first + count):
        turn, place = divmod(number, len(exercises))
        yield exercises[_order(len(exercises), seed, turn)[place]]


@lru_cache(maxsize=4)  # a batch ends one turn and begins another at most, of questions and of texts
def _order(count: int, seed: int, turn: int) -> Sequence[int]:
    order = list(range(count))
    random.Random(f"{seed}/{turn}").shuffle(order)
    return order


@contextmanager
def weights_fixed(backbone: Backbone) -> Iterator[None]:
    """The model's weights need no gradients inside."""
    changing = [weight for weight in backbone.model.parameters() if weight.requires_grad]
    for weight in changing:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in changing:
            weight.requires_grad_(True)
