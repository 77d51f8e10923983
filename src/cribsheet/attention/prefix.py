"""A sheet inside a transformers cache: the prefix is shared and never written to, new tokens go to a suffix.

Each layer answers `attend` for the registered attention function (`model/backbone.py`): prefix part and suffix part of
one softmax, merged. To transformers a layer looks as if it held `start` tokens before the suffix; masks cover the
suffix only, because every new token sees the whole prefix.

Letters as in `attention/attend.py`: `B` sequences, `H` query heads, `K` key/value heads, `T` new tokens, `P` prefix
tokens, `D` head size.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from cribsheet.attention.attend import attend, attend_ragged, attend_shared, merge
from cribsheet.attention.captures import Captures
from cribsheet.attention.rope import rotate

_WINDOW_ROWS = 512  # rows of sliding-window attention at once
_FIRST_CAPACITY = 64  # tokens a suffix buffer holds at first; it doubles


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
        packed = [torch.cat([half[head, first:] for head, first in heads]) for half in (keys, values)]
        return cls(packed[0], packed[1], None, tuple(counts))

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
        if not self.counts:
            return list(zip(self.keys, self.values, strict=True))
        return list(zip(self.keys.split(self.counts), self.values.split(self.counts), strict=True))

    @cached_property
    def starts(self) -> Tensor:
        """(K + 1,) int32 where each head begins when all stand one behind the other, and where the last one ends."""
        if not self.counts:
            return torch.arange(self.heads + 1, dtype=torch.int32, device=self.keys.device) * self.keys.shape[1]
        return torch.tensor([0, *itertools.accumulate(self.counts)], dtype=torch.int32, device=self.keys.device)

    def attend(self, query: Tensor, scale: float, softcap: float | None = None) -> tuple[Tensor, Tensor]:
        """What new tokens (B, H, T, D) see of it: output (B, H, T, D) and log-sum-exp (B, H, T)."""
        if self.counts:
            packed = self.keys, self.values, self.starts
            return attend_ragged(query, lambda: self.each, packed, self.counts, scale=scale, softcap=softcap)
        return attend_shared(query, self.keys.unsqueeze(0), self.values.unsqueeze(0), scale=scale, softcap=softcap)

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

    def without_last(self, tokens: int) -> LayerPrefix:
        """Without the last tokens of every head, of a layer without a window.

        It shares its storage where it can: where heads are packed, and for kernels, they must lie close together.
        """
        if self.counts:
            each = [(keys[: len(keys) - tokens], values[: len(values) - tokens]) for keys, values in self.each]
            keys, values = (torch.cat(half) for half in zip(*each, strict=True))
            return LayerPrefix(keys, values, None, tuple(count - tokens for count in self.counts))
        keys, values = (half[:, : half.shape[1] - tokens] for half in (self.keys, self.values))
        if keys.is_cuda:
            keys, values = keys.contiguous(), values.contiguous()
        return LayerPrefix(keys, values)


@dataclass(frozen=True, slots=True)
class Prefix:
    """A sheet as it lies on the model's device: layers and their length in tokens.

    `resting` are the buffers of a batch over it that ended, with what was captured of its steps (`engine/group.py`);
    `reads` is what was captured of reading questions on it (`engine/graphs.py`).
    """

    layers: Sequence[LayerPrefix]
    tokens: int
    resting: list[Any] = field(default_factory=list, compare=False, repr=False)
    reads: Captures[Any] = field(default_factory=Captures, compare=False, repr=False)

    def without_last(self, tokens: int) -> Prefix:
        """A prefix without its last tokens, of layers without windows."""
        return Prefix([layer.without_last(tokens) for layer in self.layers], self.tokens - tokens)


# Called after attention with the layer, queries (B, H, T, D), log-sum-exps (B, H, T), scale and softcap
# (`attention/recorder.py`).
Watch = Callable[["PrefixLayer", Tensor, Tensor, float, float | None], None]


class PrefixLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer: a shared prefix and a growing suffix of equal length in every sequence.

    Works under stock `generate()`: greedy, beams, several sequences, left-padded batches.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, prefix: LayerPrefix, start: int) -> None:
        super().__init__()
        self.prefix, self.start, self.window = prefix, start, prefix.window
        self.length = 0
        self.watch: Watch | None = None
        self.is_initialized = True
        # suffix buffers (B, K, capacity, D), filled up to `length`
        self.keys = self.values = prefix.keys.new_empty(1, prefix.heads, 0, prefix.keys.shape[-1])

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: buffers grow on the first update."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (B, K, T, D) to the suffix and return the whole suffix, tagged with this layer."""
        new = self.length + key_states.shape[2]
        self.keys = _grown(self.keys, key_states, new, self.length)
        self.values = _grown(self.values, value_states, new, self.length)
        self.keys[:, :, self.length : new] = key_states
        self.values[:, :, self.length : new] = value_states
        self.length = new
        return self.tag(self.keys[:, :, :new]), self.values[:, :, :new]

    def tag(self, keys: Tensor) -> Tensor:
        """Mark a tensor so that the registered attention function finds its way back to this layer.

        A weak reference: a strong one would tie keys and layer into a cycle, which keeps whole chunks alive until
        the garbage collector happens to run.
        """
        keys._cribsheet = weakref.ref(self)  # type: ignore[attr-defined]
        return keys

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        softcap: float | None = None,
    ) -> Tensor:
        """Attention output (B, H, T, D) of the newest T tokens over prefix and suffix."""
        out, lse = self._attend(query, key, value, self.visible(mask), scale, softcap)
        if self.watch is not None:
            self.watch(self, query, lse, scale, softcap)
        return out

    def visible(self, mask: Tensor | None) -> Tensor | None:
        """The suffix mask to use, given that of transformers."""
        return mask

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """Output, and log-sum-exp (B, H, T) over everything that the new tokens see."""
        if self.window is not None and self.prefix.longest + key.shape[2] > self.window:
            return self._attend_window(query, key, value, mask, scale, softcap, self.window)
        suffix = self._attend_suffix(query, key, value, mask, scale, softcap)
        if self.prefix.longest == 0:
            return suffix
        return merge(self.prefix.attend(query, scale, softcap), suffix)

    def _attend_suffix(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """The suffix part of `_attend`, where everything is in sight."""
        causal = mask is None and query.shape[2] > 1
        return attend(query, key, value, scale=scale, causal=causal, mask=mask, softcap=softcap)

    def _attend_window(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        softcap: float | None,
        window: int,
    ) -> tuple[Tensor, Tensor]:
        """As `_attend` where some tokens are out of sight."""
        if self.prefix.longest and (query.shape[0] > 1 or query.shape[2] == 1):
            return self._share_window(query, key, value, mask, scale, softcap, window)
        return self._read_window(query, key, value, mask, scale, softcap, window)

    def _share_window(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        softcap: float | None,
        window: int,
    ) -> tuple[Tensor, Tensor]:
        """Few rows each of one or many sequences over one prefix, which is not copied for any of them."""
        rows, columns = self.suffix_positions(query.shape[2], key.shape[2], query.device)
        row, column = rows.unsqueeze(-1), columns.unsqueeze(1)  # (B or 1, T, 1), (B or 1, 1, n)
        place = torch.arange(-self.prefix.longest, 0, device=query.device)  # of the prefix, counted from its end
        near = (column <= row) & (row - column < window)
        seen = near.unsqueeze(1) if mask is None else near.unsqueeze(1) & mask
        inside = (place <= row) & (row - place < window)
        keys, values = self.prefix.keys.unsqueeze(0), self.prefix.values.unsqueeze(0)
        shared = attend_shared(query, keys, values, scale=scale, mask=inside, softcap=softcap)
        out, lse = merge(shared, attend(query, key, value, scale=scale, mask=seen, softcap=softcap))
        blind = lse.isneginf().unsqueeze(-1)  # padding that sees nothing: its NaN would pass through later masks
        return out.masked_fill(blind, 0.0), lse

    def _read_window(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        softcap: float | None,
        window: int,
    ) -> tuple[Tensor, Tensor]:
        """One sequence of perhaps many rows: a block of rows at a time over the keys that it can see."""
        batch, before = query.shape[0], self.prefix.longest
        keys = torch.cat([self.prefix.keys.expand(batch, -1, -1, -1), key], 2)
        values = torch.cat([self.prefix.values.expand(batch, -1, -1, -1), value], 2)
        rows, columns = self.suffix_positions(query.shape[2], key.shape[2], query.device)
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

    def suffix_positions(self, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Positions of the newest tokens (B or 1, T) and of the suffix (B or 1, n), from the end of the prefix."""
        suffix = torch.arange(columns, device=device).unsqueeze(0)
        return suffix[:, columns - rows :], suffix

    def get_seq_length(self) -> int:
        """Tokens before the next one, the prefix included."""
        return self.start + self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(suffix length after the next update, position at which the suffix begins)."""
        return self.length + query_length, self.start

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.17

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens of the suffix; transformers gives their number negated."""
        self.length = max(0, self.length - abs(tokens_to_remove))

    def reset(self) -> None:
        """Empty the suffix; the prefix stays."""
        self.length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Permute the sequences, as beam search asks."""
        self.keys = self.keys.index_select(0, beam_idx)
        self.values = self.values.index_select(0, beam_idx)


class ReadingLayer(PrefixLayer):
    """A layer that reads `[chunk; guide]` in one go and remembers how it looked.

    After the read: `chunk_keys`, `chunk_values` (K, c, D), `guide_queries` (H, T, D), `guide_lse` (H, T).
    """

    def __init__(
        self,
        prefix: LayerPrefix,
        start: int,
        guide_tokens: int,
        step: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(prefix, start)
        self.guide_tokens = guide_tokens
        self._step = step  # called when the model has come to this layer
        self._known: tuple[Tensor, Tensor] | None = None  # keys and values (1, K, c, D) of the chunk, once concluded

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep a reference to the chunk's keys and values; nothing is copied."""
        chunk = key_states.shape[2] - self.guide_tokens
        read = self._known or (key_states[:, :, :chunk], value_states[:, :, :chunk])
        self.chunk_keys, self.chunk_values = read[0][0], read[1][0]
        self.guide_keys, self.guide_values = key_states[0, :, chunk:], value_states[0, :, chunk:]
        self.length = key_states.shape[2]
        if self._step is not None:
            self._step()
        return self.tag(key_states), value_states

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """As in `PrefixLayer`, keeping the guide's queries and log-sum-exps."""
        out, lse = super()._attend(query, key, value, mask, scale, softcap)
        if self._known is not None:
            out, lse = merge((out, lse), attend(query, *self._known, scale=scale, softcap=softcap))
        first = query.shape[2] - self.guide_tokens
        self.guide_queries, self.guide_lse = query[0, :, first:], lse[0, :, first:]
        return out, lse

    def conclude(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        """`update` and `attend` of the model's last layer, where nobody asks for the output: only the guide looks."""
        chunk = key.shape[2] - self.guide_tokens
        self._known = key[:, :, :chunk], value[:, :, :chunk]
        query, key, value = (part[:, :, chunk:] for part in (query, key, value))
        self.update(key, value)
        if self.guide_tokens:
            self._attend(query, key, value, None, scale, None)
        else:
            self.guide_queries, self.guide_lse = query[0], query.new_empty(query.shape[1:3], dtype=torch.float32)


def prefix_cache(layers: Sequence[LayerPrefix], start: int) -> Cache:
    """A fresh transformers `Cache` over a shared prefix of `start` tokens, for one forward pass or one `generate`."""
    return Cache(layers=[PrefixLayer(layer, start) for layer in layers])


def end_positions(layer: LayerPrefix, length: int) -> Tensor:
    """Positions (P,) or, where heads keep different numbers of tokens, (N,) of keys that end where the sheet does."""
    if not layer.counts:
        return torch.arange(length - layer.keys.shape[1], length)
    return torch.cat([torch.arange(length - count, length) for count in layer.counts])


def turned_back(layer: LayerPrefix, length: int, inv_freq: Tensor) -> LayerPrefix:
    """A layer of a sheet of `length` positions with its keys before rotation, in float32."""
    positions = end_positions(layer, length).to(layer.keys.device)
    return replace(layer, keys=rotate(layer.keys, -positions, inv_freq))


def _grown(buffer: Tensor, like: Tensor, needed: int, filled: int) -> Tensor:
    """A buffer for at least `needed` tokens that starts with the `filled` ones of `buffer`."""
    if needed <= buffer.shape[2] and buffer.shape[0] == like.shape[0]:
        return buffer
    batch, heads, _, size = like.shape
    grown = like.new_empty(batch, heads, max(needed, 2 * buffer.shape[2], _FIRST_CAPACITY), size)
    if filled:
        grown[:, :, :filled] = buffer[:, :, :filled]
    return grown
