"""The sequences that run over one prefix: who has which slot of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from cribsheet.attention.prefix import Prefix
from cribsheet.attention.recorder import Glance
from cribsheet.attention.slots import Rows, SlotLayer, step_cache
from cribsheet.engine.graphs import StepGraphs
from cribsheet.engine.prefill import told_in, watches
from cribsheet.engine.request import Answering, Suffix
from cribsheet.model.backbone import Backbone

Buffers = tuple[Rows, list[SlotLayer], StepGraphs]


class Batch:
    """The sequences that run over one prefix, in slots 0..B-1 of one batch."""

    def __init__(self, prefix: Prefix) -> None:
        self.prefix = prefix
        buffers: Buffers = prefix.resting.pop() if prefix.resting else _buffers(prefix)
        self.rows, self.layers, self._graphs = buffers
        self.running: list[Answering] = []

    def decode(self, backbone: Backbone) -> Tensor:
        """Logits (B, V) of the next token of every sequence, noting what they look at."""
        start, rows = self.prefix.tokens, self.rows
        ids, positions = [each.last for each in self.running], [start + n for n in rows.lengths]
        told, evidence = told_in(self.running), watches(self.running)
        passages = any(last > first for first, last in told)  # which lie elsewhere in each sequence: no graph fits
        graph = None if passages else self._graphs.find(backbone, self.layers, rows, evidence)
        if graph is not None:
            logits, masses = graph.replay(ids, positions, rows.lengths)
        else:
            rows.prepare(backbone.device)
            glance = Glance(self.layers, backbone.full, told) if evidence else None
            given = torch.tensor(ids).unsqueeze(1), torch.tensor(positions).unsqueeze(1)
            logits = backbone.step(*given, step_cache(self.layers))[:, -1]
            masses = glance.masses if glance else None
        if masses is not None:
            for sequence, mass in zip(self.running, masses, strict=True):
                sequence.look(mass)
        rows.lengths = [n + 1 for n in rows.lengths]
        return logits

    def rest(self) -> None:
        """Leave buffers and captured steps to the next batch over this prefix; only graphs make that worth while."""
        if self._graphs and not self.prefix.resting:
            self.prefix.resting.append((self.rows, self.layers, self._graphs))

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


def _buffers(prefix: Prefix) -> Buffers:
    rows = Rows()
    return rows, [SlotLayer(layer, prefix.tokens, rows) for layer in prefix.layers], StepGraphs()
