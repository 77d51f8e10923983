"""What all sorts of worlds share: numbering documents, strewing filler, drawing distinct questions."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from cribsheet_pocket_training.world import Document, Fact, Question

_HEADINGS = ("", "", "", "Abstract\n========\n\n", "Rationale ---------\n\n", "Motivation\n\n", "## Background\n\n")


class Builder:
    """What the three sorts of worlds share: numbering documents, strewing filler, drawing distinct questions."""

    def __init__(self, r: random.Random, held_out: bool, filler: Callable[[random.Random], str] | None) -> None:
        self.r = r
        self.h = held_out
        self.filler = filler
        self.documents: list[Document] = []

    def strew(self, documents: list[tuple[str, str, list[Fact]]], room: int) -> None:
        """Number `documents` (title, text, facts) and put filler of up to `room` characters between them."""
        mixed: list[tuple[str, str, list[Fact]]] = list(documents)
        if self.filler is not None:
            # worlds of the evaluation stay as they were
            stating = [i for i, (_, _, facts) in enumerate(documents) if facts]
            beneath = 0.0 if self.h or not stating else self.r.choice((0.0, 0.0, 0.7, 1.0))
            while room > 150:
                text = self.filler(self.r)[: max(200, room)]
                if beneath and self.r.random() < beneath:  # as real documents go on after what their header says
                    at = self.r.choice([i for i, (_, _, facts) in enumerate(mixed) if facts])
                    title, head, facts = mixed[at]
                    mixed[at] = (title, f"{head}\n\n{self.r.choice(_HEADINGS)}{text}", facts)
                else:
                    mixed.insert(self.r.randint(0, len(mixed)), ("", text, []))
                room -= len(text) + 2
        for index, (title, text, facts) in enumerate(mixed):
            identity = f"d{index + 1}"
            self.documents.append(Document(identity, title, text))
            for fact in facts:
                if identity not in fact.documents:
                    fact.documents.append(identity)

    def one(self, kind: str) -> Question | None:
        """A question of that kind, or none if this draw has none."""
        raise NotImplementedError

    def mix(self) -> dict[str, float]:
        """How often each kind of question is asked."""
        raise NotImplementedError

    def questions(
        self, count: int, kinds: Sequence[str] | None, emphasis: Mapping[str, float] | None = None
    ) -> list[Question]:
        """Up to `count` different questions; `emphasis` multiplies how often a kind is asked."""
        weights = self.mix()
        if emphasis is not None:
            weights = {k: w * emphasis.get(k, 1.0) for k, w in weights.items()}
        if kinds is not None:
            weights = {k: w for k, w in weights.items() if k in kinds}
        if not weights:
            return []
        found: dict[str, Question] = {}
        wanted = self.r.choices(list(weights), list(weights.values()), k=3 * count + 5)
        for kind in wanted:
            question = self.one(kind)
            if question is not None and question.text not in found:
                found[question.text] = question
                if len(found) == count:
                    break
        return list(found.values())
