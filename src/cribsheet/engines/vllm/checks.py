"""What must be so before vLLM answers from sheets: its version, the model, and how its caches are kept."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cribsheet.engines.same_model import rotary_of
from cribsheet.engines.vllm.file import ExportedSheet
from cribsheet.engines.vllm.weights import differing_weight
from cribsheet.errors import MismatchError, ModelError, RequestError, SheetError
from cribsheet.model.fingerprint import Fingerprint, rotary_scaling

_LOGGER = logging.getLogger(__name__)
VERSIONS = ("0.26", "0.32", "0.33")
"""Minor versions of vLLM whose connectors, scheduler and layout of caches were read; no others are let in."""


def check_version(version: str) -> None:
    """Raise `ModelError` for a version of vLLM whose interface was not read."""
    if not version.startswith(tuple(f"{known}." for known in VERSIONS)):
        raise ModelError(
            f"vLLM is {version}, and its interface of connectors changes from version to version; sheets were fitted "
            f"to {', '.join(VERSIONS)}. Install one of these."
        )


def opened(told: Any) -> dict[str, ExportedSheet]:
    """The sheets that the connector's settings name. Raises `RequestError` for others than names with files."""
    sheets = told.get("sheets") if isinstance(told, Mapping) else None
    if not isinstance(sheets, Mapping) or not sheets or not all(isinstance(each, str) for each in sheets.values()):
        raise RequestError(
            f"The connector's settings are {told!r}; use kv_connector_extra_config="
            '{"sheets": {NAME: FILE, ...}} with exported files.'
        )
    return {str(name): ExportedSheet.open(path) for name, path in sheets.items()}


def check_settings(config: Any, cache_config: Any, sheets: Mapping[str, ExportedSheet]) -> int:
    """How many tokens vLLM's blocks have. Raises `ModelError` for ways of keeping caches that sheets do not fit.

    `config` is its `VllmConfig`, and `cache_config` its `KVCacheConfig`.
    """
    if config.kv_transfer_config.kv_load_failure_policy != "fail":
        raise ModelError(
            "kv_load_failure_policy is 'recompute', and a sheet's ids mean nothing to a model that reads them; use "
            "'fail'."
        )
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if (count := getattr(config.parallel_config, name, 1)) > 1:
            raise ModelError(f"{name} is {count}, which divides a sheet's tokens; use tensor parallelism instead.")
    kinds = [group.kv_cache_spec for group in cache_config.kv_cache_groups]
    if len(kinds) != 1 or type(kinds[0]).__name__ != "FullAttentionSpec" or _slides(kinds[0]):
        named = ", ".join(type(kind).__name__ for kind in kinds)
        raise ModelError(
            f"The model's caches are of the kinds {named}; sheets go into layers that all see everything, without "
            "sliding windows, MLA or states."
        )
    if (
        int(getattr(kinds[0], "kv_quant_mode", 0))
        or not kinds[0].dtype.is_floating_point
        or kinds[0].dtype.itemsize < 2
    ):
        raise ModelError(
            f"vLLM's caches are quantised ({config.cache_config.cache_dtype}), in which sheets were not tested; start "
            "it with kv_cache_dtype='auto'."
        )
    block = int(kinds[0].block_size)
    for name, sheet in sheets.items():
        if sheet.tokens % block:
            raise SheetError(
                f"The sheet {name!r} has {sheet.tokens} tokens, no multiple of vLLM's blocks of {block}; start it with "
                f"block_size=16, or build the sheet with a budget that is a multiple of {block}."
            )
        if sheet.tokens >= config.model_config.max_model_len:
            raise SheetError(
                f"The sheet {name!r} takes {sheet.tokens} positions, and max_model_len is "
                f"{config.model_config.max_model_len}; raise it, or build the sheet at a higher rate."
            )
    return block


def check_model(model_config: Any, sheets: Mapping[str, ExportedSheet]) -> None:
    """Raise `MismatchError`, by name, if vLLM's model is another than one that made a sheet."""
    checked: list[Fingerprint] = []
    for name, sheet in sheets.items():
        made = sheet.fingerprint
        if made in checked:
            continue
        checked.append(made)
        for what, ours, theirs in _settings(made, model_config.hf_text_config):
            if ours != theirs:
                raise _refusal(name, made, what, ours, theirs, model_config)
        if getattr(model_config.hf_text_config, "quantization_config", None):
            _LOGGER.warning(
                "The weights of %s are quantised; take care that it was made of %s.", model_config.model, made.model
            )
            continue
        try:
            found = differing_weight(model_config.model, model_config.revision, made)
        except FileNotFoundError:
            _LOGGER.warning(
                "The weights of %s are not at hand as safetensors, so it cannot be known whether they made the sheet "
                "%r (%s).",
                *(model_config.model, name, made.model),
            )
        else:
            if found is not None:
                raise _refusal(name, made, f"weights ({found[0]})", f"{found[1]:.6g}", f"{found[2]:.6g}", model_config)


def _slides(kind: Any) -> bool:
    """Whether layers see only the last tokens."""
    return any(getattr(kind, name, None) is not None for name in ("sliding_window", "attention_chunk_size"))


def _settings(made: Fingerprint, loaded: Any) -> Iterator[tuple[str, Any, Any]]:
    """What must be the same, by name: as the sheet has it, and the configuration of vLLM's model."""
    heads = loaded.num_attention_heads
    rope = getattr(loaded, "rope_parameters", None) or {}
    yield "model family", made.family, loaded.model_type
    yield "number of layers", made.layers, loaded.num_hidden_layers
    yield "number of heads", made.heads, heads
    yield "number of key/value heads", made.kv_heads, getattr(loaded, "num_key_value_heads", None) or heads
    yield "head size", made.head_size, getattr(loaded, "head_dim", None) or loaded.hidden_size // heads
    kind, theta = rotary_of(made)
    yield "rotary scaling", kind, rope.get("rope_type", "default")
    base: Any = rope.get("rope_theta") or getattr(loaded, "rope_theta", 10000.0)
    yield "rotary base", theta, float(base)
    if made.rotary_scaling:
        yield "numbers of the rotary scaling", made.rotary_scaling, rotary_scaling(loaded)


def _refusal(name: str, made: Fingerprint, what: str, ours: object, theirs: object, model_config: Any) -> MismatchError:
    return MismatchError(
        f"vLLM serves another model ({Path(model_config.model).name}) than the one that made the sheet {name!r} "
        f"({made.model}), by its {what}: the sheet has {ours}, vLLM {theirs}. Serve the model that made it."
    )
