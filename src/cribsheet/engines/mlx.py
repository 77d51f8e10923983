"""A sheet as a prompt cache of MLX-LM: what its `load_prompt_cache` reads, as version 0.32.2 writes it.

A safetensors file with keys `N.0` and values `N.1` (1, K, P, D) of each layer, keys rotated for positions 0..P-1 in the
order of transformers, and P as `N.2`. Its metadata say where the sheet is from, which class each layer's cache has, and
which of the tensors are numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from cribsheet.attention.prefix import LayerPrefix
from cribsheet.sheet.atomic import writing


def write_prompt_cache(layers: Sequence[LayerPrefix], digest: str, path: Path) -> None:
    """Write layers of one length as a prompt cache, in float16. Raises `SheetError` where it cannot be written."""
    tensors, metadata = {}, {"0.sheet": digest, "2.0": ""}
    for number, layer in enumerate(layers):
        for part, half in enumerate((layer.keys, layer.values)):
            tensors[f"{number}.{part}"] = half.unsqueeze(0).to("cpu", torch.float16).contiguous()
        tensors[f"{number}.2"] = torch.tensor(layer.keys.shape[1], dtype=torch.int32)
        metadata |= {f"1.{number}": "KVCache"}
        metadata |= {f"2.{number + 1}.0": f"{number}.2", f"2.{number + 1}.1": "scalar"}
    with writing(path, "The prompt cache") as unfinished:
        save_file(tensors, unfinished, metadata=metadata)
