"""Move rotated keys to other positions.

A rotary key at position p is the unrotated key turned by the angles `p * inv_freq`; turning it back by the same
angles recovers it whatever the position, so a kept key can be given a new, compact position. Scaled variants
(linear, llama3, yarn) only change `inv_freq` or multiply keys by a constant, and turning commutes with both.
Angles and turns are computed in float32 (RoFormer, arXiv 2104.09864; half-split layout as in transformers' Llama).
"""

from __future__ import annotations

import torch
from torch import Tensor


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


def move(keys: Tensor, old: Tensor, new: Tensor, inv_freq: Tensor) -> Tensor:
    """Keys (..., S, D) rotated for positions `old` (..., S), as if they had been rotated for `new`. Float32."""
    return rotate(keys, new - old, inv_freq)
