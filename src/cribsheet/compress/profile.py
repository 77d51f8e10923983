"""How many tokens each head of a model looks up when it is asked questions: its profile, whatever the documents are.

A repetition says well which tokens of a head matter, and badly how many: heads that copy what stood behind the same
words before look at every token once, and took nearly all of a shared budget from those that find what a question
means. Questions cannot be repeated ahead, but how many tokens a head needs for them is the model's own: the same for
encyclopedia articles, stories, papers and textbooks, and for the invented documents of `rehearsal.toml`, which are read
once for each model with their questions and answers behind them (decisions/0024).

Letters: `F` layers that see everything, `K` key/value heads, `S` tokens of the rehearsal.
"""

from __future__ import annotations

import logging
import tomllib
import weakref
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cribsheet.attention.attend import column_peak
from cribsheet.compress.loop import nothing_read
from cribsheet.corpus.documents import Document
from cribsheet.corpus.task import Task
from cribsheet.prompt.chunks import TokenizedCorpus

if TYPE_CHECKING:
    from cribsheet.model.backbone import Backbone
    from cribsheet.prompt.template import ChatLayout

logger = logging.getLogger(__name__)

LEAST = 0.2  # of the mean, what every head keeps
_LINE = "Answer questions about the documents with a few words."


@dataclass(frozen=True)
class Profile:
    """The largest attention that questions and answers of the rehearsal pay to each token (F, K, S), highest first."""

    peaks: Tensor

    def weights(self, share: float) -> list[float]:
        """What each of the F * K heads keeps of a budget that is a `share` of the corpus, 0 to 1; the mean is 1.

        All heads' tokens compete for so large a share of the rehearsal; no head gets less than `LEAST`.
        """
        wanted = max(1, min(self.peaks.numel(), round(share * self.peaks.numel())))
        limit = self.peaks.flatten().topk(wanted).values[-1]
        kept = (self.peaks >= limit).float().mean(-1).flatten()
        found = (kept / kept.mean()).clamp(min=LEAST)
        weights: list[float] = (found / found.mean()).tolist()
        return weights


_profiles: weakref.WeakKeyDictionary[Backbone, dict[str, Profile | None]] = weakref.WeakKeyDictionary()


def weights_of(backbone: Backbone, layout: ChatLayout, share: float) -> list[float]:
    """What each head keeps of a budget that is a share of the corpus, by the model's profile; alike if it has none."""
    profile = profile_of(backbone, layout)
    return [1.0] * len(backbone.full) * backbone.kv_heads if profile is None else profile.weights(share)


def profile_of(backbone: Backbone, layout: ChatLayout) -> Profile | None:
    """The profile of a model with a template, measured at the first call; none if its window holds no rehearsal."""
    known = _profiles.setdefault(backbone, {})
    if layout.digest not in known:
        known[layout.digest] = _measured(backbone, layout)
    return known[layout.digest]


@torch.no_grad()
def _measured(backbone: Backbone, layout: ChatLayout) -> Profile | None:
    """Read as many of the documents as the window holds, and their questions with answers behind them."""
    texts = _rehearsal()
    for count in range(len(texts), 0, -1):
        part = texts[:count]
        turns = [pair for pairs in zip_longest(*(pairs for _, pairs in part)) for pair in pairs if pair]
        task = Task(_LINE, tuple(turns))
        documents = [Document(text=text, id=str(number)) for number, (text, _) in enumerate(part)]
        corpus = TokenizedCorpus.build(documents, layout.preamble(task.instruction), layout.encoder)
        guide = layout.encoder.after(layout.guide(task).scored)
        if len(corpus) + len(guide) > backbone.window:
            continue
        layers = backbone.read(nothing_read(backbone), 0, corpus.ids, guide)
        peaks = []
        for number in backbone.full:
            layer = layers[number]
            each = column_peak(
                layer.guide_queries, layer.chunk_keys, layer.guide_lse, scale=backbone.scale, softcap=backbone.softcap
            )
            peaks.append(each.reshape(backbone.kv_heads, -1, each.shape[-1]).amax(1)[:, 1:])  # all look at the first
        return Profile(torch.stack(peaks).cpu().sort(-1, descending=True).values)
    logger.info("the model's window of %d tokens holds no rehearsal: all heads keep equally many", backbone.window)
    return None


@cache
def _rehearsal() -> list[tuple[str, list[tuple[str, str]]]]:
    """Its documents, each with its questions and answers."""
    found = tomllib.loads(files("cribsheet.compress").joinpath("rehearsal.toml").read_text(encoding="utf-8"))
    return [(each["text"].strip(), [(q, a) for q, a in each["questions"]]) for each in found["documents"]]
