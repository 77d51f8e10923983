"""Reading with Llama-like models by few kernels.

What stands between products takes a quarter of a long read, and launching it most of a short one.
As `model/llama_step.py`, for many new tokens. Where a chunk is read, of the last layer only keys, values and what the
guide looks at are made: nobody asks for what it would hand on.

Letters as in `attention/prefix.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from cribsheet.attention.agreement import relative_error
from cribsheet.attention.cache import PrefixLayer, ReadingLayer, prefix_cache
from cribsheet.attention.prefix import AttentionInputs
from cribsheet.model.example import Read, read_by, text_ids
from cribsheet.model.llama_weights import LlamaLayer, LlamaWeights, beside, is_fast

_BEFORE, _CHECKED = 24, 40  # tokens of the text that is compared on: of the prefix, and read, half of them the guide


class LlamaRead:
    """A read with the weights of a Llama-like model."""

    def __init__(self, weights: LlamaWeights) -> None:
        self.weights = weights

    @torch.no_grad()
    def __call__(self, ids: Tensor, positions: Tensor, layers: Sequence[ReadingLayer]) -> None:
        """Read tokens (1, T) at their positions (1, T) into the layers."""
        passing = _Passing(self.weights, ids, positions)
        for mine, layer in zip(self.weights.layers[:-1], layers, strict=False):
            passing.through(mine, layer)
        layers[-1].conclude(*passing.asked(self.weights.layers[-1]), self.weights.scale)

    @torch.no_grad()
    def logits(
        self, ids: Tensor, positions: Tensor, layers: Sequence[PrefixLayer], keep: Tensor | None = None
    ) -> Tensor:
        """Logits (B, V) after new tokens (B, T) at their positions (B, T): of the last, or of place `keep` (1,)."""
        passing = _Passing(self.weights, ids, positions)
        for mine, layer in zip(self.weights.layers, layers, strict=True):
            passing.through(mine, layer)
        return F.linear(passing.last(keep), self.weights.lm_head)


class _Passing:
    """New tokens on their way through the layers: rows (B * T, hidden), and what is to be added to them."""

    def __init__(self, weights: LlamaWeights, ids: Tensor, positions: Tensor) -> None:
        self._weights, self._batch = weights, len(ids)
        self._rows = F.embedding(ids.flatten(), weights.embed)
        self._more: Tensor | None = None
        cos, sin = weights.turns(self._rows[None], positions)
        self._turn = cos.flatten(0, 1).contiguous(), sin.flatten(0, 1).contiguous()

    def asked(self, mine: LlamaLayer) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (B, H, T, D), rotated keys (B, K, T, D) and values of a layer."""
        from cribsheet.kernels.rotation import turned
        from cribsheet.kernels.step import normed

        self._rows, inner = normed(self._rows, *mine.before, self._more)
        qkv = beside(inner, mine.qkv)
        each = turned(qkv, self._turn, self._weights.kv_heads, self._weights.head_size, mine.qk_norms)
        if self._batch == 1:
            return each
        q, keys, values = (part[0].unflatten(1, (self._batch, -1)).transpose(0, 1) for part in each)
        return q, keys, values

    def through(self, mine: LlamaLayer, layer: PrefixLayer) -> None:
        """Through one layer."""
        from cribsheet.kernels.step import normed, silu_times

        query, key, value = self.asked(mine)
        seen = layer.attend(AttentionInputs(query, *layer.update(key, value), None, self._weights.scale))
        seen = F.linear(seen.transpose(1, 2).reshape(len(self._rows), -1), *mine.out)
        self._rows, inner = normed(self._rows, *mine.between, seen)
        self._more = F.linear(silu_times(beside(inner, (mine.gate, mine.up))), *mine.down)

    def last(self, keep: Tensor | None) -> Tensor:
        """Normalised rows (B, hidden) of the last tokens, or of those at place `keep` (1,)."""
        from cribsheet.kernels.step import normed

        assert self._more is not None
        both = (part.unflatten(0, (self._batch, -1)) for part in (self._rows, self._more))
        rows, more = (part[:, -1] if keep is None else part.index_select(1, keep)[:, 0] for part in both)
        return normed(rows.contiguous(), *self._weights.norm, more.contiguous())[1]


Step = Callable[[Tensor, Tensor, Cache], Tensor]  # tokens (B, T) at positions (B, T) over a cache: logits (B, 1, V)


def fast_read(weights: LlamaWeights, name: str, own: Read, step: Step, tokenizer: Any) -> LlamaRead | None:
    """A read of few kernels that agrees with the model's `own`, and its logits with those of a `step`, on some text.

    None where it does not, or cannot be run.
    """
    read, path = LlamaRead(weights), f"reads of few kernels for {name}"
    return read if is_fast(weights, path, lambda: errors(read, own, step, tokenizer)) else None


def errors(read: LlamaRead, own: Read, step: Step, tokenizer: Any) -> dict[str, float]:
    """Relative L2 errors of all that a read leaves in the layers and of logits, on a few sentences, by kind."""
    weights, embed = read.weights, read.weights.embed
    text = text_ids(tokenizer, _BEFORE + _CHECKED).to(embed.device)
    ids = text[_BEFORE:].unsqueeze(0)
    none = embed.new_empty(weights.kv_heads, 0, weights.head_size)
    prefix = read_by(own, text[:_BEFORE], len(weights.layers), none)
    positions = torch.arange(_BEFORE, _BEFORE + _CHECKED, device=embed.device).unsqueeze(0)
    outcomes = []
    for run in (read, own):
        layers = [ReadingLayer(layer, _BEFORE, _CHECKED // 2) for layer in prefix]
        run(ids, positions, layers)
        outcomes.append(layers)
    pairs = list(zip(*outcomes, strict=True))
    names = "chunk_keys", "chunk_values", "guide_queries", "guide_lse"
    found = {name: max(relative_error(getattr(one, name), getattr(two, name)) for one, two in pairs) for name in names}
    both, places = ids.view(2, -1), positions[:, : _CHECKED // 2].expand(2, -1)
    caches = [prefix_cache(prefix, _BEFORE) for _ in "12"]
    logits = read.logits(both, places, caches[0].layers)
    return found | {"logits": relative_error(logits, step(both, places, caches[1])[:, -1])}
