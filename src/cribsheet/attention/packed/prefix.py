"""A layer of a sheet that stays in four bits on the device, and is read by kernels of our own.

A step, and few rows of any kind, read the codes. Many rows read the layer in 16 bits, in room that the next layer uses
again: attention over them takes far longer than unpacking does. Where kernels do not read codes, or it is not known yet
whether they do, plain torch unpacks the layer each time.

Letters as in `attention/prefix.py`; `S` tiles as in `kernels/codes.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from cribsheet.attention import dispatch
from cribsheet.attention.packed import layout
from cribsheet.attention.prefix import LayerPrefix
from cribsheet.kernels.codes import Codes
from cribsheet.kernels.products import Weights

_FEW = 128  # rows of a head that read codes: more of them would unpack the same codes again and again
_FEW_EACH = 16  # rows of a sequence and head, of one token, that look at codes together


class Room:
    """Room for keys and values of one layer in 16 bits, of the layer that has most vectors.

    Captured computations share it, since they are replayed one after the other; each would keep its own for ever. All
    others take room of the allocator, which orders whoever uses it.
    """

    def __init__(self, vectors: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._vectors, self._size, self._dtype, self._device = vectors, size, dtype, device

    def halves(self, vectors: int) -> Tensor:
        """(2, N, D), of anything."""
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return self._captured[:, :vectors]
        return self._made(vectors)

    @cached_property
    def _captured(self) -> Tensor:
        return self._made(self._vectors)

    def _made(self, vectors: int) -> Tensor:
        return torch.empty(2, vectors, self._size, dtype=self._dtype, device=self._device)


class PackedPrefix(LayerPrefix):
    """A layer of a prefix as `codes`; `dtype` is the type that its numbers have for whoever asks for them.

    `reads` says whether kernels read them, as far as that is known. Keys and values that are asked for are unpacked for
    that, each time.
    """

    def __init__(
        self, codes: Codes, counts: Sequence[int], dtype: torch.dtype, room: Room, reads: Callable[[], bool]
    ) -> None:
        """Of heads that keep so many tokens each."""
        alike = len(set(counts)) == 1
        for name, value in (
            ("codes", codes), ("window", None), ("counts", () if alike else tuple(counts)), ("dtype", dtype),
            ("room", room), ("reads", reads), ("_kept", tuple(counts)),
        ):  # fmt: skip
            object.__setattr__(self, name, value)

    codes: Codes
    dtype: torch.dtype
    room: Room
    reads: Callable[[], bool]
    _kept: tuple[int, ...]

    @property
    def keys(self) -> Tensor:
        """Rotated keys, as of any layer."""
        return self._shaped(layout.keys(self.codes, self.dtype))

    @property
    def values(self) -> Tensor:
        """As of any layer."""
        return self._shaped(layout.values(self.codes, self.dtype))

    @property
    def each(self) -> list[tuple[Tensor, Tensor]]:
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
    def whole(self) -> tuple[Tensor, Tensor, Tensor, int] | Codes:
        """The codes, or what is unpacked of them."""
        return self.codes if self.reads() else super().whole

    def none_behind(self) -> Tensor:
        """As of any layer."""
        return torch.empty(1, self.heads, 0, self.codes.head_size, dtype=self.dtype, device=self.device)

    def attend(
        self, query: Tensor, scale: float, softcap: float | None = None, noted: list[Weights] | None = None
    ) -> tuple[Tensor, Tensor]:
        """As of any layer, by the codes where rows are few; no weights are noted."""
        if softcap is not None or not self.reads():
            return self.over(self.keys, self.values, query, scale, softcap)
        from cribsheet.kernels.step_attention import attend

        batch, heads, tokens, size = query.shape
        if batch * tokens * heads // self.heads > _FEW:
            keys, values = self._unpacked()
            return self.over(self._shaped(keys), self._shaped(values), query, scale, None)
        rows = query.transpose(1, 2).reshape(batch * tokens, heads, 1, size).contiguous()
        out, lse = attend(rows, self.codes, None, scale)
        return out.view(batch, tokens, heads, size).transpose(1, 2), lse.view(batch, tokens, heads).transpose(1, 2)

    def looked_at(self, query: Tensor, lse: Tensor, width: int, scale: float) -> Tensor:
        """As of any layer, by the codes where each sequence has one row."""
        if not self.reads():
            return super().looked_at(query, lse, width, scale)
        from cribsheet.kernels.packed import glances

        batch, heads, tokens, _ = query.shape
        if tokens > 1 or heads // self.heads > _FEW_EACH:
            return dispatch.on_prefix(query, lse, self._unpacked()[0], self.starts, self.longest, width, scale)
        rows = query.reshape(batch, self.heads, -1, query.shape[-1]).transpose(0, 1)  # (K, B, G, D)
        return glances(self.codes, rows, lse.reshape(batch, self.heads, -1).transpose(0, 1), width, scale)

    def last(self, tokens: int) -> tuple[Tensor, Tensor]:
        """As of any layer."""
        ends = [[own[len(own) - tokens :] for own in self._apart(half)] for half in (self.keys, self.values)]
        return torch.stack(ends[0]), torch.stack(ends[1])

    def without_last(self, tokens: int) -> PackedPrefix:
        """As of any layer; the codes are shared."""
        codes = layout.shorter(self.codes, tokens)
        return PackedPrefix(codes, [count - tokens for count in self._kept], self.dtype, self.room, self.reads)

    def _unpacked(self) -> tuple[Tensor, Tensor]:
        """Keys and values (N, D) by one kernel, in room that is used again."""
        from cribsheet.kernels.packed import unpack

        keys, values = self.room.halves(sum(self._kept))
        unpack(self.codes, keys, values)
        return keys, values

    def _shaped(self, vectors: Tensor) -> Tensor:
        """(N, D), or (K, P, D) where heads keep as many each."""
        return vectors if self.counts else vectors.view(self.heads, self.longest, -1)

    def _apart(self, half: Tensor) -> Sequence[Tensor]:
        return half.split(self._kept) if self.counts else half.unbind(0)
