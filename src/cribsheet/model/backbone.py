"""The model underneath: loading it, and forward passes.

Which models are taken is in `model/support.py`, how our attention gets into them in `model/registration.py`.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache

from cribsheet.attention.agreement import finding_out, is_in_a_hurry
from cribsheet.attention.cache import PrefixLayer, ReadingLayer, cache_of
from cribsheet.attention.prefix import LayerPrefix
from cribsheet.errors import ModelError
from cribsheet.kernels.codes import PACKS_FROM
from cribsheet.kernels.products import are_there
from cribsheet.kernels.threads import one_thread, pays_to_divide
from cribsheet.model.llama_cpu import LlamaPass, chosen_dtype, cpu_pass, laid_out_bytes, may_be_copied
from cribsheet.model.llama_read import LlamaRead, fast_read
from cribsheet.model.llama_weights import LlamaWeights, Unchanged, llama_weights
from cribsheet.model.registration import Attachment
from cribsheet.model.support import check_supported, head_size, inv_freq, layer_windows, located, resolved

logger = logging.getLogger(__name__)

_LEAST = 16  # tokens from which reads are those of few kernels
_SAMPLES = 16  # values looked at in each weight tensor
Inputs = tuple[Tensor, Tensor, Cache]  # of a step: tokens (B, T), their positions (B, T), and what they see
Keep = int | Tensor | None  # logits wanted: of the last so many tokens, of these places, or of none


class Backbone:
    """A causal language model with its tokenizer, as the rest of the library sees it.

    The model itself is only borrowed: attention function and training mode are ours during a forward pass and its
    own again after it.

    Attributes: `name` (what it was loaded from), `revision`, `num_layers`, `num_heads`, `kv_heads`, `head_size`,
    `window` (positions it was made for), `device`, `dtype`; and for each layer `inv_freqs` (R/2,), radians a token
    that its keys turn by, and `windows`, how many tokens a token sees (none: all of them). `full` are the numbers of
    the layers that see everything: the ones that are condensed. `may_copy` says that on a CPU weights may be held a
    second time, laid out for the processor.
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
        self.head_size: int = head_size(config)
        self.window: int = config.max_position_embeddings
        self.windows = layer_windows(config)
        self.full = [number for number, window in enumerate(self.windows) if window is None]
        self.inv_freqs = [inv_freq(model, number) for number in range(self.num_layers)]
        self.softcap: float | None = getattr(config, "attn_logit_softcapping", None)
        takes = inspect.signature(type(model).forward).parameters
        self._cache_name = "cache" if "cache" in takes else "past_key_values"  # its name before transformers 5.24
        self._attachment = Attachment.of(model)
        self.may_copy = False
        self.packs_from = PACKS_FROM  # may be set before a sheet is opened; 0 is all of them
        self._laid_out: LlamaPass | None = None
        self._unchanged: Unchanged | None = None  # since weights were laid out
        self._samples: Tensor | None = None  # of the weights, while nobody changes them
        self._inside = 0  # how many say so
        self._are_sampled = True  # or are being sampled
        self._sampling = threading.Lock()

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        **model_options: Any,
    ) -> Self:
        """Load a model from a local folder, a hub id, or `"pocket"`.

        `device` defaults to cuda, then mps, then cpu; `dtype` to the checkpoint's own on an accelerator, and on a CPU
        to float32, or to bfloat16 for a Llama-like checkpoint in it if the processor is faster so: its matrices are
        then held twice (`model/llama_cpu.py`), in the memory that float32 would take. `model_options` go to
        `from_pretrained` (`quantization_config`, `device_map`, ...). Raises `ModelError` for what cannot be loaded or
        is not supported, before any weights are read where possible.
        """
        source = located(str(name))
        try:
            config = AutoConfig.from_pretrained(source, revision=revision)
        except (OSError, ValueError, TypeError, StrictDataclassError) as error:  # no mapping: a TypeError up to 5.4
            raise ModelError(f"There is no usable model at {str(name)!r}: {_first_line(error)}") from error
        check_supported(config)
        target, kind = resolved(device, dtype)
        placed = "device_map" in model_options or "quantization_config" in model_options
        chosen = kind == "auto" and target.type == "cpu"
        alone = not placed and "distributed_config" not in model_options  # processes of one model must agree
        if chosen:
            kind = chosen_dtype(config) if alone else torch.float32
        own = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"  # stock SDPA ignores softcaps
        options: dict[str, Any] = {"attn_implementation": own, "revision": revision, **model_options}
        options["dtype"] = kind
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
            model = AutoModelForCausalLM.from_pretrained(source, **options)
        except (OSError, ValueError, ImportError) as error:  # an ImportError: what quantisation or device_map needs
            raise ModelError(f"The model at {str(name)!r} cannot be loaded: {_first_line(error)}") from error
        if not placed:
            model = model.to(target)
        backbone = cls(model, tokenizer, name=str(name), revision=revision)
        if chosen and kind == torch.bfloat16:
            logger.info("%s is computed in bfloat16, which is faster on this processor than float32", name)
        backbone.may_copy = chosen and alone and may_be_copied(config, backbone.dtype)
        return backbone

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
        step: Callable[[], None] | None = None,
    ) -> list[ReadingLayer]:
        """Read `[chunk; guide]` on top of a prefix of `start` tokens; the language-model head is not run.

        `chunk` (c,) and `guide` (T,) are token ids; T may be 0. Returns one layer each with the chunk's keys and values
        and the guide's queries and log-sum-exps. By few kernels where that pays and agrees with the model's own pass.
        `step` is called at each layer.
        """
        layers = [ReadingLayer(layer, start, len(guide), step) for layer in prefix]
        ids = torch.cat([chunk, guide]).to(self.device, non_blocking=True).unsqueeze(0)
        positions = torch.arange(start, start + ids.shape[1], device=self.device).unsqueeze(0)
        if (laid_out := self.laid_out()) is not None:
            with self.threads(ids, start):
                laid_out.read(ids, positions, layers)
            return layers
        fast = self.found_read() if ids.shape[1] >= _LEAST else None
        (fast or self.read_by_own_layers)(ids, positions, layers)
        if not self._are_sampled and self.device.type == "cuda" and not self.in_step:
            self._are_sampled = True
            threading.Thread(target=self._sample_meanwhile, name="cribsheet-weights", daemon=True).start()
        return layers

    def laid_out(self) -> LlamaPass | None:
        """Passes with weights laid out for a CPU, made and checked at the first use; none where they may not be.

        They are made anew when anybody has changed the weights, and no more when something was put into the model.
        """
        if self._laid_out is not None and self._unchanged:
            return self._laid_out
        if self.may_copy:
            self.may_copy, self._laid_out = False, None  # the model's own layers serve while they are checked
            self._unchanged = Unchanged(self.model)  # before it is copied: what changes meanwhile is seen
            weights = self.plain_weights() if self.device.type == "cpu" and are_there(self.dtype) else None
            self._laid_out = cpu_pass(weights, self.name, self._over) if weights else None
            self.may_copy = self._laid_out is not None
        return self._laid_out

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights, with those that are or will be laid out for a CPU."""
        weights = self.plain_weights() if self.may_copy else None
        own: int = sum(weight.nbytes for weight in self.model.parameters())
        return own + (laid_out_bytes(weights) if weights else 0)

    def _over(self, ids: Tensor, positions: Tensor, layers: list[PrefixLayer], keep: int | Tensor) -> Tensor:
        return self.step(ids, positions, cache_of(layers), keep)

    @cached_property
    def fast_read(self) -> LlamaRead | None:
        """A read of few kernels, checked at the first use; none where the model's own layers must be used."""
        weights = self.plain_weights() if self.device.type == "cuda" else None
        if weights is None:
            return None
        return fast_read(weights, self.name, self.read_by_own_layers, self.step, self.tokenizer)

    def found_read(self) -> LlamaRead | None:
        """`fast_read`; none in a hurry, until it was found out."""
        if "fast_read" not in vars(self) and not is_in_a_hurry():
            with finding_out:
                return self.fast_read
        found: LlamaRead | None = vars(self).get("fast_read")
        return found

    def plain_weights(self) -> LlamaWeights | None:
        """The weights of a Llama-like model that nobody has put anything into; none of any other."""
        return llama_weights(self.model)

    @torch.no_grad()
    def read_by_own_layers(self, ids: Tensor, positions: Tensor, layers: Sequence[ReadingLayer]) -> None:
        """Read tokens (1, T) at their positions (1, T) into cache layers, by the model's own layers."""
        start = layers[0].start
        with self.threads(ids, start), self.announced(ids, positions, None), self.attached():
            given = self.cached(Cache(layers=list(layers)))
            self.model.base_model(input_ids=ids, position_ids=positions, use_cache=True, **given)

    def announced(self, ids: Tensor, positions: Tensor, keep: Keep) -> AbstractContextManager[None]:
        """A forward pass, of which nobody needs to be told; `model/divided.py` tells the other processes."""
        return nullcontext()

    @property
    def in_step(self) -> bool:
        """Whether other processes make the same passes in the same order, so that nobody may make one in between."""
        return False

    def threads(self, ids: Tensor, before: int) -> AbstractContextManager[None]:
        """On a CPU, one thread for a pass of new tokens (B, T) behind so many others that is too small to be divided.

        It is the number of the calling thread alone, which has its own again afterwards.
        """
        if self.device.type != "cpu":
            return nullcontext()
        query_size, kv_size = self.num_heads * self.head_size, self.kv_heads * self.head_size
        divided = pays_to_divide(ids.numel(), self._weights_of_a_layer, query_size, kv_size, before)
        return nullcontext() if divided else one_thread()

    @cached_property
    def _weights_of_a_layer(self) -> int:
        """How many weights a step reads for each layer, those of the output shared out among them."""
        weights: int = sum(weight.numel() for weight in self.model.parameters())
        return weights // self.num_layers

    def cached(self, cache: Cache) -> dict[str, Cache]:
        """A cache as an argument of the model, and of its `generate`, by the name that this transformers has for it."""
        return {self._cache_name: cache}

    def wait(self) -> None:
        """Come back when an accelerator has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def step(
        self, ids: Tensor, positions: Tensor, cache: Cache, keep: int | Tensor = 1, *, grad: bool = False
    ) -> Tensor:
        """Run new tokens (B, T) at `positions` (B, T) over a cache: logits (B, keep, V) of the last `keep` tokens.

        As a tensor (n,), `keep` names the places of the tokens whose logits are wanted. With `grad` the caller may take
        gradients.
        """
        grad = grad and torch.is_grad_enabled()
        threads = self.threads(ids, cache.get_seq_length())
        if not grad and (laid_out := self.laid_out()) is not None:
            with threads:
                return laid_out.step(ids, positions, cache.layers, keep)
        with threads, torch.set_grad_enabled(grad), self.announced(ids, positions, keep), self.attached():
            logits: Tensor = self.model(
                input_ids=ids.to(self.device),
                position_ids=positions.to(self.device),
                use_cache=True,
                logits_to_keep=keep,
                **self.cached(cache),
            ).logits
        return logits

    def weight_samples(self) -> Tensor:
        """A few values (N,) of each weight, in float32; of a divided model all processes take them together."""
        with self._sampling:
            samples = _all_samples(self.model) if self._samples is None else self._samples
            if self._inside:
                self._samples = samples
        return samples

    @contextmanager
    def unchanging(self) -> Iterator[None]:
        """Nobody changes the weights inside: they are sampled once, on a GPU while that reads what is read first."""
        with self._sampling:
            self._inside += 1
            self._are_sampled = False
        try:
            yield
        finally:
            with self._sampling:
                self._inside -= 1
                if not self._inside:
                    self._samples, self._are_sampled = None, True

    def _sample_meanwhile(self) -> None:
        with suppress(Exception):  # whoever asks for them hears of it
            self.weight_samples()

    @cached_property
    def scale(self) -> float:
        """Factor of the attention logits."""
        scaling: float = self.model.base_model.layers[0].self_attn.scaling
        return scaling


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """The tokenizer of a model, or of a folder that holds nothing else. Raises `ModelError` if there is none."""
    source = name if Path(name).is_dir() else located(name)
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise ModelError(f"There is no usable tokenizer at {name!r}: {_first_line(error)}") from error


def _all_samples(model: Any) -> Tensor:
    samples = list(_weight_samples(model))
    if len({(each.device, each.dtype) for each in samples}) > 1:
        samples = [each.float().cpu() for each in samples]
    return torch.cat(samples).float().cpu()  # a GPU is waited for once


def _weight_samples(model: Any) -> Iterator[Tensor]:
    places: dict[tuple[int, torch.device], Tensor] = {}
    for _, weight in sorted(model.named_parameters()):
        if weight.device.type == "meta" or not weight.is_floating_point():
            continue
        plain = weight.detach()
        if hasattr(plain, "full_tensor"):  # divided among processes
            plain = plain.full_tensor()
        if type(plain) is not Tensor:  # quantised weights in a class of their own know few operations
            plain = plain.dequantize()
        flat = plain.reshape(-1)
        size = flat.numel(), flat.device
        if size not in places:
            places[size] = sample_places(flat.numel()).to(flat.device)
        yield flat.index_select(0, places[size])


def sample_places(numbers: int) -> Tensor:
    """Which of a weight's numbers, in a row, are its samples."""
    return torch.linspace(0, numbers - 1, _SAMPLES, dtype=torch.float64).long()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
