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

from cribsheet.attention.agreement import relative_error
from cribsheet.attention.cache import ReadingLayer
from cribsheet.attention.prefix import AttentionInputs, LayerPrefix
from cribsheet.model.llama_weights import LlamaWeights, beside, is_fast

_BEFORE, _CHECKED = 24, 40  # tokens of a small example: of the prefix, and read, half of them the guide


class LlamaRead:
    """A read with the weights of a Llama-like model."""

    def __init__(self, weights: LlamaWeights) -> None:
        self.weights = weights

    @torch.no_grad()
    def __call__(self, ids: Tensor, positions: Tensor, layers: Sequence[ReadingLayer]) -> None:
        """Read tokens (1, T) at their positions (1, T) into the layers."""
        from cribsheet.kernels.rotation import turned
        from cribsheet.kernels.step import normed, silu_times

        weights = self.weights
        rows = F.embedding(ids[0], weights.embed)
        cos, sin = weights.turns(rows[None], positions)
        turn, more = (cos[0].contiguous(), sin[0].contiguous()), None
        for mine, layer in zip(weights.layers, layers, strict=True):
            rows, inner = normed(rows, *mine.before, more)
            qkv = beside(inner, mine.qkv)
            query, key, value = turned(qkv, turn, weights.kv_heads, weights.head_size, mine.qk_norms)
            if layer is layers[-1]:
                layer.conclude(query, key, value, weights.scale)
                return
            seen = layer.attend(AttentionInputs(query, *layer.update(key, value), None, weights.scale))
            seen = F.linear(seen.transpose(1, 2).reshape(len(rows), -1), *mine.out)
            rows, inner = normed(rows, *mine.between, seen)
            more = F.linear(silu_times(beside(inner, (mine.gate, mine.up))), *mine.down)


Read = Callable[[Tensor, Tensor, Sequence[ReadingLayer]], None]  # tokens (1, T) at positions (1, T) into layers


def fast_read(weights: LlamaWeights, name: str, own: Read) -> LlamaRead | None:
    """A read of few kernels that agrees with the model's `own`; none where it does not, or cannot be run."""
    read = LlamaRead(weights)
    return read if is_fast(weights, f"reads of few kernels for {name}", lambda: errors(read, own)) else None


def errors(read: LlamaRead, own: Read) -> dict[str, float]:
    """Relative L2 errors of all that a read leaves in the layers, on a small random example, by kind."""
    weights, generator = read.weights, torch.Generator().manual_seed(0)
    embed = weights.embed
    ids = torch.randint(0, len(embed), (1, _CHECKED), generator=generator).to(embed.device)
    shape = weights.kv_heads, _BEFORE, weights.head_size
    keys, values = (torch.randn(shape, generator=generator).to(embed.device, embed.dtype) for _ in "kv")
    positions = torch.arange(_BEFORE, _BEFORE + _CHECKED, device=embed.device).unsqueeze(0)
    outcomes = []
    for run in (read, own):
        layers = [ReadingLayer(LayerPrefix(keys, values), _BEFORE, _CHECKED // 2) for _ in weights.layers]
        run(ids, positions, layers)
        outcomes.append(layers)
    pairs = list(zip(*outcomes, strict=True))
    names = "chunk_keys", "chunk_values", "guide_queries", "guide_lse"
    return {name: max(relative_error(getattr(one, name), getattr(two, name)) for one, two in pairs) for name in names}
