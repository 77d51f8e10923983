"""What is kept, corrected so that it stands for what was dropped: mass and values (arXiv 2602.16284).

The rows that scored a chunk saw all of it. Of each head, the first token's key is turned so that it takes, on average,
the attention that went to dropped tokens, and the values are those least squares, shrunk towards the values as they
were, with which the rows see what they saw of everything. Attention knows nothing of it: a corrected sheet differs from
a plain one in numbers only.

Letters as in `scoring/view.py`; `R` rows of a key/value head, those of its query heads one behind the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cribsheet.attention.attend import attend, attend_shared, merge
from cribsheet.attention.cache import ReadingLayer
from cribsheet.attention.plain import capped
from cribsheet.attention.rope import rotate
from cribsheet.compress.kept import Kept
from cribsheet.vocabulary import ABSENT

if TYPE_CHECKING:
    from cribsheet.model.backbone import Backbone


_KEY_SHRINKAGE, _VALUE_SHRINKAGE = 0.01, 0.1  # over the mean square of what is fitted with
_WEAKEST, _STRONGEST = 0.05, 20.0  # what the first token's mass may be multiplied by
_LEAST, _FARTHEST = 1e-8, 20.0  # share of a row, and logit over its mass, beyond which float32 says nothing
_MOST = 1024  # rows of the repetition that are looked at; fewer are worse, more would only cost


@dataclass(frozen=True, slots=True)
class Rows:
    """How the guide saw a layer: queries (K, R, D) as they follow what is kept, outputs (K, R, D) and log-sum-exps.

    `output` and `lse` (K, R) are over everything that a row saw, `guide` and `guide_lse` over the guide alone. Float32.
    """

    queries: Tensor
    output: Tensor
    lse: Tensor
    guide: Tensor
    guide_lse: Tensor

    @property
    def share(self) -> Tensor:
        """(K, R) share of each row's attention that goes to the corpus."""
        return -torch.expm1((self.guide_lse - self.lse).clamp(max=0.0))


def refitted(backbone: Backbone, read: ReadingLayer, kept: Kept, size: int, repeated: int, layer: int) -> Kept:
    """What one layer keeps, corrected for the rows that `read` it, where the prefix will be `size` tokens long."""
    inv_freq = backbone.inv_freqs[layer]
    rows = _rows(backbone, read, size, repeated, inv_freq)
    places = torch.arange(size - kept.keys.shape[1], size, device=kept.keys.device)
    turned = rotate(kept.keys, places, inv_freq)
    keys, values = kept.keys.clone(), kept.values.clone()
    for head, indices in enumerate(kept.indices):
        first = int((indices == ABSENT).sum())
        if first == len(indices):
            continue
        own = _of(rows, head)
        logits = capped(own.queries @ turned[head, first:].T * backbone.scale, backbone.softcap)
        if indices[first] == 0:  # where attention rests
            shift = _towards(own, logits, backbone.scale)
            logits[:, 0] = capped(own.queries @ (turned[head, first] + shift) * backbone.scale, backbone.softcap)
            keys[head, first] += rotate(shift, -places[first], inv_freq)
        values[head, first:] = _fitted(own, logits, kept.values[head, first:].float()).to(values.dtype)
    return replace(kept, keys=keys, values=values)


def _rows(backbone: Backbone, read: ReadingLayer, size: int, repeated: int, inv_freq: Tensor) -> Rows:
    """Rows of the guide, their queries turned from where they stood to the end of the prefix."""
    scale, softcap = backbone.scale, backbone.softcap
    keys, values = read.guide_keys.unsqueeze(0), read.guide_values.unsqueeze(0)
    place = _places(keys.shape[2], repeated, keys.device)
    queries = read.guide_queries[:, place].unsqueeze(0)
    if len(place) == keys.shape[2]:
        guide = attend(queries, keys, values, scale=scale, causal=len(place) > 1, softcap=softcap)
    else:
        before = (torch.arange(keys.shape[2], device=keys.device) <= place.unsqueeze(-1))[None, None]
        guide = attend(queries, keys, values, scale=scale, mask=before, softcap=softcap)
    chunk = read.chunk_keys.unsqueeze(0), read.chunk_values.unsqueeze(0)
    seen = merge(attend_shared(queries, *chunk, scale=scale, softcap=softcap), guide)
    if read.prefix.longest:
        seen = merge(read.prefix.attend(queries, scale, softcap), seen)
    moved = size - read.start - read.chunk_keys.shape[1]
    turned = rotate(queries[0], torch.full_like(place, moved), inv_freq)
    parts = turned, seen[0][0].float(), seen[1][0], guide[0][0].float(), guide[1][0]
    return Rows(*(part.reshape(keys.shape[1], -1, *part.shape[2:]) for part in parts))


def rows_of(guide: int, repeated: int) -> int:
    """How many of a guide's tokens are looked at, of which so many are a repetition."""
    return len(_places(guide, repeated, torch.device("cpu")))


def _places(rows: int, repeated: int, device: torch.device) -> Tensor:
    """Which of the guide's rows are looked at: all of task and examples, and some of the repetition."""
    asked = rows - repeated
    step = max(1, -(-repeated // _MOST))
    return torch.cat([torch.arange(asked, device=device), torch.arange(asked, rows, step, device=device)])


def _of(rows: Rows, head: int) -> Rows:
    return Rows(rows.queries[head], rows.output[head], rows.lse[head], rows.guide[head], rows.guide_lse[head])


def _towards(rows: Rows, logits: Tensor, scale: float) -> Tensor:
    """(D,) by which to shift the first key, so that its mass makes up, on average, for what was dropped.

    Of logits (R, P). The factor is that of least squares over the rows' mass, each row counting by the share of its
    attention that it concerns; the shift adds its logarithm to the logits of these rows, as nearly as one key can.
    """
    mass = rows.lse + rows.share.clamp(min=_LEAST).log()  # log-sum-exp over the corpus
    relative = (logits - mass.unsqueeze(-1)).clamp(max=_FARTHEST).exp()
    missing, first = 1 - relative[:, 1:].sum(-1), relative[:, 0]
    counts = rows.share.square()
    factor = (counts * missing * first).sum() / (counts * first.square()).sum().clamp(min=1e-12)
    wanted = factor.clamp(_WEAKEST, _STRONGEST).log()
    counts = counts * missing.clamp(min=0.01).square()
    weighed = rows.queries * (scale * counts).unsqueeze(-1)
    square = weighed.T @ rows.queries * scale
    return _solved(square, _KEY_SHRINKAGE, weighed.sum(0).unsqueeze(-1) * wanted)[:, 0]


def _fitted(rows: Rows, logits: Tensor, values: Tensor) -> Tensor:
    """Values (P, D) with which the rows see what they saw of everything, given logits (R, P)."""
    lse = torch.logaddexp(logits.logsumexp(-1), rows.guide_lse)
    weights = (logits - lse.unsqueeze(-1)).exp()
    wanted = rows.output - (rows.guide_lse - lse).exp().unsqueeze(-1) * rows.guide
    return values + _solved(weights.T @ weights, _VALUE_SHRINKAGE, weights.T @ (wanted - weights @ values))


def _solved(square: Tensor, shrinkage: float, wanted: Tensor) -> Tensor:
    """What solves a symmetric system (N, N) with a ridge relative to its diagonal, for each column of `wanted`."""
    ridge = shrinkage * square.diagonal().mean() + _LEAST
    return torch.cholesky_solve(
        wanted, torch.linalg.cholesky(square + ridge * torch.eye(len(square), device=square.device))
    )
