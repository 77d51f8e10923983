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

from torch import Tensor

from cribsheet.attention.prefix import Prefix
from cribsheet.engine.group import Group
from cribsheet.engine.prefill import LongRead, Read, reads
from cribsheet.engine.request import Answering, Request, tell
from cribsheet.errors import EngineError
from cribsheet.model.backbone import Backbone

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
        _ENGINES.add(self)

    def _begin(self) -> None:
        """No work and no thread: at first, and in a forked child, where those of the parent mean nothing."""
        self._waiting: deque[Request | Answering] = deque()  # new questions and parked answers, first come first served
        self._groups: list[Group] = []
        self._short: deque[Read] = deque()
        self._long: deque[Read] = deque()
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
        self._read_on(self._short)
        self._read_on_long()
        for group in list(self._groups):
            self._decode(group)
        for group in self._groups:
            if not group.running:
                group.rest()
        self._groups = [group for group in self._groups if group.running]
        return bool(self._groups or self._waiting or self._short or self._long)

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
        done = [(each, group) for group in self._groups for each in group.running if each.turn >= _QUANTUM]
        done.sort(key=lambda pair: -pair[0].turn)
        for sequence, group in done[:wanted]:
            group.park(sequence)
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
                self._group(each.request.prefix).insert(each, each.suffix)
                continue
            try:
                new.append(self._answering(each))
            except Exception as error:
                tell(each, error)
        for read in reads(new):
            (self._long if isinstance(read, LongRead) else self._short).append(read)

    def _read_on(self, queue: deque[Read]) -> None:
        """One pass over short questions, or one piece of a long one; those take turns."""
        if not queue:
            return
        read = queue.popleft()
        read.drop_those_over()
        if not read.sequences:
            return
        try:
            logits = read.next(self.backbone)
            if logits is None:
                queue.append(read)
            else:
                self._enter(read, logits)
        except Exception as error:
            _fail(read.sequences, error)
            self._group(read.prefix).prune()

    def _enter(self, read: Read, logits: Tensor) -> None:
        """Sample the first tokens of questions that were read, and give those that go on a slot each."""
        self._advance(read.sequences, logits)
        group = self._group(read.prefix)
        for row, sequence in enumerate(read.sequences):
            if not sequence.finished:
                group.insert(sequence, read.suffix(row))

    def _read_on_long(self) -> None:
        """A piece of a long question, unless the last one took from running answers more than they have had since."""
        running = any(group.running for group in self._groups)
        if not self._long or (running and time.monotonic() < self._long_again):
            return
        began = time.monotonic()
        self._read_on(self._long)
        ended = time.monotonic()
        self._long_again = ended + (ended - began)

    def _answering(self, request: Request) -> Answering:
        return Answering(request, self.backbone.tokenizer, self._eos)

    def _decode(self, group: Group) -> None:
        """One token for every running sequence of a prefix."""
        if not group.running:
            return
        try:
            logits = group.decode(self.backbone)
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
        self._short.clear()
        self._long.clear()
        for each in waiting:
            tell(_request(each), error)

    def _started(self) -> list[Answering]:
        """All answers that have a slot, or will have it once their question is read."""
        running = [sequence for group in self._groups for sequence in group.running]
        return running + [sequence for read in (*self._short, *self._long) for sequence in read.sequences]


def _request(each: Request | Answering) -> Request:
    return each.request if isinstance(each, Answering) else each


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
