"""Where an answer comes from, found by reading question and answer again: for any answer, and for more than it carries.

What the engine notes while it writes an answer is the same; `asking/sources.py` traces both back to documents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cribsheet.asking.answer import Answer, Source
from cribsheet.asking.session import Session
from cribsheet.asking.sources import find_passages, find_sources, of_sheet
from cribsheet.attention.cache import prefix_cache
from cribsheet.attention.prefix import Prefix
from cribsheet.attention.recorder import Glance, question_weights
from cribsheet.errors import RequestError
from cribsheet.model.backbone import Backbone
from cribsheet.prompt.turns import Question
from cribsheet.recall.placing import Recalled
from cribsheet.retrieval.placing import Told


class _Looked(NamedTuple):
    """What an answer looks at, (M, K, p + N), and its question in tokens."""

    masses: Tensor
    asked: Told


def sources(session: Session, question: Question, answer: Answer | str, *, limit: int) -> list[Source]:
    """The `limit` documents that an answer looks at most, and all passages that it was told, by weight."""
    passages = answer.passages if isinstance(answer, Answer) else ()
    looked = _look_again(session, question, answer)
    return list(find_sources(session.sheet, looked.masses, limit, passages=passages, places=looked.asked.places))


def passages(
    session: Session, question: Question, answer: Answer | str, *, limit: int, characters: int
) -> list[Source]:
    """The `limit` passages of about `characters` of the sheet's documents that an answer looks at most.

    Raises `RequestError` for a `limit` or `characters` below 1, and for a question that does not fit the window.
    """
    for name, value in (("limit", limit), ("characters", characters)):
        if value < 1:
            raise RequestError(f"{name} is {value}; give at least 1.")
    if isinstance(answer, Answer) and answer.mode == "retrieval":
        return []
    looked = _look_again(session, question, answer)
    return find_passages(session.sheet, of_sheet(session.sheet, looked.masses, looked.asked.places), limit, characters)


def looked_at(
    backbone: Backbone, prefix: Prefix, asked: Told, answered: Tensor, recalled: Recalled | None = None
) -> Tensor:
    """What an answer of tokens (A,) to a question looks at, as the engine notes it while it writes: (M, K, P + N).

    The question may stand behind what is `recalled`.
    """
    size, places = len(asked.ids), asked.places
    ids = torch.cat([asked.ids, answered[:-1]])  # the row of the last token would write the next one
    weights = torch.cat([question_weights(size, asked.lead), torch.ones(len(ids) - size)])
    cache = prefix_cache(prefix.layers, prefix.tokens)
    glance = Glance(cache.layers, backbone.full, [(places[0][0], places[-1][1]) if places else (0, 0)], [weights])
    start = prefix.tokens
    if recalled:
        for layer, (keys, values) in zip(cache.layers, recalled.placed(start), strict=True):
            layer.update(keys.unsqueeze(0), values.unsqueeze(0))
        start += recalled.tokens
    positions = torch.arange(start, start + len(ids))
    backbone.step(ids.unsqueeze(0), positions.unsqueeze(0), cache)
    return glance.masses[0]


def _look_again(session: Session, question: Question, answer: Answer | str) -> _Looked:
    passages = answer.passages if isinstance(answer, Answer) else ()
    alone = isinstance(answer, Answer) and answer.mode == "retrieval"
    session.check_long(question, None, 0)
    recalled = session.recall_again(passages) if isinstance(answer, Answer) and answer.mode == "recall" else None
    asked = session.render(question, passages=passages, alone=alone, recalled=recalled)
    answered = session.layout.encoder.plain(str(answer)) if str(answer) else asked.ids[-1:]
    prefix = session.prefix_for(passages, alone=alone)
    session.check_room(len(asked.ids) + len(answered) - 1, prefix.tokens + (recalled.tokens if recalled else 0))
    return _Looked(looked_at(session.backbone, prefix, asked, answered, recalled), asked)
