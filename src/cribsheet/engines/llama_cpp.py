"""A sheet as a sequence state of llama.cpp: what its `llama_state_seq_load_file` and its server's slots restore.

Written as `llama-server` and `llama_state_seq_save_file` write it, of a cache in float16 with flash attention on, which
leaves values as they are. A file, all numbers little-endian:

    magic ggsq, version, P, P token ids      what the state is of
    1, P, and for each cell: position, 1, 0  one stream of P cells, each of sequence 0
    0, layers, 0, 0                          values are not transposed
    layers times: type 1, bytes a row, rows  keys (P, K * D), rotated for positions 0..P-1
    layers times: the same                   values

Ids are those of `placeholders.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cribsheet.attention.prefix import LayerPrefix
from cribsheet.engines.placeholders import placeholders
from cribsheet.engines.same_model import ARCHITECTURES
from cribsheet.errors import SheetError
from cribsheet.sheet.atomic import writing

VERSIONS = (4,)
"""Of the format; llama.cpp reads one only, 4 since version 0.26 (build 11549 was tested)."""

_MAGIC, _FLOAT16 = 0x67677371, 1
_PERMUTED = ("llama",)  # architectures whose files hold pairs of channels that turn together side by side


def write_state(
    layers: Sequence[LayerPrefix], family: str, digest: str, path: Path, *, version: int | None = None
) -> None:
    """Write layers of one length as a state. Raises `SheetError` for a version that was not tested."""
    known = ", ".join(map(str, VERSIONS))
    written = VERSIONS[-1] if version is None else version
    if type(written) is not int or written not in VERSIONS:
        raise SheetError(
            f"State files of llama.cpp of version {version!r} were not tested; use version {known}, and a llama.cpp "
            "that reads it (0.26 or newer)."
        )
    tokens = layers[0].keys.shape[1]
    permuted = ARCHITECTURES[family] in _PERMUTED
    keys = [_rows(_interleaved(layer.keys) if permuted else layer.keys) for layer in layers]
    values = [_rows(layer.values) for layer in layers]
    with writing(path, "The state") as unfinished, Path(unfinished).open("wb") as file:
        file.write(struct.pack("<III", _MAGIC, written, tokens))
        file.write(struct.pack(f"<{tokens}i", *placeholders(digest, tokens)))
        file.write(struct.pack("<II", 1, tokens))
        file.write(b"".join(struct.pack("<iIi", position, 1, 0) for position in range(tokens)))
        file.write(struct.pack("<IIII", 0, len(layers), 0, 0))
        for rows in (*keys, *values):
            file.write(struct.pack("<iQ", _FLOAT16, rows.shape[1] * rows.element_size()))
            file.write(rows.numpy().tobytes())


def _rows(heads: Tensor) -> Tensor:
    """(K, P, D) as rows of all heads (P, K * D), float16."""
    rows: Tensor = heads.transpose(0, 1).flatten(1).to(torch.float16).contiguous()
    return rows


def _interleaved(keys: Tensor) -> Tensor:
    """Keys (..., D) with the channels that turn together, half a head apart in transformers, side by side."""
    pairs: Tensor = keys.unflatten(-1, (2, -1)).transpose(-1, -2)
    return pairs.flatten(-2)
