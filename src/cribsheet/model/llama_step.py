"""A decoding step of Llama-like models with a quarter of the kernels: products take along what stands around them.

It reads the weights where the model has them (`model/llama_weights.py`) and runs none of its modules but that of the
rotations. A model is taken only if all its parts are the plain ones, and steps on small examples give what the model's
own give; for all others, and without Triton, the model's own step stays.

Letters as in `attention/slots.py`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cribsheet.attention.agreement import finding_out, is_in_a_hurry, relative_error
from cribsheet.attention.prefix import LayerPrefix
from cribsheet.attention.slots import Rows, SlotLayer, step_cache
from cribsheet.model.backbone import Backbone
from cribsheet.model.llama_weights import Linear, LlamaLayer, LlamaWeights, beside, is_fast

Products = Callable[[Tensor, Sequence[Linear]], Tensor]

_MOST_OWN = 32  # rows up to which our own products are used: measured to be faster at 1 and at 32
_CHECKED = (1, 3, _MOST_OWN, _MOST_OWN + 1)  # rows of the steps that are compared with the model's own: every kernel

_steps: weakref.WeakKeyDictionary[Backbone, LlamaStep | None] = weakref.WeakKeyDictionary()


class LlamaStep:
    """One step with the weights of a Llama-like model; `own` are the most rows of a batch that our products take.

    More go through `products`: of the same rows with several weights, side by side.
    """

    def __init__(self, weights: LlamaWeights, *, own: int = _MOST_OWN, products: Products = beside) -> None:
        self.weights, self._own, self._products = weights, own, products

    @torch.no_grad()
    def __call__(self, ids: Tensor, positions: Tensor, layers: Sequence[SlotLayer]) -> Tensor:
        """Logits (B, V) after one more token (B,) of each sequence, at its position (B,)."""
        rows = F.embedding(ids, self.weights.embed)
        cos, sin = self.weights.turns(rows[:, None], positions[:, None])
        turn = cos.reshape(len(ids), -1).contiguous(), sin.reshape(len(ids), -1).contiguous()
        run = self._by_own_products if len(ids) <= self._own else self._by_torch
        return run(rows, turn, layers)

    def _by_own_products(self, rows: Tensor, turn: tuple[Tensor, Tensor], layers: Sequence[SlotLayer]) -> Tensor:
        """Norms, gates and sums are part of the products."""
        from cribsheet.kernels.step import gated, normed, product

        for mine, layer in zip(self.weights.layers, layers, strict=True):
            qkv = product(rows, mine.qkv, norm=mine.before)
            seen = self._attend(qkv, turn, layer, mine)
            rows = product(seen, [mine.out], residual=rows)
            inner = gated(rows, mine.gate[0], mine.up[0], norm=mine.between)
            rows = product(inner, [mine.down], residual=rows)
        if len(rows) == 1:
            return product(rows, [(self.weights.lm_head, None)], norm=self.weights.norm)
        return F.linear(normed(rows, *self.weights.norm)[1], self.weights.lm_head)  # read at 3.9 TB/s on an H200

    def _by_torch(self, rows: Tensor, turn: tuple[Tensor, Tensor], layers: Sequence[SlotLayer]) -> Tensor:
        """Products of many rows by the library that PyTorch brings, with our own kernels between them."""
        from cribsheet.kernels.step import normed, silu_times

        more: Tensor | None = None
        for mine, layer in zip(self.weights.layers, layers, strict=True):
            rows, inner = normed(rows, *mine.before, more)
            qkv = self._products(inner, mine.qkv)
            seen = self._attend(qkv, turn, layer, mine)
            rows, inner = normed(rows, *mine.between, F.linear(seen, *mine.out))
            inner = silu_times(self._products(inner, (mine.gate, mine.up)))
            more = F.linear(inner, *mine.down)
        return F.linear(normed(rows, *self.weights.norm, more)[1], self.weights.lm_head)

    def _attend(self, qkv: Tensor, turn: tuple[Tensor, Tensor], layer: SlotLayer, mine: LlamaLayer) -> Tensor:
        """Append keys and values to the suffix, and attend: (B, H * D)."""
        from cribsheet.kernels import step_attention
        from cribsheet.kernels.rotation import placed

        q = placed(qkv, turn, layer.rows.index, layer.keys, layer.values, mine.qk_norms)
        suffix = layer.keys, layer.values, layer.rows.index
        found, lse = step_attention.attend(q, layer.prefix.whole, suffix, self.weights.scale)
        if layer.watch is not None:
            layer.watch(layer, q, lse, self.weights.scale, None)
        return found.reshape(len(qkv), -1)


def find(backbone: Backbone) -> LlamaStep | None:
    """The step of a model, checked at the first call; none where the model's own must be used, or is for a hurry."""
    if backbone not in _steps and not is_in_a_hurry():
        with finding_out:
            if backbone not in _steps:
                _steps[backbone] = _checked(backbone) if backbone.device.type == "cuda" else None
    return _steps.get(backbone)


def use(backbone: Backbone, step: LlamaStep | None) -> None:
    """Let a model take this step, or none but its own, whatever a check would say."""
    _steps[backbone] = step


def forget(backbone: Backbone) -> None:
    """Check again at the next call."""
    _steps.pop(backbone, None)


def unchecked(backbone: Backbone, *, own: int = _MOST_OWN) -> LlamaStep | None:
    """The step of a plain model, not checked."""
    weights = backbone.plain_weights()
    return None if weights is None else LlamaStep(weights, own=own)


def _checked(backbone: Backbone) -> LlamaStep | None:
    """A step that agrees with the model's own."""
    step = unchecked(backbone)
    if step is None:
        return None
    path = f"steps of few kernels for {backbone.name}"
    return step if is_fast(step.weights, path, lambda: errors(backbone, step, _CHECKED)) else None


def errors(backbone: Backbone, step: LlamaStep, sizes: Iterable[int] = (1, 3)) -> dict[str, float]:
    """Relative L2 errors of the logits of a step on small random examples, by batch size."""
    return {f"{size} answers": _error(backbone, step, size) for size in sizes}


def _error(backbone: Backbone, step: LlamaStep, size: int) -> float:
    """That of a batch, over a prefix of a few random tokens; what is in the suffix by then must be equal, too."""
    outcomes, generator = [], torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(backbone.device, backbone.dtype)

    heads, entries, tokens = backbone.kv_heads, backbone.head_size, 24
    prefix = [
        LayerPrefix(random(heads, tokens, entries), random(heads, tokens, entries)) for _ in range(backbone.num_layers)
    ]
    ids = torch.randint(0, backbone.config.vocab_size, (size,), generator=generator).to(backbone.device)
    lengths = torch.arange(5, 5 + size, device=backbone.device)
    suffix = [(random(size, heads, 64, entries), random(size, heads, 64, entries)) for _ in prefix]
    runs: list[Callable[[list[SlotLayer]], Tensor]] = [
        lambda layers: step(ids, lengths + tokens, layers),
        lambda layers: backbone.step(ids[:, None], (lengths + tokens)[:, None], step_cache(layers))[:, -1],
    ]
    for run in runs:
        rows = Rows()
        rows.fix(lengths, 64)
        layers = [SlotLayer(layer, tokens, rows) for layer in prefix]
        for layer, (keys, values) in zip(layers, suffix, strict=True):
            layer.keys, layer.values = keys.clone(), values.clone()
        logits = run(layers).float()
        outcomes.append(
            [logits, *(torch.stack([layer.keys[:, :, 5:], layer.values[:, :, 5:]]).float() for layer in layers)]
        )
    pairs = zip(*outcomes, strict=True)
    return max(relative_error(got, wanted) for got, wanted in pairs)
