"""The sequences that run over one prefix: who has which slot of the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cribsheet.attention.prefix import Prefix
from cribsheet.attention.recorder import Glance
from cribsheet.attention.slots import Rows, SlotLayer, step_cache
from cribsheet.engine.graphs import StepGraphs
from cribsheet.engine.prefill import on_passages, told_in, watches
from cribsheet.engine.request import Answering, Suffix
from cribsheet.model.backbone import Backbone, Inputs

Buffers = tuple[Rows, list[SlotLayer], StepGraphs]


class Batch:
    """The sequences that run over one prefix, in slots 0..B-1 of one batch."""

    def __init__(self, prefix: Prefix) -> None:
        self.prefix = prefix
        buffers: Buffers = prefix.resting.pop() if prefix.resting else _buffers(prefix)
        self.rows, self.layers, self._graphs = buffers
        self.running: list[Answering] = []
        self._glance: Glance | None = None

    def replayed(self, backbone: Backbone) -> Tensor | None:
        """Logits (B, V) of the next token of every sequence by a graph; none where the model must make the step."""
        blocks, evidence = told_in(self.running), watches(self.running)
        told = any(last > first for first, last in blocks)
        graph = self._graphs.find(backbone, self.layers, self.rows, evidence=evidence, told=told)
        if graph is None:
            return None
        logits, masses = graph.replay(*self._newest(), self.rows.lengths)
        if told and masses is not None:  # passages lie elsewhere in each sequence, so all of its suffix was watched
            masses = [on_passages(mass, self.prefix.tokens, block) for mass, block in zip(masses, blocks, strict=True)]
        self._took(masses)
        return logits

    def inputs(self, backbone: Backbone) -> Inputs:
        """The newest token of every sequence; `note` must follow."""
        ids, positions = (torch.tensor(row).unsqueeze(1) for row in self._newest())
        self.rows.prepare(backbone.device)
        if watches(self.running):
            self._glance = Glance(self.layers, backbone.full, told_in(self.running))
        return ids, positions, step_cache(self.layers)

    def note(self) -> None:
        """After the step: what was looked at."""
        self._took(self._glance.masses if self._glance else None)
        self._glance = None

    def _newest(self) -> tuple[list[int], list[int]]:
        """The newest tokens, and their positions."""
        return [each.last for each in self.running], [self.prefix.tokens + n for n in self.rows.lengths]

    def _took(self, masses: Sequence[Tensor] | None) -> None:
        """Every sequence is longer by a token, which looked at this (M, K, P + N), if it was watched."""
        if masses is not None:
            for sequence, mass in zip(self.running, masses, strict=True):
                sequence.look(mass)
        self.rows.lengths = [n + 1 for n in self.rows.lengths]

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
