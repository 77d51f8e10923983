"""Questions on their way into the model: short ones together in one pass, long ones piece by piece.

Nothing here reads more than `PIECE` tokens at once, so that whoever is being answered gets the next token soon.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cribsheet.attention.cache import PrefixLayer, prefix_cache
from cribsheet.attention.prefix import Prefix
from cribsheet.attention.recorder import Glance, question_weights
from cribsheet.attention.slots import padded_batch, prefill_cache
from cribsheet.engine.graphs import find_read
from cribsheet.engine.request import Answering, Suffix
from cribsheet.model.backbone import Backbone

PIECE = 1024  # tokens that are read in one step, padding included
_MOST_BEFORE = 16 * PIECE  # recalled tokens that stand before questions of one step, padding included


class Read:
    """Questions over one prefix that are read together."""

    def __init__(self, sequences: Sequence[Answering], prefix: Prefix) -> None:
        self.sequences, self.prefix = list(sequences), prefix
        self.cache = prefix_cache((), prefix.tokens)
        self.layers: Sequence[object] = ()  # what was read lies in them
        self.spare = 0  # tokens of padding behind the questions
        self.ahead: list[Suffix] = []  # what stands before each question, once it is placed

    def next(self, backbone: Backbone) -> Tensor | None:
        """Read on; logits (B, V) of the first new tokens once everything is read."""
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

    def step(self, backbone: Backbone, ids: Tensor, positions: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Logits (B, V) after new tokens, noting what they look at; `weights` (n,) are of each one's last rows."""
        glance = None
        if watches(self.sequences):
            pads = [ids.shape[1] - len(weight) for weight in weights]
            told = [self._padded(each, pad) for each, pad in zip(self.sequences, pads, strict=True)]
            glance = Glance(self.cache.layers, backbone.full, told, weights)
        logits = backbone.step(ids, positions, self.cache)[:, -1]
        self.layers = self.cache.layers
        if glance is not None:
            for sequence, mass in zip(self.sequences, glance.masses, strict=True):
                sequence.look(mass)
        return logits

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


class ShortRead(Read):
    """Short questions in one pass, padded to the longest."""

    def next(self, backbone: Backbone) -> Tensor:
        """Read them all: logits (B, V)."""
        prefix = self.prefix
        if (logits := self._replayed(backbone)) is not None:
            return logits
        self.place()
        before = [each.request.before for each in self.sequences]
        ids, positions, mask = padded_batch([each.request.question for each in self.sequences], prefix.tokens, before)
        self.cache = prefill_cache(prefix.layers, prefix.tokens, mask, self.ahead)
        weights = [question_weights(len(each.request.question), each.request.lead) for each in self.sequences]
        return self.step(backbone, ids, positions, weights)

    def _replayed(self, backbone: Backbone) -> Tensor | None:
        """Logits (1, V) of a question that is alone and of a length that was captured."""
        sequence, request = self.sequences[0], self.sequences[0].request
        if len(self.sequences) > 1 or request.ahead or any(last > first for first, last in told_in(self.sequences)):
            return None  # passages lie elsewhere in each question: no graph fits
        graph = find_read(backbone, self.prefix, len(request.question), watches(self.sequences))
        if graph is None:
            return None
        logits, mass, self.layers = graph.replay(
            request.question, question_weights(len(request.question), request.lead)
        )
        self.spare = graph.tokens - len(request.question)
        if mass is not None:
            sequence.look(mass)
        return logits


class LongRead(Read):
    """One long question, a piece a step."""

    def __init__(self, sequence: Answering, prefix: Prefix) -> None:
        super().__init__([sequence], prefix)
        self.cache = prefix_cache(prefix.layers, prefix.tokens)
        self._done = 0

    def next(self, backbone: Backbone) -> Tensor | None:
        """Read the next piece; logits (1, V) after the last one."""
        request = self.sequences[0].request
        question = request.question
        if request.ahead and not self._done:
            self.place()
            for layer, (keys, values) in zip(self.cache.layers, self.ahead[0], strict=True):
                layer.update(keys.unsqueeze(0), values.unsqueeze(0))
        piece = question[self._done : self._done + PIECE]
        first = self.prefix.tokens + request.before + self._done
        positions = torch.arange(first, first + len(piece)).unsqueeze(0)
        weights = question_weights(len(question), request.lead)[self._done : self._done + PIECE]
        logits = self.step(backbone, piece.unsqueeze(0), positions, [weights])
        self._done += len(piece)
        return logits if self._done == len(question) else None


def watches(sequences: Sequence[Answering]) -> bool:
    """Whether it must be noted what these questions over one prefix look at."""
    wanting = [each.request for each in sequences if each.request.evidence]
    return any(each.told or each.prefix.tokens for each in wanting)


def told_in(sequences: Sequence[Answering]) -> list[tuple[int, int]]:
    """Where in each question its passages begin and end; nowhere if nobody wants to know."""
    return [each.request.block if each.request.evidence else (0, 0) for each in sequences]


def reads(sequences: Sequence[Answering]) -> list[Read]:
    """How to read new questions: shorter ones together, in passes of bounded padded size over one prefix each."""
    found: list[Read] = []
    for sequence in sorted(sequences, key=_alike):
        prefix, last = sequence.request.prefix, found[-1] if found else None
        if len(sequence.request.question) > PIECE:
            found.append(LongRead(sequence, prefix))
        elif isinstance(last, ShortRead) and last.prefix is prefix and _fits([*last.sequences, sequence]):
            last.sequences.append(sequence)
        else:
            found.append(ShortRead([sequence], prefix))
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
