"""One question on its way through the engine: the request, the events that its caller reads, and the running answer."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from cribsheet.attention.prefix import Prefix
from cribsheet.engine.detokenizer import TextStream
from cribsheet.engine.sampling import Choice, Sampler, SamplingParams, TokenLogprob, describe
from cribsheet.errors import EngineError
from cribsheet.structured.grammar import Constraint

logger = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "cancelled"]
Suffix = list[tuple[Tensor, Tensor]]  # keys and values (K, n, D) of each layer


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of an answer, and the log-probabilities of the tokens behind it if they were asked for."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of an answer: why, and how many tokens it took (the one that ended it not counted).

    `looked` (M, K, P + N) is what question and answer looked at (`attention/recorder.py`), if the request wanted
    evidence.
    """

    reason: FinishReason
    completion_tokens: int
    looked: Tensor | None = field(default=None, compare=False)


Event = Delta | Finished | BaseException
Sink = Callable[[Event], None]


class Ahead(Protocol):
    """Tokens that were read elsewhere and stand between a prefix and a question (`recall/placing.py`)."""

    @property
    def tokens(self) -> int:
        """How many."""

    def placed(self, start: int) -> Suffix:
        """Their keys and values on the model's device, keys rotated for the positions from `start` on."""


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)  # no two are the same, whatever they ask
class Request:
    """A question in tokens (T,), over a prefix; events go to `sink` from the engine's thread, which must not block."""

    prefix: Prefix
    question: Tensor
    params: SamplingParams
    sink: Sink
    choice: int = 0
    ends: tuple[str, ...] = ()  # where the template's turn ends once it has begun, besides the caller's own stops
    constraint: Constraint | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    timeout: float | None = None  # seconds from now on until the caller gets an error instead
    asked: float = field(default_factory=time.monotonic)
    evidence: bool = False  # whether the end tells what was looked at
    told: tuple[tuple[int, int], ...] = ()  # first and last-plus-one token of passages behind the prefix
    lead: int = 0  # tokens of the question before what is asked, passages included
    ahead: Ahead | None = None  # what stands before the question and is not read again

    @property
    def before(self) -> int:
        """Tokens between the prefix and the question."""
        return self.ahead.tokens if self.ahead else 0

    @property
    def block(self) -> tuple[int, int]:
        """First and last-plus-one token of all passages together."""
        return (self.told[0][0], self.told[-1][1]) if self.told else (0, 0)

    @property
    def is_over(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.cancelled.is_set() or self.is_late

    @property
    def is_late(self) -> bool:
        """Whether its time is up."""
        return is_late(self.asked, self.timeout)

    def end(self) -> Event:
        """The last event of a question that is over before anything was written."""
        if self.cancelled.is_set():
            return Finished("cancelled", 0)
        return EngineError(
            f"The answer was not complete after timeout={self.timeout} seconds; allow more, or ask less."
        )

    def cancel(self) -> None:
        """Stop within one token; the sink gets a last `Finished("cancelled", n)`."""
        self.cancelled.set()


class Answering:
    """One running answer."""

    def __init__(self, request: Request, tokenizer: Any, eos: frozenset[int]) -> None:
        self.request = request
        self.tokenizer = tokenizer
        self.eos = eos | _special_tokens(tokenizer, request.params.stops)
        self.sampler = Sampler(request.params, request.choice)
        form = request.constraint
        self.text = TextStream(form or tokenizer, request.params.stops, ends=request.ends, exact=form is not None)
        self.length = request.before + len(request.question)  # tokens in the suffix whenever it has no slot
        self.suffix: Suffix = []  # keys and values (K, n, D) of each layer while it is parked
        self.produced = 0
        self.turn = 0  # tokens since it got its slot
        self.last = 0
        self.finished = False
        self.looked: Tensor | None = None  # (M, K, P + N) so far, if evidence is wanted
        self._pending: list[TokenLogprob] = []

    @property
    def is_plain(self) -> bool:
        """Whether its tokens can be chosen together with others'."""
        return self.request.constraint is None and self.request.params.is_plain

    def advance(self, made: Choice | Tensor) -> None:
        """Take one step's choice, or its logits (V,) to choose from; emit, maybe finish."""
        params = self.request.params
        if self.request.is_over:
            return self.stop()
        if isinstance(made, Tensor):
            form = self.request.constraint
            token, logprobs = form.choose(made, self.sampler.pick) if form else self.sampler.pick(made)
            self.sampler.took(token)
            made = describe(torch.tensor([token]), logprobs[None], [params.logprobs or 0])[0]
        made.check()
        self.last = made.token
        if params.logprobs is not None and self.last not in self.eos:
            self._pending.append(made.described(self.text.text_of))
        if self.last in self.eos:
            return self._finish("stop")
        self.produced += 1
        self.turn += 1
        self._emit(self.text.push(self.last))
        if self.text.stopped:
            self._finish("stop")
        elif self.produced >= params.max_tokens:
            self._finish("stop" if self.request.constraint else "length")  # a form is complete by then

    def look(self, mass: Tensor) -> None:
        """Add what new rows looked at (M, K, P + N)."""
        if self.request.evidence:
            self.looked = mass.clone() if self.looked is None else self.looked.add_(mass)

    def fail(self, error: BaseException) -> None:
        """Hand an error to the caller instead of an answer."""
        self.finished = True
        tell(self.request, error)

    def stop(self) -> None:
        """End an answer that nobody waits for."""
        end = self.request.end()
        if isinstance(end, BaseException):
            self.fail(end)
        else:
            self._finish("cancelled")

    def drop(self) -> None:
        """End an answer that has no slot."""
        try:
            self.stop()
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
        self.request.sink(Finished(reason, self.produced, self.looked))


def _special_tokens(tokenizer: Any, stops: tuple[str, ...]) -> set[int]:
    """Stop strings that are special tokens, which are never written and so are never found in the text."""
    known = tokenizer.added_tokens_decoder.items() if stops else ()
    wanted = frozenset(stops)  # some tokenizers have thousands of such tokens
    return {number for number, token in known if token.special and str(token) in wanted}


def is_late(asked: float, timeout: float | None) -> bool:
    """Whether the seconds that a caller allows are up, if any are given, since it asked by the monotonic clock."""
    return timeout is not None and time.monotonic() - asked > timeout


class Listening(Protocol):
    """A request, or whoever will make one."""

    @property
    def sink(self) -> Sink:
        """Where events go."""


def tell(caller: Listening, event: Event) -> None:
    """Hand over a last event; a sink that fails on it loses it, and nobody else is harmed."""
    try:
        caller.sink(own_copy(event) if isinstance(event, BaseException) else event)
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
