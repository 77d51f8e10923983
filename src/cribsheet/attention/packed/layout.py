"""Codes in tiles: from how they are stored, and back to numbers as the 16-bit path has them, by plain torch.

Letters as in `kernels/codes.py`; `N` tokens of all heads one behind the other, `B` stored blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from cribsheet.attention import rope
from cribsheet.kernels.codes import TILE, Codes, order

_SIZES = (64, 128)  # of heads whose words kernels take apart


def takes(head_size: int, groups: int, freqs: Tensor) -> bool:
    """Whether kernels read such heads: all of a head turns, and no more than two ranges of a value are told apart."""
    return head_size in _SIZES and groups in (1, 2) and 2 * len(freqs) == head_size


def turns(freqs: Tensor, dtype: torch.dtype) -> Tensor:
    """`Codes.turns` of frequencies (D / 2,), for a model whose numbers are of a type."""
    slots = torch.arange(TILE, device=freqs.device)
    return torch.stack(rope.turns(slots, freqs), 1)[..., _in_words(2 * len(freqs), freqs.device)[: len(freqs)]].to(
        _kind(dtype)
    )


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
    end of `length` positions; `turn` are frequencies, and the turns of a tile's slots.
    """
    device, sizes, tokens = keys[0].device, blocks.long(), sum(counts)
    begins = sizes.cumsum(0) - sizes
    parts = -(-sizes // TILE)
    block = torch.arange(len(sizes)).repeat_interleave(parts)  # of each tile
    nth = torch.arange(len(block)) - (parts.cumsum(0) - parts)[block]
    row = begins[block] + nth * TILE
    count = (sizes[block] - nth * TILE).clamp(max=TILE)
    ends = torch.tensor([0, *accumulate(counts)])
    place = length - ends[torch.searchsorted(ends, row, right=True)] + row
    borders = torch.searchsorted(row, ends)
    before = (torch.arange(len(block)) * TILE - row).to(device)
    slot = before.repeat_interleave(count.to(device), output_size=tokens) + torch.arange(tokens, device=device)

    def in_slots(vectors: Tensor) -> Tensor:
        return vectors.new_zeros(len(block) * TILE, vectors.shape[1]).index_copy_(0, slot, vectors)

    own, (freqs, small) = block.to(device), turn
    ranges = [in_slots(each).view(len(block), TILE, -1).transpose(1, 2) for each in values[1:]]
    spans = torch.stack([borders[:-1], borders[1:]], 1)
    return Codes(
        _words(_apart(in_slots(keys[0]))),
        _in_pairs(_words(_apart(in_slots(values[0])).unflatten(0, (-1, TILE)).transpose(1, 2))),
        _key_ranges(keys[1][own].float(), keys[2][own].float(), rope.turns(place.to(device), freqs)).to(small.dtype),
        torch.cat(ranges, 1)[..., _in_words(TILE, device)],
        torch.stack([place, count, row], 1).to(device, torch.int32),
        spans.to(device, torch.int32),
        freqs,
        small,
        most=int((spans[:, 1] - spans[:, 0]).max()),
    )


def _key_ranges(scales: Tensor, offsets: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """`Codes.key_ranges` of ranges (S, D), turned by the positions of their tiles' first slots."""
    scales = 16 * scales
    (a, b), (low, high), (cos, sin) = scales.chunk(2, 1), (offsets - scales).chunk(2, 1), turn
    found = [a * cos, -b * sin, low * cos - high * sin, b * cos, a * sin, high * cos + low * sin]
    return torch.stack(found, 1)[..., _in_words(scales.shape[1], scales.device)[: scales.shape[1] // 2]]


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
    ranges = torch.empty_like(codes.key_ranges, dtype=torch.float32)
    ranges[..., _in_words(codes.head_size, codes.keys.device)[: codes.head_size // 2]] = codes.key_ranges.float()
    held = _held(codes)
    a1, a2, a0, b1, b2, b0 = (each.repeat_interleave(TILE, 0)[held] for each in ranges.unbind(1))
    a, b = _numbers(codes.keys, codes.head_size)[held].chunk(2, 1)
    slots = torch.arange(len(held), device=held.device)[held] % TILE
    return rope.rotate(torch.cat([a * a1 + b * a2 + a0, b * b1 + a * b2 + b0], 1), slots, codes.freqs).to(dtype)


def values(codes: Codes, dtype: torch.dtype) -> Tensor:
    """Values (N, D)."""
    ranges = torch.empty_like(codes.value_ranges, dtype=torch.float32)
    ranges[..., _in_words(TILE, codes.keys.device)] = codes.value_ranges.float()
    ranges = ranges.transpose(1, 2).flatten(0, 1)  # (S * TILE, 2 * G)
    scales, offsets = (x.repeat_interleave(codes.head_size // codes.groups, 1) for x in ranges.chunk(2, 1))
    words = codes.values.permute(0, 3, 1, 2, 4).flatten(3).flatten(1, 2)  # (S, D, TILE / 8)
    found = _numbers(words, TILE).sub_(1).mul_(16).transpose(1, 2).flatten(0, 1)
    return found.mul(scales).add_(offsets)[_held(codes)].to(dtype)


def _kind(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float32 else torch.float16


def _held(codes: Codes) -> Tensor:
    """(S * TILE,) whether a slot holds a token."""
    slots = torch.arange(TILE, device=codes.tiles.device)
    return (slots < codes.tiles[:, 1:2]).flatten()


def _in_words(size: int, device: torch.device) -> Tensor:
    """Channels, or slots, in the order of their quarters, words and halves: the lower ones are the first half."""
    places = order(size)
    return torch.tensor(sorted(range(size), key=lambda d: (places[d][2], places[d][0], places[d][1])), device=device)


def _apart(pairs: Tensor) -> Tensor:
    """Codes as they are stored (..., D / 2), one by one (..., D)."""
    return torch.cat([pairs & 15, pairs >> 4], -1)


def _words(codes: Tensor) -> Tensor:
    """Codes (..., n) in words (..., n / 8) int32."""
    words: Tensor = codes.new_zeros(*codes.shape[:-1], codes.shape[-1] // 8, dtype=torch.int32)
    for (half, quarter), places in _by_bits(codes.shape[-1]).items():
        words |= codes[..., places].int() << (16 * half + 4 * quarter)
    return words


def _in_pairs(words: Tensor) -> Tensor:
    """Words (S, D, TILE / 8) of channels as `Codes.values` has them."""
    apart = words.view(len(words), 2, -1, 4, words.shape[-1] // 4)
    return apart.permute(0, 2, 3, 1, 4).contiguous()


def _numbers(words: Tensor, size: int) -> Tensor:
    """What codes (..., n) of words stand for, 1 to 2."""
    found: Tensor = torch.empty(*words.shape[:-1], size, device=words.device)
    for (half, quarter), places in _by_bits(size).items():
        found[..., places] = 1 + ((words >> (16 * half + 4 * quarter)) & 15) / 16
    return found


def _by_bits(size: int) -> dict[tuple[int, int], list[int]]:
    """Places of codes that have the same bits of their words, in the order of these."""
    found: dict[tuple[int, int], list[int]] = {}
    for place, (_, half, quarter) in sorted(enumerate(order(size)), key=lambda each: each[1][0]):
        found.setdefault((half, quarter), []).append(place)
    return found
