"""A question that only needs to be asked: in tokens, checked, with its form compiled."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from cribsheet.asking.settings import Retrieval
from cribsheet.attention.prefix import Prefix
from cribsheet.engine.request import Ahead, Request, Sink, is_late
from cribsheet.engine.sampling import SamplingParams
from cribsheet.errors import RequestError
from cribsheet.prompt.turns import Question
from cribsheet.retrieval.placing import Told
from cribsheet.retrieval.retriever import Passage
from cribsheet.structured.grammar import Constraint
from cribsheet.structured.tools import Toolbox


class Lookup(NamedTuple):
    """A question for which passages are looked up: what is asked, how they help, and the settings of its answer."""

    question: Question
    retrieval: Retrieval
    sampling: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)  # no two are the same, whatever they ask
class Prepared:
    """A question that only needs to be asked, once; see `CompressedKnowledgeLLM.prepare`.

    `told` is the question in tokens with its `passages`, which stand behind the sheet or, `alone`, instead of it; what
    is `recalled` of them is not among these tokens. `before` is how many tokens the prefix has. Whoever asks may cancel
    it, and its `timeout` runs, from now on.
    """

    told: Told
    before: int
    params: SamplingParams
    ends: tuple[str, ...] = ()
    constraint: Constraint | None = None
    toolbox: Toolbox | None = None
    timeout: float | None = None
    evidence: bool = False
    passages: tuple[Passage, ...] = ()
    alone: bool = False
    recalled: Ahead | None = None
    lookup: Lookup | None = None
    choice: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)
    asked: float = field(default_factory=time.monotonic)
    _unasked: threading.Lock = field(default_factory=threading.Lock)

    @property
    def mode(self) -> Literal["sheet", "retrieval", "hybrid", "recall"]:
        """What it is answered from."""
        if self.recalled:
            return "recall"
        return "retrieval" if self.alone else "hybrid" if self.passages else "sheet"

    @property
    def is_late(self) -> bool:
        """Whether its time is up."""
        return is_late(self.asked, self.timeout)

    def claim(self) -> None:
        """Take it to be asked. Raises `RequestError` if somebody has."""
        if not self._unasked.acquire(blocking=False):
            raise RequestError("This prepared question was asked already; prepare it again.")

    def again(self, choice: int) -> Prepared:
        """The same question for another answer, which is written and cancelled by itself."""
        form = self.constraint
        return replace(
            self,
            choice=choice,
            cancelled=threading.Event(),
            constraint=form and form.copy(),
            _unasked=threading.Lock(),
        )

    def instead_of(self, other: Prepared) -> Prepared:
        """The same question for those who wait for another one's answer, and may cancel that."""
        return replace(self.again(other.choice), cancelled=other.cancelled, asked=other.asked)

    def over(self, prefix: Prefix, sink: Sink) -> Request:
        """What the engine gets: the question over a prefix, and where its events go."""
        return Request(
            prefix,
            self.told.ids,
            self.params,
            sink,
            choice=self.choice,
            ends=self.ends,
            constraint=self.constraint,
            cancelled=self.cancelled,
            timeout=self.timeout,
            asked=self.asked,
            evidence=self.evidence,
            told=self.told.places,
            lead=self.told.lead,
            ahead=self.recalled,
        )
