"""A sheet as vLLM's workers load it: a safetensors file with keys and values of each layer, and what made them.

Tensors `keys.N` and `values.N` (K, P, D), keys rotated for positions 0..P-1, in the sheet's float type. The metadata
hold, under `exported`, JSON: the `form` of the file, the sheet's `digest`, its `tokens` P, the `fingerprint` of the
model that made it, and what the tensors come to (`contents`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cribsheet.attention.prefix import LayerPrefix
from cribsheet.engines.placeholders import placeholders
from cribsheet.errors import SheetError
from cribsheet.model.fingerprint import Fingerprint
from cribsheet.sheet.atomic import writing
from cribsheet.sheet.tensors import digest_of

_FORM = 1
_AGAIN = "export it again with to='vllm'"


class _Told(BaseModel):
    """What the file says of itself."""

    model_config = ConfigDict(extra="forbid")

    form: int
    digest: str
    tokens: int = Field(ge=1, lt=1 << 31)
    fingerprint: Fingerprint
    contents: str


@dataclass(frozen=True)
class ExportedSheet:
    """An exported file. `ids` are those that stand for the sheet in a prompt, one for each of its tokens."""

    path: Path
    digest: str
    ids: tuple[int, ...]
    fingerprint: Fingerprint

    @classmethod
    def open(cls, path: str | Path) -> ExportedSheet:
        """Read what it says of itself, and that its tensors are those that were written. Raises `SheetError` if not."""
        try:
            with safe_open(path, "pt") as file:
                told = _Told.model_validate_json((file.metadata() or {})["exported"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValidationError) as error:
            why = f"{error.error_count()} of its fields are wrong" if isinstance(error, ValidationError) else error
            raise SheetError(f"{str(path)!r} is no sheet that was exported for vLLM ({why}); {_AGAIN}.") from error
        if told.form != _FORM:
            raise SheetError(f"{str(path)!r} has the form {told.form}, and {_FORM} is read here; {_AGAIN}.")
        made = told.fingerprint
        shape = (made.kv_heads, told.tokens, made.head_size)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if shapes != {f"{half}.{layer}": shape for half in ("keys", "values") for layer in range(made.layers)}:
            raise SheetError(f"The tensors of {str(path)!r} are not those of {made.layers} layers {shape}; {_AGAIN}.")
        if digest_of(tensors) != told.contents:
            raise SheetError(f"{str(path)!r} is damaged: its tensors are not those that were written; {_AGAIN}.")
        return cls(Path(path), told.digest, tuple(placeholders(told.digest, told.tokens)), made)

    @property
    def tokens(self) -> int:
        """Positions that it takes."""
        return len(self.ids)

    def rows(self, layer: int, heads: range, dtype: torch.dtype) -> Tensor:
        """(k, P, 2 * D) keys with values behind them of some heads of a layer, as vLLM's caches have them.

        Raises `SheetError` for numbers that the type does not hold.
        """
        with safe_open(self.path, "pt") as file:
            halves = [file.get_slice(f"{half}.{layer}")[heads.start : heads.stop] for half in ("keys", "values")]
        rows = torch.cat(halves, dim=-1)
        largest, most = float(rows.abs().max()), torch.finfo(dtype).max
        if not largest <= most:
            raise SheetError(
                f"The sheet {str(self.path)!r} has numbers up to {largest:.0f}, and vLLM's cache is {dtype}, which "
                f"holds {most:.0f}; start vLLM with dtype='bfloat16'."
            )
        return rows.to(dtype)


def write_exported(
    layers: Sequence[LayerPrefix], fingerprint: Fingerprint, digest: str, dtype: torch.dtype, path: Path
) -> None:
    """Write layers of one length, in a float type. Raises `SheetError` where it cannot be written."""
    tensors = {}
    for number, layer in enumerate(layers):
        tensors[f"keys.{number}"] = layer.keys.to("cpu", dtype).contiguous()
        tensors[f"values.{number}"] = layer.values.to("cpu", dtype).contiguous()
    told = {"form": _FORM, "digest": digest, "tokens": layers[0].keys.shape[1], "contents": digest_of(tensors)}
    metadata = {"exported": json.dumps({**told, "fingerprint": fingerprint.model_dump(mode="json")})}
    with writing(path, "The exported sheet") as unfinished:
        save_file(tensors, unfinished, metadata=metadata)
