"""Whether a GGUF file is the model that made a sheet: what both say of it, and tensors that both hold.

Norms and biases stay in float32 whatever a model is quantised to, so those that the sheet's fingerprint holds values of
are compared as they are. Weights that were trained further without touching these cannot be told apart.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from cribsheet.engines.gguf import Gguf
from cribsheet.errors import MismatchError, ModelError
from cribsheet.model.fingerprint import Fingerprint, probe_places

_LOGGER = logging.getLogger(__name__)
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's names of the families whose sheets it was seen to answer from as we do."""

ROTARIES = ("default", "llama3")
"""Kinds of rotary embedding with which it was."""

_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_TOLERANCE = 0.004  # relative: bfloat16 rounds by at most 0.2 %, and both may be rounded
_ROUNDING = 2e-6  # the fingerprint's values have six decimals


def check_same_model(gguf: Gguf, made: Fingerprint) -> None:
    """Raise `MismatchError`, by name, if a file is another model than the one with this fingerprint.

    Raises `ModelError` for one part of a divided file. Warns where a file holds nothing by which other weights of the
    same shape could be known.
    """
    if (parts := gguf.number("split.count")) > 1:
        raise ModelError(
            f"{str(gguf.path)!r} is one part of {parts}, and the tensors by which a model is known stand in all of "
            "them; join them with `llama-gguf-split`, and give that file."
        )
    for what, ours, theirs in (*_settings(gguf, made), *_scaled_otherwise(gguf, made)):
        if ours != theirs:
            _refuse(gguf, made, what, ours, theirs)
    if 0 < gguf.vocabulary < made.vocabulary:  # files have a token for each row of the embeddings, which may be more
        _refuse(gguf, made, "vocabulary", f"{made.vocabulary} tokens", gguf.vocabulary)
    differing = [list(_differing(gguf, made, tied=tied)) for tied in (False, True)]
    if all(differing):
        name, ours, theirs = min(differing, key=len)[0]
        _refuse(gguf, made, f"weights ({name})", f"{ours:.6g}", f"{theirs:.6g}")
    if not any(_compared(gguf, made, tied=True)):
        _LOGGER.warning(
            "%s holds no norm or bias as it is, so whether it has the weights of %s cannot be known; take care that it "
            "was converted from them.",
            gguf.path,
            made.model,
        )


def _settings(gguf: Gguf, made: Fingerprint) -> Iterator[tuple[str, Any, Any]]:
    """What must be the same, by name: as the sheet has it, and the file."""
    heads = gguf.count("attention.head_count")
    size = gguf.count("attention.key_length") or gguf.count("embedding_length") // max(1, heads)
    yield "model family", ARCHITECTURES.get(made.family, made.family), gguf.architecture
    yield "number of layers", made.layers, gguf.count("block_count")
    yield "number of heads", made.heads, heads
    yield "number of key/value heads", made.kv_heads, gguf.count("attention.head_count_kv", heads)
    yield "head size", made.head_size, size
    yield "share of a head that turns", size, gguf.count("rope.dimension_count", size)
    kind, theta = rotary_of(made)
    yield "rotary base", theta, gguf.of_model("rope.freq_base", 10000.0)
    theirs = "llama3" if "rope_freqs.weight" in gguf.tensors else gguf.of_model("rope.scaling.type", "none")
    yield "rotary scaling", {"default": "none"}.get(kind, kind), theirs


def _scaled_otherwise(gguf: Gguf, made: Fingerprint) -> Iterator[tuple[str, Any, Any]]:
    """Pairs of channels that the file turns at other speeds, where the sheet says how its own are scaled."""
    held = gguf.tensors.get("rope_freqs.weight")
    if held is None or not held.is_plain or not made.rotary_scaling:
        return
    ours = slower_by(made.rotary_scaling, rotary_of(made)[1], made.head_size)
    theirs = gguf.read("rope_freqs.weight").flatten().tolist()
    if len(ours) != len(theirs):
        yield "number of channels that turn", 2 * len(ours), 2 * len(theirs)
    for pair, (mine, its) in enumerate(zip(ours, theirs, strict=False)):
        if not agree(mine, its):
            yield f"rotary scaling of the pair of channels {pair}", f"{mine:.6g}", f"{its:.6g}"


def slower_by(scaling: Mapping[str, float], theta: float, size: int) -> list[float]:
    """How many times slower each pair of channels turns than without Llama 3's scaling.

    Those that turn within the `original_max_position_embeddings` often enough do not, those that turn seldom by the
    whole factor, and others by something between.
    """
    window, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = [window / (2 * math.pi * theta ** (2 * pair / size)) for pair in range(size // 2)]
    between = [min(1.0, max(0.0, (often - low) / (high - low))) for often in turns]
    return [1.0 / ((1.0 - share) / factor + share) for share in between]


def rotary_of(made: Fingerprint) -> tuple[str, float]:
    """Kind of rotary embedding and its base, as a fingerprint words them."""
    told = re.match(r"(\w+) theta=(\S+)", made.rotary)
    return (told[1], float(told[2])) if told and told[2] != "None" else (made.rotary, math.nan)


def _differing(gguf: Gguf, made: Fingerprint, *, tied: bool) -> Iterator[tuple[str, float, float]]:
    """Values that are not those of the sheet's model: name of the tensor, the sheet's value, and the file's."""
    for name, ours, theirs in _compared(gguf, made, tied=tied):
        if not agree(ours, theirs):
            yield name, ours, theirs


def agree(ours: float, theirs: float) -> bool:
    """Whether a value of a fingerprint is that of a file, as both may be rounded."""
    return math.isclose(ours, theirs, rel_tol=_TOLERANCE, abs_tol=_ROUNDING)


def _compared(gguf: Gguf, made: Fingerprint, *, tied: bool) -> Iterator[tuple[str, float, float]]:
    """Values of norms and biases that both hold. Files may have a head of their own where the model's is `tied`."""
    names = {ours: theirs for theirs in gguf.tensors if (ours := _module(theirs)) is not None}
    if tied:
        names.pop("lm_head.weight", None)
    held = sorted(names)
    shapes = [gguf.tensors[names[name]].shape for name in held]
    for (number, place), value in zip(probe_places(shapes), made.weights_probe, strict=False):
        name = names[held[number]]
        tensor = gguf.tensors[name]
        # Rows of queries and keys stand in another order in Llama's files, their biases too.
        moved = gguf.architecture == "llama" and name.endswith(("attn_q.bias", "attn_k.bias"))
        if len(tensor.shape) == 1 and tensor.is_plain and not moved:
            yield name, value, float(gguf.read(name)[place])


def _module(name: str) -> str | None:
    """A tensor's name in transformers; nothing for what is no parameter there."""
    if found := _IN_LAYER.fullmatch(name):
        module = _MODULES.get(found[2])
        return f"model.layers.{found[1]}.{module}.{found[3]}" if module else None
    return _OUTSIDE.get(name)


def _refuse(gguf: Gguf, made: Fingerprint, what: str, ours: object, theirs: object) -> None:
    raise MismatchError(
        f"{str(gguf.path)!r} is another model than the sheet's ({made.model}), by its {what}: the sheet has {ours}, "
        f"the file {theirs}. Give the GGUF of the model that made the sheet, or build the sheet with that file's model."
    )
