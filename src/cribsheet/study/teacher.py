"""What a model would write over a prefix, token by token: what a sheet is to write as well.

For each token of an answer the best continuations are kept with their probabilities: what is learnt is the
distribution, not the words (Cartridges, arXiv 2506.06266, learn so too, from conversations).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cribsheet.asking.answer import Answer
from cribsheet.attention.cache import prefix_cache
from cribsheet.attention.prefix import Prefix
from cribsheet.model.backbone import Backbone
from cribsheet.study.exercises import Exercise, padded

_TOP = 32  # continuations of each token that are kept
_ROWS = 16  # answers that are looked at together


class Row(NamedTuple):
    """A question and its answer, and both in tokens (T,): a user's turn, and what was written after it."""

    question: str
    answer: str
    turn: Tensor
    ids: Tensor

    @classmethod
    def of(cls, question: str, turn: Tensor, answer: Answer) -> Row:
        """A question in its turn, with an answer whose tokens were asked for (`logprobs`)."""
        ids = torch.tensor([token.token_id for token in answer.logprobs or ()])
        return cls(question, answer.text.strip(), turn, ids)


def taught(backbone: Backbone, prefix: Prefix, rows: Sequence[Row], doubt: float) -> list[Exercise]:
    """Exercises of answers that were written over a prefix.

    One whose tokens have a mean log-probability below `doubt` is not believed, and left out.
    """
    found = []
    ends = torch.tensor(sorted(backbone.eos_ids))
    for first in range(0, len(rows), _ROWS):
        batch = rows[first : first + _ROWS]
        ids = padded([torch.cat([row.turn, row.ids]) for row in batch])
        positions = torch.arange(prefix.tokens, prefix.tokens + ids.shape[1]).expand_as(ids).to(backbone.device)
        keep = torch.arange(min(len(row.turn) for row in batch) - 1, ids.shape[1])
        logits = backbone.step(ids, positions, prefix_cache(prefix.layers, prefix.tokens), keep.to(backbone.device))
        for own, (question, answer, turn, said) in zip(logits, batch, strict=True):
            begin = len(turn) - 1 - int(keep[0])
            likely = own[begin : begin + len(said) + 1].float().log_softmax(-1).cpu()
            if float(likely[:-1].gather(1, said[:, None]).mean()) < doubt:
                continue
            if len(ends) and int(likely[-1].argmax()) in backbone.eos_ids:  # a base model's answer ends otherwise
                said = torch.cat([said, likely[-1].argmax()[None]])
            best = likely[: len(said)].topk(min(_TOP, likely.shape[1]))
            whole, weights = torch.cat([turn, said]), best.values.exp()
            found.append(Exercise(whole, len(turn), best.indices, weights, question, answer))
    return found
