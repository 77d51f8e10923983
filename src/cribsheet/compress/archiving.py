"""All tokens of a corpus to an archive, chunk by chunk, as the loop reads them and before it chooses.

No more than a few blocks are held at once, so memory does not grow with corpus or chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cribsheet.attention.cache import ReadingLayer
from cribsheet.attention.prefix import LayerPrefix
from cribsheet.attention.rope import rotate
from cribsheet.model.backbone import Backbone
from cribsheet.prompt.chunks import Chunk
from cribsheet.sheet.archive.writer import ArchiveWriter
from cribsheet.sheet.int4 import BLOCK
from cribsheet.sheet.layers import StoredLayer
from cribsheet.vocabulary import StorageDtype

AT_ONCE = 4 * BLOCK  # tokens that are in memory while they are written


class Archiving:
    """Writes what is read to `writer`, whose next token is the one at `first` of the corpus."""

    def __init__(self, backbone: Backbone, writer: ArchiveWriter, first: int) -> None:
        self._backbone, self._writer, self._ahead = backbone, writer, first - writer.tokens

    def __call__(self, chunk: Chunk, layers: Sequence[ReadingLayer]) -> None:
        """Write a chunk, as it was read by all layers of the model."""
        while (start := self._writer.tokens + self._ahead) < chunk.stop:
            stop = self._writer.reach(min(start + AT_ONCE, chunk.stop) - self._ahead) + self._ahead
            self._writer.append(
                [
                    _stored(layer, start - chunk.start, stop - chunk.start, inv_freq, self._writer.layout.dtype)
                    for layer, inv_freq in zip(layers, self._backbone.inv_freqs, strict=True)
                ]
            )


def _stored(read: ReadingLayer, first: int, stop: int, inv_freq: Tensor, dtype: StorageDtype) -> StoredLayer:
    """Tokens `first` to `stop` of a chunk in one layer, keys before rotation."""
    places = torch.arange(read.start + first, read.start + stop, device=read.chunk_keys.device)
    keys = rotate(read.chunk_keys[:, first:stop], -places, inv_freq)
    return StoredLayer.of(LayerPrefix(keys, read.chunk_values[:, first:stop]), dtype)
