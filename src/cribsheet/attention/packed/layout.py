"""Codes in tiles: from how they are stored, and back to numbers as the 16-bit path has them, by plain torch.

Letters as in `kernels/codes.py`; `N` tokens of all heads one behind the other, `B` stored blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from cribsheet.attention.rope import rotate
from cribsheet.kernels.codes import TILE, Codes


def takes(head_size: int, groups: int, freqs: Tensor) -> bool:
    """Whether heads are such that codes of a byte are rotated together and share no more than two values' ranges."""
    return head_size % 16 == 0 and groups in (1, 2) and 2 * len(freqs) == head_size


def turns(freqs: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """`Codes.turns` of frequencies (D / 2,), for so many positions, for a model whose numbers are of a type."""
    places = torch.arange(length + TILE, device=freqs.device)
    angles = places.unsqueeze(-1).float() * freqs.float()
    kind = torch.float32 if dtype == torch.float32 else torch.float16
    return torch.stack([angles.cos(), angles.sin()], 1).to(kind)


def tiled(
    keys: tuple[Tensor, Tensor, Tensor],
    values: tuple[Tensor, Tensor, Tensor],
    blocks: Tensor,
    counts: Sequence[int],
    length: int,
    turn: tuple[Tensor, Tensor],
) -> Codes:
    """Codes (N, D / 2), scales and offsets of keys (B, D), before rotation, and of values (N, G).

    `blocks` (B,) are the sizes of blocks, on the CPU, `counts` the tokens of each head, whose last one stands at the
    end of `length` positions; `turn` are frequencies, and the turns of the first positions.
    """
    device, sizes = keys[0].device, blocks.long()
    begins = sizes.cumsum(0) - sizes
    parts = -(-sizes // TILE)
    block = torch.arange(len(sizes)).repeat_interleave(parts)  # of each tile
    nth = torch.arange(len(block)) - (parts.cumsum(0) - parts)[block]
    row = begins[block] + nth * TILE
    count = (sizes[block] - nth * TILE).clamp(max=TILE)
    ends = torch.tensor([0, *accumulate(counts)])
    head = torch.searchsorted(ends, row, right=True) - 1
    place = length - ends[head + 1] + row
    borders = torch.searchsorted(row, ends)
    slot = (torch.arange(len(block)) * TILE - row).to(device).repeat_interleave(
        count.to(device), output_size=sum(counts)
    ) + torch.arange(sum(counts), device=device)

    def in_slots(vectors: Tensor) -> Tensor:
        return vectors.new_zeros(len(block) * TILE, vectors.shape[1]).index_copy_(0, slot, vectors)

    last = torch.isin(torch.arange(len(block)), borders[1:] - 1)
    ranges = [in_slots(each).view(len(block), TILE, -1).transpose(1, 2) for each in values[1:]]
    spans = torch.stack([borders[:-1], borders[1:]], 1)
    return Codes(
        in_slots(keys[0]),
        in_slots(values[0]),
        torch.stack([each[block.to(device)] for each in keys[1:]], 1),
        torch.cat(ranges, 1).contiguous(),
        torch.stack([place, count, row], 1).to(device, torch.int32),
        spans.to(device, torch.int32),
        *turn,
        most=int((spans[:, 1] - spans[:, 0]).max()),
        even=bool((last | (count == TILE)).all()),
    )


def shorter(codes: Codes, tokens: int) -> Codes:
    """Without the last tokens of every head, which has as many; keys, values and ranges are shared."""
    tiles, spans = codes.tiles.cpu().clone(), codes.spans.cpu().clone()
    for first, last in spans.tolist():
        ends = tiles[first:last, 1].cumsum(0)
        left = (ends[-1:] - tokens).clamp(min=0)
        tiles[first:last, 1] = ends.minimum(left).diff(prepend=ends.new_zeros(1))
    spans[:, 1] = torch.stack([first + (tiles[first:last, 1] > 0).sum() for first, last in spans.tolist()])
    tiles[:, 2] = tiles[:, 1].cumsum(0) - tiles[:, 1]
    most = int((spans[:, 1] - spans[:, 0]).max())
    return replace(codes, tiles=tiles.to(codes.tiles), spans=spans.to(codes.spans), most=most)


def keys(codes: Codes, dtype: torch.dtype) -> Tensor:
    """Rotated keys (N, D) of all heads, one behind the other."""
    scales, offsets = (x.repeat_interleave(TILE, 0) for x in codes.key_ranges.unbind(1))
    place = (codes.tiles[:, :1] + torch.arange(TILE, device=codes.tiles.device)).flatten()
    held = _held(codes)
    numbers = _unpaired(codes.keys)[held].mul_(scales.float()[held]).add_(offsets.float()[held])
    return rotate(numbers, place[held], codes.freqs).to(dtype)


def values(codes: Codes, dtype: torch.dtype) -> Tensor:
    """Values (N, D)."""
    ranges = codes.value_ranges.transpose(1, 2).flatten(0, 1).float()  # (S * TILE, 2 * G)
    scales, offsets = (x.repeat_interleave(codes.head_size // codes.groups, 1) for x in ranges.chunk(2, 1))
    return _unpaired(codes.values).mul_(scales).add_(offsets)[_held(codes)].to(dtype)


def _held(codes: Codes) -> Tensor:
    """(S * TILE,) whether a slot holds a token."""
    slots = torch.arange(TILE, device=codes.tiles.device)
    return (slots < codes.tiles[:, 1:2]).flatten()


def _unpaired(pairs: Tensor) -> Tensor:
    return torch.cat([pairs & 15, pairs >> 4], -1).float()
