"""Worlds of people who belong to several groups each, and questions about what is said of all their groups."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cribsheet_pocket_training import names
from cribsheet_pocket_training.builder import Builder
from cribsheet_pocket_training.names import Draw, capital
from cribsheet_pocket_training.schemas import KINDS
from cribsheet_pocket_training.world import ABSENT, CHARACTERS_PER_TOKEN, Fact, Question, Task


class Trait(NamedTuple):
    """What is said of groups: its plural is its name and "s"; `asked` are questions about one group or a person's."""

    name: str
    draw: Draw
    said: tuple[str, ...]
    asked: tuple[str, str]


class Sort(NamedTuple):
    """A sort of group, and how belonging to it is said and asked."""

    name: str
    plural: str
    draw: Draw
    said: tuple[str, ...]
    belongs: str


_SORTS = (
    Sort("project", "projects", names.project, ("{m} works on {g}.", "{m} is a member of {g}.", "{g} has {m} on its team."), "works on"),  # noqa: E501
    Sort("project", "projects", names.adjective_noun, ("{m} is a member of {g}.", "{m} belongs to {g}."), "belongs to"),
    Sort("club", "clubs", names.org, ("{m} is a member of {g}.", "{m} joined {g}.", "{g} counts {m} among its members."), "is a member of"),  # noqa: E501
    Sort("course", "courses", names.headline, ("{m} attends {g}.", "{m} is enrolled in {g}."), "attends"),
    Sort("committee", "committees", names.title_words, ("{m} sits on {g}.", "{m} was elected to {g}."), "sits on"),
    Sort("company", "companies", names.org, ("{m} owns shares of {g}.", "{g} belongs in part to {m}."), "owns shares of"),  # noqa: E501
)  # fmt: skip
_FIELDS = names.one_of(
    "astronomy|music|banking|law|history|mining|fishing|logistics|printing|medicine|chemistry|optics"
)


def _field(r: random.Random, held_out: bool) -> str:
    return (_FIELDS if r.random() < 0.5 else names.topic)(r, held_out)


_TRAITS = (
    Trait("domain", _field, ("{g} is in the domain of {v}.", "The domain of {g} is {v}.", "{g} is about {v}."), ("What is the domain of {g}?", "What are the domains of {gs}?")),  # noqa: E501
    Trait("sponsor", names.org, ("{g} is sponsored by {v}.", "{v} sponsors {g}."), ("Who sponsors {g}?", "Who sponsors {gs}?")),  # noqa: E501
    Trait("year", names.year, ("{g} began in {v}.", "{g} was founded in {v}."), ("In which year did {g} begin?", "In which years did {gs} begin?")),  # noqa: E501
    Trait("place", names.city, ("{g} meets in {v}.", "{g} is based in {v}."), ("Where does {g} meet?", "Where do {gs} meet?")),  # noqa: E501
    Trait("leader", names.person, ("{g} is led by {v}.", "The leader of {g} is {v}."), ("Who leads {g}?", "Who leads {gs}?")),  # noqa: E501
    Trait("budget", names.money, ("The budget of {g} is {v}.", "{g} may spend {v}."), ("What is the budget of {g}?", "What are the budgets of {gs}?")),  # noqa: E501
    Trait("code", names.code, ("The code of {g} is {v}.", "{g} has the code {v}."), ("What is the code of {g}?", "What are the codes of {gs}?")),  # noqa: E501
)  # fmt: skip
_ROLES = names.one_of("engineer|manager|analyst|designer|tester|consultant|treasurer|secretary|guest|adviser")
_HOBBIES = names.one_of("chess|sailing|pottery|climbing|archery|baking|fencing|gardening|cycling|painting")


class Connected(Builder):
    """People, groups, and who belongs to what: each person to as many groups as the others."""

    def __init__(
        self, r: random.Random, held_out: bool, tokens: int, filler: Callable[[random.Random], str] | None
    ) -> None:
        super().__init__(r, held_out, filler)
        self.sort = r.choice(_SORTS)
        self.traits = r.sample(_TRAITS, r.randint(1, 3))
        each = r.choice((1, 1, 2, 2, 3, 4, 5, 6, 8))
        room = int(tokens * CHARACTERS_PER_TOKEN * (r.choice((0.4, 0.7)) if filler else 1.0))
        people = max(2, int(room / (90 + 95 * each + 50 * len(self.traits))))
        self.people = self._names(names.person, min(people, 60))
        self.groups = self._names(self.sort.draw, max(each + 1, min(60, int(people * each / r.choice((1.2, 2, 4))))))
        self.value = {(g, t.name): t.draw(r, held_out) for g in self.groups for t in self.traits}
        self.role: dict[tuple[str, str], str] = {}
        belongs = {(m, g) for m in self.people for g in r.sample(self.groups, min(each, len(self.groups)))}
        parts = self._parts(sorted(belongs))
        r.shuffle(parts)
        self.belongs = [fact for _, _, facts in parts for fact in facts if fact.values != [""]]
        self.strew(parts, int(tokens * CHARACTERS_PER_TOKEN) - sum(len(text) + 2 for _, text, _ in parts))

    def _names(self, draw: Draw, count: int) -> list[str]:
        found: dict[str, None] = {}
        for _ in range(4 * count):  # few name words may not give so many different names
            found.setdefault(draw(self.r, self.h))
            if len(found) == count:
                break
        return list(found)

    def _parts(self, belongs: Sequence[tuple[str, str]]) -> list[tuple[str, str, list[Fact]]]:
        """Texts about people, about groups, and about who belongs to what, with their facts."""
        r, kind = self.r, KINDS["person"]
        with_roles = r.random() < 0.5
        apart = r.random() < 0.6  # each membership a text of its own, or all of a person's together
        self.about: dict[str, Fact] = {}
        parts: list[tuple[str, str, list[Fact]]] = []
        for group in self.groups:
            self.about[group] = Fact(group, kind, kind.attributes[0], [""])
            said = [r.choice(t.said).format(g=group, v=self.value[group, t.name]) for t in self.traits]
            parts.append(("", capital(" ".join(said)), [self.about[group]]))
        for person in self.people:
            text = f"{person} lives in {names.city(r, self.h)} and enjoys {_HOBBIES(r, self.h)}."
            own = [g for m, g in belongs if m == person]
            r.shuffle(own)
            said = []
            for group in own:
                line = r.choice(self.sort.said).format(m=person, g=group)
                if with_roles:
                    self.role[person, group] = _ROLES(r, self.h)
                    line += f" The role of {person} in {group} is {self.role[person, group]}."
                said.append(capital(line))
            facts = [Fact(person, kind, kind.attributes[0], [group]) for group in own]
            if apart:
                parts += [("", line, [fact]) for line, fact in zip(said, facts, strict=True)]
                parts.append(("", text, []))
            else:
                parts.append(("", " ".join([text, *said]), facts))
        return parts

    def mix(self) -> dict[str, float]:
        """How often each kind of question is asked."""
        return {"join2": 5.0, "list": 2.0, "inverse": 0.7, "direct": 1.5, "absent": 0.5}

    def one(self, kind: str) -> Question | None:
        """A question of that kind, or none if this draw has none."""
        r, sort = self.r, self.sort
        person, group, trait = r.choice(self.people), r.choice(self.groups), r.choice(self.traits)
        own = [fact for fact in self.belongs if fact.entity == person]
        if kind == "join2" and own:
            phrase = r.choice((f"{person}'s {sort.plural}", f"the {sort.plural} that {person} {sort.belongs}"))
            asked = r.choice((trait.asked[1].format(gs=phrase), f"What are the {trait.name}s of {phrase}?"))
            if r.random() < 0.3:
                phrase = f"{person}'s {sort.name}"
                asked = f"What are {phrase} {trait.name}s?"
            if len(own) == 1 and r.random() < 0.5:
                phrase = f"the {sort.name} that {person} {sort.belongs}"
                asked = trait.asked[0].format(g=phrase)
            values = [self.value[fact.values[0], trait.name] for fact in own]
            needed = [*own, *(self.about[fact.values[0]] for fact in own)]
            return self._made(asked, kind, trait.name, values, needed, person, ((phrase, own[0].values[0]),))
        if kind == "list" and own:
            asked = r.choice((f"Which {sort.plural} does {person} belong to?", f"List {person}'s {sort.plural}.",
                              f"What are {person}'s {sort.plural}?"))  # fmt: skip
            return self._made(asked, kind, "groups", [fact.values[0] for fact in own], own, person)
        if kind == "inverse":
            found = [fact for fact in self.belongs if fact.values == [group]]
            asked = r.choice((f"Who {sort.belongs} {group}?", f"Which people belong to {group}?"))
            return self._made(asked, kind, "members", [f.entity for f in found], found, group) if found else None
        if kind == "direct" and own and self.role and r.random() < 0.5:
            fact = r.choice(own)
            asked = r.choice(("Which role does {} have in {}?", "What is the role of {} in {}?"))
            answer = self.role[person, fact.values[0]]
            return self._made(asked.format(person, fact.values[0]), kind, "role", [answer], [fact], person)
        if kind == "direct":
            return self._made(trait.asked[0].format(g=group), kind, trait.name, [self.value[group, trait.name]],
                              [self.about[group]], group)  # fmt: skip
        stranger = names.person(r, self.h)
        if kind != "absent" or stranger in self.people:
            return None
        return self._made(f"Which {sort.plural} does {stranger} belong to?", kind, "groups", [ABSENT], [], stranger)

    def _made(
        self,
        text: str,
        kind: str,
        family: str,
        answers: Sequence[str],
        facts: Sequence[Fact],
        entity: str,
        bridges: tuple[tuple[str, str], ...] = (),
    ) -> Question:
        documents = tuple(dict.fromkeys(d for fact in facts for d in fact.documents))
        return Question(
            text, ", ".join(answers), kind, f"connected.{family}", documents, tuple(answers), entity, bridges
        )

    def tasks(self, drawn: Sequence[Question]) -> list[Task]:
        """Task lines for the drawn questions."""
        families = tuple(dict.fromkeys(q.family for q in drawn))
        line = self.r.choice(
            ("Answer questions about people and their {}.", "People and their {}.", "Who belongs to which {}.")
        )
        notes = [f"{fact.entity}: {fact.values[0]}" for fact in self.belongs]
        return [Task(line.format(self.sort.plural), families, tuple(notes[:20]))]
