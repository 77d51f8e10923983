"""Questions on their way into the model: short ones together in one pass, long ones piece by piece.

Nothing here reads more than `PIECE` tokens at once, twice as many on a GPU, so that whoever is being answered gets the
next token soon.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cribsheet.attention.cache import PrefixLayer, prefix_cache
from cribsheet.attention.prefix import Prefix
from cribsheet.attention.recorder import Glance, question_weights
from cribsheet.attention.slots import padded_batch, prefill_cache
from cribsheet.engine.graphs import find_prefill
from cribsheet.engine.request import Answering, Suffix
from cribsheet.model.backbone import Backbone, Inputs

PIECE = 1024  # tokens that are read in one step, padding included
_ACCELERATOR_PIECE = 2 * PIECE  # of a long question where twice as many take little longer
_MOST_BEFORE = 16 * PIECE  # recalled tokens that stand before questions of one step, padding included


class Prefill:
    """Questions over one prefix that are read together."""

    def __init__(self, sequences: Sequence[Answering], prefix: Prefix) -> None:
        self.sequences, self.prefix = list(sequences), prefix
        self.cache = prefix_cache((), prefix.tokens)
        self.layers: Sequence[object] = ()  # what was read lies in them
        self.spare = 0  # tokens of padding behind the questions
        self._glance: Glance | None = None
        self.ahead: list[Suffix] = []  # what stands before each question, once it is placed

    @property
    def is_read(self) -> bool:
        """Whether the pass that was made last was the last one, so that its logits are of the first new tokens."""
        return True

    def replayed(self, backbone: Backbone) -> Tensor | None:
        """Logits (B, V) by a graph that was captured; none where the model must make the pass."""
        return None

    def replayed_alone(self, backbone: Backbone) -> Tensor | None:
        """Logits (1, V) of the only question by a graph, if it is of a length that was captured."""
        sequence, request = self.sequences[0], self.sequences[0].request
        if request.ahead:
            return None
        first, last = block = told_in(self.sequences)[0]
        weights = question_weights(len(request.question), request.lead)
        evidence, told = watches(self.sequences), last > first
        graph = find_prefill(backbone, self.prefix, request.question, weights, evidence=evidence, told=told)
        if graph is None:
            return None
        logits, mass, self.layers = graph.replay(request.question, weights)
        self.spare = graph.tokens - len(request.question)
        if mass is not None:
            sequence.look(on_passages(mass, self.prefix.tokens, block))
        return logits

    def inputs(self, backbone: Backbone) -> Inputs:
        """What the model reads next; `note` must follow."""
        raise NotImplementedError

    def drop_those_over(self) -> None:
        """Tell those whom nobody waits for any more, and leave them out."""
        for sequence in self.sequences:
            if sequence.request.is_over:
                sequence.drop()
        self.sequences = [sequence for sequence in self.sequences if not sequence.finished]

    def place(self) -> None:
        """Place what stands before the questions."""
        asked = [each.request for each in self.sequences]
        self.ahead = [each.ahead.placed(self.prefix.tokens) if each.ahead else [] for each in asked]

    def watched(self, backbone: Backbone, ids: Tensor, positions: Tensor, weights: Sequence[Tensor]) -> Inputs:
        """New tokens as inputs, watched as they look at things; `weights` (n,) are of each one's last rows."""
        if watches(self.sequences):
            pads = [ids.shape[1] - len(weight) for weight in weights]
            told = [self._padded(each, pad) for each, pad in zip(self.sequences, pads, strict=True)]
            self._glance = Glance(self.cache.layers, backbone.full, told, weights)
        return ids, positions, self.cache

    def note(self) -> None:
        """After the pass: where its keys and values lie, and what was looked at."""
        self.layers = self.cache.layers
        if self._glance is not None:
            for sequence, mass in zip(self.sequences, self._glance.masses, strict=True):
                sequence.look(mass)
            self._glance = None

    def _padded(self, sequence: Answering, pad: int) -> tuple[int, int]:
        """Where passages begin and end among all that is behind the prefix, a question with so much padding before it.

        What is recalled stands at the end of the longest that is before any of the questions.
        """
        (first, last), before = told_in([sequence])[0], sequence.request.before
        shift = max(each.request.before for each in self.sequences) - before + (pad if first >= before else 0)
        return first + shift, last + shift

    def suffix(self, row: int) -> Suffix:
        """The keys and values of what stands before a question and of the question that was read, padding left out."""
        length = len(self.sequences[row].request.question)
        found: Suffix = []
        for layer in self.layers:
            assert isinstance(layer, PrefixLayer)
            last = layer.length - self.spare
            found.append((layer.keys[row, :, last - length : last], layer.values[row, :, last - length : last]))
        if self.ahead and self.ahead[row]:
            both = zip(self.ahead[row], found, strict=True)
            found = [(torch.cat([k, keys], 1), torch.cat([v, values], 1)) for (k, v), (keys, values) in both]
        return found


class ShortPrefill(Prefill):
    """Short questions in one pass, padded to the longest."""

    def inputs(self, backbone: Backbone) -> Inputs:
        """All of them."""
        prefix = self.prefix
        self.place()
        before = [each.request.before for each in self.sequences]
        ids, positions, mask = padded_batch([each.request.question for each in self.sequences], prefix.tokens, before)
        self.cache = prefill_cache(prefix.layers, prefix.tokens, mask, self.ahead)
        weights = [question_weights(len(each.request.question), each.request.lead) for each in self.sequences]
        return self.watched(backbone, ids, positions, weights)

    def replayed(self, backbone: Backbone) -> Tensor | None:
        """Logits (1, V) of a question that is alone and of a length that was captured."""
        return None if len(self.sequences) > 1 else self.replayed_alone(backbone)


class LongPrefill(Prefill):
    """One long question, a piece a step."""

    def __init__(self, sequence: Answering, prefix: Prefix) -> None:
        super().__init__([sequence], prefix)
        self.cache = prefix_cache(prefix.layers, prefix.tokens)
        self._done = 0

    @property
    def is_read(self) -> bool:
        """Whether there is no further piece."""
        return self._done == len(self.sequences[0].request.question)

    def replayed(self, backbone: Backbone) -> Tensor | None:
        """Logits (1, V) of a question that is not so long that no graph takes it whole."""
        logits = None if self._done else self.replayed_alone(backbone)
        if logits is not None:
            self._done = len(self.sequences[0].request.question)
        return logits

    def inputs(self, backbone: Backbone) -> Inputs:
        """The next piece."""
        request = self.sequences[0].request
        question = request.question
        if request.ahead and not self._done:
            self.place()
            for layer, (keys, values) in zip(self.cache.layers, self.ahead[0], strict=True):
                layer.update(keys.unsqueeze(0), values.unsqueeze(0))
        most = PIECE if backbone.device.type == "cpu" else _ACCELERATOR_PIECE
        piece = question[self._done : self._done + most]
        first = self.prefix.tokens + request.before + self._done
        positions = torch.arange(first, first + len(piece)).unsqueeze(0)
        weights = question_weights(len(question), request.lead)[self._done : self._done + most]
        self._done += len(piece)
        return self.watched(backbone, piece.unsqueeze(0), positions, [weights])


def watches(sequences: Sequence[Answering]) -> bool:
    """Whether it must be noted what these questions over one prefix look at."""
    wanting = [each.request for each in sequences if each.request.evidence]
    return any(each.told or each.prefix.tokens for each in wanting)


def told_in(sequences: Sequence[Answering]) -> list[tuple[int, int]]:
    """Where in each question its passages begin and end; nowhere if nobody wants to know."""
    return [each.request.block if each.request.evidence else (0, 0) for each in sequences]


def on_passages(mass: Tensor, prefix: int, block: tuple[int, int]) -> Tensor:
    """Of what is looked at in prefix and suffix (M, K, P + n), that in the prefix and in a block of the suffix."""
    first, last = block
    if last == first:
        return mass[..., :prefix]
    return torch.cat([mass[..., :prefix], mass[..., prefix + first : prefix + last]], -1)


def prefills(sequences: Sequence[Answering]) -> list[Prefill]:
    """How to read new questions: shorter ones together, in passes of bounded padded size over one prefix each."""
    found: list[Prefill] = []
    for sequence in sorted(sequences, key=_alike):
        prefix, last = sequence.request.prefix, found[-1] if found else None
        if len(sequence.request.question) > PIECE:
            found.append(LongPrefill(sequence, prefix))
        elif isinstance(last, ShortPrefill) and last.prefix is prefix and _fits([*last.sequences, sequence]):
            last.sequences.append(sequence)
        else:
            found.append(ShortPrefill([sequence], prefix))
    return found


def _alike(sequence: Answering) -> tuple[int, bool, int]:
    """Those that are read together well come one after the other."""
    request = sequence.request
    return id(request.prefix), request.before > 0, len(request.question)


def _fits(sequences: Sequence[Answering]) -> bool:
    """Whether questions, the longest last, may be read in one step: all with something before them, or none."""
    before = [each.request.before for each in sequences]
    longest, count = len(sequences[-1].request.question), len(sequences)
    return count * longest <= PIECE and count * max(before) <= _MOST_BEFORE and (min(before) > 0) == (max(before) > 0)
