"""A layer whose prefix is being learnt: attention in plain operations that gradients pass.

What stands in the sheet is a start plus a learnt shift in units of its own spread, so that one learning rate suits
all layers; tokens that are not free (preamble, attention sinks, guide) have a spread of zero and stay.

Letters as in `attention/prefix.py`, with `N` tokens of all heads, one head behind the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cribsheet.attention.cache import PrefixLayer
from cribsheet.attention.plain import capped
from cribsheet.attention.prefix import AttentionInputs, LayerPrefix
from cribsheet.study.rounding import Rounding


class Learnt:
    """Keys and values (N, D) of one layer in float32, and what they are shifted by.

    `free` (N,) says which tokens may change. `shifts` are the two tensors (N, D) that are learnt, zero at first. With a
    `rounding`, attention can see them as they would be stored.
    """

    def __init__(self, prefix: LayerPrefix, free: Tensor, rounding: Rounding | None = None) -> None:
        self.prefix, self._rounding = prefix, rounding
        self._lost: list[Tensor] = []
        counts = prefix.counts or (prefix.longest,) * prefix.heads
        size = prefix.keys.shape[-1]
        self._start = [half.reshape(-1, size).float() for half in (prefix.keys, prefix.values)]
        self._spread = [_spread(half, counts, free) for half in self._start]
        self._shape = (prefix.heads, prefix.longest, size)
        device = prefix.keys.device
        ends = [(head + 1) * prefix.longest for head in range(prefix.heads)]
        self._rows = torch.cat(
            [torch.arange(end - count, end, device=device) for end, count in zip(ends, counts, strict=True)]
        )
        alike = len(set(counts)) == 1
        held = torch.zeros(prefix.heads * prefix.longest, dtype=torch.bool, device=device)
        held[self._rows] = True
        self.absent = None if alike else ~held.view(prefix.heads, 1, prefix.longest)
        self.shifts = [torch.zeros_like(half).requires_grad_() for half in self._start]

    def halves(self) -> list[Tensor]:
        """Keys and values (N, D) as they are now, in float32."""
        rows = zip(self._start, self._spread, self.shifts, strict=True)
        return [start + spread * shift for start, spread, shift in rows]

    def round(self) -> None:
        """Let attention see them as they are stored, until they are changed; `loosen` ends it."""
        if self._rounding is not None:
            with torch.no_grad():
                self._lost = self._rounding.lost(*self.halves())

    def loosen(self) -> None:
        """Let attention see them as they are."""
        self._lost = []

    def padded(self, dtype: torch.dtype) -> list[Tensor]:
        """Keys and values (K, P, D) in the model's dtype, each head's at the end, with zeros before them."""
        size, halves = self._shape[-1], self.halves()
        if self._lost:
            halves = [half + lost for half, lost in zip(halves, self._lost, strict=True)]
        return [
            half.new_zeros(self._shape[0] * self._shape[1], size)
            .index_copy(0, self._rows, half)
            .view(self._shape)
            .to(dtype)
            for half in halves
        ]

    def learnt(self) -> LayerPrefix:
        """The layer as it is now, in float32, not rounded: storing it is what rounds."""
        with torch.no_grad():
            keys, values = (half.view(self.prefix.keys.shape) for half in self.halves())
        return LayerPrefix(keys, values, self.prefix.window, self.prefix.counts)


class StudiedLayer(PrefixLayer):
    """A cache layer over a prefix that is learnt, or one that stays as it is; for one pass over new tokens.

    Scores of the prefix are by far the most that a pass holds, so they are computed again on the way back.
    """

    def __init__(self, prefix: LayerPrefix, start: int, learnt: Learnt | None = None) -> None:
        super().__init__(prefix, start)
        self._learnt = learnt

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Nothing is kept: there is one pass."""
        self.length = key_states.shape[2]
        return self.tag(key_states), value_states

    def attend(self, inputs: AttentionInputs) -> Tensor:
        """Attention output (B, H, T, D) over prefix and new tokens."""
        if not torch.is_grad_enabled():
            return self._attend(inputs.query, inputs.key, inputs.value, inputs)
        out: Tensor = checkpoint(self._attend, inputs.query, inputs.key, inputs.value, inputs, use_reentrant=False)
        return out

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, inputs: AttentionInputs) -> Tensor:
        batch, heads, rows, size = query.shape
        groups = key.shape[1]
        grouped = query.reshape(batch, groups, -1, size)
        near = self._near(grouped.float() @ key.float().mT * inputs.scale, inputs, rows)  # (B, K, G * T, T)
        keys, values = self._halves(query.dtype)
        far = grouped.transpose(0, 1).reshape(groups, -1, size).float() @ keys.float().mT * inputs.scale
        far = self._far(capped(far, inputs.softcap), rows)  # (K, B * G * T, P)
        together = torch.cat([far, near.transpose(0, 1).flatten(1, 2)], -1).softmax(-1).to(value.dtype)
        seen = together[..., : self.prefix.longest] @ values
        own = together[..., self.prefix.longest :].view(groups, batch, -1, rows).transpose(0, 1) @ value
        return (seen.view(groups, batch, -1, size).transpose(0, 1) + own).reshape(batch, heads, rows, size)

    def _halves(self, dtype: torch.dtype) -> list[Tensor]:
        if self._learnt is not None:
            return self._learnt.padded(dtype)
        return [self.prefix.keys.to(dtype), self.prefix.values.to(dtype)]

    def _near(self, logits: Tensor, inputs: AttentionInputs, rows: int) -> Tensor:
        """Logits (B, K, G * T, T) of the new tokens: each sees those before it, as far as its window reaches."""
        batch, groups = logits.shape[:2]
        place = torch.arange(rows, device=logits.device)
        seen = place <= place.unsqueeze(-1)
        if self.window is not None:
            seen &= place.unsqueeze(-1) - place < self.window
        visible = seen if inputs.mask is None else seen & inputs.mask[:, :, None, :, :rows]
        parts = capped(logits, inputs.softcap).view(batch, groups, -1, rows, rows)
        return parts.masked_fill(~visible, float("-inf")).reshape(logits.shape)

    def _far(self, logits: Tensor, rows: int) -> Tensor:
        """Logits (K, B * G * T, P) of the prefix, without what a head does not hold or a window does not reach."""
        if self._learnt is not None and self._learnt.absent is not None:
            logits = logits.masked_fill(self._learnt.absent, float("-inf"))
        if self.window is None:
            return logits
        row = torch.arange(rows, device=logits.device).unsqueeze(-1)
        far = row - torch.arange(-self.prefix.longest, 0, device=logits.device) >= self.window  # (T, P)
        parts = logits.view(len(logits), logits.shape[1] // rows, rows, self.prefix.longest)
        return parts.masked_fill(far, float("-inf")).view(logits.shape)


def _spread(half: Tensor, counts: tuple[int, ...], free: Tensor) -> Tensor:
    """(N, 1) root mean square by which a head's tokens differ from their mean, and zero for those that stay."""
    deviations = [
        (head - head.mean(0)).square().mean().sqrt().clamp(min=1e-4) for head in half.split(counts) if len(head)
    ]
    sizes = torch.tensor([count for count in counts if count], device=half.device)
    each = torch.stack(deviations).repeat_interleave(sizes) if deviations else half.new_zeros(0)
    return (each * free).unsqueeze(-1)
