"""Four bits a number: keys with a range for each channel over a block of tokens, values for a group of channels.

A key's channels differ far more from each other than from token to token, so a range of their own costs them half the
error of a range for each token (KIVI, arXiv 2402.02750); of values it is the other way round. Keys are packed before
rotation, which would mix two channels. A number is `code * scale + offset`, codes 0 to 15; a byte holds that of channel
d in its lower half and that of channel d + D / 2 in its upper one.

Letters: `N` tokens of all heads one behind the other, `D` head size, `B` blocks, none of which crosses two heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cribsheet.errors import BudgetError

BLOCK = 128  # tokens of a head that share their channels' ranges
GROUP = 64  # channels of a value that share a range
SCALE = torch.float16
_MOST = 15
_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Packed:
    """Numbers as `codes` (N, D / 2), and their ranges (B, D) or (N, groups) in `SCALE`."""

    codes: Tensor
    scales: Tensor
    offsets: Tensor


def block_sizes(tokens: Sequence[int], block: int = BLOCK) -> Tensor:
    """(B,) uint8, tokens in each block of heads that keep so many."""
    sizes = [min(block, count - first) for count in tokens for first in range(0, count, block)]
    return torch.tensor(sizes, dtype=torch.uint8)


def pack_blocks(numbers: Tensor, sizes: Tensor, scale: torch.dtype = SCALE) -> Packed:
    """Numbers (N, D) with a range for each channel of a block."""
    block = _block_of(sizes)
    least, most = (_extreme(numbers, block, len(sizes), way) for way in ("amin", "amax"))
    scales, offsets = _ranges(least, most, scale)
    return Packed(_paired(_codes(numbers, scales[block], offsets[block])), scales, offsets)


def unpack_blocks(packed: Packed, sizes: Tensor) -> Tensor:
    """Numbers (N, D) in float32."""
    numbers = _unpaired(packed.codes)
    ends = [0, *sizes.long().cumsum(0).tolist()]
    for first in range(0, len(sizes), _AT_ONCE):  # so many that their ranges, once for each token, stay in the cache
        last = min(first + _AT_ONCE, len(sizes))
        block = _block_of(sizes[first:last])
        scales, offsets = (ranges[first:last].float()[block] for ranges in (packed.scales, packed.offsets))
        numbers[ends[first] : ends[last]].mul_(scales).add_(offsets)
    return numbers


def pack_groups(numbers: Tensor, group: int = GROUP, scale: torch.dtype = SCALE) -> Packed:
    """Numbers (N, D) with a range for each group of a token's channels."""
    apart = numbers.unflatten(-1, (-1, group_size(numbers.shape[-1], group)))
    scales, offsets = _ranges(apart.amin(-1), apart.amax(-1), scale)
    codes = _codes(apart, scales.unsqueeze(-1), offsets.unsqueeze(-1))
    return Packed(_paired(codes.flatten(-2)), scales, offsets)


def unpack_groups(packed: Packed) -> Tensor:
    """Numbers (N, D) in float32."""
    numbers = _unpaired(packed.codes)
    apart = numbers.unflatten(-1, (packed.scales.shape[-1], -1))
    apart.mul_(packed.scales.float().unsqueeze(-1)).add_(packed.offsets.float().unsqueeze(-1))
    return numbers


def group_size(head_size: int, group: int = GROUP) -> int:
    """Channels that share a range: all of a head whose size is no multiple of a group."""
    return group if head_size % group == 0 else head_size


def packed_bytes(vectors: int, heads: int, head_size: int) -> int:
    """Bytes of so many keys and values in some heads; half of each head's last block is counted."""
    blocks = vectors / BLOCK + heads / 2
    ranges = 2 * SCALE.itemsize * head_size // group_size(head_size)
    return vectors * (head_size + ranges) + round(blocks * (2 * SCALE.itemsize * head_size + 1))


def _block_of(sizes: Tensor) -> Tensor:
    """(N,) the block of each token."""
    return torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes.long())


def _extreme(numbers: Tensor, block: Tensor, blocks: int, way: str) -> Tensor:
    place = block.unsqueeze(-1).expand_as(numbers)
    return numbers.new_zeros(blocks, numbers.shape[-1]).scatter_reduce(0, place, numbers, way, include_self=False)


def _ranges(least: Tensor, most: Tensor, kept: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales and offsets; a scale covers what rounding its offset lost."""
    offsets = least.to(kept)
    scales = ((most - offsets.float()) / _MOST).clamp(min=0).to(kept)
    if not (scales.isfinite().all() and offsets.isfinite().all()):
        raise BudgetError(f"Keys or values beyond {torch.finfo(kept).max:g} do not fit int4; store them in bfloat16.")
    return scales, offsets


def _codes(numbers: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
    """A range of nothing has codes of 0."""
    steps = (numbers - offsets.float()) / torch.where(scales > 0, scales.float(), 1.0)
    return steps.round().clamp(0, _MOST).to(torch.uint8)


def _paired(codes: Tensor) -> Tensor:
    lower, upper = codes.chunk(2, -1)
    return lower | upper << 4


def _unpaired(pairs: Tensor) -> Tensor:
    return torch.cat([pairs & _MOST, pairs >> 4], -1).float()
