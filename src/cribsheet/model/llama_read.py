"""Reading with Llama-like models by few kernels: what stands between products takes a quarter of a long read.

As `model/llama_step.py`, for many new tokens of one sequence. Of the last layer only keys, values and what the guide
looks at are made: nobody asks for what it would hand on.

Letters as in `attention/prefix.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cribsheet.attention.dispatch import relative_error
from cribsheet.attention.prefix import LayerPrefix, ReadingLayer
from cribsheet.model.backbone import Backbone, PlainParts, plain_parts
from cribsheet.model.llama_step import agrees, beside

_LEAST = 256  # tokens from which time is spent in kernels, not in launching them
_CHECKED = 40  # tokens of a small example, half of them the guide


class LeanRead:
    """A read by a model of plain `parts`, whose heads are of so many entries."""

    def __init__(self, parts: PlainParts, head_size: int, kv_heads: int, scale: float) -> None:
        self._parts, self._heads, self._scale = parts, (kv_heads, head_size), scale

    @torch.no_grad()
    def __call__(self, ids: Tensor, positions: Tensor, layers: Sequence[ReadingLayer]) -> None:
        """Read tokens (1, T) at their positions (1, T) into the layers."""
        from cribsheet.kernels.read import turned
        from cribsheet.kernels.step import normed, silu_times

        rows = F.embedding(ids[0], self._parts.embed)
        cos, sin = self._parts.turns(rows[None], positions)
        turn, more = (cos[0].contiguous(), sin[0].contiguous()), None
        for mine, layer in zip(self._parts.layers, layers, strict=True):
            rows, inner = normed(rows, *mine.before, more)
            query, key, value = turned(beside(inner, mine.qkv), turn, *self._heads, mine.heads)
            if layer is layers[-1]:
                layer.conclude(query, key, value, self._scale)
                return
            seen = layer.attend(query, *layer.update(key, value), None, self._scale)
            seen = F.linear(seen.transpose(1, 2).reshape(len(rows), -1), *mine.out)
            rows, inner = normed(rows, *mine.between, seen)
            more = F.linear(silu_times(beside(inner, (mine.gate, mine.up))), *mine.down)


def read(
    backbone: Backbone,
    prefix: Sequence[LayerPrefix],
    start: int,
    chunk: Tensor,
    guide: Tensor,
    step: Callable[[], None] | None = None,
) -> list[ReadingLayer]:
    """`Backbone.read` with few kernels where that pays and agrees."""
    long = len(chunk) + len(guide) >= _LEAST
    return backbone.read(prefix, start, chunk, guide, run=find(backbone) if long else None, step=step)


def find(backbone: Backbone) -> LeanRead | None:
    """The lean read of a model, checked at the first call; none where the model's own must be used."""
    if backbone.lean_read is None:
        backbone.lean_read = _checked(backbone) if backbone.device.type == "cuda" else False
    found: LeanRead | bool = backbone.lean_read
    return found if isinstance(found, LeanRead) else None


def made(backbone: Backbone) -> LeanRead | None:
    """The lean read of a plain model, not checked."""
    parts = plain_parts(backbone)
    return None if parts is None else LeanRead(parts, backbone.head_size, backbone.kv_heads, backbone.scale)


def _checked(backbone: Backbone) -> LeanRead | bool:
    """A lean read that agrees with the model's own, or false."""
    found = made(backbone)
    return found if found and agrees(backbone, "read", lambda: errors(backbone, found)) else False


def errors(backbone: Backbone, lean: LeanRead) -> dict[str, float]:
    """Relative L2 errors of all that a lean read leaves in the layers, on a small random example, by kind."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, backbone.config.vocab_size, (_CHECKED,), generator=generator)
    shape = backbone.kv_heads, 24, backbone.head_size
    keys, values = (torch.randn(shape, generator=generator).to(backbone.device, backbone.dtype) for _ in "kv")
    prefix = [LayerPrefix(keys, values)] * backbone.num_layers
    chunk, guide = ids.split(_CHECKED // 2)
    pairs = list(zip(*(backbone.read(prefix, 24, chunk, guide, run=run) for run in (lean, None)), strict=True))
    names = "chunk_keys", "chunk_values", "guide_queries", "guide_lse"
    return {name: max(relative_error(getattr(one, name), getattr(two, name)) for one, two in pairs) for name in names}
