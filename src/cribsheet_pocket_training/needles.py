"""Worlds without entities: single facts strewn in a text, and chains of assignments."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from cribsheet_pocket_training import names
from cribsheet_pocket_training.builder import Builder
from cribsheet_pocket_training.names import capital
from cribsheet_pocket_training.schemas import KINDS
from cribsheet_pocket_training.world import ABSENT, CHARACTERS_PER_TOKEN, Document, Fact, Question, Task


class Needles(Builder):
    """Single sentences ("The access code for the blue falcon is 48213.") in a text about something else."""

    def __init__(
        self, r: random.Random, held_out: bool, tokens: int, filler: Callable[[random.Random], str] | None
    ) -> None:
        super().__init__(r, held_out, filler)
        self.thing = r.choice(
            (
                "magic number",
                "access code",
                "secret word",
                "password",
                "serial number",
                "special number",
                "key",
                "lucky number",
            )
        )
        room = int(tokens * CHARACTERS_PER_TOKEN)
        share = r.choice((0.05, 0.1, 0.3, 1.0)) if filler else 1.0
        count = max(2, int(room * share / 52))
        many = r.random() < 0.35
        self.values: dict[str, list[str]] = {}
        while len(self.values) < count:
            name = r.choice((names.adjective_noun, names.lower_word, names.person, names.city))(r, held_out)
            amount = r.randint(1, 4) if many else 1
            self.values[name] = list(dict.fromkeys(self._value() for _ in range(amount)))
            count -= amount - 1
        sentences = [(k, v, self._sentence(k, v)) for k, vs in self.values.items() for v in vs]
        r.shuffle(sentences)
        self.order = [(k, v) for k, v, _ in sentences]
        self.values = {k: [v for name, v in self.order if name == k] for k in self.values}
        step = 1 if share < 0.5 else r.choice((1, 5, 12))
        documents = []
        self.where: dict[str, list[Fact]] = {}
        kind = KINDS["person"]
        for i in range(0, len(sentences), step):
            facts = [Fact(k, kind, kind.attributes[0], [v]) for k, v, _ in sentences[i : i + step]]
            for fact in facts:
                self.where.setdefault(fact.entity, []).append(fact)
            documents.append(("", r.choice((" ", "\n")).join(s for _, _, s in sentences[i : i + step]), facts))
        used = sum(len(text) + 2 for _, text, _ in documents)
        if filler is not None and r.random() < 0.6:  # inside the paragraphs, not between them
            for i, (title, text, facts) in enumerate(documents):
                if used < room - 200:
                    around = re.split(r"(?<=[.!?]) ", filler(r)[: room - used])
                    cut = r.randint(0, len(around))
                    whole = " ".join([*around[:cut], text, *around[cut:]])
                    used += len(whole) - len(text)
                    documents[i] = (title, whole, facts)
        self.strew(documents, room - used)

    def _value(self) -> str:
        r = self.r
        if self.thing in ("secret word", "password"):
            return names.lower_word(r, self.h)
        return str(r.randint(10**4, 10**7)) if "number" in self.thing else names.code(r, self.h)

    def _sentence(self, key: str, value: str) -> str:
        if len(self.values[key]) > 1:
            return f"One of the {self.thing}s for {key} is {value}."
        return self.r.choice(
            (
                f"The {self.thing} for {key} is {value}.",
                f"The {self.thing} for {key} is {value}.",
                f"Remember that the {self.thing} for {key} is {value}.",
            )
        )

    def mix(self) -> dict[str, float]:
        """How often each kind of question is asked."""
        return {"needle": 10.0, "absent": 1.0}

    def one(self, kind: str) -> Question | None:
        """A question of that kind, or none if this draw has none."""
        key = self.r.choice(list(self.values))
        if kind == "absent":
            key = names.adjective_noun(self.r, self.h)
            if key in self.values:
                return None
            return Question(f"What is the {self.thing} for {key}?", ABSENT, "absent", "needles", (), (ABSENT,), key)
        values = self.values[key]
        form = (
            f"What are all the {self.thing}s for {key}?"
            if len(values) > 1
            else self.r.choice((f"What is the {self.thing} for {key}?", f"Which {self.thing} belongs to {key}?"))
        )
        documents = tuple(dict.fromkeys(d for f in self.where[key] for d in f.documents))
        return Question(form, ", ".join(values), "needle", "needles", documents, tuple(values), key)

    def tasks(self, drawn: Sequence[Question]) -> list[Task]:
        """Task lines for the drawn questions."""
        line = self.r.choice(
            (
                "Answer questions about {}s.",
                "Look up {}s.",
                "Find the {} of a name.",
                "{}s.",
                "The {} that belongs to each name.",
            )
        )
        notes = tuple(f"{k}: {v}" for k, v in self.order[:20])
        return [Task(capital(line.format(self.thing)), ("needles",), notes)]


class Variables(Builder):
    """Assignments that have to be followed: "VAR QX = VAR AB"."""

    def __init__(
        self, r: random.Random, held_out: bool, tokens: int, filler: Callable[[random.Random], str] | None
    ) -> None:
        super().__init__(r, held_out, filler)
        room = int(tokens * CHARACTERS_PER_TOKEN)
        count = max(4, min(60, int(room * (r.choice((0.1, 0.3)) if filler else 1.0) / 18)))
        self.form = r.choice(("VAR {} = {}", "{} = {}", "Let {} be {}.", "set {} to {}"))
        self.mark = "VAR " if self.form.startswith("VAR") else ""
        self.source: dict[str, str] = {}
        self.value: dict[str, str] = {}
        while len(self.source) < count:
            name = (
                names.made_up(r)
                if r.random() < 0.5
                else "".join(r.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(4))
            )
            if name in self.source:
                continue
            shallow = [n for n in self.source if self.depth(n) < 3]
            if shallow and r.random() < 0.6:
                other = r.choice(shallow)
                self.source[name], self.value[name] = self.mark + other, self.value[other]
            else:
                self.source[name] = self.value[name] = str(r.randint(10, 99999))
        lines = [self.form.format(n, s) for n, s in self.source.items()]
        step = r.choice((2, 5, 100))
        documents: list[tuple[str, str, list[Fact]]] = [
            ("", "\n".join(lines[i : i + step]), []) for i in range(0, len(lines), step)
        ]
        used = sum(len(text) + 2 for _, text, _ in documents)
        for document in documents:  # one by one: filler goes between the assignments, whose order stays
            self.strew([document], 0 if filler is None else int((room - used) * r.random() * 2 / len(documents)))
        self.documents = [Document(f"d{i + 1}", d.title, d.text) for i, d in enumerate(self.documents)]

    def depth(self, name: str) -> int:
        """How many steps a variable is away from its number."""
        steps = 0
        while not self.source[name].isdigit():
            name, steps = self.source[name].removeprefix(self.mark), steps + 1
        return steps

    def mix(self) -> dict[str, float]:
        """How often each kind of question is asked."""
        return {"variable": 1.0}

    def one(self, kind: str) -> Question | None:
        """A question of that kind, or none if this draw has none."""
        name = self.r.choice(list(self.source))
        if self.r.random() < 0.75:
            text, answers = (
                self.r.choice((f"What is the value of {name}?", f"What value does {name} have?")),
                [self.value[name]],
            )
        else:
            answers = [n for n, v in self.value.items() if v == self.value[name]]
            if len(answers) > 8:
                return None
            text = f"Which variables have the value {self.value[name]}?"
        pattern = re.compile(rf"\b({'|'.join(map(re.escape, {name, *answers}))})\b")
        documents = tuple(d.id for d in self.documents if pattern.search(d.text))
        return Question(text, ", ".join(answers), kind, "variables", documents, tuple(answers), name)

    def tasks(self, drawn: Sequence[Question]) -> list[Task]:
        """Task lines for the drawn questions."""
        line = self.r.choice(
            ("Answer questions about the values of variables.", "Track variables.", "Variable values.")
        )
        return [Task(line, ("variables",), tuple(f"{n}: {v}" for n, v in list(self.value.items())[:20]))]
