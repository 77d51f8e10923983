"""A decoding step of Llama-like models with a quarter of the kernels: products take along what stands around them.

It reads the weights where the model has them and runs none of its modules. A model is taken only if all its parts are
the plain ones that we know, nobody hooks into them, and a step on a small example gives what the model's own gives;
for all others, and wherever Triton is missing, the model's own step stays.

Letters as in `batch.py`.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cribsheet import fused
from cribsheet.backbone import Backbone
from cribsheet.batch import Rows, SlotLayer, step_cache
from cribsheet.flash import on_cuda
from cribsheet.prefix import LayerPrefix

logger = logging.getLogger(__name__)

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_BOUND = 0.1  # relative L2 error of logits: one norm or one factor that we do not know of would be several times that
_MOST_OWN = 16  # rows up to which our own products are used

_LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.act_fn")
_NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
_PARTS = {"", "self_attn", "mlp", *_LINEAR, *_MLP, *_NORMS}  # modules of a layer

Norm = tuple[Tensor, float]


@dataclass(frozen=True)
class _Layer:
    """The weights of one layer; biases may be missing."""

    before: Norm
    qkv: tuple[nn.Linear, nn.Linear, nn.Linear]
    out: nn.Linear
    between: Norm
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    heads: tuple[Tensor, Tensor, float] | None  # gains of queries and keys


class LeanStep:
    """One step of one model.

    `own` are the most rows of a batch that our own products take; `parted` is whether prefix and suffix are attended
    to by one kernel of ours.
    """

    def __init__(self, backbone: Backbone, *, own: int = _MOST_OWN, parted: bool = False) -> None:
        base = backbone.model.base_model
        self._embed: nn.Embedding = base.embed_tokens
        self._rotary: Any = base.rotary_emb
        self._layers = [_layer(each) for each in base.layers]
        self._norm = _norm(base.norm)
        self._head: nn.Linear = backbone.model.lm_head
        self._scale, self._own, self._parted = backbone.scale, own, parted

    @torch.no_grad()
    def __call__(self, ids: Tensor, positions: Tensor, layers: Sequence[SlotLayer]) -> Tensor:
        """Logits (B, V) after one more token (B,) of each sequence, at its position (B,)."""
        rows = F.embedding(ids, self._embed.weight)
        cos, sin = self._rotary(rows[:, None], positions[:, None])
        turn = cos.reshape(len(ids), -1).contiguous(), sin.reshape(len(ids), -1).contiguous()
        run = self._by_own_products if len(ids) <= self._own else self._by_torch
        return run(rows, turn, layers)

    def _by_own_products(self, rows: Tensor, turn: tuple[Tensor, Tensor], layers: Sequence[SlotLayer]) -> Tensor:
        """Norms, gates and sums are part of the products."""
        from cribsheet.step_kernels import gated, product

        for mine, layer in zip(self._layers, layers, strict=True):
            weights, biases = [each.weight for each in mine.qkv], [each.bias for each in mine.qkv]
            qkv = product(rows, weights, biases, norm=mine.before)
            seen = self._attend(qkv, turn, layer, mine)
            rows = product(seen, [mine.out.weight], [mine.out.bias], residual=rows)
            inner = gated(rows, mine.gate.weight, mine.up.weight, norm=mine.between)
            rows = product(inner, [mine.down.weight], [mine.down.bias], residual=rows)
        return product(rows, [self._head.weight], norm=self._norm)

    def _by_torch(self, rows: Tensor, turn: tuple[Tensor, Tensor], layers: Sequence[SlotLayer]) -> Tensor:
        """Products of many rows by the library that PyTorch brings, with our own kernels between them."""
        from cribsheet.step_kernels import normed, silu_times

        more: Tensor | None = None
        for mine, layer in zip(self._layers, layers, strict=True):
            rows, inner = normed(rows, *mine.before, more)
            qkv = self._beside(inner, mine.qkv)
            seen = self._attend(qkv, turn, layer, mine)
            rows, inner = normed(rows, *mine.between, F.linear(seen, mine.out.weight, mine.out.bias))
            inner = silu_times(self._beside(inner, (mine.gate, mine.up)))
            more = F.linear(inner, mine.down.weight, mine.down.bias)
        return F.linear(normed(rows, *self._norm, more)[1], self._head.weight)

    def _beside(self, rows: Tensor, parts: Sequence[nn.Linear]) -> Tensor:
        """Products (M, N1 + N2 + ...) of the same rows."""
        widths = [len(part.weight) for part in parts]
        out = rows.new_empty(len(rows), sum(widths))
        for part, mine in zip(parts, out.split(widths, 1), strict=True):
            bias: Tensor | None = part.bias
            if bias is None:
                torch.mm(rows, part.weight.t(), out=mine)
            else:
                torch.addmm(bias, rows, part.weight.t(), out=mine)
        return out

    def _attend(self, qkv: Tensor, turn: tuple[Tensor, Tensor], layer: SlotLayer, mine: _Layer) -> Tensor:
        """Append keys and values to the suffix, and attend: (B, H * D)."""
        from cribsheet import step_attention
        from cribsheet.step_kernels import placed, starting

        q = placed(qkv, turn, layer.rows.index, layer.keys, layer.values, mine.heads)
        if not self._parted:
            return layer.attend(q, layer.keys, layer.values, None, self._scale).reshape(len(qkv), -1)
        prefix, suffix = layer.prefix, (layer.keys, layer.values, layer.rows.index)
        keys, values = prefix.keys, prefix.values
        if not prefix.counts:
            keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        whole = keys, values, prefix.starts, prefix.longest
        found, lse = step_attention.attend(q, whole, suffix, self._scale, early=starting["early"])
        if layer.watch is not None:
            layer.watch(layer, q, lse, self._scale, None)
        return found.reshape(len(qkv), -1)


def _norm(module: Any) -> Norm:
    return module.weight, float(module.variance_epsilon)


def _layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    own = getattr(attention, "q_norm", None)
    return _Layer(
        before=_norm(layer.input_layernorm),
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        out=attention.o_proj,
        between=_norm(layer.post_attention_layernorm),
        gate=mlp.gate_proj,
        up=mlp.up_proj,
        down=mlp.down_proj,
        heads=None if own is None else (own.weight, attention.k_norm.weight, float(own.variance_epsilon)),
    )


def find(backbone: Backbone) -> LeanStep | None:
    """The lean step of a model, checked at the first call; none where the model's own must be used."""
    if backbone.lean is None:
        backbone.lean = _checked(backbone) if backbone.device.type == "cuda" else False
    found: LeanStep | bool = backbone.lean
    return found if isinstance(found, LeanStep) else None


def is_plain(backbone: Backbone) -> bool:
    """Whether all parts of a model are those that we know, and nobody has put anything of their own in between."""
    config, model = backbone.config, backbone.model
    if config.model_type not in _FAMILIES or getattr(config, "hidden_act", None) != "silu":
        return False
    if len(backbone.full) < backbone.num_layers or backbone.softcap is not None or backbone.samples is not None:
        return False
    layers = [_layer(each) for each in model.model.layers if {name for name, _ in each.named_modules()} <= _PARTS]
    linear = [part for each in layers for part in (*each.qkv, each.out, each.gate, each.up, each.down)]
    weights = list(model.parameters())
    return (
        len(layers) == backbone.num_layers
        and all(type(module) is nn.Linear for module in (*linear, model.lm_head))
        and all(module.bias is None for each in layers for module in (each.gate, each.up, model.lm_head))
        and all(type(weight.data) is Tensor and weight.is_contiguous() for weight in weights)
        and len({(weight.device, weight.dtype) for weight in weights}) == 1
        and not any(_is_hooked(module) for module in model.modules())
        and all(2 * len(each) == backbone.head_size for each in backbone.inv_freqs)
    )


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)


def _checked(backbone: Backbone) -> LeanStep | bool:
    """A lean step that agrees with the model's own, or false."""
    if not is_plain(backbone):
        return False
    known: tuple[type[Exception], ...] = (ImportError, RuntimeError, OSError, subprocess.SubprocessError)
    like = torch.empty(1, backbone.num_heads, 1, backbone.head_size, device=backbone.device, dtype=backbone.dtype)
    if not on_cuda(like) or not fused.usable(like, backbone.kv_heads):
        return False
    try:
        found = LeanStep(backbone)
        error = max(errors(backbone, found).values())
    except (*known, *fused.triton_errors()) as failure:
        if isinstance(failure, torch.OutOfMemoryError):
            raise
        logger.warning("%s is decoded by its own layers: %r", backbone.name, failure)
        return False
    if not error <= _BOUND:
        logger.warning("%s is decoded by its own layers, from which ours differ by %.1e", backbone.name, error)
        return False
    return found


def errors(backbone: Backbone, step: LeanStep, sizes: Iterable[int] = (1, 3)) -> dict[str, float]:
    """Relative L2 errors of the logits of a lean step on small random examples, by batch size."""
    return {f"{size} answers": _error(backbone, step, size) for size in sizes}


def _error(backbone: Backbone, step: LeanStep, size: int) -> float:
    """That of a batch, over a prefix of a few random tokens; what is in the suffix by then must be equal, too."""
    made, generator = [], torch.Generator().manual_seed(0)

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
        made.append(
            [logits, *(torch.stack([layer.keys[:, :, 5:], layer.values[:, :, 5:]]).float() for layer in layers)]
        )
    pairs = zip(*made, strict=True)
    return max(float((got - wanted).norm() / wanted.norm()) for got, wanted in pairs)
