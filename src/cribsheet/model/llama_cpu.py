"""Passes of Llama-like models in bfloat16 on a CPU, whose weights lie as its bfloat16 instructions want them.

PyTorch lays the weights of a product out anew at every call, which takes longer than the product itself where rows are
few: a step in bfloat16 is then no faster than one in float32. So they are laid out once, in a second copy: together
with the model's own they take what float32 would.
As in `model/llama_step.py`, a model is taken only if all its parts are the plain ones, and small examples give what its
own layers give; for all others, and for gradients, its own layers stay.

Letters as in `attention/prefix.py`.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from cribsheet.attention.agreement import agrees, relative_error
from cribsheet.attention.cache import PrefixLayer, ReadingLayer
from cribsheet.attention.prefix import AttentionInputs, LayerPrefix
from cribsheet.kernels.products import laid_out, padded_rows, times
from cribsheet.kernels.threads import one_thread
from cribsheet.model.llama_weights import BOUND, Linear, LlamaLayer, LlamaWeights, Norm, is_plain
from cribsheet.model.support import head_size

logger = logging.getLogger(__name__)

LEAST_PARAMETERS = 100_000_000  # of smaller models, which are fast anyway, figures stay the same on all machines
_GAIN = 1.25  # times faster that reading must be
_MOST_SIDE = 2048  # entries of the matrices that are timed
_READ = 128  # rows of the product that stands for reading
_ROUNDS, _SECONDS = 3, 0.05  # how often products are timed at least, and for how long
_BEFORE, _CHECKED = 24, 8  # tokens of a small example: of the prefix, and new

Keep = int | Tensor  # logits wanted: of the last so many tokens, or of these places
Own = Callable[[Tensor, Tensor, list[PrefixLayer], Keep], Tensor]  # the model's own step


class PackedLinear:
    """Products of rows with weights (N, K) and biases (N,), one behind the other, laid out once for the processor."""

    def __init__(self, *parts: Linear) -> None:
        weights, biases = zip(*parts, strict=True)
        self._weight = laid_out(
            torch.cat([weight.detach() for weight in weights]) if parts[1:] else weights[0].detach()
        )
        held = [bias for bias in biases if bias is not None]
        if 0 < len(held) < len(parts):
            held = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in parts]
        self._bias = torch.cat([bias.detach() for bias in held]) if held else None

    def __call__(self, rows: Tensor) -> Tensor:
        """Products (..., N) of rows (..., K)."""
        return _product(rows, self._weight, self._bias)


class _PackedLayer:
    """One layer's products, and the norms between them."""

    def __init__(self, layer: LlamaLayer) -> None:
        self.before, self.between, self.qk_norms = layer.before, layer.between, layer.qk_norms
        self.qkv = PackedLinear(*layer.qkv)
        self.out, self.gate, self.up, self.down = map(PackedLinear, (layer.out, layer.gate, layer.up, layer.down))


class LlamaPass:
    """Forward passes with the weights of a Llama-like model, over any of our cache layers."""

    def __init__(self, weights: LlamaWeights) -> None:
        """Lay the weights out."""
        self.weights = weights
        self._layers = [_PackedLayer(layer) for layer in weights.layers]
        self._lm_head = PackedLinear((weights.lm_head, None))

    @torch.no_grad()
    def read(self, ids: Tensor, positions: Tensor, layers: Sequence[ReadingLayer]) -> None:
        """Read tokens (1, T) at their positions (1, T) into the layers; of the last only what is asked for is made."""
        self._run(ids, positions, layers, concluded=True)

    @torch.no_grad()
    def step(self, ids: Tensor, positions: Tensor, layers: Sequence[PrefixLayer], keep: Keep = 1) -> Tensor:
        """Logits (B, keep, V) of new tokens (B, T) at their positions (B, T), as `Backbone.step` gives them."""
        rows = self._run(ids, positions, layers, keep=keep)
        return self._lm_head(_normed(rows, self.weights.norm))

    def _run(
        self,
        ids: Tensor,
        positions: Tensor,
        layers: Sequence[PrefixLayer],
        *,
        keep: Keep = 0,
        concluded: bool = False,
    ) -> Tensor:
        rows = F.embedding(ids, self.weights.embed)
        cos, sin = (part.unsqueeze(1) for part in self.weights.turns(rows, positions))
        sin = torch.cat([-sin[..., : sin.shape[-1] // 2], sin[..., sin.shape[-1] // 2 :]], -1)
        for mine, layer in zip(self._layers, layers, strict=True):
            query, key, value = self._heads(mine, rows, cos, sin)
            is_last = layer is layers[-1]
            if concluded and is_last:
                cast(ReadingLayer, layer).conclude(query, key, value, self.weights.scale)
                break
            keys, values = layer.update(key, value)
            mask = _behind(query.shape[2], keys.shape[2], query.device)
            seen = layer.attend(AttentionInputs(query, keys, values, mask, self.weights.scale))
            seen = seen.transpose(1, 2).flatten(2)
            if is_last:  # nobody asks for the others
                rows, seen = _wanted(rows, keep), _wanted(seen, keep)
            rows = rows + mine.out(seen)
            inner = _normed(rows, mine.between)
            rows = rows + mine.down(F.silu(mine.gate(inner)) * mine.up(inner))
        return rows

    def _heads(self, mine: _PackedLayer, rows: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (B, H, T, D) and keys (B, K, T, D), and values."""
        weights = self.weights
        split = weights.heads, weights.kv_heads, weights.kv_heads
        made = mine.qkv(_normed(rows, mine.before)).unflatten(-1, (-1, weights.head_size))
        if mine.qk_norms is not None:
            query, key, value = made.split(split, 2)
            of_queries, of_keys, epsilon = mine.qk_norms
            made = torch.cat([_normed(query, (of_queries, epsilon)), _normed(key, (of_keys, epsilon)), value], 2)
        turned, value = made.transpose(1, 2).split((weights.heads + weights.kv_heads, weights.kv_heads), 1)
        query, key = _turned(turned, cos, sin).split(split[:2], 1)
        return query, key, value


def laid_out_bytes(weights: LlamaWeights) -> int:
    """Bytes of the second copy of a model's matrices."""
    each = ((*layer.qkv, layer.out, layer.gate, layer.up, layer.down) for layer in weights.layers)
    return weights.lm_head.nbytes + sum(weight.nbytes for layer in each for weight, _ in layer)


def _wanted(rows: Tensor, keep: Keep) -> Tensor:
    return rows[:, -keep:] if isinstance(keep, int) else rows[:, keep]


def _behind(rows: int, columns: int, device: torch.device) -> Tensor | None:
    """What new tokens see of themselves and of those before them; none where that is a square, or all."""
    if rows in (1, columns):
        return None
    return torch.arange(columns, device=device) <= torch.arange(columns - rows, columns, device=device)[:, None]


def _normed(rows: Tensor, norm: Norm) -> Tensor:
    gain, epsilon = norm
    wide = rows.float()
    return gain * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(rows.dtype)


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads (B, H, T, D) by cosines and sines, those of the first half negative."""
    return heads * cos + heads.roll(heads.shape[-1] // 2, -1) * sin


@torch.no_grad()
def _product(rows: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    flat = rows.flatten(0, -2)
    more = padded_rows(len(flat)) - len(flat)
    padded = F.pad(flat, (0, 0, 0, more)) if more else flat
    found = times(padded, weight, bias)
    return found[: len(flat)].view(*rows.shape[:-1], -1)


def cpu_pass(weights: LlamaWeights, name: str, own: Own) -> LlamaPass | None:
    """Passes that agree with the model's `own` step; none where they do not, or cannot be made."""
    made: list[LlamaPass] = []

    def check() -> dict[str, float]:
        made.append(LlamaPass(weights))
        return errors(made[0], own)

    return made[0] if agrees(f"products in bfloat16 laid out for {name}", check, BOUND) else None


def errors(mine: LlamaPass, own: Own) -> dict[str, float]:
    """Relative L2 errors on a small random example: of the logits of a first read and of one behind it."""
    weights, generator = mine.weights, torch.Generator().manual_seed(0)
    like = weights.embed

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(like.device, like.dtype)

    shape = (weights.kv_heads, _BEFORE, weights.head_size)
    prefix = [LayerPrefix(random(*shape), random(*shape)) for _ in weights.layers]
    ids = torch.randint(0, len(weights.embed), (1, 2 * _CHECKED), generator=generator)
    places = torch.arange(_BEFORE, _BEFORE + 2 * _CHECKED).unsqueeze(0)
    runs: list[Own] = [lambda i, p, layers, keep: mine.step(i, p, layers, keep), own]
    found = []
    for run in runs:
        layers = [PrefixLayer(layer, _BEFORE) for layer in prefix]
        parts = zip(ids.split(_CHECKED, 1), places.split(_CHECKED, 1), strict=True)
        found.append([run(one, place, layers, 4) for one, place in parts])
    names = ("a first read", "a second read")
    return {name: relative_error(*pair) for name, pair in zip(names, zip(*found, strict=True), strict=True)}


def chosen_dtype(config: Any) -> torch.dtype:
    """The type in which to compute on this processor where nobody says one: float32, or bfloat16 if that is faster.

    Only for checkpoints in bfloat16, of which no weight is rounded, and for models that `LlamaPass` takes. Products are
    timed on matrices of the model's shape, on one thread, in a tenth of a second.
    """
    stored = str(getattr(config, "dtype", None)).removeprefix("torch.")
    quantised = getattr(config, "quantization_config", None) is not None  # whose products are other ones
    if stored != "bfloat16" or quantised or not is_plain(config) or parameters(config) < LEAST_PARAMETERS:
        return torch.float32
    sides = (min(side, _MOST_SIDE) for side in (config.hidden_size, config.intermediate_size))
    return torch.bfloat16 if _is_faster(*sides) else torch.float32


def may_be_copied(config: Any, dtype: torch.dtype) -> bool:
    """Whether a model whose type nobody said may be held twice: in bfloat16, or in any type if it is small."""
    return dtype == torch.bfloat16 or (is_plain(config) and parameters(config) < LEAST_PARAMETERS)


def parameters(config: Any) -> int:
    """About how many weights a Llama-like model has."""
    width, attended = config.hidden_size, head_size(config) * (config.num_attention_heads + config.num_key_value_heads)
    layer: int = width * (2 * attended + 3 * config.intermediate_size)
    return config.num_hidden_layers * layer + config.vocab_size * width  # type: ignore[no-any-return]


@functools.cache
def _is_faster(width: int, inner: int) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    weight, rows = (torch.ones(length, width, dtype=torch.float32, device="cpu") for length in (inner, _READ))
    try:
        with one_thread():  # several wait for each other where others want the processors, whatever the type
            packed = laid_out(weight.bfloat16())
            halves = rows.bfloat16()
            read = _gain(lambda: F.linear(rows, weight), lambda: _product(halves, packed, None))
            step = _gain(lambda: F.linear(rows[:1], weight), lambda: _product(halves[:1], packed, None))
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        logger.info("bfloat16 cannot be tried on this processor, so float32 stays: %s", error)
        return False
    logger.info("bfloat16 against float32 on this processor: reading %.1f times as fast, a step %.1f", read, step)
    return read >= _GAIN and step >= 1


def _gain(slow: Callable[[], Tensor], fast: Callable[[], Tensor]) -> float:
    """How many times as fast, each at its best: they take turns, so that a neighbour is in the way of both."""
    for product in (slow, fast):
        product()
    times: list[tuple[float, float]] = []
    began = time.perf_counter()
    while len(times) < _ROUNDS or time.perf_counter() - began < _SECONDS:
        times.append((_seconds(slow), _seconds(fast)))
    return min(one for one, _ in times) / min(other for _, other in times)


def _seconds(product: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    product()
    return time.perf_counter() - began
