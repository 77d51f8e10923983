"""Where the weights of Llama-like models lie, for passes of few kernels that run none of the model's own layers.

A model is taken only if all its parts are the plain ones that we know and nobody hooks into them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cribsheet.attention import dispatch
from cribsheet.attention.agreement import agrees
from cribsheet.attention.backends import on_cuda
from cribsheet.model.support import head_size, inv_freq, layer_windows

BOUND = 0.1  # relative L2 error of a pass: one norm or one factor that we do not know of would be several times that
_PLAIN = ("llama", "mistral", "qwen2", "qwen3")  # families whose layers are these parts and nothing else
_LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.act_fn")
_NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
_PARTS = {"", "self_attn", "mlp", *_LINEAR, *_MLP, *_NORMS}  # modules of a layer
_LOOKED_AT = 4  # numbers of each matrix by which changes are seen that nobody counts

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers of as many bytes

Linear = tuple[Tensor, Tensor | None]  # weight (N, K) and bias (N,)
Norm = tuple[Tensor, float]  # gain (K,) and epsilon


@dataclass(frozen=True)
class LlamaLayer:
    """The weights of one layer, as the model holds them."""

    before: Norm
    qkv: tuple[Linear, Linear, Linear]
    out: Linear
    between: Norm
    gate: Linear
    up: Linear
    down: Linear
    qk_norms: tuple[Tensor, Tensor, float] | None  # gains of queries and keys, and epsilon, where they are normalised


@dataclass(frozen=True)
class LlamaWeights:
    """All that a pass of a Llama-like model needs: weights where the model has them, none of its modules but `turns`.

    `turns` gives cosines and sines (B, T, D) at positions (B, T); `scale` is the factor of the attention logits.
    """

    embed: Tensor
    turns: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    layers: Sequence[LlamaLayer]
    norm: Norm
    lm_head: Tensor
    heads: int
    kv_heads: int
    head_size: int
    scale: float


class Unchanged:
    """A model as it is now, to be told later whether anybody has changed it.

    Changes of `weight.data` in place are not counted by PyTorch (adapters are merged so), and are seen by a few numbers
    of each matrix.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._places = [place for module in self._modules for place in _places(module)]
        self._matrices = [weight for weight in model.parameters() if weight.dim() > 1]
        self._numbers = [_some_numbers(weight.detach()) for weight in self._matrices]
        self._states, self._seen = self._now(), torch.cat(self._numbers)

    def __bool__(self) -> bool:
        """Whether modules, hooks and matrices are those of then."""
        return (
            all(held.get(name) is part for held, name, part in self._places)
            and not any(_is_hooked(module) for module in self._modules)
            and self._now() == self._states
            and torch.equal(torch.cat(self._numbers), self._seen)
        )

    def _now(self) -> list[tuple[int, int]]:
        return [(weight.data_ptr(), weight._version) for weight in self._matrices]


def _places(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, object]]:
    """Where the parts and the parameters of a module are held."""
    for held in (module._modules, module._parameters):
        for name, part in held.items():
            yield held, name, part


def _some_numbers(matrix: Tensor) -> Tensor:
    """A view (N,) of a few numbers, in bits, so that what is no number is equal to itself."""
    bits = matrix.reshape(-1).view(_BITS[matrix.dtype.itemsize])
    return bits[:: max(1, len(bits) // _LOOKED_AT)]


def is_plain(config: Any) -> bool:
    """Whether a model of this configuration is made of the parts that we know."""
    known = config.model_type in _PLAIN and getattr(config, "hidden_act", None) == "silu"
    return known and not any(layer_windows(config)) and getattr(config, "attn_logit_softcapping", None) is None


def llama_weights(model: Any) -> LlamaWeights | None:
    """The weights of a Llama-like model; none if a part is unknown or anybody has put something in between."""
    config = model.config
    if not is_plain(config):
        return None
    layers = list(model.model.layers)
    if len(layers) != config.num_hidden_layers or any(_names(layer) - _PARTS for layer in layers):
        return None
    linear = [model.lm_head, *(layer.get_submodule(name) for layer in layers for name in (*_LINEAR, *_MLP[:3]))]
    gates = [layer.mlp.get_submodule(name) for layer in layers for name in ("gate_proj", "up_proj")]
    weights = list(model.parameters())
    size = head_size(config)
    plain = (
        all(type(module) is nn.Linear for module in linear)
        and all(module.bias is None for module in (*gates, model.lm_head))
        and all(type(weight.data) is Tensor and weight.is_contiguous() for weight in weights)
        and len({(weight.device, weight.dtype) for weight in weights}) == 1
        and not any(_is_hooked(module) for module in model.modules())
        and all(2 * len(inv_freq(model, number)) == size for number in range(len(layers)))
    )
    if not plain:
        return None
    base = model.model
    return LlamaWeights(
        embed=base.embed_tokens.weight,
        turns=base.rotary_emb,
        layers=[_layer(layer) for layer in layers],
        norm=_norm(base.norm),
        lm_head=model.lm_head.weight,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=size,
        scale=layers[0].self_attn.scaling,
    )


def _names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_modules()}


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)


def _layer(layer: Any) -> LlamaLayer:
    attention, mlp = layer.self_attn, layer.mlp
    norm = getattr(attention, "q_norm", None)
    return LlamaLayer(
        before=_norm(layer.input_layernorm),
        qkv=(_linear(attention.q_proj), _linear(attention.k_proj), _linear(attention.v_proj)),
        out=_linear(attention.o_proj),
        between=_norm(layer.post_attention_layernorm),
        gate=_linear(mlp.gate_proj),
        up=_linear(mlp.up_proj),
        down=_linear(mlp.down_proj),
        qk_norms=None if norm is None else (norm.weight, attention.k_norm.weight, float(norm.variance_epsilon)),
    )


def _linear(module: nn.Linear) -> Linear:
    return module.weight, module.bias


def _norm(module: Any) -> Norm:
    return module.weight, float(module.variance_epsilon)


def beside(rows: Tensor, parts: Sequence[Linear]) -> Tensor:
    """Products (M, N1 + N2 + ...) of the same rows."""
    widths = [len(weight) for weight, _ in parts]
    out = rows.new_empty(len(rows), sum(widths))
    for (weight, bias), mine in zip(parts, out.split(widths, 1), strict=True):
        if bias is None:
            torch.mm(rows, weight.t(), out=mine)
        else:
            torch.addmm(bias, rows, weight.t(), out=mine)
    return out


def is_fast(weights: LlamaWeights, path: str, check: Callable[[], dict[str, float]]) -> bool:
    """Whether kernels can be compiled for a model, and the errors that a check finds are what half precision leaves."""
    like = torch.empty(1, weights.heads, 1, weights.head_size, device=weights.embed.device, dtype=weights.embed.dtype)
    return on_cuda(like) and dispatch.usable(like, weights.kv_heads) and agrees(path, check, BOUND)
