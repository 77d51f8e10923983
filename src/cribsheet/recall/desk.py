"""What of an archive lies on the model's device: the blocks that were used last, up to a bound in bytes.

Whoever asks about the same pages asks for the same blocks: those that lie there already are not read again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch

from cribsheet.model.backbone import Backbone
from cribsheet.recall.placing import Piece, Recalled
from cribsheet.sheet.archive.archive import Archive

DESK_BYTES = 512 * 1024**2
BLOCK = 128  # tokens that are fetched and dropped together


class Desk:
    """At most `max_bytes` of an archive on the model's device, in its dtype. Thread-safe; the bound may be set anew.

    `hits` counts blocks that lay there when they were asked for, `reads` those that were fetched.
    """

    def __init__(self, archive: Archive, backbone: Backbone, max_bytes: int = DESK_BYTES) -> None:
        self.archive = archive
        self.hits = self.reads = 0
        self._backbone, self._max_bytes = backbone, max_bytes
        self._blocks: OrderedDict[int, Piece] = OrderedDict()
        self._lock, self._reading = threading.Lock(), threading.Lock()

    def take(self, stretches: Sequence[tuple[int, int]]) -> Recalled:
        """Tokens [first, stop) of the corpus, stretch by stretch. Raises `SheetError` if they cannot be read."""
        wanted = sorted({number for first, stop in stretches for number in range(first // BLOCK, -(-stop // BLOCK))})
        blocks = self._held(wanted)
        if len(blocks) < len(wanted):
            with self._reading:  # whoever waits here may find on the desk what another one has fetched meanwhile
                missing = [number for number in wanted if number not in blocks]
                blocks |= self._held(missing)
                missing = [number for number in missing if number not in blocks]
                for run in _runs(missing):
                    blocks |= self._fetched(run)
                self._lay({number: blocks[number] for number in missing})
        pieces = [piece for first, stop in stretches for piece in _between(blocks, first, stop)]
        return Recalled(pieces, [stop - first for first, stop in stretches], self._backbone.inv_freqs)

    @property
    def max_bytes(self) -> int:
        """The bound."""
        return self._max_bytes

    @max_bytes.setter
    def max_bytes(self, most: int) -> None:
        self._max_bytes = most
        self._lay({})

    @property
    def nbytes(self) -> int:
        """Bytes that lie on it."""
        with self._lock:
            return self._bytes()

    def _held(self, numbers: Sequence[int]) -> dict[int, Piece]:
        with self._lock:
            found = {number: self._blocks[number] for number in numbers if number in self._blocks}
            for number in found:
                self._blocks.move_to_end(number)
            self.hits += len(found)
            return found

    def _fetched(self, run: Sequence[int]) -> dict[int, Piece]:
        """Neighbouring blocks, read at once, and restored where the model is: fewer bytes go there."""
        stored = self.archive.layers(run[0] * BLOCK, min((run[-1] + 1) * BLOCK, self.archive.tokens))
        layers = [layer.restored(self._backbone.device, self._backbone.dtype) for layer in stored]
        keys, values = torch.stack([each.keys for each in layers]), torch.stack([each.values for each in layers])
        parts = zip(run, keys.split(BLOCK, 2), values.split(BLOCK, 2), strict=True)
        return {number: (key.clone(), value.clone()) for number, key, value in parts}  # each is let go by itself

    def _lay(self, blocks: dict[int, Piece]) -> None:
        with self._lock:
            self._blocks |= blocks
            self.reads += len(blocks)
            while self._blocks and self._bytes() > self._max_bytes:
                self._blocks.popitem(last=False)

    def _bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self._blocks.values())


def _runs(numbers: Sequence[int]) -> Iterator[list[int]]:
    """Numbers that follow each other, together."""
    cuts = [0, *(at for at, (a, b) in enumerate(pairwise(numbers), 1) if b != a + 1), len(numbers)]
    yield from (list(numbers[first:last]) for first, last in pairwise(cuts) if last > first)


def _between(blocks: dict[int, Piece], first: int, stop: int) -> Iterator[Piece]:
    """Tokens of neighbouring blocks."""
    for number in range(first // BLOCK, -(-stop // BLOCK)):
        start = number * BLOCK
        inside = slice(max(first - start, 0), stop - start)
        keys, values = blocks[number]
        yield keys[:, :, inside], values[:, :, inside]
