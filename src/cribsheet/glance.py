"""How much a question and its answer look at each token of the prefix, gathered while the answer is written.

Every forward pass has the queries of its new tokens and their log-sum-exps; that is all it takes to know what weight
each prefix token got. Only the upper half of the layers that see everything is asked: in the lower half heads look at
words and neighbours, in the upper half at where the answer stands (measured: `bench/evidence.py`).

Letters as in `attention.py`: `B` sequences, `H` query heads, `K` key/value heads, `T` rows, `P` prefix tokens, `D` head
size; and `M` layers that are watched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cribsheet.attention import capped, column_mass
from cribsheet.prefix import PrefixLayer

_QUESTION = 3.0  # what the rows of a question weigh together; a row that writes a token of the answer weighs 1


def watched(full: Sequence[int]) -> list[int]:
    """Numbers of the layers that are asked, of those that see everything."""
    return list(full[len(full) // 2 :])


class Glance:
    """Attention on the prefix during one forward pass; `masses` is (M, B, K, P) after it."""

    def __init__(self, layers: Sequence[object], full: Sequence[int], weights: Sequence[Tensor] | None = None) -> None:
        """Watch the cache `layers`; `weights` are those of each sequence's last rows (n,), 1 for one row if none."""
        self._weights = weights
        self._masses: list[Tensor] = []
        for number in watched(full):
            layer = layers[number]
            assert isinstance(layer, PrefixLayer)
            layer.watch = self._look

    @property
    def masses(self) -> Tensor:
        """(M, B, K, P) in float32."""
        return torch.stack(self._masses)

    def _look(self, layer: PrefixLayer, query: Tensor, lse: Tensor, scale: float, softcap: float | None) -> None:
        layer.watch = None
        prefix = layer.prefix
        groups = [keys.unsqueeze(0) for keys, _ in prefix.each] if prefix.counts else [prefix.keys]
        sizes = [keys.shape[0] * query.shape[1] // prefix.heads for keys in groups]  # query heads of each
        parts = zip(query.split(sizes, 1), groups, lse.split(sizes, 1), strict=True)
        masses = [self._mass(q, keys, seen, scale, softcap) for q, keys, seen in parts]
        self._masses.append(torch.cat([F.pad(mass, (layer.start - mass.shape[2], 0)) for mass in masses], 1))

    def _mass(self, query: Tensor, keys: Tensor, lse: Tensor, scale: float, softcap: float | None) -> Tensor:
        """(B, G, P) of a group of heads with keys (G, P, D)."""
        if self._weights is None:
            return one_row(query, keys, lse, scale, softcap)
        found = []
        for row, weight in enumerate(self._weights):
            q, seen = query[row, :, -len(weight) :], lse[row, :, -len(weight) :]
            mass = column_mass(q, keys, seen, scale=scale, row_weight=weight.to(q.device), softcap=softcap)
            found.append(mass.reshape(keys.shape[0], -1, keys.shape[1]).sum(1))
        return torch.stack(found)


def one_row(query: Tensor, keys: Tensor, lse: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Weights (B, K, P) of the one new row of each sequence, summed over the query heads that share a key.

    `query` is (B, H, 1, D), `keys` (K, P, D), `lse` (B, H, 1) over all that the rows saw.
    """
    batch, heads = query.shape[0], keys.shape[0]
    rows = query.reshape(batch, heads, -1, query.shape[3]).transpose(0, 1)  # (K, B, H/K, D)
    seen = lse.reshape(batch, heads, -1).transpose(0, 1).unsqueeze(-1)
    logits = (rows.flatten(1, 2) @ keys.transpose(-1, -2)).float() * scale  # keys are read once for all sequences
    weights = (capped(logits, softcap).reshape(*rows.shape[:3], -1) - seen).exp_()
    return weights.sum(2).transpose(0, 1)


def question_weights(tokens: int) -> Tensor:
    """What each row of a question of so many tokens weighs; the last one writes the answer's first token."""
    weights = torch.full((tokens,), _QUESTION / tokens)
    weights[-1] += 1
    return weights
