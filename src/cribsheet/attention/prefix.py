"""A sheet on the model's device: keys and values of each layer, and what new tokens behind them see.

Nobody writes to them; new tokens go to a suffix (`attention/cache.py`), and both are parts of one softmax, merged.

Letters as in `attention/attend.py`: `B` sequences, `H` query heads, `K` key/value heads, `T` new tokens, `P` prefix
tokens, `n` suffix tokens, `D` head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cribsheet.attention import dispatch
from cribsheet.attention.attend import attend, attend_ragged, attend_shared, attend_spans, merge
from cribsheet.attention.captures import Captures
from cribsheet.attention.rope import rotate
from cribsheet.kernels.codes import Codes
from cribsheet.kernels.products import Span, Weights, spans_of

_WINDOW_ROWS = 512  # rows of sliding-window attention at once
_MOST_NOTED = 1 << 23  # weights of a layer that are held at once: 32 MiB
_LEAST_SPAN = 192  # tokens from which a head is worth a product of its own on a CPU
_FEW_ROWS = 16  # of each key/value head, up to which PyTorch's fused attention is faster there


class AttentionInputs(NamedTuple):
    """What attention of a layer is given: queries (B, H, T, D), and keys and values (B, K, n, D) of the suffix.

    `mask` is boolean, broadcastable to (B, 1, T, n), true where a row may look, or none where rows look at all that is
    before them; scale and softcap are as in `attention/attend.py`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float
    softcap: float | None = None

    def attend(self) -> tuple[Tensor, Tensor]:
        """What the new tokens see of the suffix: output (B, H, T, D) and log-sum-exp (B, H, T)."""
        causal = self.mask is None and self.query.shape[2] > 1
        before = self.key.shape[2] - self.query.shape[2]
        if causal and before:  # a square is causal everywhere alike, and what is before it is in everybody's sight
            keys, values = self.key[:, :, :before], self.value[:, :, :before]
            newest = self._replace(key=self.key[:, :, before:], value=self.value[:, :, before:])
            return merge(attend(self.query, keys, values, scale=self.scale, softcap=self.softcap), newest.attend())
        return attend(
            self.query, self.key, self.value, scale=self.scale, causal=causal, mask=self.mask, softcap=self.softcap
        )


@dataclass(frozen=True)
class LayerPrefix:
    """Rotated keys and values (K, P, D) of one layer, shared by every sequence; nobody writes to them.

    In a layer with sliding-window attention, `window` is how many tokens a token sees, itself included, and P is at
    most one less: the end of the corpus rather than a choice from it. Where heads keep different numbers of tokens,
    `counts` has them, and keys and values (N, D) are those of all heads, one head behind the other; each head's last
    token stands at the end of the prefix.
    """

    keys: Tensor
    values: Tensor
    window: int | None = None
    counts: tuple[int, ...] = ()

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, counts: Sequence[int], window: int | None = None) -> LayerPrefix:
        """Of keys and values (K, P, D), of which each head holds so many at its end."""
        longest = keys.shape[1]
        if window is not None or all(count == longest for count in counts):
            return cls(keys, values, window)
        heads = [(head, longest - count) for head, count in enumerate(counts)]
        ragged = [torch.cat([half[head, first:] for head, first in heads]) for half in (keys, values)]
        return cls(ragged[0], ragged[1], None, tuple(counts))

    @classmethod
    def ragged(cls, keys: Tensor, values: Tensor, counts: Sequence[int], starts: Tensor) -> LayerPrefix:
        """Of keys and values (N, D) of all heads, which begin at `starts` (K + 1,) int32, on their device."""
        made = cls(keys, values, None, tuple(counts))
        vars(made)["starts"] = starts
        return made

    @property
    def heads(self) -> int:
        """Key/value heads."""
        return len(self.counts) or self.keys.shape[0]

    @property
    def longest(self) -> int:
        """Tokens of the head that keeps most."""
        return max(self.counts) if self.counts else self.keys.shape[1]

    @cached_property
    def each(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (P, D) of each head."""
        return _by_head(self.keys, self.values, self.counts)

    @cached_property
    def starts(self) -> Tensor:
        """(K + 1,) int32 where each head begins when all stand one behind the other, and where the last one ends."""
        if not self.counts:
            return torch.arange(self.heads + 1, dtype=torch.int32, device=self.device) * self.longest
        starts = torch.tensor([0, *itertools.accumulate(self.counts)], dtype=torch.int32)
        return starts.to(self.device, non_blocking=True)  # a GPU is not waited for

    def padded_keys(self) -> Tensor:
        """Keys (K, P, D) of all heads at the end of the longest, and any before them."""
        if not self.counts:
            return self.keys
        last = torch.arange(-self.longest, 0, device=self.device) + self.starts[1:, None]
        return self.keys[last.clamp(min=0)]

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.keys.device

    @property
    def nbytes(self) -> int:
        """Bytes of its keys and values where they lie."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def whole(self) -> tuple[Tensor, Tensor, Tensor, int] | Codes:
        """As a step's kernels read it: keys and values (N, D), where heads begin, and the most tokens; or codes."""
        keys, values = (half if self.counts else half.flatten(0, 1) for half in (self.keys, self.values))
        return keys, values, self.starts, self.longest

    def none_behind(self) -> Tensor:
        """Keys (1, K, 0, D), or values, of no tokens, of the type and where it lies."""
        return self.keys.new_empty(1, self.heads, 0, self.keys.shape[-1])

    @cached_property
    def spans(self) -> list[Span]:
        """Where products on a CPU find the heads; none where these are too short for them, or lie apart."""
        counts = self.counts or (self.keys.shape[1],) * self.heads
        if min(counts) < _LEAST_SPAN or not (self.keys.is_contiguous() and self.values.is_contiguous()):
            return []
        size = self.keys.shape[-1]
        return spans_of(self.keys.view(-1, size), self.values.view(-1, size), counts)

    def attend(
        self, query: Tensor, scale: float, softcap: float | None = None, noted: list[Weights] | None = None
    ) -> tuple[Tensor, Tensor]:
        """What new tokens (B, H, T, D) see of it: output (B, H, T, D) and log-sum-exp (B, H, T).

        What weights they gave is added to `noted`, if they were made on the way.
        """
        rows = query.shape[:3].numel() // self.heads
        if softcap is None and rows > _FEW_ROWS and dispatch.can_span(query) and self.spans:
            is_wanted = noted is not None and rows * self.heads * self.longest <= _MOST_NOTED
            out, lse, weights = attend_spans(query, self.spans, scale=scale, noted=is_wanted)
            if noted is not None and weights is not None:
                noted.append(weights)
            return out, lse
        return self.over(self.keys, self.values, query, scale, softcap)

    def over(
        self, keys: Tensor, values: Tensor, query: Tensor, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """`attend`, given its keys and values."""
        if self.counts:
            heads = partial(_by_head, keys, values, self.counts)
            return attend_ragged(query, heads, (keys, values, self.starts), self.counts, scale=scale, softcap=softcap)
        return attend_shared(query, keys.unsqueeze(0), values.unsqueeze(0), scale=scale, softcap=softcap)

    def looked_at(self, query: Tensor, lse: Tensor, width: int, scale: float) -> Tensor:
        """How much rows look at each of `width` positions, (B, K, width), as `dispatch.on_prefix` says it."""
        keys = self.keys if self.counts else self.keys.flatten(0, 1)
        return dispatch.on_prefix(query, lse, keys, self.starts, self.longest, width, scale)

    def followed_by(self, keys: Tensor, values: Tensor) -> LayerPrefix:
        """With more tokens (K, T, D) behind it, as far back as its window reaches."""
        if not self.counts:
            first = 0 if self.window is None else -(self.window - 1)
            longer = torch.cat([self.keys, keys], 1)[:, first:], torch.cat([self.values, values], 1)[:, first:]
            return LayerPrefix(*longer, self.window)
        halves = [
            torch.cat([part for head in zip(old.split(self.counts), new, strict=True) for part in head])
            for old, new in ((self.keys, keys), (self.values, values))
        ]
        return LayerPrefix(halves[0], halves[1], None, tuple(count + keys.shape[1] for count in self.counts))

    def last(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values (K, T, D) of the last tokens of every head."""
        keys, values = (
            torch.stack([half[len(half) - tokens :] for half in halves]) for halves in zip(*self.each, strict=True)
        )
        return keys, values

    def without_last(self, tokens: int) -> LayerPrefix:
        """Without the last tokens of every head, of a layer without a window.

        It shares its storage where it can: heads that stand one behind the other, and kernels, need them close
        together.
        """
        if self.counts:
            each = [(keys[: len(keys) - tokens], values[: len(values) - tokens]) for keys, values in self.each]
            keys, values = (torch.cat(half) for half in zip(*each, strict=True))
            return LayerPrefix(keys, values, None, tuple(count - tokens for count in self.counts))
        keys, values = (half[:, : half.shape[1] - tokens] for half in (self.keys, self.values))
        if keys.is_cuda:
            keys, values = keys.contiguous(), values.contiguous()
        return LayerPrefix(keys, values)


def _by_head(keys: Tensor, values: Tensor, counts: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (P, D) of each head."""
    if not counts:
        return list(zip(keys, values, strict=True))
    return list(zip(keys.split(tuple(counts)), values.split(tuple(counts)), strict=True))


@dataclass(frozen=True, slots=True)
class Prefix:
    """A sheet as it lies on the model's device: layers and their length in tokens.

    `resting` are the buffers of a batch over it that ended, with what was captured of its steps (`engine/batch.py`);
    `prefills` is what was captured of reading questions on it (`engine/graphs.py`).
    """

    layers: Sequence[LayerPrefix]
    tokens: int
    resting: list[Any] = field(default_factory=list, compare=False, repr=False)
    prefills: Captures[Any] = field(default_factory=Captures, compare=False, repr=False)

    def without_last(self, tokens: int) -> Prefix:
        """A prefix without its last tokens, of layers without windows."""
        return Prefix([layer.without_last(tokens) for layer in self.layers], self.tokens - tokens)


def attend_behind(
    prefix: LayerPrefix,
    inputs: AttentionInputs,
    suffix: tuple[Tensor, Tensor],
    noted: list[Weights] | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over a prefix and the suffix, given those of the suffix, where everything is in sight.

    `noted` is as in `LayerPrefix.attend`.
    """
    if prefix.longest == 0:
        return suffix
    return merge(prefix.attend(inputs.query, inputs.scale, inputs.softcap, noted), suffix)


def attend_window(
    prefix: LayerPrefix, inputs: AttentionInputs, rows: Tensor, columns: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over a prefix and the suffix of rows that see so many tokens, themselves included.

    `rows` (B or 1, T) and `columns` (B or 1, n) are positions of the new tokens and of the suffix, counted from the
    end of the prefix.
    """
    query = inputs.query
    if prefix.longest and (query.shape[0] > 1 or query.shape[2] == 1):
        return _share_window(prefix, inputs, rows, columns, window)
    return _read_window(prefix, inputs, rows, columns, window)


def _share_window(
    prefix: LayerPrefix, inputs: AttentionInputs, rows: Tensor, columns: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    """Few rows each of one or many sequences over one prefix, which is not copied for any of them."""
    query, key, value, mask, scale, softcap = inputs
    row, column = rows.unsqueeze(-1), columns.unsqueeze(1)  # (B or 1, T, 1), (B or 1, 1, n)
    place = torch.arange(-prefix.longest, 0, device=query.device)  # of the prefix, counted from its end
    near = (column <= row) & (row - column < window)
    seen = near.unsqueeze(1) if mask is None else near.unsqueeze(1) & mask
    inside = (place <= row) & (row - place < window)
    keys, values = prefix.keys.unsqueeze(0), prefix.values.unsqueeze(0)
    shared = attend_shared(query, keys, values, scale=scale, mask=inside, softcap=softcap)
    out, lse = merge(shared, attend(query, key, value, scale=scale, mask=seen, softcap=softcap))
    blind = lse.isneginf().unsqueeze(-1)  # padding that sees nothing: its NaN would pass through later masks
    return out.masked_fill(blind, 0.0), lse


def _read_window(
    prefix: LayerPrefix, inputs: AttentionInputs, rows: Tensor, columns: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    """One sequence of perhaps many rows: a block of rows at a time over the keys that it can see."""
    query, key, value, mask, scale, softcap = inputs
    batch, before = query.shape[0], prefix.longest
    keys = torch.cat([prefix.keys.expand(batch, -1, -1, -1), key], 2)
    values = torch.cat([prefix.values.expand(batch, -1, -1, -1), value], 2)
    columns = torch.cat([torch.arange(-before, 0, device=query.device).expand(len(columns), -1), columns], 1)
    parts = []
    for first in range(0, query.shape[2], _WINDOW_ROWS):
        row = rows[:, first : first + _WINDOW_ROWS, None]
        seen = (columns[:, None] <= row) & (row - columns[:, None] < window)  # (B or 1, rows, keys)
        if mask is not None:
            allowed = mask[:, 0, first : first + _WINDOW_ROWS]
            seen = torch.cat([seen[..., :before].expand(len(allowed), -1, -1), seen[..., before:] & allowed], -1)
        used = seen.flatten(0, 1).any(0).nonzero()
        low, high = int(used[0]), int(used[-1]) + 1
        block = query[:, :, first : first + _WINDOW_ROWS]
        visible = seen[:, None, :, low:high]
        parts.append(
            attend(block, keys[:, :, low:high], values[:, :, low:high], scale=scale, mask=visible, softcap=softcap)
        )
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def end_positions(layer: LayerPrefix, length: int) -> Tensor:
    """Positions (P,) or, where heads keep different numbers of tokens, (N,) of keys that end where the sheet does."""
    if not layer.counts:
        return torch.arange(length - layer.keys.shape[1], length)
    return torch.cat([torch.arange(length - count, length) for count in layer.counts])


def turned_back(layer: LayerPrefix, length: int, inv_freq: Tensor) -> LayerPrefix:
    """A layer of a sheet of `length` positions with its keys before rotation, in float32."""
    positions = end_positions(layer, length).to(layer.keys.device)
    return replace(layer, keys=rotate(layer.keys, -positions, inv_freq))
