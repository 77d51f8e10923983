"""Move rotated keys to other positions.

A rotary key at position p is the unrotated key turned by the angles `p * inv_freq`; turning it back by the same
angles recovers it whatever the position, so a kept key can be given a new, compact position. Scaled variants
(linear, llama3, yarn) only change `inv_freq` or multiply keys by a constant, and turning commutes with both.
Angles and turns are computed in float32 (RoFormer, arXiv 2104.09864; half-split layout as in transformers' Llama).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def rotate(keys: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Turn keys (..., S, D) by `positions` (..., S) tokens; negative positions turn back. Returns float32.

    `inv_freq` is (R/2,) radians per token; the first R of D dimensions turn, the rest (partial rotary) stay.
    """
    return turned(keys, turns(positions, inv_freq))


def turns(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (..., S, R/2) of the angles at `positions` (..., S), to be used for many keys."""
    angles = positions.unsqueeze(-1).float() * inv_freq.float()
    return angles.cos(), angles.sin()


def turned(keys: Tensor, by: tuple[Tensor, Tensor]) -> Tensor:
    """Turn keys (..., S, D) by cosines and sines (..., S, R/2). Returns float32."""
    (cos, sin), keys = by, keys.float()
    half = cos.shape[-1]
    first, second, rest = keys[..., :half], keys[..., half : 2 * half], keys[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


class OfAlike(Generic[T]):
    """What is made of a layer's `inv_freq`, once for those that turn alike: they share their frequencies."""

    def __init__(self, inv_freqs: Sequence[Tensor], make: Callable[[Tensor], T]) -> None:
        self._inv_freqs, self._make = inv_freqs, make
        self._made: dict[tuple[int, int], T] = {}

    def of(self, layer: int) -> T:
        """That of a layer."""
        inv_freq = self._inv_freqs[layer]
        alike = inv_freq.data_ptr(), len(inv_freq)
        if alike not in self._made:
            self._made[alike] = self._make(inv_freq)
        return self._made[alike]


def move(keys: Tensor, old: Tensor, new: Tensor, inv_freq: Tensor) -> Tensor:
    """Keys (..., S, D) rotated for positions `old` (..., S), as if they had been rotated for `new`. Float32."""
    return rotate(keys, new - old, inv_freq)
