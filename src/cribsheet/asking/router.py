"""Several sheets, of which one answers a question.

Routing asks the model itself: a question is most likely where its names and words stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar, Unpack

import torch
from torch import Tensor

from cribsheet.asking.answer import Answer
from cribsheet.asking.session import Session
from cribsheet.attention.prefix import prefix_cache
from cribsheet.errors import RequestError

if TYPE_CHECKING:
    from cribsheet.asking.options import AskOptions


class Knowledge(Protocol):
    """A sheet that can be asked, such as a `CompressedKnowledgeLLM`."""

    @property
    def session(self) -> Session:
        """The sheet on its model."""

    def ask(self, question: str, **sampling: Unpack[AskOptions]) -> Answer:
        """Answer a question."""


Known = TypeVar("Known", bound=Knowledge)


class Router(Generic[Known]):
    """Several sheets of which one answers: the one after which the model finds the question most likely."""

    def __init__(self, knowledge: Sequence[Known]) -> None:
        """Raises `RequestError` without sheets, or for sheets of several models, whose likelihoods do not compare."""
        self.knowledge = list(knowledge)
        if not self.knowledge:
            raise RequestError("No sheets were given; a router needs at least one.")
        if len({id(each.session.backbone) for each in self.knowledge}) > 1:
            raise RequestError("The sheets are on several models, whose likelihoods do not compare; load them on one.")

    def scores(self, question: str) -> list[float]:
        """Mean log-likelihood of the question's tokens after each sheet."""
        return [likelihood(each.session, question) for each in self.knowledge]

    def route(self, question: str) -> Known:
        """The sheet that fits the question best."""
        scores = self.scores(question)
        return self.knowledge[scores.index(max(scores))]

    def ask(self, question: str, **sampling: Unpack[AskOptions]) -> Answer:
        """Answer from the sheet that fits best; `sampling` is that of `CompressedKnowledgeLLM.ask`."""
        return self.route(question).ask(question, **sampling)


def likelihood(session: Session, question: str) -> float:
    """Mean log-likelihood of a question's tokens after a sheet, in nats; the template around it does not count.

    Nor does a token with which all that is new begins: its likelihood is known only where the sheet ends.
    """
    ids, prefix = session.render(question).ids, session.prefix
    around = session.render("?").ids
    positions = torch.arange(prefix.tokens, prefix.tokens + len(ids)).unsqueeze(0)
    cache = prefix_cache(prefix.layers, prefix.tokens)
    logits = session.backbone.step(ids.unsqueeze(0), positions, cache, keep=len(ids))[0]
    scores = logits[:-1].float().log_softmax(-1).cpu().gather(1, ids[1:, None])[:, 0]
    return float(_inner(scores, ids, around).mean())


def _inner(scores: Tensor, ids: Tensor, around: Tensor) -> Tensor:
    """The scores of tokens that are the question's own: those before and behind it are the same for every question."""
    before, behind = _shared(ids, around), _shared(ids.flip(0), around.flip(0))
    inner = scores[max(0, before - 1) : len(scores) - behind]
    return inner if len(inner) else scores


def _shared(first: Tensor, second: Tensor) -> int:
    """How many tokens two sequences have in common from their beginnings."""
    size = min(len(first), len(second))
    different = (first[:size] != second[:size]).nonzero()
    return int(different[0]) if len(different) else size
