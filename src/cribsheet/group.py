"""The sequences that run over one prefix: who has which slot of the batch."""

from __future__ import annotations

from cribsheet.answering import Answering, Suffix
from cribsheet.batch import Rows, SlotLayer
from cribsheet.prefix import Prefix


class Group:
    """The sequences that run over one prefix, in slots 0..B-1 of one batch."""

    def __init__(self, prefix: Prefix) -> None:
        self.prefix = prefix
        self.rows = Rows()
        self.layers = [SlotLayer(layer, prefix.tokens, self.rows) for layer in prefix.layers]
        self.running: list[Answering] = []

    def insert(self, sequence: Answering, suffix: Suffix) -> None:
        """Give a sequence a slot, with the keys and values of all that was read and written so far."""
        slot = len(self.running)
        for layer, (keys, values) in zip(self.layers, suffix, strict=True):
            layer.insert(slot, keys, values)
        self.running.append(sequence)
        self.rows.lengths.append(sequence.length)
        sequence.suffix, sequence.turn = [], 0

    def prune(self) -> None:
        """Free the slots of finished sequences."""
        for slot in reversed(range(len(self.running))):
            if self.running[slot].finished:
                self._vacate(slot)

    def park(self, sequence: Answering) -> None:
        """Take a sequence out of its slot, with a copy of its suffix."""
        slot = self.running.index(sequence)
        length = sequence.length = self.rows.lengths[slot]
        sequence.suffix = [
            (layer.keys[slot, :, :length].clone(), layer.values[slot, :, :length].clone()) for layer in self.layers
        ]
        self._vacate(slot)

    def _vacate(self, slot: int) -> None:
        last = len(self.running) - 1
        for layer in self.layers:
            layer.vacate(slot, last)
        self.running[slot], self.rows.lengths[slot] = self.running[last], self.rows.lengths[last]
        self.running.pop()
        self.rows.lengths.pop()
