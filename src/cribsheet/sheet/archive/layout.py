"""How an archive lies in its file: token by token, in blocks that have digests of their own.

A row is a token with all of its layers and heads, so that a stretch of tokens is one stretch of each tensor, read in
one go. Numbers are those that a sheet of the same storage type holds (`sheet/layers.py`), keys before rotation. In
int4, keys share their channels' ranges over a block of tokens; blocks are cut where what was read in one pass ends, so
a block is written once and is never touched again, and a document that was read alone has blocks of its own.

Letters: `N` tokens, `B` blocks, `L` layers, `K` key/value heads, `D` head size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from cribsheet.attention.prefix import LayerPrefix
from cribsheet.sheet.layers import StoredLayer, form_of
from cribsheet.sheet.manifest import Manifest
from cribsheet.sheet.tensors import Kind, header_of
from cribsheet.vocabulary import StorageDtype

FORMAT = 1
SUFFIX = ".archive"
ABOUT = "cribsheet_archive"  # in the file's metadata
DIGEST = 32  # bytes, of SHA-256
_BLOCKS = "key_blocks"  # a tensor of int4 layers that says what `blocks` says for all of them
_SMALL = ("origins", "blocks", "digests")

Parts = Mapping[str, Tensor]  # rows of the large tensors, by name


@dataclass(frozen=True)
class Layout:
    """The shape of one archive; `blocks` (B,) are the tokens of each block, one behind the other."""

    layers: int
    heads: int
    head_size: int
    dtype: StorageDtype
    blocks: Sequence[int]

    @cached_property
    def ends(self) -> list[int]:
        """Where blocks begin, and the last one ends (B + 1,)."""
        return list(accumulate(self.blocks, initial=0))

    @property
    def tokens(self) -> int:
        """In all blocks."""
        return self.ends[-1]

    @cached_property
    def _sample(self) -> dict[str, Tensor]:
        """What one token is in one layer."""
        token = torch.zeros(self.heads, 1, self.head_size)
        tensors = StoredLayer.of(LayerPrefix(token, token), self.dtype).tensors()
        return {name: tensor for name, tensor in tensors.items() if name != _BLOCKS}

    def is_of_blocks(self, name: str) -> bool:
        """Whether a tensor has a row for each block rather than for each token."""
        return name in getattr(form_of(self.dtype), "of_blocks", ())

    @cached_property
    def rows(self) -> dict[str, Kind]:
        """Type and shape of one row of each large tensor."""
        found = {}
        for name, tensor in self._sample.items():
            inner = tensor.shape[1:] if self.is_of_blocks(name) else tensor.shape[2:]
            found[name] = Kind(tensor.dtype, (self.layers, self.heads, *inner))
        return found

    @cached_property
    def tensors(self) -> dict[str, Kind]:
        """Type and shape of each tensor of the file."""
        blocks = len(self.blocks)
        small = {
            "origins": Kind(torch.int32, (self.tokens, 3)),
            "blocks": Kind(torch.uint8, (blocks,)),
            "digests": Kind(torch.uint8, (blocks, DIGEST)),
        }
        large = {
            name: Kind(row.dtype, (blocks if self.is_of_blocks(name) else self.tokens, *row.shape))
            for name, row in self.rows.items()
        }
        return small | large

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says of itself."""
        about = {"format": FORMAT, "dtype": self.dtype, "tokens": self.tokens}
        return {"format": "pt", ABOUT: json.dumps(about)}

    @property
    def header(self) -> bytes:
        """What stands in the file before the tensors."""
        return header_of(self.tensors, self.metadata)

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(kind.nbytes for kind in self.tensors.values())

    def fits(self, manifest: Manifest) -> bool:
        """Whether it is the shape of an archive of such a sheet."""
        made = manifest.fingerprint
        shape = (self.layers, self.heads, self.head_size, self.tokens)
        return shape == (made.layers, made.kv_heads, made.head_size, manifest.corpus_tokens)

    def parts_of(self, layers: Sequence[StoredLayer]) -> dict[str, Tensor]:
        """All layers of tokens (K, n, ...) that fill blocks, as rows: (n, L, K, ...), or (b, L, K, ...) of blocks."""
        found = {}
        for name in self.rows:
            stacked = torch.stack([getattr(layer, name) for layer in layers])
            if self.is_of_blocks(name):
                stacked = stacked.unflatten(1, (self.heads, -1))
            found[name] = stacked.permute(2, 0, 1, *range(3, stacked.dim())).contiguous()
        return found

    def layers_of(self, parts: Parts, sizes: Sequence[int]) -> list[StoredLayer]:
        """The layers of rows in blocks of these sizes, each with keys and values (K, n, ...)."""
        form, found = form_of(self.dtype), []
        for number in range(self.layers):
            tensors: dict[str, Any] = {name: rows[:, number].transpose(0, 1) for name, rows in parts.items()}
            for name in tensors:
                if self.is_of_blocks(name):
                    tensors[name] = tensors[name].flatten(0, 1)
            if _BLOCKS in form.names:
                tensors[_BLOCKS] = torch.tensor(list(sizes) * self.heads, dtype=torch.uint8)
            found.append(form(**tensors))
        return found

    def block_of(self, parts: Parts, block: int, first: int) -> dict[str, Tensor]:
        """The rows of one block, of those of several from block `first` on."""
        start, stop = (self.ends[number] - self.ends[first] for number in (block, block + 1))
        return {
            name: rows[block - first : block - first + 1] if self.is_of_blocks(name) else rows[start:stop]
            for name, rows in parts.items()
        }

    def block_digest(self, parts: Parts) -> bytes:
        """SHA-256 of all bytes of one block, tensors in the order of their names."""
        digest = hashlib.sha256()
        for name in sorted(parts):
            digest.update(parts[name].contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.digest()


def root_digest(header: bytes, small: Parts) -> str:
    """What a manifest says of its archive: SHA-256 of its header, of where its tokens came from, and of all digests."""
    digest = hashlib.sha256(header)
    for name in _SMALL:
        digest.update(small[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
