"""The Llama architecture, written for training: everything but attention is independent of the sequence length.

Context grows during training.  The parts before and after attention see a flat batch of tokens, so they are compiled
once, whatever the length of a row; attention itself is one library call.  Parameter names are those of
`transformers.LlamaForCausalLM`, which is what the trained weights are loaded with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cribsheet_pocket_training.prompts import BRIDGE


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model."""

    width: int = 512
    layers: int = 14
    heads: int = 8
    kv_heads: int = 4
    head: int = 64
    hidden: int = 1024
    vocabulary: int = 8192
    theta: float = 100_000.0
    bridge: int = 8  # layers after which the first step of a join is to be known
    positions: int = 16384

    def config(self) -> dict[str, Any]:
        """The config.json of the equivalent LlamaForCausalLM."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head,
            "intermediate_size": self.hidden,
            "vocab_size": self.vocabulary,
            "rms_norm_eps": 1e-5,
            "rope_theta": self.theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.theta},
            "max_position_embeddings": self.positions,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 5,
            "pad_token_id": 0,
            "dtype": "bfloat16",
        }


SHAPES = {
    "pocket": Shape(),
    "small": Shape(width=256, layers=6, heads=4, kv_heads=2, hidden=704, bridge=4),
    "tiny": Shape(width=64, layers=2, heads=2, kv_heads=1, head=32, hidden=128, bridge=1),
}


class _Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class _Attention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.q_proj = nn.Linear(s.width, s.heads * s.head, bias=False)
        self.k_proj = nn.Linear(s.width, s.kv_heads * s.head, bias=False)
        self.v_proj = nn.Linear(s.width, s.kv_heads * s.head, bias=False)
        self.o_proj = nn.Linear(s.heads * s.head, s.width, bias=False)


class _Mlp(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.width, s.hidden, bias=False)
        self.up_proj = nn.Linear(s.width, s.hidden, bias=False)
        self.down_proj = nn.Linear(s.hidden, s.width, bias=False)


class _Layer(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.self_attn = _Attention(s)
        self.mlp = _Mlp(s)
        self.input_layernorm = _Norm(s.width)
        self.post_attention_layernorm = _Norm(s.width)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), weight, 1e-5).to(x.dtype)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype))


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding: x (T, H, D), cos and sin (T, 1, D)."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def _before(
    x: Tensor, norm: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (T, H, D), keys and values (T, K, D) of a flat batch x (T, width)."""
    h = _norm(x, norm)
    size = cos.shape[-1]
    q, k, v = (_linear(h, w).unflatten(-1, (-1, size)) for w in (wq, wk, wv))
    return _turn(q, cos, sin), _turn(k, cos, sin), v


def _after(x: Tensor, attended: Tensor, wo: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The rest of a layer, from what attention returned (T, H·D)."""
    x = x + _linear(attended, wo)
    h = _norm(x, norm)
    return x + _linear(F.silu(_linear(h, gate)) * _linear(h, up), down)


def _losses(x: Tensor, norm: Tensor, embedding: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each position (T,) and whether the best guess is right (T,)."""
    logits = _linear(_norm(x, norm), embedding).float()
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


class Reader(nn.Module):
    """A Llama to train.  `compiled` builds kernels for the parts that do not depend on the sequence length.

    `bridges` is for training alone and is not saved: after layer `shape.bridge` it reads, at the end of a phrase such
    as "the company that Ana works for", the first tokens of the entity meant.  Asking for them there teaches the
    first step of a join; left to itself the model learns to guess among the likely answers instead.
    """

    def __init__(self, shape: Shape, compiled: bool = False) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.layers))
        self.norm = _Norm(shape.width)
        self.bridges = nn.Parameter(torch.eye(shape.width).repeat(BRIDGE, 1, 1))
        wrap: Callable[..., Any] = (lambda f: torch.compile(f, dynamic=False)) if compiled else (lambda f: f)
        self._before, self._after, self._losses = wrap(_before), wrap(_after), wrap(_losses)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02 if "embed" in name else 0.5 / math.sqrt(parameter.shape[1]))
                if "o_proj" in name or "down_proj" in name:
                    parameter.data.mul_(1 / math.sqrt(2 * shape.layers))

    def grow_from(self, tensors: dict[str, Tensor]) -> None:
        """Take over the weights, by their transformers names, of a model that may have fewer layers but is as wide.

        A layer that is new copies the one before it, and adds nothing to the stream until it has learnt to: the model
        computes what the smaller one does.
        """
        old = {name.removeprefix("model."): tensor.float() for name, tensor in tensors.items()}
        count = 1 + max(int(name.split(".")[1]) for name in old if name.startswith("layers."))
        total = self.shape.layers
        fresh = {round((i + 1.5) * total / (total - count + 2)) for i in range(total - count)}  # spread over the depth
        source = -1
        for name in ("embed_tokens.weight", "norm.weight"):
            self.get_parameter(name).data.copy_(old[name])
        for index, layer in enumerate(self.layers):
            source += index not in fresh
            units = _strongest(old, f"layers.{source}.mlp.", self.shape.hidden)
            for name, parameter in layer.named_parameters():
                tensor = old[f"layers.{source}.{name}"]
                if "mlp." in name:
                    tensor = tensor[:, units] if "down_proj" in name else tensor[units]
                parameter.data.copy_(tensor)
                if index in fresh and ("o_proj" in name or "down_proj" in name):
                    parameter.data.zero_()

    def rotations(self, rows: int, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines for `rows` sequences of `length` tokens: (rows · length, 1, D)."""
        size = self.shape.head
        rate = self.shape.theta ** (-torch.arange(0, size, 2, device=device).double() / size)
        angle = (torch.arange(length, device=device).double()[:, None] * rate).repeat(rows, 2)
        return angle.cos().to(dtype)[:, None], angle.sin().to(dtype)[:, None]

    def forward(
        self, ids: Tensor, targets: Tensor, dtype: torch.dtype, marks: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of each position, whether it was guessed right (both (rows · length,)), and the mean loss of the marks.

        ids and targets are (rows, length); marks (M, 2 + BRIDGE) hold row, place, and the tokens to be known there.
        """
        rows, length = ids.shape
        s = self.shape
        cos, sin = self.rotations(rows, length, ids.device, dtype)
        x = F.embedding(ids.reshape(-1), self.embed_tokens.weight).to(dtype)
        bridged = 0 * self.bridges.sum()  # a gradient of zeros, where there are no marks, for the other processes' sake
        for index, layer in enumerate(cast("list[_Layer]", self.layers)):
            if index == s.bridge and marks is not None and len(marks):
                bridged = self._bridge_loss(x[marks[:, 0] * length + marks[:, 1]], marks[:, 2:])
            a, m = layer.self_attn, layer.mlp
            q, k, v = self._before(
                x, layer.input_layernorm.weight, a.q_proj.weight, a.k_proj.weight, a.v_proj.weight, cos, sin
            )
            q, k, v = (t.view(rows, length, -1, s.head).transpose(1, 2) for t in (q, k, v))
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            o = o.transpose(1, 2).reshape(rows * length, s.heads * s.head)
            x = self._after(
                x,
                o,
                a.o_proj.weight,
                layer.post_attention_layernorm.weight,
                m.gate_proj.weight,
                m.up_proj.weight,
                m.down_proj.weight,
            )
        loss, right = self._losses(x, self.norm.weight, self.embed_tokens.weight, targets.reshape(-1))
        return loss, right, bridged

    def _bridge_loss(self, x: Tensor, entities: Tensor) -> Tensor:
        """Mean cross-entropy of the tokens of entities (M, BRIDGE), zeros left out, as read off states x (M, width)."""
        read = torch.einsum("mw,bwv->mbv", _norm(x, torch.ones_like(self.norm.weight)), self.bridges.to(x.dtype))
        logits = _linear(read, self.embed_tokens.weight).float()
        return F.cross_entropy(logits.flatten(0, 1), entities.flatten(), ignore_index=0)


def _strongest(tensors: dict[str, Tensor], mlp: str, count: int) -> Tensor:
    """Indices of the `count` hidden units of a feed-forward part that weigh most, in order."""
    gate, up, down = (tensors[f"{mlp}{name}_proj.weight"] for name in ("gate", "up", "down"))
    weight: Tensor = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
    return weight.topk(count).indices.sort().values


def save(model: Reader, folder: Path, shard_bytes: int = 15_900_000) -> None:
    """Write config.json and bf16 safetensors shards of at most `shard_bytes` bytes each."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {
        f"model.{k}": v.detach().to(torch.bfloat16).cpu().contiguous()
        for k, v in model.state_dict().items()
        if k != "bridges"
    }
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, value in state.items():
        bytes_ = value.numel() * 2
        if size + bytes_ > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = value
        size += bytes_
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(v.numel() * 2 for v in state.values())
    layout = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(layout), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(model.shape.config(), indent=1) + "\n", encoding="utf-8")
