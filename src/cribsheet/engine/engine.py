"""The engine: one thread per model that answers many questions at once over shared prefixes.

Its whole story is `Engine.step`: admit waiting questions, prefill them, decode one token for everybody, emit.
Questions over the same sheet form one batch over one prefix; different sheets on one model take turns token by token.
Nobody starves: a long question is read in pieces between the others' tokens, and when more ask than there are slots, an
answer that had its turn is parked behind those that wait and goes on later, token for token as if nothing had happened.
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
from collections.abc import Iterator

from torch import Tensor

from cribsheet.attention.agreement import answering, hurry
from cribsheet.attention.prefix import Prefix
from cribsheet.engine.batch import Batch
from cribsheet.engine.prefill import LongPrefill, Prefill, prefills
from cribsheet.engine.request import Answering, Request, tell
from cribsheet.engine.sampling import choose
from cribsheet.errors import EngineError
from cribsheet.model.backbone import Backbone
from cribsheet.model.passes import by_few_kernels, prepare

logger = logging.getLogger(__name__)

_IDLE_SECONDS = 1.0  # an engine without work gives its thread back after so long
_QUANTUM = 64  # tokens of an answer before it makes room for those who wait


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
        prepare(backbone)
        _ENGINES.add(self)

    def _begin(self) -> None:
        """No work and no thread: at first, and in a forked child, where those of the parent mean nothing."""
        self._waiting: deque[Request | Answering] = deque()  # new questions and parked answers, first come first served
        self._batches: list[Batch] = []
        self._short: deque[Prefill] = deque()
        self._long: deque[Prefill] = deque()
        self._long_again = 0.0  # when the next piece of them may be read
        self._asked: weakref.WeakSet[Request] = weakref.WeakSet()
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
            self._asked.update(requests)
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
        self._admit()
        for work in self._due():
            self._make_pass(work)
        for batch in self._batches:
            if not batch.running:
                batch.rest()
        self._batches = [batch for batch in self._batches if batch.running]
        return bool(self._batches or self._waiting or self._short or self._long)

    def _run(self) -> None:
        hurry()
        while True:
            try:
                with answering():
                    while self.step():
                        pass
            except BaseException as error:  # a bug of ours: callers must hear of it rather than wait
                logger.exception("the engine failed")
                self._fail_all(error)
            with self._wake:
                idle_since = time.monotonic()
                while not self._waiting and not self._closed and time.monotonic() - idle_since < _IDLE_SECONDS:
                    self._wake.wait(_IDLE_SECONDS)
                if not self._waiting:
                    self._leaving, self._thread = self._thread, None
                    _LEAVING[:] = [*filter(threading.Thread.is_alive, _LEAVING), threading.current_thread()]
                    return

    def _free(self) -> int:
        """Slots that nobody has."""
        return self.max_batch - len(self._started())

    def _make_room(self) -> None:
        """Park answers that had their turn, the longest turns first, as far as others wait for their slots."""
        with self._wake:
            wanted = len(self._waiting) - self._free()
        if wanted <= 0:
            return
        done = [(each, batch) for batch in self._batches for each in batch.running if each.turn >= _QUANTUM]
        done.sort(key=lambda pair: -pair[0].turn)
        for sequence, batch in done[:wanted]:
            batch.park(sequence)
            with self._wake:
                self._waiting.append(sequence)

    def _admit(self) -> None:
        """Fill free slots in order of arrival: parked answers go on, new questions are read."""
        with self._wake:
            over = [each for each in self._waiting if _request(each).is_over]
            for each in over:  # they leave the queue at once, also when all slots are taken
                self._waiting.remove(each)
            admitted = [self._waiting.popleft() for _ in range(min(self._free(), len(self._waiting)))]
        for each in over:
            _drop(each)
        new: list[Answering] = []
        for each in admitted:
            if isinstance(each, Answering):
                self._batch(each.request.prefix).insert(each, each.suffix)
                continue
            try:
                new.append(self._answering(each))
            except Exception as error:
                tell(each, error)
        for prefill in prefills(new):
            (self._long if isinstance(prefill, LongPrefill) else self._short).append(prefill)

    def _due(self) -> Iterator[Prefill | Batch]:
        """What this step reads: short questions in one pass, a piece of a long one, a token for each running sequence.

        Long questions take turns, and wait if the last piece took from running answers more than they have had since.
        """
        yield from _next_of(self._short)
        running = any(batch.running for batch in self._batches)
        if self._long and not (running and time.monotonic() < self._long_again):
            began = time.monotonic()
            yield from _next_of(self._long)
            ended = time.monotonic()
            self._long_again = ended + (ended - began)
        yield from [batch for batch in self._batches if batch.running]

    def _make_pass(self, work: Prefill | Batch) -> None:
        """Have the model read what is due, and go on with its logits."""
        try:
            logits = work.replayed(self.backbone)
            if logits is None:
                inputs = work.inputs(self.backbone)
                logits = by_few_kernels(self.backbone, *inputs)
                if logits is None:
                    logits = self.backbone.step(*inputs)[:, -1]
                work.note()
            if isinstance(work, Batch):
                self._advance(work.running, logits)
                work.prune()
            elif work.is_read:
                self._enter(work, logits)
            else:
                self._long.append(work)
        except Exception as error:
            self._give_up(work, error)

    def _give_up(self, work: Prefill | Batch, error: Exception) -> None:
        """Tell those who were read together that it went wrong."""
        if isinstance(work, Batch):
            _fail(work.running, error)
            self._batches.remove(work)
        else:
            _fail(work.sequences, error)
            self._batch(work.prefix).prune()

    def _enter(self, prefill: Prefill, logits: Tensor) -> None:
        """Sample the first tokens of questions that were read, and give those that go on a slot each."""
        self._advance(prefill.sequences, logits)
        batch = self._batch(prefill.prefix)
        for row, sequence in enumerate(prefill.sequences):
            if not sequence.finished:
                batch.insert(sequence, prefill.suffix(row))

    def _answering(self, request: Request) -> Answering:
        return Answering(request, self.backbone.tokenizer, self._eos)

    def _advance(self, sequences: list[Answering], logits: Tensor) -> None:
        plain = [row for row, sequence in enumerate(sequences) if sequence.is_plain]
        rows = logits if len(plain) == len(sequences) else logits[plain]
        made = dict(zip(plain, choose(rows, [sequences[row].sampler for row in plain]) if plain else (), strict=True))
        for row, sequence in enumerate(sequences):
            try:
                sequence.advance(made[row] if row in made else logits[row])
            except Exception as error:  # one caller's trouble is not the others'
                sequence.fail(error)

    def _batch(self, prefix: Prefix) -> Batch:
        for batch in self._batches:
            if batch.prefix is prefix:
                return batch
        self._batches.append(Batch(prefix))
        return self._batches[-1]

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
        self._batches = []
        self._short.clear()
        self._long.clear()
        for each in waiting:
            tell(_request(each), error)

    def _started(self) -> list[Answering]:
        """All answers that have a slot, or will have it once their question is read."""
        running = [sequence for batch in self._batches for sequence in batch.running]
        return running + [sequence for prefill in (*self._short, *self._long) for sequence in prefill.sequences]


def _request(each: Request | Answering) -> Request:
    return each.request if isinstance(each, Answering) else each


def _next_of(queue: deque[Prefill]) -> Iterator[Prefill]:
    """The questions that are to be read next, unless nobody waits for any of them any more."""
    if queue:
        prefill = queue.popleft()
        prefill.drop_those_over()
        if prefill.sequences:
            yield prefill


def _drop(each: Request | Answering) -> None:
    """Tell someone who waits that it is over."""
    if isinstance(each, Answering):
        each.drop()
    else:
        tell(each, each.end())


def _fail(sequences: list[Answering], error: BaseException) -> None:
    for sequence in sequences:
        if not sequence.finished:
            sequence.fail(error)


_ENGINES: weakref.WeakSet[Engine] = weakref.WeakSet()
_LEAVING: list[threading.Thread] = []  # idle threads that may not be quite gone, even if their engine is


def _after_fork() -> None:
    """In the child: the parent answers what was asked there, and the child whatever is asked from now on."""
    for engine in list(_ENGINES):
        engine.backbone.attached().release()
        asked = list(engine._asked)
        engine._begin()
        for request in asked:
            tell(
                request,
                EngineError("This question was asked before the process forked: only the parent has its answer."),
            )


@atexit.register
def _close_all() -> None:
    """A thread that is inside torch while the interpreter goes would take the whole process down with an abort."""
    for engine in list(_ENGINES):
        engine.close()
    for thread in list(_LEAVING):
        thread.join()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
