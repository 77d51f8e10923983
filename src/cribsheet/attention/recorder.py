"""How much a question and its answer look at each token of the prefix, gathered while the answer is written.

Every forward pass has the queries of its new tokens and their log-sum-exps; that is all it takes to know what weight
each prefix token got, and each token of passages that were told with the question. Only the upper half of the layers
that see everything is asked: in the lower half heads look at words and neighbours, in the upper half at where the
answer stands (measured: `cribsheet_bench/evidence.py`).

Letters as in `attention/attend.py`: `B` sequences, `H` query heads, `K` key/value heads, `T` rows, `P` prefix tokens,
`D` head size; and `M` layers that are watched, `N` tokens of passages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cribsheet.attention import dispatch
from cribsheet.attention.attend import column_mass
from cribsheet.attention.cache import PrefixLayer
from cribsheet.attention.plain import capped, weighted
from cribsheet.kernels.products import Weights

_QUESTION = 3.0  # what the rows of a question weigh together; a row that writes a token of the answer weighs 1


def watched(full: Sequence[int]) -> list[int]:
    """Numbers of the layers that are asked, of those that see everything."""
    return list(full[len(full) // 2 :])


class Glance:
    """Attention on the prefix, and on what was told with questions, during one forward pass."""

    def __init__(
        self,
        layers: Sequence[object],
        full: Sequence[int],
        told: Sequence[tuple[int, int]],
        weights: Sequence[Tensor] | None = None,
        *,
        whole: bool = False,
        rows: Tensor | None = None,
    ) -> None:
        """Watch the cache `layers`.

        `told` is where the passages of each sequence begin and end in its suffix, padding included; every row that
        weighs anything stands behind them. `weights` are those of each sequence's last rows (n,), 1 for one row if
        none. If the `whole` suffix is watched, as one new row of each sequence sees it, nothing is told. If only some
        `rows` (n,) are looked at, wherever they are, the weights are theirs.
        """
        self._only = rows
        self._told, self._weights, self._whole = told, weights, whole
        self._rows: Tensor | None = None  # (B, 1, T) of all rows of the pass, once they are needed
        on_cpu = [weight.device.type == "cpu" for weight in weights or ()]
        self._idle = [known and not weight.any() for known, weight in zip(on_cpu, weights or (), strict=True)]
        self._asking = 0  # of the last rows so many weigh anything; 0 if that is not known
        if weights and all(on_cpu):
            self._asking = max(len(weight) - int((weight > 0).float().argmax()) for weight in weights)
        self._masses: list[Tensor] = []
        self._on_told: list[list[Tensor]] = [[] for _ in told]
        for number in watched(full):
            layer = layers[number]
            assert isinstance(layer, PrefixLayer)
            layer.watch = self._look

    @property
    def masses(self) -> list[Tensor]:
        """For each sequence (M, K, P + N) in float32, prefix first; `N` may differ."""
        found = torch.stack(self._masses).unbind(1)
        pairs = zip(found, self._on_told, strict=True)
        return [torch.cat([mass, torch.stack(own)], 2) if own else mass for mass, own in pairs]

    def _look(self, layer: PrefixLayer, query: Tensor, lse: Tensor, scale: float, softcap: float | None) -> None:
        layer.watch = None
        if self._only is not None:
            query, lse = query.index_select(2, self._only), lse.index_select(2, self._only)
        if self._whole:
            self._masses.append(
                torch.cat(
                    [self._on_prefix(layer, query, lse, scale, softcap), in_suffix(layer, query, lse, scale, softcap)],
                    2,
                )
            )
            return
        for row, (first, last) in enumerate(self._told):
            if last > first:
                self._on_told[row].append(self._on_passages(row, layer, query, lse, scale, softcap))
        self._masses.append(self._on_prefix(layer, query, lse, scale, softcap))

    def _on_prefix(self, layer: PrefixLayer, query: Tensor, lse: Tensor, scale: float, softcap: float | None) -> Tensor:
        """(B, K, start) of all sequences and heads."""
        prefix = layer.prefix
        if prefix.longest == 0:
            return torch.zeros(query.shape[0], prefix.heads, layer.start, device=query.device)
        if layer.noted and self._only is None:  # what is noted is of all rows
            return self._of_weights(layer.noted[0], layer.start, query, lse)
        if dispatch.usable(query, prefix.heads, softcap):
            return self._at_once(layer, query, lse, scale)
        heads = [keys.unsqueeze(0) for keys, _ in prefix.each] if prefix.counts else [prefix.keys]
        sizes = [keys.shape[0] * query.shape[1] // prefix.heads for keys in heads]  # query heads of each
        parts = zip(query.split(sizes, 1), heads, lse.split(sizes, 1), strict=True)
        masses = [self._mass(q, keys, seen, scale, softcap) for q, keys, seen in parts]
        return torch.cat([F.pad(mass, (layer.start - mass.shape[2], 0)) for mass in masses], 1)

    def _at_once(self, layer: PrefixLayer, query: Tensor, lse: Tensor, scale: float) -> Tensor:
        """(B, K, start) of all sequences and heads by one kernel."""
        rows = self._weights_of_rows(query)
        if rows is not None:
            query, lse = query[:, :, -rows.shape[2] :], lse[:, :, -rows.shape[2] :]
            lse = weighted(lse, rows)
        return layer.prefix.looked_at(query, lse, layer.start, scale)

    def _of_weights(self, noted: Weights, width: int, query: Tensor, lse: Tensor) -> Tensor:
        """(B, K, width) of all sequences and heads, from the weights that rows gave within the prefix."""
        (batch, _, tokens, _), heads = query.shape, len(noted.heads)
        shares = noted.lse.reshape(heads, batch, -1, tokens).transpose(0, 1)  # (B, K, H/K, T)
        shares = (shares - lse.reshape(batch, heads, -1, tokens)).exp_()  # of what rows gave to all that they saw
        rows = self._weights_of_rows(query)
        if rows is not None:
            shares[..., : tokens - rows.shape[2]] = 0
            shares[..., -rows.shape[2] :] *= rows.unsqueeze(1)
        found = torch.zeros(batch, heads, width)
        for head, (weights, span) in enumerate(zip(noted.heads, noted.spans, strict=True)):
            mass = shares[:, head].reshape(batch, 1, -1) @ weights.reshape(batch, -1, weights.shape[1])
            found[:, head, width - (span.last - span.first) :] = mass[:, 0, span.first : span.last]
        return found

    def _weights_of_rows(self, query: Tensor) -> Tensor | None:
        """(B, 1, T) of the last rows of the pass, of which any weighs something; none where each weighs 1."""
        if self._weights is not None and self._rows is None:
            rows = [F.pad(weight, (query.shape[2] - len(weight), 0)) for weight in self._placed(query.device)]
            self._rows = torch.stack(rows).unsqueeze(1)[..., -self._asking or None :]
        return self._rows

    def _placed(self, device: torch.device) -> Sequence[Tensor]:
        """The rows' weights where the layers are: one copy for all of them."""
        if self._weights and self._weights[0].device != device:
            sizes = [len(weight) for weight in self._weights]
            self._weights = torch.cat(list(self._weights)).to(device, non_blocking=True).split(sizes)
        return self._weights or ()

    def _mass(self, query: Tensor, keys: Tensor, lse: Tensor, scale: float, softcap: float | None) -> Tensor:
        """(B, G, P) of heads that hold equally many keys (G, P, D)."""
        if self._weights is None:
            return one_row(query, keys, lse, scale, softcap)
        return torch.stack([self._mass_of(n, query, keys, lse, scale, softcap) for n in range(len(self._weights))])

    def _on_passages(
        self, row: int, layer: PrefixLayer, query: Tensor, lse: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        """(K, N) of one sequence."""
        first, last = self._told[row]
        if self._idle and self._idle[row]:
            # a piece of a long question that is all passages, which may not be read to their end yet
            return torch.zeros(layer.prefix.heads, last - first, device=query.device)
        return self._mass_of(row, query, layer.keys[row, :, first:last], lse, scale, softcap)

    def _mass_of(
        self, row: int, query: Tensor, keys: Tensor, lse: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        """(G, P) of one sequence."""
        if self._weights is None:
            return one_row(query[row : row + 1], keys, lse[row : row + 1], scale, softcap)[0]
        if self._idle[row]:
            return torch.zeros(keys.shape[:2], device=keys.device)
        weight = self._placed(query.device)[row]
        if query.is_cuda:  # rows that weigh nothing are the most of a question with passages
            weight = weight[-self._asking or None :]
        q, seen = query[row, :, -len(weight) :], lse[row, :, -len(weight) :]
        mass = column_mass(q, keys, seen, scale=scale, row_weight=weight, softcap=softcap)
        return mass.reshape(keys.shape[0], -1, keys.shape[1]).sum(1)


def in_suffix(layer: PrefixLayer, query: Tensor, lse: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Weights (B, K, n) of the buffers of the suffix for the one new row of each sequence, query (B, H, 1, D).

    What is behind a sequence's end is any number.
    """
    batch, keys = len(query), layer.keys[: len(query)]
    rows = query.reshape(batch, keys.shape[1], -1, query.shape[3])
    logits = capped((rows @ keys.transpose(-1, -2)).float() * scale, softcap)
    return (logits - lse.reshape(batch, keys.shape[1], -1, 1)).exp_().sum(2)


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


def question_weights(tokens: int, lead: int = 0) -> Tensor:
    """What each row of a question of so many tokens weighs; the last one writes the answer's first token.

    The first `lead` rows are passages and what stands before them, and weigh nothing.
    """
    weights = torch.full((tokens,), _QUESTION / max(1, tokens - lead))
    weights[:lead] = 0
    weights[-1] += 1
    return weights
