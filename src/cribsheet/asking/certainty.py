"""What mode `auto` measures of a sheet's own answer, its draft: whether it is told, probable, or read elsewhere.

A draft is *told* if the best passages of a search have its words, those of the question left out: then they would say
the same again. That takes no model; only drafts that are not told are measured further.
A draft is probable if each of its tokens is, and if the sheet makes it so: "I do not know" is as probable without any
documents. It is *near* if it was read where the question itself looks: the stretches that hold the answer are those
that the question names, which is what a retriever finds. A draft that was read elsewhere had to go from what the
question names to what is told of that, where a search for the question's words does not follow.
Measured in decisions/0018 and, on real models, 0026.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cribsheet.asking.answer import Answer
from cribsheet.asking.session import Session
from cribsheet.asking.sources import per_stretch
from cribsheet.attention.agreement import in_a_hurry
from cribsheet.attention.cache import prefix_cache
from cribsheet.attention.recorder import Glance
from cribsheet.retrieval.content_words import told_by
from cribsheet.retrieval.placing import opening
from cribsheet.retrieval.retriever import Passage

NEAR = 0.6  # share of attention in common from which on a draft was read where the question looks (decisions/0018)
BEST = 2  # passages of a search that may tell a draft; with more of them, what a draft mixes up is told too
FAITHFUL = 10.0  # rate of a sheet up to which a draft's words are believed where passages have them (decisions/0026)
_GAIN = 0.1  # nats a token by which a sheet that knows the answer makes it more probable


class Judged(NamedTuple):
    """What a draft looks like: its `probability` and `nearness`, 0 to 1, and from which nearness on it is near."""

    probability: float
    nearness: float
    near_from: float = NEAR

    @property
    def certainty(self) -> float:
        """How certain it is that passages add nothing, 0 to 1: 0 for a draft that a retriever can confirm."""
        return 0.0 if self.nearness >= self.near_from else self.probability

    def is_lost(self, sure: float) -> bool:
        """Whether the sheet seems to have lost what a retriever finds."""
        return self.nearness >= self.near_from and self.probability < sure


def judge(session: Session, asked: Tensor, draft: Answer) -> Judged:
    """Measure an answer with log-probabilities, written by the sheet alone to a question in tokens (T,)."""
    with in_a_hurry():
        return Judged(probability(session, asked, draft), nearness(session, asked, draft))


def told(question: str, draft: Answer, found: Sequence[Passage]) -> float:
    """Share of what a draft says beyond its question that the best passages of a search say too, 0 to 1."""
    return told_by([passage.text for passage in found[:BEST]], draft.text, question)


def probability(session: Session, asked: Tensor, draft: Answer) -> float:
    """The least probability of a draft's tokens; 0 if they are as probable without any documents."""
    if not draft.logprobs or gain(session, asked, draft) < _GAIN:
        return 0.0
    return math.exp(min(each.logprob for each in draft.logprobs))


def gain(session: Session, asked: Tensor, draft: Answer) -> float:
    """Nats a token by which the sheet makes an answer with log-probabilities more probable than no documents do."""
    said = draft.logprobs or ()
    ids, bare = torch.tensor([each.token_id for each in said], dtype=torch.int64), session.nothing
    bare_opening, _ = opening(session.layout, session.task, session.sheet, ())
    prompt = torch.cat([bare_opening, asked, ids]).unsqueeze(0)
    cache = prefix_cache(bare.layers, 0)
    logits = session.backbone.step(prompt, torch.arange(prompt.shape[1]).unsqueeze(0), cache, keep=len(ids) + 1)
    without = logits[0, :-1].float().log_softmax(-1).cpu()[torch.arange(len(ids)), ids]
    return (sum(each.logprob for each in said) - float(without.sum())) / max(1, len(said))


def nearness(session: Session, asked: Tensor, draft: Answer) -> float:
    """Share of its attention that a draft pays to stretches of documents as the question does, 0 to 1.

    Question and draft each spread their attention over the stretches; shared is the lesser of both at each.
    """
    ids = torch.cat([asked, torch.tensor([each.token_id for each in draft.logprobs or ()], dtype=torch.int64)[:-1]])
    size, prefix, sheet = len(asked), session.prefix, session.sheet
    question, answer = torch.zeros(len(ids)), torch.zeros(len(ids))
    question[:size] = 1
    answer[size - 1 :] = 1  # the question's last row writes the first token
    looked = _looked(session, prefix.tokens, ids, (question, answer))
    first, second = (per_stretch(sheet, each) for each in looked)
    return float(torch.minimum(first / (first.sum() or 1), second / (second.sum() or 1)).sum())


def _looked(session: Session, start: int, ids: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """What tokens (T,) after the sheet look at (M, K, P), once for each weighting (T,) of them."""
    rows, backbone = len(weights), session.backbone
    cache = prefix_cache(session.prefix.layers, start)
    glance = Glance(cache.layers, backbone.full, [(0, 0)] * rows, list(weights))
    positions = torch.arange(start, start + len(ids))
    backbone.step(ids.expand(rows, -1), positions.expand(rows, -1), cache)
    return glance.masses
