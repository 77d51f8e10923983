"""The model underneath: which families and settings are supported, loading, and forward passes.

Everything that is not listed here is refused by name. How our attention gets into the model is in
`model/registration.py`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from packaging.version import Version
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache

from cribsheet.attention.prefix import LayerPrefix, ReadingLayer
from cribsheet.errors import ModelError
from cribsheet.model.registration import Attachment

logger = logging.getLogger(__name__)

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
_PLAIN = ("llama", "mistral", "qwen2", "qwen3")  # families whose layers are the parts below and nothing else
_LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.act_fn")
_NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
_PARTS = {"", "self_attn", "mlp", *_LINEAR, *_MLP, *_NORMS}  # modules of a layer
Keep = int | Tensor | None  # logits wanted: of the last so many tokens, of these places, or of none


class Backbone:
    """A causal language model with its tokenizer, as the rest of the library sees it.

    The model itself is only borrowed: attention function and training mode are ours during a forward pass and its
    own again after it.

    Attributes: `name` (what it was loaded from), `revision`, `num_layers`, `num_heads`, `kv_heads`, `head_size`,
    `window` (positions it was made for), `device`, `dtype`; and for each layer `inv_freqs` (R/2,), radians a token
    that its keys turn by, and `windows`, how many tokens a token sees (none: all of them). `full` are the numbers of
    the layers that see everything: the ones that are condensed.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str = "", revision: str | None = None) -> None:
        config = model.config
        check_supported(config)
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"The tokenizer {type(tokenizer).__name__} gives no character offsets, so kept tokens could not be "
                "traced to their documents; load a fast tokenizer (tokenizer.json)."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.name = name or str(getattr(config, "_name_or_path", "") or type(model).__name__)
        self.revision = revision or getattr(config, "_commit_hash", None)
        self.num_layers: int = config.num_hidden_layers
        self.num_heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.head_size: int = getattr(config, "head_dim", None) or config.hidden_size // self.num_heads
        self.window: int = config.max_position_embeddings
        self.windows = layer_windows(config)
        self.full = [number for number, window in enumerate(self.windows) if window is None]
        self.inv_freqs = [_inv_freq(model, number) for number in range(self.num_layers)]
        self.softcap: float | None = getattr(config, "attn_logit_softcapping", None)
        takes = inspect.signature(type(model).forward).parameters
        self._cache_name = "cache" if "cache" in takes else "past_key_values"  # its name before transformers 5.24
        self._attachment = Attachment.of(model)
        self.announce: Callable[[Tensor, Tensor, Keep], AbstractContextManager[None]] = _alone  # `model/divided.py`
        self.samples: Tensor | None = None  # of the weights, where no process holds all (`model/fingerprint.py`)
        self.lean: Any = None  # a step of few kernels, or false where there must be none (`model/llama_step.py`)
        self.lean_read: Any = None  # the same of a read (`model/llama_read.py`)
        self.profiles: dict[str, Any] = {}  # how many tokens each head looks up, by template (`compress/profile.py`)

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        **model_options: Any,
    ) -> Backbone:
        """Load a model from a local folder, a hub id, or `"pocket"`.

        `device` defaults to cuda, then mps, then cpu; `dtype` to the checkpoint's own on an accelerator and float32
        on a CPU. `model_options` go to `from_pretrained` (`quantization_config`, `device_map`, ...). Raises
        `ModelError` for what cannot be loaded or is not supported, before any weights are read where possible.
        """
        source = _locate(str(name))
        try:
            config = AutoConfig.from_pretrained(source, revision=revision)
        except (OSError, ValueError, TypeError, StrictDataclassError) as error:  # no mapping: a TypeError up to 5.4
            raise ModelError(f"There is no usable model at {str(name)!r}: {_first_line(error)}") from error
        check_supported(config)
        target, kind = resolved(device, dtype)
        own = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"  # stock SDPA ignores softcaps
        options: dict[str, Any] = {"attn_implementation": own, "revision": revision, **model_options}
        options["dtype"] = kind
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
            model = AutoModelForCausalLM.from_pretrained(source, **options)
        except (OSError, ValueError, ImportError) as error:  # an ImportError: what quantisation or device_map needs
            raise ModelError(f"The model at {str(name)!r} cannot be loaded: {_first_line(error)}") from error
        if "device_map" not in model_options and "quantization_config" not in model_options:
            model = model.to(target)
        return cls(model, tokenizer, name=str(name), revision=revision)

    @property
    def config(self) -> Any:
        """The model's own configuration."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the first weights live."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Type in which keys and values are computed."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        generation = getattr(self.model, "generation_config", None)
        ids: set[int] = set()
        for source in (generation, self.config, self.tokenizer):
            value = getattr(source, "eos_token_id", None)
            ids.update(value if isinstance(value, (list, tuple)) else [value] if value is not None else [])
        return frozenset(ids)

    def attached(self) -> Attachment:
        """A context: evaluate with our attention function while inside; nests, and across threads."""
        return self._attachment

    @torch.no_grad()
    def read(
        self,
        prefix: Sequence[LayerPrefix],
        start: int,
        chunk: Tensor,
        guide: Tensor,
        run: Callable[[Tensor, Tensor, Sequence[ReadingLayer]], None] | None = None,
        step: Callable[[], None] | None = None,
    ) -> list[ReadingLayer]:
        """Read `[chunk; guide]` on top of a prefix of `start` tokens; the language-model head is not run.

        `chunk` (c,) and `guide` (T,) are token ids; T may be 0. Returns one layer each with the chunk's keys and values
        and the guide's queries and log-sum-exps. `run` reads tokens (1, n) at their positions into the layers; the
        model's own forward pass if there is none. `step` is called at each layer.
        """
        layers = [ReadingLayer(layer, start, len(guide), step) for layer in prefix]
        ids = torch.cat([chunk, guide]).to(self.device).unsqueeze(0)
        positions = torch.arange(start, start + ids.shape[1], device=self.device).unsqueeze(0)
        if run is not None:
            run(ids, positions, layers)
            return layers
        with self.announce(ids, positions, None), self.attached():
            given = self.cached(Cache(layers=list(layers)))
            self.model.base_model(input_ids=ids, position_ids=positions, use_cache=True, **given)
        return layers

    def cached(self, cache: Cache) -> dict[str, Cache]:
        """A cache as an argument of the model, and of its `generate`, by the name that this transformers has for it."""
        return {self._cache_name: cache}

    def wait(self) -> None:
        """Come back when an accelerator has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    @torch.no_grad()
    def step(self, ids: Tensor, positions: Tensor, cache: Cache, keep: int | Tensor = 1) -> Tensor:
        """Run new tokens (B, T) at `positions` (B, T) over a cache: logits (B, keep, V) of the last `keep` tokens.

        As a tensor (n,), `keep` names the places of the tokens whose logits are wanted.
        """
        with self.announce(ids, positions, keep), self.attached():
            logits: Tensor = self.model(
                input_ids=ids.to(self.device),
                position_ids=positions.to(self.device),
                use_cache=True,
                logits_to_keep=keep,
                **self.cached(cache),
            ).logits
        return logits

    @torch.no_grad()
    def accompany(self, ids: Tensor, positions: Tensor, keep: Keep) -> None:
        """Compute along with the leader of a divided model, which reads (none) or steps; attention is the leader's."""
        given = {"input_ids": ids.to(self.device), "position_ids": positions.to(self.device), "use_cache": False}
        with self.attached():
            if keep is None:
                self.model.base_model(**given)
            else:
                self.model(**given, logits_to_keep=keep)

    @property
    def scale(self) -> float:
        """Factor of the attention logits."""
        scaling: float = self.model.base_model.layers[0].self_attn.scaling
        return scaling


Linear = tuple[Tensor, Tensor | None]  # weight (N, K) and bias (N,)
Norm = tuple[Tensor, float]  # gain (K,) and epsilon


@dataclass(frozen=True)
class PlainLayer:
    """The weights of one layer, as the model holds them."""

    before: Norm
    qkv: tuple[Linear, Linear, Linear]
    out: Linear
    between: Norm
    gate: Linear
    up: Linear
    down: Linear
    heads: tuple[Tensor, Tensor, float] | None  # gains of queries and keys, and epsilon, where they are normalised


@dataclass(frozen=True)
class PlainParts:
    """All that a step of a plain model needs; `turns` gives cosines and sines (B, T, D) at positions (B, T)."""

    embed: Tensor
    turns: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    layers: Sequence[PlainLayer]
    norm: Norm
    head: Tensor


def plain_parts(backbone: Backbone) -> PlainParts | None:
    """The parts of a Llama-like model; none if one of them is unknown or anybody has put something in between."""
    config, model = backbone.config, backbone.model
    if config.model_type not in _PLAIN or getattr(config, "hidden_act", None) != "silu":
        return None
    if len(backbone.full) < backbone.num_layers or backbone.softcap is not None or backbone.samples is not None:
        return None
    layers = list(model.model.layers)
    if len(layers) != backbone.num_layers or any(_names(each) - _PARTS for each in layers):
        return None
    linear = [model.lm_head, *(each.get_submodule(name) for each in layers for name in (*_LINEAR, *_MLP[:3]))]
    gates = [each.mlp.get_submodule(name) for each in layers for name in ("gate_proj", "up_proj")]
    weights = list(model.parameters())
    plain = (
        all(type(module) is nn.Linear for module in linear)
        and all(module.bias is None for module in (*gates, model.lm_head))
        and all(type(weight.data) is Tensor and weight.is_contiguous() for weight in weights)
        and len({(weight.device, weight.dtype) for weight in weights}) == 1
        and not any(_is_hooked(module) for module in model.modules())
        and all(2 * len(each) == backbone.head_size for each in backbone.inv_freqs)
    )
    if not plain:
        return None
    base = model.model
    found = [_plain_layer(each) for each in layers]
    return PlainParts(base.embed_tokens.weight, base.rotary_emb, found, _norm(base.norm), model.lm_head.weight)


def _names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_modules()}


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)


def _plain_layer(layer: Any) -> PlainLayer:
    attention, mlp = layer.self_attn, layer.mlp
    own = getattr(attention, "q_norm", None)
    return PlainLayer(
        before=_norm(layer.input_layernorm),
        qkv=(_linear(attention.q_proj), _linear(attention.k_proj), _linear(attention.v_proj)),
        out=_linear(attention.o_proj),
        between=_norm(layer.post_attention_layernorm),
        gate=_linear(mlp.gate_proj),
        up=_linear(mlp.up_proj),
        down=_linear(mlp.down_proj),
        heads=None if own is None else (own.weight, attention.k_norm.weight, float(own.variance_epsilon)),
    )


def _linear(module: nn.Linear) -> Linear:
    return module.weight, module.bias


def _norm(module: Any) -> Norm:
    return module.weight, float(module.variance_epsilon)


def _alone(ids: Tensor, positions: Tensor, keep: Keep) -> AbstractContextManager[None]:
    """A forward pass of which nobody needs to be told."""
    return nullcontext()


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


def _inv_freq(model: Any, number: int) -> Tensor:
    """Radians per token by which keys of a layer turn (R/2,); empty in layers without positions."""
    config, rotary = model.config, model.base_model.rotary_emb
    single = getattr(rotary, "inv_freq", None)
    frequencies: Tensor = single if single is not None else getattr(rotary, f"{config.layer_types[number]}_inv_freq")
    rotates = getattr(config, "no_rope_layers", None)  # 1 where a layer rotates, whatever the name says
    return frequencies.detach().float()[: None if rotates is None or rotates[number] else 0]


def _locate(name: str) -> str:
    """The folder or id that `from_pretrained` takes."""
    if name == POCKET:
        return _pocket()
    looks_local = name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"The folder {name!r} holds no config.json; give the folder of a transformers model.")
        return str(path)
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
    """The device and dtype that `Backbone.load` takes for what was given, or for nothing."""
    target = _device(device) if device is not None else _best_device()
    if str(target) == "cuda":
        target = torch.device("cuda", torch.cuda.current_device())
    return target, _resolve_dtype(dtype, target)


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


def _resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | str:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    resolved = getattr(torch, dtype, None)
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ModelError(f"There is no dtype {dtype!r}; use float32, bfloat16 or float16.")
    return resolved


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
