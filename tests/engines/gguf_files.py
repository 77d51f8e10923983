"""Models as GGUF files, written by the format: what llama.cpp needs of tiny models, in float32."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import torch

from cribsheet.model.backbone import Backbone
from cribsheet.testing import tiny_backbone

MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_KINDS = {torch.float32: 0, torch.float16: 1}


def plain_backbone(family: str, seed: int = 0) -> Backbone:
    """A tiny model without sliding windows, whose norms and biases differ from those of another seed."""
    full = {"use_sliding_window": False, "layer_types": ["full_attention"] * 3} if family == "qwen2" else {}
    backbone = tiny_backbone(family, seed=seed, **full)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in backbone.model.named_parameters():
            if weight.dim() == 1:
                weight.copy_(torch.rand(weight.shape, generator=draw) * 0.5 + (0.75 if "norm" in name else -0.25))
    return backbone


def settings_of(backbone: Backbone) -> dict[str, Any]:
    """What the header says of a model, and of its tokenizer: of bytes, or of pieces with a mark for the blank."""
    config, name = backbone.config, ARCHITECTURES[backbone.config.model_type]
    state = json.loads(backbone.tokenizer.backend_tokenizer.to_str())
    tokens = [text for text, _ in sorted(backbone.tokenizer.get_vocab().items(), key=lambda each: each[1])]
    special = {each["content"] for each in state["added_tokens"] if each["special"]}
    pieces = "\u2581a" in tokens
    merges = [" ".join(pair) for pair in state["model"]["merges"]]
    return {
        "general.architecture": name,
        "general.name": "tiny",
        f"{name}.block_count": config.num_hidden_layers,
        f"{name}.context_length": config.max_position_embeddings,
        f"{name}.embedding_length": config.hidden_size,
        f"{name}.feed_forward_length": config.intermediate_size,
        f"{name}.attention.head_count": config.num_attention_heads,
        f"{name}.attention.head_count_kv": config.num_key_value_heads,
        f"{name}.attention.key_length": backbone.head_size,
        f"{name}.attention.value_length": backbone.head_size,
        f"{name}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{name}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        f"{name}.rope.dimension_count": backbone.head_size,
        f"{name}.vocab_size": len(tokens),
        "tokenizer.ggml.model": "llama" if pieces else "gpt2",
        "tokenizer.ggml.pre": "default" if pieces else "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [_kind(text, special) for text in tokens],
        **({"tokenizer.ggml.scores": [0.0] * len(tokens)} if pieces else {"tokenizer.ggml.merges": merges}),
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
        "tokenizer.ggml.padding_token_id": config.pad_token_id,
        "tokenizer.ggml.add_bos_token": False,
    }


def tensors_of(backbone: Backbone, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The weights by llama.cpp's names; norms and biases in float32, all others in a type."""
    permuted = ARCHITECTURES[backbone.config.model_type] == "llama"
    named = {}
    for name, weight in backbone.model.named_parameters():
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            module, _, kind = rest.rpartition(".")
            here = f"blk.{layer}.{MODULES[module]}.{kind}"
            heads = {"attn_q": backbone.num_heads, "attn_k": backbone.kv_heads}.get(MODULES[module])
            if permuted and heads:  # channels that turn together side by side
                weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        else:
            here = {"lm_head.weight": "output.weight", "model.norm.weight": "output_norm.weight"}.get(
                name, "token_embd.weight"
            )
        named[here] = weight.detach().to(torch.float32 if weight.dim() == 1 else dtype).contiguous()
    return named


def write_gguf(path: Path, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """A file of version 3."""
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(settings))]
    for name, value in settings.items():
        head += [_text(name), _value(value)]
    start = 0
    for name, tensor in tensors.items():
        shape = tuple(reversed(tensor.shape))
        head += [_text(name), struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, _KINDS[tensor.dtype], start)]
        start += _padded(tensor.nbytes)
    header = b"".join(head)
    with path.open("wb") as file:
        file.write(header.ljust(_padded(len(header)), b"\0"))
        for tensor in tensors.values():
            file.write(tensor.numpy().tobytes().ljust(_padded(tensor.nbytes), b"\0"))
    return path


def save_gguf(backbone: Backbone, path: Path, **changed: Any) -> Path:
    """A model as a file, with some of its settings changed: `block_count=4`."""
    settings = settings_of(backbone)
    for name, value in changed.items():
        settings[f"{settings['general.architecture']}.{name.replace('__', '.')}"] = value
    return write_gguf(path, settings, tensors_of(backbone))


def _padded(size: int) -> int:
    return -(-size // 32) * 32


def _text(text: str) -> bytes:
    held = text.encode()
    return struct.pack("<Q", len(held)) + held


def _kind(text: str, special: set[str]) -> int:
    """llama.cpp's number for control tokens, single bytes, and all others."""
    return 3 if text in special else 6 if re.fullmatch(r"<0x[0-9A-F]{2}>", text) else 1


def _value(value: Any) -> bytes:
    if isinstance(value, list):
        parts = [
            struct.pack("<Ii", 5, x) if isinstance(x, int) else _value(x) for x in value
        ]  # each with its kind before it, which is said once of a list
        return struct.pack("<I", 9) + parts[0][:4] + struct.pack("<Q", len(value)) + b"".join(x[4:] for x in parts)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    return (
        struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<Ii", 5 if value < 0 else 4, value)
    )
