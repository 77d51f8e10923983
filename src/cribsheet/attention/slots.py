"""Cache layers for many sequences over one prefix: ragged decoding in slots, and padded prefill.

Letters as in `attention/prefix.py`: `B` sequences, `K` key/value heads, `T` new tokens, `D` head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from cribsheet.attention import dispatch
from cribsheet.attention.attend import attend_each
from cribsheet.attention.cache import PrefixLayer
from cribsheet.attention.prefix import AttentionInputs, LayerPrefix, attend_behind

_BLOCK = 64  # suffix buffers grow by blocks of so many tokens


class Rows:
    """How long each sequence's suffix is, with the tensors that all layers of a step share."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.count = self.longest = 0
        self.index = torch.empty(0)
        self.mask: Tensor | None = None
        self.bias: Tensor | None = None
        self._places: dict[tuple[int, int], Tensor] = {}

    def prepare(self, device: torch.device) -> None:
        """Make room for one more token in every row."""
        self._begin(torch.tensor(self.lengths, device=device), max(self.lengths) + 1)
        if min(self.lengths) + 1 < self.longest:
            self._hide()

    def fix(self, index: Tensor, tokens: int) -> None:
        """Rows of any lengths (B,) below `tokens`, which only the device needs to know."""
        self._begin(index, tokens)
        self._hide()

    def _begin(self, index: Tensor, longest: int) -> None:
        self.index, self.count, self.longest = index, len(index), longest
        self._places.clear()
        self.mask = self.bias = None

    def _hide(self) -> None:
        """No row sees what is behind its new token."""
        device = self.index.device
        self.mask = (torch.arange(self.longest, device=device) <= self.index[:, None])[:, None, None, :]
        self.bias = torch.zeros(self.mask.shape, device=device).masked_fill_(~self.mask, float("-inf"))

    def places(self, heads: int, tokens: int) -> Tensor:
        """(B * K,) where the new tokens go in buffers of `tokens` a slot, seen as one list of vectors."""
        found = self._places.get((heads, tokens))
        if found is None:
            firsts = torch.arange(self.count * heads, device=self.index.device) * tokens
            found = self._places[heads, tokens] = firsts + self.index.repeat_interleave(heads)
        return found


class SlotLayer(PrefixLayer):
    """One layer of a batch whose sequences have suffixes of different lengths; each decodes one token a step."""

    def __init__(self, prefix: LayerPrefix, start: int, rows: Rows) -> None:
        super().__init__(prefix, start)
        self.rows = rows

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token (B, K, 1, D) behind each row and return the filled part of the buffers."""
        rows, count = self.rows, self.rows.count
        self.reserve(count, rows.longest, key_states)
        _, heads, tokens, size = self.keys.shape
        places = rows.places(heads, tokens)
        self.keys.view(-1, size).index_copy_(0, places, key_states.reshape(-1, size))
        self.values.view(-1, size).index_copy_(0, places, value_states.reshape(-1, size))
        return self.tag(self.keys[:count, :, : rows.longest]), self.values[:count, :, : rows.longest]

    def visible(self, mask: Tensor | None) -> Tensor | None:
        """Each row sees its own suffix."""
        return self.rows.mask

    def look(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """As in `PrefixLayer`, with the bias that all layers of a step share, or by one kernel where there is one."""
        query, key, value, _, scale, softcap = inputs
        if self.is_cut(key.shape[2]):
            return self.look_near(inputs)
        if self.window is None and dispatch.usable(query, self.prefix.heads, softcap):
            before = self.prefix.attend(query, scale) if self.prefix.longest else None
            return dispatch.newest(query, self.keys, self.values, self.rows.index, scale, before)
        suffix = attend_each(query, key, value, scale=scale, bias=self.rows.bias, softcap=softcap)
        return attend_behind(self.prefix, inputs, suffix, self.noted)

    def suffix_positions(self, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Positions of the newest token (B, 1) and of the suffix (1, n), counted from the end of the prefix."""
        return self.rows.index.unsqueeze(1), torch.arange(columns, device=device).unsqueeze(0)

    def insert(self, slot: int, keys: Tensor, values: Tensor) -> None:
        """Fill a slot with the suffix (K, n, D) of a prefilled sequence."""
        size = keys.shape[1]
        self.reserve(slot + 1, size, keys.unsqueeze(0))
        self.keys[slot, :, :size], self.values[slot, :, :size] = keys, values

    def vacate(self, slot: int, last: int) -> None:
        """Close the gap at `slot` with the `last` slot and wipe that: an overflow's NaN would pass through a mask."""
        if slot != last:
            self.keys[slot], self.values[slot] = self.keys[last], self.values[last]
        self.keys[last], self.values[last] = 0.0, 0.0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """One token a step sees everything, so transformers builds no mask."""
        return query_length, self.start

    def get_seq_length(self) -> int:
        """Positions are always given; this only has to agree with `get_mask_sizes`."""
        return self.start

    def reserve(self, count: int, longest: int, like: Tensor) -> None:
        """Buffers of at least `count` slots and `longest` tokens."""
        slots, tokens = self.keys.shape[0], self.keys.shape[2]
        if count <= slots and longest <= tokens and tokens:
            return
        slots = max(count, 2 * slots if count > slots else slots)
        tokens = max(tokens, -(-longest // _BLOCK) * _BLOCK + _BLOCK if longest > tokens else tokens)
        self.keys = _enlarged(self.keys, slots, tokens, like)
        self.values = _enlarged(self.values, slots, tokens, like)


class PaddedLayer(PrefixLayer):
    """One layer of a prefill of questions of different lengths, padded on the left; one forward pass only.

    Keys and values (B, K, n, D) that are `ahead` of the questions were read elsewhere.
    """

    def __init__(
        self, prefix: LayerPrefix, start: int, mask: Tensor | None, ahead: tuple[Tensor, Tensor] | None = None
    ) -> None:
        super().__init__(prefix, start)
        self.mask, self.ahead = mask, ahead

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep the new keys and values, behind those that are ahead."""
        if self.ahead is not None:
            keys, values = self.ahead
            key_states, value_states = torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)
        self.keys, self.values, self.length = key_states, value_states, key_states.shape[2]
        return self.tag(key_states), value_states

    def visible(self, mask: Tensor | None) -> Tensor | None:
        """Causal, without the padding; transformers was given no mask."""
        return self.mask

    def suffix_positions(self, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Positions (B or 1, T) and (B or 1, n), counted from the end of the prefix; of padding, that before it."""
        if self.mask is None:
            places = torch.arange(columns, device=device).unsqueeze(0)
        else:  # the last row sees all tokens that are no padding
            places = self.mask[:, 0, -1].cumsum(-1) - 1
        return places[:, columns - rows :], places


def padded_batch(
    questions: Sequence[Tensor], start: int, before: Sequence[int] = ()
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids (B, T) padded on the left, their positions (B, T), and the mask (B, 1, T, N + T), none if rows see all.

    Each question stands behind so many tokens `before` it, of which N is the most, also padded on the left.
    """
    before = before or [0] * len(questions)
    longest, most = max(len(ids) for ids in questions), max(before)
    ids = torch.zeros(len(questions), longest, dtype=torch.int64)
    positions = torch.full_like(ids, start)
    pads = torch.tensor([longest - len(question) for question in questions])
    for row, (question, ahead) in enumerate(zip(questions, before, strict=True)):
        ids[row, longest - len(question) :] = question
        positions[row, longest - len(question) :] = torch.arange(start + ahead, start + ahead + len(question))
    if not pads.any() and not most:
        return ids, positions, None
    column = torch.arange(longest)
    mask = (column <= column[:, None]) & (column >= pads[:, None, None])  # (B, T, T)
    seen = torch.arange(most) >= most - torch.tensor(before)[:, None]  # (B, N)
    return ids, positions, torch.cat([seen[:, None].expand(-1, longest, -1), mask], 2).unsqueeze(1)


def prefill_cache(
    layers: Sequence[LayerPrefix],
    start: int,
    mask: Tensor | None,
    ahead: Sequence[Sequence[tuple[Tensor, Tensor]]] = (),
) -> Cache:
    """A cache for one padded prefill; keys and values (K, n, D) of each layer may stand `ahead` of each question."""
    device = layers[0].device
    placed = None if mask is None else mask.to(device)
    before = _padded(ahead) if any(ahead) else [None] * len(layers)
    return Cache(layers=[PaddedLayer(layer, start, placed, each) for layer, each in zip(layers, before, strict=True)])


def _padded(ahead: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (B, K, N, D) of each layer, of sequences that have (K, n, D), padded on the left with zeros."""
    longest = max(sequence[0][0].shape[1] for sequence in ahead)

    def padded(halves: Sequence[Tensor]) -> Tensor:
        return torch.stack([F.pad(half, (0, 0, longest - half.shape[1], 0)) for half in halves])

    return [(padded([k for k, _ in layer]), padded([v for _, v in layer])) for layer in zip(*ahead, strict=True)]


def step_cache(layers: Sequence[SlotLayer]) -> Cache:
    """A cache for one decoding step of a batch."""
    return Cache(layers=list(layers))


def _enlarged(buffer: Tensor, slots: int, tokens: int, like: Tensor) -> Tensor:
    _, heads, _, size = like.shape
    grown = like.new_zeros(slots, heads, tokens, size)
    if buffer.shape[2]:
        grown[: buffer.shape[0], :, : buffer.shape[2]] = buffer
    return grown
