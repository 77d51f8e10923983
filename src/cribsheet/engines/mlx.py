"""A sheet as a prompt cache of MLX-LM: what its `load_prompt_cache` reads.

A safetensors file with keys `N.0` and values `N.1` (1, K, P, D) of each layer, keys rotated for positions 0..P-1 in the
order of transformers; its metadata name the class of each layer's cache. Written by the format; there is no Mac here on
which an answer was seen.
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
    tensors = {
        f"{number}.{part}": half.unsqueeze(0).to("cpu", torch.float16).contiguous()
        for number, layer in enumerate(layers)
        for part, half in enumerate((layer.keys, layer.values))
    }
    metadata = {f"0.{number}": "" for number in range(len(layers))}
    metadata |= {"1.cribsheet": digest}
    metadata |= {f"2.{number}": "KVCache" for number in range(len(layers))}
    with writing(path, "The prompt cache") as unfinished:
        save_file(tensors, unfinished, metadata=metadata)
