"""The engine: one thread per model that answers many questions at once over shared prefixes.

Its whole story is `Engine.step`: admit waiting questions, prefill them, decode one token for everybody, emit.
Questions over the same sheet form one batch over one prefix; different sheets on one model take turns token by token.
Callers hand in a `Request` and read events from a sink; they never touch the model.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from cribsheet.backbone import Backbone
from cribsheet.batch import Rows, SlotLayer, padded_batch, prefill_cache
from cribsheet.errors import EngineError
from cribsheet.grammar import Constraint
from cribsheet.prefix import LayerPrefix, PrefixLayer
from cribsheet.sampling import Sampler, SamplingParams, TokenLogprob, describe
from cribsheet.textstream import TextStream

logger = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "cancelled"]

_IDLE_SECONDS = 1.0  # an engine without work gives its thread back after so long
_PREFILL_TOKENS = 8192  # padded tokens in one prefill pass


@dataclass(frozen=True, slots=True)
class Prefix:
    """A sheet as it lies on the model's device: layers and their length in tokens."""

    layers: Sequence[LayerPrefix]
    tokens: int


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of an answer, and the log-probabilities of the tokens behind it if they were asked for."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of an answer: why, and how many tokens it took (the one that ended it not counted)."""

    reason: FinishReason
    completion_tokens: int


Event = Delta | Finished | BaseException
Sink = Callable[[Event], None]


@dataclass(slots=True)
class Request:
    """A question in tokens (T,), over a prefix; events go to `sink` from the engine's thread, which must not block."""

    prefix: Prefix
    question: Tensor
    params: SamplingParams
    sink: Sink
    choice: int = 0
    constraint: Constraint | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Stop within one token; the sink gets a last `Finished("cancelled", n)`."""
        self.cancelled.set()


class Answering:
    """One running answer."""

    def __init__(self, request: Request, tokenizer: Any, eos: frozenset[int]) -> None:
        self.request = request
        self.tokenizer, self.eos = tokenizer, eos
        self.sampler = Sampler(request.params, request.choice)
        self.text = TextStream(tokenizer, request.params.stops)
        self.length = len(request.question)  # tokens in the suffix
        self.produced = 0
        self.last = 0
        self.finished = False
        self._pending: list[TokenLogprob] = []

    def advance(self, logits: Tensor, greedy: int | None) -> None:
        """Take one step's logits (V,), or the greedy choice made for the whole batch; emit and maybe finish."""
        params = self.request.params
        if self.request.cancelled.is_set():
            return self._finish("cancelled")
        if greedy is not None:
            self.last = greedy
        else:
            form = self.request.constraint
            self.last, logprobs = form.choose(logits, self.sampler.pick) if form else self.sampler.pick(logits)
            self.sampler.took(self.last)
            if params.logprobs is not None and self.last not in self.eos:
                self._pending.append(describe(self.last, logprobs, params.logprobs, self.tokenizer))
        if self.last in self.eos:
            return self._finish("stop")
        self.produced += 1
        self._emit(self.text.push(self.last))
        if self.text.stopped:
            self._finish("stop")
        elif self.produced >= params.max_tokens:
            self._finish("stop" if self.request.constraint else "length")  # a form is complete by then

    def fail(self, error: BaseException) -> None:
        """Hand an error to the caller instead of an answer."""
        self.finished = True
        _tell(self.request, error)

    def _emit(self, text: str) -> None:
        if text:
            self.request.sink(Delta(text, tuple(self._pending)))
            self._pending.clear()

    def _finish(self, reason: FinishReason) -> None:
        rest = self.text.finish()
        if rest or self._pending:
            self.request.sink(Delta(rest, tuple(self._pending)))
        self.finished = True
        self.request.sink(Finished(reason, self.produced))


class Group:
    """The sequences that run over one prefix, in slots 0..B-1 of one batch."""

    def __init__(self, prefix: Prefix) -> None:
        self.prefix = prefix
        self.rows = Rows()
        self.layers = [SlotLayer(layer, prefix.tokens, self.rows) for layer in prefix.layers]
        self.running: list[Answering] = []

    def insert(self, sequence: Answering, cache: Cache, row: int) -> None:
        """Move a prefilled sequence from row `row` of `cache` into a slot of its own."""
        slot = len(self.running)
        for layer, filled in zip(self.layers, cache.layers, strict=True):
            assert isinstance(filled, PrefixLayer)
            layer.insert(slot, filled.keys[row, :, -sequence.length :], filled.values[row, :, -sequence.length :])
        self.running.append(sequence)
        self.rows.lengths.append(sequence.length)

    def prune(self) -> None:
        """Free the slots of finished sequences."""
        for slot in reversed(range(len(self.running))):
            if self.running[slot].finished:
                last = len(self.running) - 1
                for layer in self.layers:
                    layer.vacate(slot, last)
                self.running[slot], self.rows.lengths[slot] = self.running[last], self.rows.lengths[last]
                self.running.pop()
                self.rows.lengths.pop()


class Engine:
    """Answers requests on one model; thread-safe. The thread starts with the first request and ends when idle.

    `max_batch` bounds the answers that run at once, `max_queue` those that wait; beyond that `submit` raises
    `EngineError`.
    """

    def __init__(self, backbone: Backbone, *, max_batch: int = 64, max_queue: int = 1024) -> None:
        self.backbone = backbone
        self.max_batch, self.max_queue = max_batch, max_queue
        self._closed = False
        self._eos = backbone.eos_ids
        self._begin()
        _ENGINES.add(self)

    def _begin(self) -> None:
        """No work and no thread: at first, and in a forked child, where those of the parent mean nothing."""
        self._waiting: deque[Request] = deque()
        self._groups: list[Group] = []
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None

    def submit(self, *requests: Request) -> None:
        """Queue requests, all or none. Raises `EngineError` when the engine is closed or its queue is full."""
        with self._wake:
            if self._closed:
                raise EngineError("The engine is closed; load the model again to ask more questions.")
            if len(self._waiting) + len(requests) > self.max_queue:
                raise EngineError(
                    f"{len(self._waiting)} questions wait already and at most {self.max_queue} may; try again later, "
                    "or make the engine with a larger max_queue."
                )
            self._waiting.extend(requests)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="cribsheet-engine", daemon=True)
                self._thread.start()
            self._wake.notify()

    def close(self) -> None:
        """Refuse new requests and cancel running ones; returns when the thread is done."""
        with self._wake:
            self._closed = True  # the next step cancels whatever it finds
            thread = self._thread
            self._wake.notify()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def step(self) -> bool:
        """Admit, prefill, decode one token for everybody, emit; returns whether any work is left."""
        if self._closed:
            self._cancel_all()
        for prefix, requests in self._admit():
            self._prefill(prefix, requests)
        for group in list(self._groups):
            self._decode(group)
        self._groups = [group for group in self._groups if group.running]
        return bool(self._groups or self._waiting)

    def _run(self) -> None:
        while True:
            try:
                busy = self.step()
            except BaseException as error:  # a bug of ours: callers must hear of it rather than wait
                logger.exception("the engine failed")
                self._fail_all(error)
                busy = False
            if busy:
                continue
            with self._wake:
                idle_since = time.monotonic()
                while not self._waiting and not self._closed and time.monotonic() - idle_since < _IDLE_SECONDS:
                    self._wake.wait(_IDLE_SECONDS)
                if not self._waiting:
                    self._thread = None
                    return

    def _admit(self) -> list[tuple[Prefix, list[Request]]]:
        """Take waiting requests while slots are free, by prefix and in order of arrival."""
        taken: dict[int, tuple[Prefix, list[Request]]] = {}
        free = self.max_batch - sum(len(group.running) for group in self._groups)
        with self._wake:
            cancelled: list[Request] = []  # they leave the queue at once, also when all slots are taken
            waiting: deque[Request] = deque()
            for request in self._waiting:
                (cancelled if request.cancelled.is_set() else waiting).append(request)
            self._waiting = waiting
            admitted = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        for request in cancelled:
            _tell(request, Finished("cancelled", 0))
        for request in admitted:
            taken.setdefault(id(request.prefix), (request.prefix, []))[1].append(request)
        return list(taken.values())

    def _prefill(self, prefix: Prefix, requests: list[Request]) -> None:
        """Read new questions, padded to the longest, and sample their first tokens."""
        group = self._group(prefix)
        for part in _by_size(requests):
            sequences: list[Answering] = []
            try:
                sequences = [Answering(request, self.backbone.tokenizer, self._eos) for request in part]
                ids, positions, mask = padded_batch([request.question for request in part], prefix.tokens)
                cache = prefill_cache(prefix.layers, prefix.tokens, mask)
                logits = self.backbone.step(ids, positions, cache)[:, -1]
                self._advance(sequences, logits)
                for row, sequence in enumerate(sequences):
                    if not sequence.finished:
                        group.insert(sequence, cache, row)
            except Exception as error:
                _fail(sequences, error)
                for request in part[len(sequences) :]:
                    _tell(request, error)
                group.prune()

    def _decode(self, group: Group) -> None:
        """One token for every running sequence of a prefix."""
        if not group.running:
            return
        try:
            device = self.backbone.device
            group.rows.prepare(device)
            ids = torch.tensor([[sequence.last] for sequence in group.running])
            positions = torch.tensor([[group.prefix.tokens + n] for n in group.rows.lengths])
            logits = self.backbone.step(ids, positions, Cache(layers=list(group.layers)))[:, -1]
            group.rows.lengths = [n + 1 for n in group.rows.lengths]
            self._advance(group.running, logits)
            group.prune()
        except Exception as error:
            _fail(group.running, error)
            self._groups.remove(group)

    def _advance(self, sequences: list[Answering], logits: Tensor) -> None:
        greedy = logits.argmax(-1).tolist() if any(s.request.params.is_greedy for s in sequences) else []
        for row, sequence in enumerate(sequences):
            try:
                sequence.advance(logits[row], greedy[row] if sequence.request.params.is_greedy else None)
            except Exception as error:  # one caller's trouble is not the others'
                sequence.fail(error)

    def _group(self, prefix: Prefix) -> Group:
        for group in self._groups:
            if group.prefix is prefix:
                return group
        self._groups.append(Group(prefix))
        return self._groups[-1]

    def _cancel_all(self) -> None:
        with self._wake:
            for request in self._waiting:
                request.cancel()
        for group in self._groups:
            for sequence in group.running:
                sequence.request.cancel()

    def _fail_all(self, error: BaseException) -> None:
        with self._wake:
            waiting, self._waiting = list(self._waiting), deque()
        for group in self._groups:
            _fail(group.running, error)
        self._groups = []
        for request in waiting:
            _tell(request, error)


def _by_size(requests: list[Request]) -> list[list[Request]]:
    """Requests in passes of bounded padded size, shorter questions together."""
    parts: list[list[Request]] = []
    for request in sorted(requests, key=lambda r: len(r.question)):
        if parts and (len(parts[-1]) + 1) * len(request.question) <= _PREFILL_TOKENS:
            parts[-1].append(request)
        else:
            parts.append([request])
    return parts


def _fail(sequences: list[Answering], error: BaseException) -> None:
    for sequence in sequences:
        if not sequence.finished:
            sequence.fail(error)


def _tell(request: Request, event: Event) -> None:
    """Hand over a last event; a sink that fails on it loses it, and nobody else is harmed."""
    try:
        request.sink(event)
    except Exception:
        logger.exception("nobody could be told of %r", event)


_ENGINES: weakref.WeakSet[Engine] = weakref.WeakSet()


def _after_fork() -> None:
    for engine in list(_ENGINES):
        engine.backbone.release()
        engine._begin()


@atexit.register
def _close_all() -> None:
    """A thread that is inside torch while the interpreter goes would take the whole process down with an abort."""
    for engine in list(_ENGINES):
        engine.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
