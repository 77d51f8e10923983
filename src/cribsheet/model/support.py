"""Which models and settings are supported: families, rotary embeddings, windows, devices and dtypes.

Everything that is not listed here is refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor

from cribsheet.errors import ModelError

_FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "phi",
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "olmo2",
    "smollm3",
    "starcoder2",
    "stablelm",
    "mixtral",
    "qwen3_moe",
)
# transformers 5.4 takes no configuration of OLMo 2: it wants an int where every one of them has a bool.
FAMILIES = tuple(name for name in _FAMILIES if name != "olmo2" or Version(transformers.__version__) >= Version("5.5"))
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
POCKET = "pocket"


def check_supported(config: Any) -> None:
    """Refuse, by name, a model whose attention would not survive compression. Raises `ModelError`."""
    family = getattr(config, "model_type", "?")
    if family not in FAMILIES:
        raise ModelError(f"Models of type {family!r} are not supported; use one of {', '.join(FAMILIES)}.")
    for rope_type in rope_types(config):
        if rope_type not in ROPE_TYPES:
            raise ModelError(
                f"Rotary embeddings of type {rope_type!r} change with the length of the text, so keys cannot be moved; "
                f"use a model with one of {', '.join(ROPE_TYPES)}."
            )
    unknown = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ModelError(
            f"This {family} model has layers of type {', '.join(sorted(unknown))}, which are not supported."
        )
    windows = layer_windows(config)
    if None not in windows:
        raise ModelError(
            f"In this {family} model every layer sees only the last {windows[0]} tokens, so kept tokens would fall out "
            "of sight; use a version with layers of full attention (sliding_window: null)."
        )


def rope_types(config: Any) -> list[str]:
    """Kinds of rotary embedding in the model: one, or one for each type of layer."""
    settings = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in settings.values() if isinstance(value, dict)]
    return [str(each.get("rope_type", "default")) for each in (nested or [settings])]


def layer_windows(config: Any) -> list[int | None]:
    """How many tokens a token sees in each layer, itself included; none where it sees all that the model allows."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # families without layer types slide everywhere or, switched off, nowhere
        kinds = ["sliding_attention" if getattr(config, "use_sliding_window", True) else "full_attention"]
        kinds = kinds * config.num_hidden_layers
    limits = window if window and window < config.max_position_embeddings else None
    return [limits if kind == "sliding_attention" else None for kind in kinds]


def head_size(config: Any) -> int:
    """Entries of a key of one head."""
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def inv_freq(model: Any, number: int) -> Tensor:
    """Radians per token by which keys of a layer turn (R/2,); empty in layers without positions."""
    config, rotary = model.config, model.base_model.rotary_emb
    single = getattr(rotary, "inv_freq", None)
    frequencies: Tensor = single if single is not None else getattr(rotary, f"{config.layer_types[number]}_inv_freq")
    rotates = getattr(config, "no_rope_layers", None)  # 1 where a layer rotates, whatever the name says
    return frequencies.detach().float()[: None if rotates is None or rotates[number] else 0]


def located(name: str) -> str:
    """The folder or id that `from_pretrained` takes."""
    if name == POCKET:
        return _pocket()
    looks_local = name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"The folder {name!r} holds no config.json; give the folder of a transformers model.")
        return str(path)
    if name.lower().endswith(".gguf"):
        raise ModelError(
            f"{name!r} is a GGUF, which llama.cpp runs; give the folder or hub id of the transformers model that it "
            "was made of, and the GGUF as gguf= where a sheet is exported or llama.cpp answers."
        )
    if looks_local:
        raise ModelError(f"There is no model folder {name!r}; give an existing folder, a hub id, or {POCKET!r}.")
    return name


def _pocket() -> str:
    """The folder of the small model that ships. Raises `ModelError` where its distribution is missing."""
    try:
        import cribsheet_pocket  # only here: its weights are unpacked on first use
    except ModuleNotFoundError as error:
        raise ModelError(
            f"The model {POCKET!r} is a distribution of its own, which is not installed: pip install cribsheet-pocket, "
            "or in a clone pip install ./src/cribsheet_pocket; or give another model's folder or hub id."
        ) from error
    return str(cribsheet_pocket.path())


def resolved(device: Any, dtype: Any) -> tuple[torch.device, torch.dtype | str]:
    """The device and dtype that `Backbone.load` takes for what was given, or for nothing: "auto"."""
    target = _device(device) if device is not None else _best_device()
    if str(target) == "cuda":
        target = torch.device("cuda", torch.cuda.current_device())
    return target, _resolve_dtype(dtype)


def _device(wanted: str | torch.device) -> torch.device:
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ModelError(f"There is no device {str(wanted)!r}; use cuda, mps or cpu.") from error
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type, True):
        raise ModelError(f"The device {str(wanted)!r} is not available here; use {_best_device()}.")
    return device


def _best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None:
        return "auto"
    resolved = getattr(torch, dtype, None)
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ModelError(f"There is no dtype {dtype!r}; use float32, bfloat16 or float16.")
    return resolved
