"""How a layer's keys and values lie in a sheet: in a float type, in eight bits with a scale for each token, or in four.

int8 keeps one float32 scale per token and head, so that no token's rounding depends on another's: on Gaussian data it
loses 0.6 % (relative L2). int4 is packed as `sheet/int4.py` says, keys before rotation. `loss` measures either on the
sheet at hand. Numbers are restored when the sheet is put on a device, but for int4 on CUDA, where kernels of our own
read codes (`attention/packed`).
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Self, overload

import torch
from torch import Tensor

from cribsheet.attention.packed.layout import tiled
from cribsheet.attention.prefix import LayerPrefix
from cribsheet.kernels.codes import Codes
from cribsheet.sheet.int4 import (
    SCALE,
    Packed,
    block_sizes,
    group_size,
    pack_blocks,
    pack_groups,
    unpack_blocks,
    unpack_groups,
)
from cribsheet.vocabulary import StorageDtype

Parts = Mapping[str, Tensor]  # tensors by name


@dataclass(frozen=True, slots=True)
class StoredLayer(ABC):
    """Keys and values (K, P, ...) of one layer on the CPU, in the form of one storage type.

    Where heads keep different numbers of tokens, `counts`, they are (N, ...), one head behind the other. `window` is
    how many tokens a token sees, where attention slides.
    """

    keys: Tensor
    values: Tensor
    window: int | None = None
    counts: tuple[int, ...] = ()

    names: ClassVar[tuple[str, ...]] = ("keys", "values")
    """The tensors by name, as files have them."""

    @staticmethod
    def of(layer: LayerPrefix, dtype: StorageDtype) -> StoredLayer:
        """A layer as it is stored; for int4 with keys before rotation."""
        return form_of(dtype).made_of(layer, dtype)

    @classmethod
    @abstractmethod
    def made_of(cls, layer: LayerPrefix, dtype: StorageDtype) -> Self:
        """A layer in this form."""

    @abstractmethod
    def restored(self, device: torch.device, dtype: torch.dtype) -> LayerPrefix:
        """The layer as attention reads it; of int4 its keys are not rotated yet."""

    @abstractmethod
    def is_sound(self, vectors: tuple[int, ...], head_size: int, dtype: StorageDtype) -> bool:
        """Whether its tensors are those of so many `vectors`, (K, P) or (N,), in a storage type."""

    def parts(self, places: Sequence[Sequence[int]]) -> list[Self]:
        """Its stretches: `places` are of each head the rows between them, one more than there are stretches."""
        heads = self.heads()
        return [self._between(heads, bounds) for bounds in zip(*(pairwise(head) for head in places), strict=True)]

    def _between(self, heads: Sequence[Parts], bounds: Sequence[tuple[int, int]]) -> Self:
        """The tokens between two places of each head; not copied where all heads have the same."""
        if not self.counts and len(set(bounds)) == 1:
            first, last = bounds[0]
            return self.with_tensors({name: tensor[:, first:last] for name, tensor in self.tensors().items()})
        return self.with_heads([_cut(head, *bound) for head, bound in zip(heads, bounds, strict=True)])

    @staticmethod
    def joined(parts: Sequence[StoredLayer]) -> StoredLayer:
        """Stretches of tokens of one layer, one behind the other in each head."""
        return parts[0]._joined(parts)

    def _joined(self, parts: Sequence[StoredLayer]) -> Self:
        if any(part.counts for part in parts):
            return self._joined_by_head(parts)
        tensors = [part.tensors() for part in parts]
        return self.with_tensors({name: torch.cat([part[name] for part in tensors], 1) for name in self.names})

    def _joined_by_head(self, parts: Sequence[StoredLayer]) -> Self:
        heads = zip(*(part.heads() for part in parts), strict=True)
        return self.with_heads(
            [{name: torch.cat([part[name] for part in head]) for name in self.names} for head in heads]
        )

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values and of what restores them."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def vectors(self) -> int:
        """How many keys it has, or values, in all heads."""
        return self.keys.shape[:-1].numel()

    def loss(self, layer: LayerPrefix) -> tuple[float, float]:
        """Relative L2 error of keys and of values against the layer that was stored."""
        back = self.restored(torch.device("cpu"), torch.float32)
        return _error(back.keys, layer.keys), _error(back.values, layer.values)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        return {name: getattr(self, name) for name in self.names}

    def with_each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same of changed tensors, of the shapes that they had."""
        return self.with_tensors({name: change(tensor) for name, tensor in self.tensors().items()}, self.counts)

    def with_tensors(self, tensors: Parts, counts: tuple[int, ...] = ()) -> Self:
        """The same layer of other tensors, whose heads keep `counts` tokens if they differ."""
        return type(self)(**tensors, window=self.window, counts=counts)

    def heads(self) -> list[dict[str, Tensor]]:
        """The tensors of each head: (P, ...) of its own P, or (B, ...) of its own blocks."""
        split = [tensor.split(self.counts) if self.counts else tensor.unbind(0) for tensor in self.tensors().values()]
        return [dict(zip(self.names, head, strict=True)) for head in zip(*split, strict=True)]

    def with_heads(self, heads: Sequence[Parts]) -> Self:
        """A layer of these heads, one behind the other unless all are of one length."""
        counts = tuple(len(head["keys"]) for head in heads)
        alike = len(set(counts)) == 1
        join = torch.stack if alike else torch.cat
        return self.with_tensors(
            {name: join([head[name] for head in heads]) for name in self.names}, () if alike else counts
        )


@dataclass(frozen=True, slots=True)
class FloatLayer(StoredLayer):
    """Keys and values (K, P, D) in a float type."""

    @classmethod
    def made_of(cls, layer: LayerPrefix, dtype: StorageDtype) -> Self:
        """Rounded to the type."""
        kept = getattr(torch, dtype)
        return cls(layer.keys.to("cpu", kept), layer.values.to("cpu", kept), layer.window, layer.counts)

    def loss(self, layer: LayerPrefix) -> tuple[float, float]:
        """As of any form; none where the type is the same."""
        kept = self.keys.dtype, self.values.dtype
        return (0.0, 0.0) if kept == (layer.keys.dtype, layer.values.dtype) else StoredLayer.loss(self, layer)

    def restored(self, device: torch.device, dtype: torch.dtype) -> LayerPrefix:
        """In another float type."""
        keys, values = (half.to(device, dtype, non_blocking=half.is_pinned()) for half in (self.keys, self.values))
        return LayerPrefix(keys, values, self.window, self.counts)

    def is_sound(self, vectors: tuple[int, ...], head_size: int, dtype: StorageDtype) -> bool:
        """Whether keys and values are so many numbers of the type."""
        return all(_has(half, getattr(torch, dtype), (*vectors, head_size)) for half in (self.keys, self.values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Layer(StoredLayer):
    """Keys and values (K, P, D) in int8, with a float32 scale (K, P) for each token."""

    key_scales: Tensor
    value_scales: Tensor

    names: ClassVar[tuple[str, ...]] = ("keys", "values", "key_scales", "value_scales")

    @classmethod
    def made_of(cls, layer: LayerPrefix, dtype: StorageDtype) -> Self:
        """Each token rounded by its own scale."""
        (keys, key_scales), (values, value_scales) = quantize(layer.keys), quantize(layer.values)
        return cls(keys, values, layer.window, layer.counts, key_scales=key_scales, value_scales=value_scales)

    def restored(self, device: torch.device, dtype: torch.dtype) -> LayerPrefix:
        """Numbers times scales."""
        halves = (self.keys, self.key_scales), (self.values, self.value_scales)
        keys, values = (
            (half.to(device, non_blocking=half.is_pinned()).float() * scales.to(device).unsqueeze(-1)).to(dtype)
            for half, scales in halves
        )
        return LayerPrefix(keys, values, self.window, self.counts)

    def is_sound(self, vectors: tuple[int, ...], head_size: int, dtype: StorageDtype) -> bool:
        """Whether there are so many numbers, and a scale for each vector of them."""
        halves, scales = (self.keys, self.values), (self.key_scales, self.value_scales)
        return all(_has(half, torch.int8, (*vectors, head_size)) for half in halves) and all(
            _has(scale, torch.float32, vectors) for scale in scales
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4Layer(StoredLayer):
    """Keys and values (K, P, D / 2) as pairs of codes, keys before rotation.

    Values have ranges (K, P, groups), keys ranges (B, D) for blocks of `key_blocks` (B,) tokens each, head after head.
    """

    key_scales: Tensor
    value_scales: Tensor
    key_offsets: Tensor
    value_offsets: Tensor
    key_blocks: Tensor

    names: ClassVar[tuple[str, ...]] = (
        "keys",
        "values",
        "key_scales",
        "value_scales",
        "key_offsets",
        "value_offsets",
        "key_blocks",
    )
    of_blocks: ClassVar[tuple[str, ...]] = ("key_scales", "key_offsets", "key_blocks")
    """Those that have a row for each block."""

    @classmethod
    def made_of(cls, layer: LayerPrefix, dtype: StorageDtype) -> Self:
        """Of keys before rotation. Raises `BudgetError` for numbers that its ranges do not hold.

        Numbers are packed on the device where they are.
        """
        keys, values = (half.detach().float() for half in (layer.keys, layer.values))
        sizes = block_sizes(layer.counts or [keys.shape[1]] * len(keys)).to(keys.device)
        packed_keys, packed_values = pack_blocks(keys.flatten(0, -2), sizes), pack_groups(values)
        packed = cls(
            packed_keys.codes.view(packed_values.codes.shape),
            packed_values.codes,
            layer.window,
            layer.counts,
            key_scales=packed_keys.scales,
            value_scales=packed_values.scales,
            key_offsets=packed_keys.offsets,
            value_offsets=packed_values.offsets,
            key_blocks=sizes,
        )
        return packed.with_each(Tensor.cpu)

    def restored(self, device: torch.device, dtype: torch.dtype) -> LayerPrefix:
        """Codes times scales, and offsets; keys are not rotated yet."""
        there = {name: half.to(device, non_blocking=half.is_pinned()) for name, half in self.tensors().items()}
        packed_keys = Packed(there["keys"].flatten(0, -2), there["key_scales"], there["key_offsets"])
        values = unpack_groups(Packed(there["values"], there["value_scales"], there["value_offsets"])).to(dtype)
        keys = unpack_blocks(packed_keys, there["key_blocks"]).view(values.shape).to(dtype)
        return LayerPrefix(keys, values, self.window, self.counts)

    def tiled(self, device: torch.device, length: int, turn: tuple[Tensor, Tensor]) -> Codes:
        """The codes on a device, of a sheet of `length` positions, as kernels read them; `turn` as in `layout.tiled`.

        Not for layers with a window.
        """
        there = {name: half.to(device, non_blocking=half.is_pinned()) for name, half in self.tensors().items()}
        keys = there["keys"].flatten(0, -2), there["key_scales"], there["key_offsets"]
        values = tuple(there[name].flatten(0, -2) for name in ("values", "value_scales", "value_offsets"))
        return tiled(keys, (values[0], values[1], values[2]), self.key_blocks, self.kept, length, turn)

    @property
    def kept(self) -> tuple[int, ...]:
        """How many tokens each head has."""
        return self.counts or (self.keys.shape[1],) * len(self.keys)

    def is_sound(self, vectors: tuple[int, ...], head_size: int, dtype: StorageDtype) -> bool:
        """Whether there are so many codes, with their ranges, and no block crosses two heads."""
        blocks = self.key_blocks
        if blocks.dim() != 1 or blocks.dtype != torch.uint8 or not blocks.all():
            return False
        groups = head_size // group_size(head_size)
        fits = (
            all(_has(codes, torch.uint8, (*vectors, head_size // 2)) for codes in (self.keys, self.values))
            and all(_has(ranges, SCALE, (len(blocks), head_size)) for ranges in (self.key_scales, self.key_offsets))
            and all(_has(ranges, SCALE, (*vectors, groups)) for ranges in (self.value_scales, self.value_offsets))
        )
        # each head's end must be a block's end
        counts = self.counts or (vectors[1],) * vectors[0]
        ends = set(accumulate(blocks.tolist(), initial=0))
        return fits and max(ends) == sum(counts) and ends.issuperset(accumulate(counts))

    def _between(self, heads: Sequence[Parts], bounds: Sequence[tuple[int, int]]) -> Self:
        """As of any layer; a block that is cut keeps its ranges in both parts."""
        return self.with_heads([self._cut(head, *bound) for head, bound in zip(heads, bounds, strict=True)])

    def _cut(self, head: Parts, first: int, last: int) -> dict[str, Tensor]:
        sizes = head["key_blocks"].long()
        ends = sizes.cumsum(0)
        inside = (ends.clamp(first, last) - (ends - sizes).clamp(first, last)).to(torch.uint8)
        rows = {name: head[name][inside > 0] for name in self.of_blocks}
        return {**_cut(head, first, last), **rows, "key_blocks": inside[inside > 0]}

    def _joined(self, parts: Sequence[StoredLayer]) -> Self:
        """As of any layer; always head by head, because blocks are."""
        return self._joined_by_head(parts)

    def heads(self) -> list[dict[str, Tensor]]:
        """As of any layer; blocks are those of each head."""
        blocks, split = self._blocks(), []
        for name, tensor in self.tensors().items():
            if name in self.of_blocks:
                split.append(tensor.split(blocks))
            else:
                split.append(tensor.split(self.counts) if self.counts else tensor.unbind(0))
        return [dict(zip(self.names, head, strict=True)) for head in zip(*split, strict=True)]

    def _blocks(self) -> list[int]:
        """How many blocks each head has."""
        ends, heads = self.key_blocks.long().cumsum(0), torch.tensor([0, *accumulate(self.kept)])
        return torch.searchsorted(ends, heads, right=True).diff().tolist()

    def with_heads(self, heads: Sequence[Parts]) -> Self:
        """As of any layer; blocks always stand one behind the other."""
        counts = tuple(len(head["keys"]) for head in heads)
        alike = len(set(counts)) == 1
        tensors = {}
        for name in self.names:
            join = torch.stack if alike and name not in self.of_blocks else torch.cat
            tensors[name] = join([head[name] for head in heads])
        return self.with_tensors(tensors, () if alike else counts)


def form_of(dtype: StorageDtype) -> type[StoredLayer]:
    """The form in which a layer of a storage type lies."""
    forms: dict[str, type[StoredLayer]] = {"int8": Int8Layer, "int4": Int4Layer}
    return forms.get(dtype, FloatLayer)


class LayersOfFile(Sequence[StoredLayer]):
    """Layers that are read when they are first looked at, all of them at once, and then stay in memory. Thread-safe."""

    def __init__(self, like: Sequence[StoredLayer], read: Callable[[], list[StoredLayer]]) -> None:
        """Layers `like` these, which are without contents, that `read` gives; what it raises, every look raises."""
        self._like, self._read, self._layers = like, read, list[StoredLayer]()
        self._lock = threading.Lock()

    def read(self) -> list[StoredLayer]:
        """The layers."""
        with self._lock:
            if not self._layers:
                self._layers = self._read()
            return self._layers

    def __len__(self) -> int:
        """How many there are; nothing is read."""
        return len(self._like)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them; nothing is read."""
        return sum(layer.nbytes for layer in self._like)

    @property
    def vectors(self) -> int:
        """Keys, or values, of all of them; nothing is read."""
        return sum(layer.vectors for layer in self._like)

    @overload
    def __getitem__(self, number: int) -> StoredLayer: ...

    @overload
    def __getitem__(self, number: slice) -> list[StoredLayer]: ...

    def __getitem__(self, number: int | slice) -> StoredLayer | list[StoredLayer]:
        return self.read()[number]

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process they are no longer those of a file."""
        return list, (self.read(),)


def quantize(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """int8 (K, P, D) and the float32 scale (K, P) of each token; a token of zeros has scale 1."""
    values = tokens.detach().to("cpu", torch.float32)
    scales = values.abs().amax(-1) / 127
    scales = torch.where(scales > 0, scales, 1.0)
    return (values / scales.unsqueeze(-1)).round().to(torch.int8), scales


def _cut(head: Parts, first: int, last: int) -> dict[str, Tensor]:
    """Tokens `first` to `last` of a head."""
    return {name: tensor[first:last] for name, tensor in head.items()}


def _has(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return tensor.dtype == dtype and tuple(tensor.shape) == shape


def _error(got: Tensor, wanted: Tensor) -> float:
    wanted = wanted.detach().to("cpu", torch.float32)
    return float((got - wanted).norm() / wanted.norm().clamp(min=1e-30))
