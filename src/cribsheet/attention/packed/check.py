"""Whether a kind of head may be read in four bits: on CUDA, in half precision, if Triton is there and agrees."""

from __future__ import annotations

import torch
from torch import Tensor

from cribsheet.attention import dispatch
from cribsheet.attention.agreement import relative_error
from cribsheet.attention.backends import on_cuda
from cribsheet.attention.packed import layout
from cribsheet.attention.packed.prefix import PackedPrefix, Room
from cribsheet.attention.plain import attend_plain
from cribsheet.attention.prefix import LayerPrefix
from cribsheet.kernels.codes import Codes

_KEPT, _LENGTH = (300, 130), 5000


def usable(like: Tensor, kv_heads: int) -> bool:
    """Whether queries (B, H, T, D) of such heads are answered right from codes, as far as whoever asks can wait."""
    return on_cuda(like) and dispatch.agree(errors, *_heads(like, kv_heads))


def is_ruled_out(like: Tensor, kv_heads: int) -> bool:
    """Whether it is known that they are not."""
    return not on_cuda(like) or dispatch.disagrees(errors, *_heads(like, kv_heads))


def _heads(like: Tensor, kv_heads: int) -> tuple[torch.device, torch.dtype, int, int]:
    return like.device, like.dtype, like.shape[-1], like.shape[1] // kv_heads


def errors(device: torch.device, dtype: torch.dtype, size: int, shared_by: int) -> dict[str, float]:
    """Relative L2 errors of all that reads codes on a small random example, by case."""
    generator, found = torch.Generator().manual_seed(0), dict[str, float]()
    room = Room(sum(_KEPT), size, dtype, device)
    prefix = PackedPrefix(example(generator, size, device, dtype, _KEPT), _KEPT, dtype, room, lambda: True)
    plain, scale = LayerPrefix(prefix.keys, prefix.values, None, prefix.counts), size**-0.5
    for batch, tokens in ((1, 1), (3, 2), (1, 200)):
        q = torch.randn(batch, 2 * shared_by, tokens, size, generator=generator).to(device, dtype)
        (out, lse), (wanted, seen) = prefix.attend(q, scale), _reference(plain, q, scale)
        case = f"{tokens} rows of {batch}"
        found |= {f"output, {case}": relative_error(out, wanted), f"log-sum-exp, {case}": relative_error(lse, seen)}
        mass, looked = (each.looked_at(q, seen, _LENGTH, scale) for each in (prefix, plain))
        found[f"mass, {case}"] = relative_error(mass, looked)
    return found


def _reference(plain: LayerPrefix, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """By the formula, head by head."""
    heads = zip(q.chunk(plain.heads, 1), plain.each, strict=True)
    parts = [attend_plain(own, keys[None, None], values[None, None], scale=scale) for own, (keys, values) in heads]
    return torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 1)


def example(
    generator: torch.Generator, size: int, device: torch.device, dtype: torch.dtype, kept: tuple[int, ...]
) -> Codes:
    """Random codes of heads that keep so many tokens."""
    groups, tokens = (2 if size % 64 == 0 and size > 64 else 1), sum(kept)
    sizes = torch.tensor([min(128, count - first) for count in kept for first in range(0, count, 128)])

    def halves(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        codes = torch.randint(0, 256, (tokens, size // 2), generator=generator).to(torch.uint8)
        scales = torch.rand(rows, columns, generator=generator).add_(0.1).div_(5)
        offsets = torch.randn(rows, columns, generator=generator).sub_(1)
        return codes.to(device), scales.to(device, torch.float16), offsets.to(device, torch.float16)

    freqs = (1e4 ** (-torch.arange(0, size, 2) / size)).to(device)
    turn = freqs, layout.turns(freqs, dtype)
    return layout.tiled(halves(len(sizes), size), halves(tokens, groups), sizes, kept, _LENGTH, turn)
