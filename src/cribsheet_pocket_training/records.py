"""Questions and task lines about worlds of entities: facts, joins, lists, counts, comparisons, absent answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from cribsheet_pocket_training.names import capital
from cribsheet_pocket_training.schemas import KINDS, Attribute, name_of
from cribsheet_pocket_training.world import ABSENT, Fact, Question, Task
from cribsheet_pocket_training.writing import Written, article, titled


class Records(Written):
    """Questions and tasks about entities with attributes."""

    @cached_property
    def by_attribute(self) -> dict[tuple[str, str], list[Fact]]:
        """The facts of each kind's attributes, in order of appearance."""
        facts: dict[tuple[str, str], list[Fact]] = {}
        for fact in self.facts:
            facts.setdefault((fact.kind.key, fact.attribute.key), []).append(fact)
        return facts

    @cached_property
    def by_entity(self) -> dict[tuple[str, str], Fact]:
        """The fact of each entity's attributes."""
        return {(fact.entity, fact.attribute.key): fact for fact in self.facts}

    @cached_property
    def pairs(self) -> list[tuple[str, Attribute]]:
        """The attributes that the world's kinds have here, with their kinds."""
        return [(k, a) for k, attributes in self.schema.items() for a in attributes]

    @cached_property
    def chains(self) -> list[tuple[str, tuple[Attribute, ...]]]:
        """Relations followed by an attribute of what they lead to: (kind, (relation, ..., attribute))."""
        chains: list[tuple[str, tuple[Attribute, ...]]] = []
        for key, attributes in self.schema.items():
            for first in attributes:
                if first.target is None:
                    continue
                for second in self.schema[first.target]:
                    chains.append((key, (first, second)))
                    if second.target is not None:
                        chains += [(key, (first, second, third)) for third in self.schema[second.target]]
        return chains

    # -- what is asked -------------------------------------------------------------------------------------------

    def mix(self) -> dict[str, float]:
        """How often each kind of question is asked."""
        mix = {
            "direct": 30.0,
            "list": 6.0,
            "inverse": 9.0,
            "count": 3.0,
            "compare": 4.0,
            "yesno": 5.0,
            "absent": 7.0,
            "fill": 4.0,
        }
        if self.chains:
            mix["join2"] = 26.0
        if any(len(c) == 3 for _, c in self.chains):
            mix["join3"] = 8.0
        return mix

    def ask(self, a: Attribute, entity: str) -> str:
        """A question for attribute `a` of `entity`, a name or a phrase."""
        r = self.r
        if a.questions and r.random() < 0.72:
            return r.choice(a.questions).replace("{e}", entity)
        form = r.choice(("What is the {l} of {e}?", "What is the {l} of {e}?", "What is {e}'s {l}?", "Which {l} does {e} have?",  # noqa: E501
                         "{e}: {l}?", "Give the {l} of {e}."))  # fmt: skip
        if " " in entity and entity.startswith("the ") and "'s" in form:
            form = "What is the {l} of {e}?"
        if form.startswith("{e}"):
            form = titled(entity) + form[3:]
        return form.replace("{l}", a.label).replace("{e}", entity)

    def _phrase(self, a: Attribute, entity: str) -> str:
        forms = (*a.phrases, f"the {a.label} of {{e}}")
        if not self.h:  # wordings that came later; worlds of the evaluation stay as they were
            forms += (f"{{e}}'s {a.label}",)
        return self.r.choice(forms).replace("{e}", entity)

    def _made(
        self,
        text: str,
        kind: str,
        family: str,
        facts: Sequence[Fact],
        answers: Sequence[str],
        entity: str = "",
        answer: str | None = None,
        bridges: Sequence[tuple[str, str]] = (),
    ) -> Question:
        documents = tuple(dict.fromkeys(d for f in facts for d in f.documents))
        whole = ", ".join(answers) if answer is None else answer
        return Question(text, whole, kind, family, documents, tuple(answers), entity, tuple(bridges))

    def one(self, kind: str) -> Question | None:  # noqa: C901
        """A question of that kind, or none if this draw has none."""
        r = self.r
        if kind in ("join2", "join3"):
            return self._join(2 if kind == "join2" else 3)
        key, a = r.choice(self.pairs)
        facts = self.by_attribute.get((key, a.key), [])
        family = f"{key}.{a.key}"
        if not facts:
            return None
        fact = r.choice(facts)
        if kind == "direct":
            if len(fact.values) > 1:
                return self._made(self.ask(a, fact.entity), "list", family, [fact], fact.values, fact.entity)
            return self._made(self.ask(a, fact.entity), kind, family, [fact], fact.values, fact.entity)
        if kind in ("list", "inverse", "count"):
            return self._inverse(kind, key, a, facts, fact)
        if kind == "compare":
            return self._compare(key, a, facts)
        if kind == "yesno":
            return self._yesno(family, a, facts, fact)
        if kind == "absent":
            return self._absent(key, a)
        if fact.sentence and len(fact.values) == 1 and fact.values[0] in fact.sentence:
            blank = fact.sentence.replace(fact.values[0], "____", 1)
            if fact.entity.lower() in blank.lower():
                return self._made(f"Fill in the blank: {blank}", "fill", family, [fact], fact.values, fact.entity)
        return None

    def _join(self, steps: int) -> Question | None:
        chains = [c for c in self.chains if len(c[1]) == steps]
        if not chains:
            return None
        key, chain = self.r.choice(chains)
        start = self.r.choice(self.entities[key])
        entity, phrase, used, bridges = start, start, [], []
        for a in chain[:-1]:
            fact = self.by_entity.get((entity, a.key))
            if fact is None or len(fact.values) != 1:
                return None
            used.append(fact)
            entity, phrase = fact.values[0], self._phrase(a, phrase)
            bridges.append((phrase, entity))
        last = self.by_entity.get((entity, chain[-1].key))
        if last is None or entity == start:
            return None
        family = ".".join((key, *(a.key for a in chain)))
        text = self.ask(chain[-1], phrase)
        return self._made(text, f"join{steps}", family, [*used, last], last.values, start, bridges=bridges)

    def _inverse(self, kind: str, key: str, a: Attribute, facts: list[Fact], fact: Fact) -> Question | None:
        r, value, k = self.r, self.r.choice(fact.values), KINDS[key]
        hits = [f for f in facts if value in f.values]
        if not self.h and kind != "inverse" and len(hits) == 1 and r.random() < 0.8:  # a count of one teaches little
            return None
        if len(hits) > 12 or (kind == "list" and len(hits) < 2):
            return None
        forms = [s for s in a.statements if s.startswith("{e}") and "{v}" in s]
        who = "Who" if key == "person" else f"Which {k.singular}"
        family = f"{key}.{a.key}.{kind}"
        if kind == "count":
            text = r.choice(
                (
                    f"How many {k.plural if key != 'spec' else 'documents'} have the {a.label} {value}?",
                    f"For how many {k.plural if key != 'spec' else 'documents'} is the {a.label} {value}?",
                )
            )
            return self._made(text, kind, family, hits, [str(len(hits))])
        if forms and r.random() < 0.5:
            text = who + r.choice(forms)[3:-1].replace("{v}", value) + "?"
        elif kind == "list" or r.random() < 0.4:
            plural = self.prefix + "s" if key == "spec" else k.plural
            text = r.choice(
                (
                    f"Which {plural} have the {a.label} {value}?",
                    f"List all {plural} whose {a.label} is {value}.",
                    f"List the {plural} with the {a.label} {value}.",
                )
            )
        else:
            text = r.choice((f"{who} has the {a.label} {value}?", f"{who} has {value} as {a.label}?"))
        return self._made(text, "inverse" if len(hits) == 1 else "list", family, hits, [f.entity for f in hits])

    def _compare(self, key: str, a: Attribute, facts: list[Fact]) -> Question | None:
        r = self.r
        if a.value not in ("year", "number", "big", "ext"):
            return None
        size = 2 if r.random() < 0.7 or len(facts) > 10 else len(facts)
        if len(facts) < size:
            return None
        pair = r.sample(facts, size)
        numbers = [int(f.values[0].replace(",", "")) for f in pair]
        if len(set(numbers)) < len(numbers):
            return None
        most = r.random() < 0.5
        best = pair[numbers.index(max(numbers) if most else min(numbers))]
        word = ("later" if most else "earlier") if a.value == "year" else ("higher" if most else "lower")
        if size > 2:
            word = {"later": "latest", "earlier": "earliest", "higher": "highest", "lower": "lowest"}[word]
        who = "Who" if key == "person" else f"Which {KINDS[key].singular}"
        text = f"{who} has the {word} {a.label}" + (f", {pair[0].entity} or {pair[1].entity}?" if size == 2 else "?")
        return self._made(text, "compare", f"{key}.{a.key}.compare", pair, [best.entity])

    def _yesno(self, family: str, a: Attribute, facts: list[Fact], fact: Fact) -> Question | None:
        r = self.r
        value, truth = r.choice(fact.values), True
        if r.random() < 0.5:
            value, truth = r.choice(r.choice(facts).values), False
            if value in fact.values or value == fact.entity:
                return None
        form = r.choice((f"Is {value} the {a.label} of {fact.entity}?", f"Is the {a.label} of {fact.entity} {value}?"))
        if a.statements and r.random() < 0.5:
            form = (
                "Is it true that " + r.choice(a.statements)[:-1].replace("{e}", fact.entity).replace("{v}", value) + "?"
            )
        return self._made(form, "yesno", family + ".yesno", [fact], ["Yes" if truth else "No"], fact.entity)

    def _absent(self, key: str, a: Attribute) -> Question | None:
        r = self.r
        if r.random() < 0.5:  # an entity of the world about which this is not said
            entity = r.choice(self.entities[key])
            if (entity, a.key) in self.by_entity:
                others = [b for b in KINDS[key].attributes if b not in self.schema[key]]
                if not others:
                    return None
                a = r.choice(others)
                if any(a.label == b.label for b in self.schema[key]):
                    return None
        else:
            entity = name_of(KINDS[key], r, self.h, self.prefix if KINDS[key].namer == "spec" else "ticket ")
            if any(entity in found for found in self.entities.values()):
                return None
        return self._made(self.ask(a, entity), "absent", f"{key}.{a.key}", [], [ABSENT], entity)

    # -- tasks ---------------------------------------------------------------------------------------------------

    def tasks(self, drawn: Sequence[Question]) -> list[Task]:
        """Task lines for the families of the drawn questions, and some that cover several."""
        r = self.r
        families = list(dict.fromkeys(q.family for q in drawn))
        made: list[Task] = []
        for family in families:
            key, first, *rest = family.split(".")
            a = next((x for x in (*self.schema[key], *KINDS[key].attributes) if x.key == first), None)
            if a is None:
                continue
            if rest and rest[0] not in ("list", "inverse", "count", "compare", "yesno"):
                chain = next(c for k, c in self.chains if k == key and [x.key for x in c] == [first, *rest])
                made.append(Task(self._join_line(key, chain), (family,), self._join_notes(key, chain)))
                continue
            notes = tuple(f"{f.entity}: {', '.join(f.values)}" for f in self.by_attribute.get((key, a.key), []))
            made.append(Task(self._line(key, a), (family,), notes))
        for key in self.schema:
            covered = tuple(f for f in families if f.split(".")[0] == key)
            if covered:
                k = KINDS[key]
                word = r.choice(
                    (f"the {k.plural}", f"the {k.singular} directory", f"{k.plural}", f"the list of {k.plural}")
                )
                if key == "person":
                    word = r.choice(("the staff directory", "people", "the people", "the members"))
                line = r.choice(
                    (
                        "Answer questions about {}.",
                        "Questions about {}.",
                        "Look up facts about {}.",
                        "Look things up about {}.",
                    )
                )
                notes = tuple(
                    f"{e}: "
                    + "; ".join(
                        ", ".join(self.by_entity[e, a.key].values)
                        for a in self.schema[key]
                        if (e, a.key) in self.by_entity
                    )
                    for e in dict.fromkeys(f.entity for f in self.facts if f.kind.key == key)
                )
                made.append(Task(line.format(word), covered, notes))
        if len(families) > 2:
            two = r.sample(families, 2)
            topics = [next((t.description for t in made if t.families == (f,)), "") for f in two]
            if all(topics):
                made.append(Task(" ".join(topics), tuple(two), ()))
        made.append(
            Task(
                r.choice(("Answer questions about the documents.", "Answer the questions.", "Look up facts.")),
                tuple(families),
                (),
            )
        )
        return [replace(t, notes=t.notes[:20]) for t in made]

    def _line(self, key: str, a: Attribute) -> str:
        r, k = self.r, KINDS[key]
        topics = (
            *a.topics,
            a.topics[0] if a.topics else f"the {a.label} of {k.plural}",
            f"the {a.label} of each {k.singular}",
        )
        t = r.choice(topics)
        return capital(r.choice((
            f"Answer questions about {t}.", f"Answer questions about {t}.", f"{capital(t)}.", f"Look up {t}.", f"Questions about {t}.",  # noqa: E501
            f"Find {t}.", f"Look up the {a.label} of {article(k.singular)}.", f"The {a.label} of each {k.singular}.",
            f"Say what the {a.label} of {article(k.singular)} is.", f"I will ask about {t}.",
        )))  # fmt: skip

    def _join_line(self, key: str, chain: tuple[Attribute, ...]) -> str:
        r, k = self.r, KINDS[key]
        path = " of the ".join(a.label for a in reversed(chain))
        return r.choice((
            f"Answer questions about the {path} of {k.plural}.", f"Look up the {path} of {article(k.singular)}.",
            f"Questions about the {path} of {k.plural}.", f"The {path} of each {k.singular}.",
            f"Answer questions about {k.plural}, their {chain[0].label}, and the {chain[-1].label} of the {chain[0].label}.",  # noqa: E501
        ))  # fmt: skip

    def _join_notes(self, key: str, chain: tuple[Attribute, ...]) -> tuple[str, ...]:
        notes = []
        for fact in self.by_attribute.get((key, chain[0].key), []):
            steps, entity = [], fact.entity
            for a in chain:
                found = self.by_entity.get((entity, a.key))
                if found is None:
                    break
                entity = found.values[0]
                steps.append(", ".join(found.values))
            if len(steps) == len(chain):
                notes.append(f"{fact.entity}: " + "; ".join(steps))
        return tuple(notes)
