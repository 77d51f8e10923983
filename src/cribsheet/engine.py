"""The engine: one thread per model that answers many questions at once over shared prefixes.

Its whole story is `Engine.step`: admit waiting questions, prefill them, decode one token for everybody, emit.
Questions over the same sheet form one batch over one prefix; different sheets on one model take turns token by token.
Nobody starves: a long question is read in pieces between the others' tokens, and when more ask than there are slots, an
answer that had its turn is parked behind those that wait and goes on later, token for token as if nothing had happened.
Callers hand in a `Request` and read events from a sink; they never touch the model.
"""

from __future__ import annotations

import atexit
import copy
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
from cribsheet.prefix import LayerPrefix, PrefixLayer, prefix_cache
from cribsheet.sampling import Sampler, SamplingParams, TokenLogprob, describe
from cribsheet.textstream import TextStream

logger = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "cancelled"]

_IDLE_SECONDS = 1.0  # an engine without work gives its thread back after so long
_PREFILL_TOKENS = 8192  # padded tokens in one prefill pass
_PIECE = 1024  # tokens of a long question that are read in one step
_QUANTUM = 64  # tokens of an answer before it makes room for those who wait


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


Suffix = list[tuple[Tensor, Tensor]]
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
    ends: tuple[str, ...] = ()  # where the template's turn ends, besides the caller's own stop strings
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
        self.text = TextStream(tokenizer, request.params.stops + request.ends)
        self.length = len(request.question)  # tokens in the suffix whenever it has no slot
        self.suffix: Suffix = []  # keys and values (K, n, D) of each layer while it is parked
        self.produced = 0
        self.turn = 0  # tokens since it got its slot
        self.last = 0
        self.finished = False
        self._pending: list[TokenLogprob] = []

    def advance(self, logits: Tensor | None, greedy: int) -> None:
        """Take one step's logits (V,), or without them the greedy choice for the whole batch; emit, maybe finish."""
        params = self.request.params
        if self.request.cancelled.is_set():
            return self._finish("cancelled")
        if logits is None:
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
        self.turn += 1
        self._emit(self.text.push(self.last))
        if self.text.stopped:
            self._finish("stop")
        elif self.produced >= params.max_tokens:
            self._finish("stop" if self.request.constraint else "length")  # a form is complete by then

    def fail(self, error: BaseException) -> None:
        """Hand an error to the caller instead of an answer."""
        self.finished = True
        _tell(self.request, error)

    def cancel(self) -> None:
        """End an answer that has no slot."""
        try:
            self._finish("cancelled")
        except Exception:
            logger.exception("nobody could be told that an answer was cancelled")

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

    def insert(self, sequence: Answering, suffix: Suffix) -> None:
        """Give a sequence a slot, with the keys and values of all that was read and written so far."""
        slot = len(self.running)
        for layer, (keys, values) in zip(self.layers, suffix, strict=True):
            layer.insert(slot, keys, values)
        self.running.append(sequence)
        self.rows.lengths.append(sequence.length)
        sequence.suffix, sequence.turn = [], 0

    def prune(self) -> None:
        """Free the slots of finished sequences."""
        for slot in reversed(range(len(self.running))):
            if self.running[slot].finished:
                self._vacate(slot)

    def park(self, sequence: Answering) -> None:
        """Take a sequence out of its slot, with a copy of its suffix."""
        slot = self.running.index(sequence)
        length = sequence.length = self.rows.lengths[slot]
        sequence.suffix = [
            (layer.keys[slot, :, :length].clone(), layer.values[slot, :, :length].clone()) for layer in self.layers
        ]
        self._vacate(slot)

    def _vacate(self, slot: int) -> None:
        last = len(self.running) - 1
        for layer in self.layers:
            layer.vacate(slot, last)
        self.running[slot], self.rows.lengths[slot] = self.running[last], self.rows.lengths[last]
        self.running.pop()
        self.rows.lengths.pop()


class LongRead:
    """A long question on its way into the model, piece by piece."""

    def __init__(self, sequence: Answering, prefix: Prefix) -> None:
        self.sequence, self.prefix = sequence, prefix
        self.cache = prefix_cache(prefix.layers, prefix.tokens)
        self._done = 0

    def next(self, backbone: Backbone) -> Tensor | None:
        """Read the next piece; logits (1, V) after the last one."""
        question = self.sequence.request.question
        piece = question[self._done : self._done + _PIECE]
        first = self.prefix.tokens + self._done
        positions = torch.arange(first, first + len(piece)).unsqueeze(0)
        logits = backbone.step(piece.unsqueeze(0), positions, self.cache)[:, -1]
        self._done += len(piece)
        return logits if self._done == len(question) else None


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
        self._waiting: deque[Request | Answering] = deque()  # new questions and parked answers, first come first served
        self._groups: list[Group] = []
        self._reads: deque[LongRead] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._leaving: threading.Thread | None = None  # idle, but perhaps not quite gone

    @property
    def closed(self) -> bool:
        """Whether it refuses requests."""
        return self._closed

    def submit(self, *requests: Request) -> None:
        """Queue requests, all or none. Raises `EngineError` when the engine is closed or its queue is full."""
        with self._wake:
            if self._closed:
                raise EngineError("The engine is closed; load the model again to ask more questions.")
            waiting = sum(isinstance(each, Request) for each in self._waiting)
            if waiting + len(requests) > self.max_queue:
                raise EngineError(
                    f"{waiting} questions wait already and at most {self.max_queue} may; try again later, "
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
            threads = (self._thread, self._leaving)
            self._wake.notify()
        for thread in threads:
            if thread is not None and thread is not threading.current_thread():
                thread.join()

    def step(self) -> bool:
        """Admit, prefill, decode one token for everybody, emit; returns whether any work is left."""
        if self._closed:
            self._cancel_all()
        self._make_room()
        for prefix, requests in self._admit():
            self._prefill(prefix, requests)
        self._read_on()
        for group in list(self._groups):
            self._decode(group)
        self._groups = [group for group in self._groups if group.running]
        return bool(self._groups or self._waiting or self._reads)

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
                    self._leaving, self._thread = self._thread, None
                    return

    def _free(self) -> int:
        """Slots that nobody has."""
        return self.max_batch - sum(len(group.running) for group in self._groups) - len(self._reads)

    def _make_room(self) -> None:
        """Park answers that had their turn, the longest turns first, as far as others wait for their slots."""
        with self._wake:
            wanted = len(self._waiting) - self._free()
        if wanted <= 0:
            return
        done = [(each, group) for group in self._groups for each in group.running if each.turn >= _QUANTUM]
        done.sort(key=lambda pair: -pair[0].turn)
        for sequence, group in done[:wanted]:
            group.park(sequence)
            with self._wake:
                self._waiting.append(sequence)

    def _admit(self) -> list[tuple[Prefix, list[Request]]]:
        """Fill free slots in order of arrival: parked answers go on, new short questions are returned by prefix."""
        with self._wake:
            cancelled = [each for each in self._waiting if _request(each).cancelled.is_set()]
            if cancelled:  # they leave the queue at once, also when all slots are taken
                self._waiting = deque(each for each in self._waiting if not _request(each).cancelled.is_set())
            admitted = [self._waiting.popleft() for _ in range(min(self._free(), len(self._waiting)))]
        for each in cancelled:
            _drop(each)
        taken: dict[int, tuple[Prefix, list[Request]]] = {}
        for each in admitted:
            prefix = _request(each).prefix
            if isinstance(each, Answering):
                self._group(prefix).insert(each, each.suffix)
            elif len(each.question) > _PIECE:
                self._reads.append(LongRead(self._answering(each), prefix))
            else:
                taken.setdefault(id(prefix), (prefix, []))[1].append(each)
        return list(taken.values())

    def _prefill(self, prefix: Prefix, requests: list[Request]) -> None:
        """Read new questions, padded to the longest, and sample their first tokens."""
        for part in _by_size(requests):
            sequences: list[Answering] = []
            try:
                sequences = [self._answering(request) for request in part]
                ids, positions, mask = padded_batch([request.question for request in part], prefix.tokens)
                cache = prefill_cache(prefix.layers, prefix.tokens, mask)
                self._enter(sequences, prefix, cache, self.backbone.step(ids, positions, cache)[:, -1])
            except Exception as error:
                _fail(sequences, error)
                for request in part[len(sequences) :]:
                    _tell(request, error)
                self._group(prefix).prune()

    def _read_on(self) -> None:
        """One piece of one long question; those take turns."""
        if not self._reads:
            return
        read = self._reads.popleft()
        if read.sequence.request.cancelled.is_set():
            return read.sequence.cancel()
        try:
            logits = read.next(self.backbone)
            if logits is None:
                self._reads.append(read)
            else:
                self._enter([read.sequence], read.prefix, read.cache, logits)
        except Exception as error:
            _fail([read.sequence], error)
            self._group(read.prefix).prune()

    def _enter(self, sequences: list[Answering], prefix: Prefix, cache: Cache, logits: Tensor) -> None:
        """Sample the first tokens of questions that were read, and give those that go on a slot each."""
        self._advance(sequences, logits)
        group = self._group(prefix)
        for row, sequence in enumerate(sequences):
            if not sequence.finished:
                group.insert(sequence, _read_suffix(cache, row, sequence.length))

    def _answering(self, request: Request) -> Answering:
        return Answering(request, self.backbone.tokenizer, self._eos)

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
                if sequence.request.params.is_greedy:
                    sequence.advance(None, greedy[row])
                else:
                    sequence.advance(logits[row], 0)
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
            for each in self._waiting:
                _request(each).cancel()
        for sequence in self._started():
            sequence.request.cancel()

    def _fail_all(self, error: BaseException) -> None:
        with self._wake:
            waiting, self._waiting = list(self._waiting), deque()
        _fail(self._started(), error)
        self._groups = []
        self._reads.clear()
        for each in waiting:
            _tell(_request(each), error)

    def _started(self) -> list[Answering]:
        """All answers that have a slot."""
        running = [sequence for group in self._groups for sequence in group.running]
        return running + [read.sequence for read in self._reads]


def _by_size(requests: list[Request]) -> list[list[Request]]:
    """Requests in passes of bounded padded size, shorter questions together."""
    parts: list[list[Request]] = []
    for request in sorted(requests, key=lambda r: len(r.question)):
        if parts and (len(parts[-1]) + 1) * len(request.question) <= _PREFILL_TOKENS:
            parts[-1].append(request)
        else:
            parts.append([request])
    return parts


def _request(each: Request | Answering) -> Request:
    return each.request if isinstance(each, Answering) else each


def _drop(each: Request | Answering) -> None:
    """Tell someone who waits that it was cancelled."""
    if isinstance(each, Answering):
        each.cancel()
    else:
        _tell(each, Finished("cancelled", 0))


def _read_suffix(cache: Cache, row: int, length: int) -> Suffix:
    """The `length` newest keys and values of a row, padding left out."""
    suffix: Suffix = []
    for layer in cache.layers:
        assert isinstance(layer, PrefixLayer)
        first, last = layer.length - length, layer.length
        suffix.append((layer.keys[row, :, first:last], layer.values[row, :, first:last]))
    return suffix


def _fail(sequences: list[Answering], error: BaseException) -> None:
    for sequence in sequences:
        if not sequence.finished:
            sequence.fail(error)


def _tell(request: Request, event: Event) -> None:
    """Hand over a last event; a sink that fails on it loses it, and nobody else is harmed."""
    try:
        request.sink(own_copy(event) if isinstance(event, BaseException) else event)
    except Exception:
        logger.exception("nobody could be told of %r", event)


def own_copy(error: BaseException) -> BaseException:
    """A copy for one caller: raising one object in many threads would mix up their tracebacks."""
    try:
        mine = copy.copy(error)
    except Exception:  # an exception whose constructor takes something else than its `args`
        return error
    mine.__cause__, mine.__context__ = error.__cause__, error.__context__
    return mine.with_traceback(error.__traceback__)


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
