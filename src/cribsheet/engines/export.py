"""A sheet as a file of another engine: what all of them ask of it, and who writes which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch

from cribsheet.engines.gguf import Gguf
from cribsheet.engines.llama_cpp import write_state
from cribsheet.engines.mlx import write_prompt_cache
from cribsheet.engines.same_model import ARCHITECTURES, ROTARIES, check_same_model, rotary_of
from cribsheet.engines.vllm.file import write_exported
from cribsheet.errors import SheetError

if TYPE_CHECKING:
    from cribsheet.attention.prefix import LayerPrefix
    from cribsheet.sheet.layers import StoredLayer
    from cribsheet.sheet.manifest import Manifest

EngineName = Literal["llama.cpp", "mlx", "vllm"]
_AGAIN = "build it again with for_engines=True"
_FLOATS = {"bfloat16": torch.bfloat16, "float32": torch.float32}  # in which vLLM's file is as the sheet is


def export(
    made: Manifest,
    layers: Sequence[StoredLayer],
    path: str | Path,
    *,
    to: EngineName,
    version: int | None = None,
    gguf: str | Path | None = None,
) -> Path:
    """Write the layers of a sheet, of which `made` tells, as the file of an engine; whole or not at all.

    `version` is that of llama.cpp's format, the newest by default. With `gguf` that file must be the model that made
    the sheet. Raises `SheetError` for a sheet that the engine cannot take, and `MismatchError` for another model.
    """
    if to not in get_args(EngineName):
        raise SheetError(f"There is no engine {to!r}; use {', '.join(get_args(EngineName))}.")
    if to != "llama.cpp" and (version is not None or gguf is not None):
        raise SheetError(f"version and gguf are llama.cpp's, and the file is for {to}; leave them out.")
    check_exportable(made, to)
    if gguf is not None:
        check_same_model(Gguf.open(gguf), made.fingerprint)
    target = Path(path)
    if not target.parent.is_dir():
        raise SheetError(f"The folder {str(target.parent)!r} does not exist; create it first.")
    restored = [layer.restored(torch.device("cpu"), torch.float32) for layer in layers]
    if to == "vllm":
        write_exported(restored, made.fingerprint, made.digest, _FLOATS.get(made.dtype, torch.float16), target)
        return target
    _check_float16(restored, to)
    if to == "mlx":
        write_prompt_cache(restored, made.digest, target)
    else:
        write_state(restored, made.fingerprint.family, made.digest, target, version=version)
    return target


def check_exportable(made: Manifest, to: str) -> None:
    """Raise `SheetError`, with the way out, for a sheet that no engine but ours can read."""
    if made.fingerprint.family not in ARCHITECTURES:
        raise SheetError(
            f"{to} was not seen to answer from sheets of {made.fingerprint.family!r} models; use one of "
            f"{', '.join(ARCHITECTURES)}."
        )
    if made.allocation != "uniform":
        raise SheetError(
            f"The heads of this sheet keep different numbers of tokens (allocation {made.allocation!r}), and {to} has "
            f"one length for all layers and heads; {_AGAIN}."
        )
    if not made.rotated:
        stored = "int4" if made.dtype == "int4" else "an independent sheet"
        raise SheetError(f"Keys of {stored} are stored before rotation, and {to} reads them rotated; {_AGAIN}.")
    if (kind := rotary_of(made.fingerprint)[0]) not in ROTARIES:
        raise SheetError(
            f"Rotary embeddings of {made.fingerprint.model} are scaled ({kind}), and {to} was not seen to answer from "
            "sheets of such models; use a model without that."
        )
    if any(window is not None for window in made.fingerprint.windows):
        raise SheetError(
            f"Some layers of {made.fingerprint.model} see only the last tokens, for which {to} has a cache of another "
            "form that was not tested; use a model without sliding windows."
        )


def _check_float16(layers: Sequence[LayerPrefix], to: str) -> None:
    """Raise `SheetError` for numbers that float16, in which all engines' files are, does not hold."""
    largest = max(float(half.abs().max()) for layer in layers for half in (layer.keys, layer.values))
    if not largest <= torch.finfo(torch.float16).max:
        raise SheetError(
            f"The sheet has numbers up to {largest:.0f}, and caches of {to} are float16, which holds 65,504; no other "
            "engine's file can be written of it."
        )
