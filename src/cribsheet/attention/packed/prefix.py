"""A layer of a sheet that stays in four bits on the device, and is read by kernels of our own.

A step, and few rows of any kind, read the codes. Many rows read the layer in 16 bits from room that all layers of a
sheet share, one after the other: attention over them takes far longer than unpacking does.

Letters as in `attention/prefix.py`; `S` tiles as in `kernels/codes.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from cribsheet.attention.packed import layout
from cribsheet.attention.prefix import LayerPrefix
from cribsheet.kernels.codes import Codes

_FEW = 128  # rows of a head that read codes: more of them would unpack the same codes again and again


class Room:
    """Room for keys and values of one layer in 16 bits, made at its first use and never again.

    What was captured with it goes on writing there, so it neither grows nor goes before the sheet does.
    """

    def __init__(self, vectors: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._shape, self._dtype, self._device = (2, vectors, size), dtype, device
        self.lock = threading.RLock()  # whoever unpacks into it attends before anybody else unpacks

    @cached_property
    def halves(self) -> Tensor:
        """(2, N, D), N of the layer that has most."""
        return torch.empty(self._shape, dtype=self._dtype, device=self._device)


class PackedPrefix(LayerPrefix):
    """A layer of a prefix as `codes`; `dtype` is the type that its numbers have for whoever asks for them.

    Keys and values that are asked for are unpacked for that, each time.
    """

    def __init__(self, codes: Codes, counts: Sequence[int], dtype: torch.dtype, room: Room) -> None:
        """Of heads that keep so many tokens each."""
        alike = len(set(counts)) == 1
        for name, value in (
            ("codes", codes), ("window", None), ("counts", () if alike else tuple(counts)), ("dtype", dtype),
            ("room", room), ("_kept", tuple(counts)),
        ):  # fmt: skip
            object.__setattr__(self, name, value)

    codes: Codes
    dtype: torch.dtype
    room: Room
    _kept: tuple[int, ...]

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        """Rotated keys, as of any layer."""
        return self._shaped(layout.keys(self.codes, self.dtype))

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """As of any layer."""
        return self._shaped(layout.values(self.codes, self.dtype))

    @property
    def each(self) -> list[tuple[Tensor, Tensor]]:  # type: ignore[override]
        """Keys and values (P, D) of each head, unpacked for this."""
        return list(zip(self._apart(self.keys), self._apart(self.values), strict=True))

    @property
    def heads(self) -> int:
        """Key/value heads."""
        return len(self._kept)

    @property
    def longest(self) -> int:
        """Tokens of the head that keeps most."""
        return max(self._kept)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.codes.keys.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and ranges."""
        return self.codes.nbytes

    @property
    def whole(self) -> Codes:
        """The codes."""
        return self.codes

    def none_behind(self) -> Tensor:
        """As of any layer."""
        return torch.empty(1, self.heads, 0, self.codes.head_size, dtype=self.dtype, device=self.device)

    def attend(self, query: Tensor, scale: float, softcap: float | None = None) -> tuple[Tensor, Tensor]:
        """As of any layer, by the codes where rows are few."""
        from cribsheet.kernels.packed import unpack
        from cribsheet.kernels.step_attention import attend

        batch, heads, tokens, size = query.shape
        if softcap is None and batch * tokens * heads // self.heads <= _FEW:
            rows = query.transpose(1, 2).reshape(batch * tokens, heads, 1, size)
            out, lse = attend(rows, self.codes, None, scale)
            out, lse = out.view(batch, tokens, heads, size), lse.view(batch, tokens, heads)
            return out.transpose(1, 2), lse.transpose(1, 2)
        with self.room.lock:
            keys, values = self.room.halves[:, : sum(self._kept)]
            unpack(self.codes, keys, values)
            return self.over(self._shaped(keys), self._shaped(values), query, scale, softcap)

    def last(self, tokens: int) -> tuple[Tensor, Tensor]:
        """As of any layer."""
        keys, values = (torch.stack([own[len(own) - tokens :] for own in self._apart(x)]) for x in (self.keys, self.values))
        return keys, values

    def without_last(self, tokens: int) -> PackedPrefix:
        """As of any layer; the codes are shared."""
        codes = layout.shorter(self.codes, tokens)
        return PackedPrefix(codes, [count - tokens for count in self._kept], self.dtype, self.room)

    def _shaped(self, vectors: Tensor) -> Tensor:
        """(N, D), or (K, P, D) where heads keep as many each."""
        return vectors if self.counts else vectors.view(self.heads, self.longest, -1)

    def _apart(self, half: Tensor) -> Sequence[Tensor]:
        return half.split(self._kept) if self.counts else half.unbind(0)
