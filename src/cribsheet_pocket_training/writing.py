"""Worlds of entities: what is true in them, and eleven ways to write it down.

Users bring prose, headers, tables, mails and records; a reader that has seen facts in one form only fails on theirs.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import ClassVar

from cribsheet_pocket_training import names
from cribsheet_pocket_training.builder import Builder
from cribsheet_pocket_training.names import capital
from cribsheet_pocket_training.schemas import KINDS, Attribute, Kind, draw, made_up_attribute, name_of
from cribsheet_pocket_training.world import CHARACTERS_PER_TOKEN, STYLES, Fact


def titled(entity: str) -> str:
    """An entity at the start of a sentence or as a heading; a name such as "libfoo" keeps its small letter."""
    return "T" + entity[1:] if entity.startswith("the ") else entity


def article(noun: str) -> str:
    """The noun with "a" or "an"."""
    return ("an " if noun[0] in "aeio" else "a ") + noun


def joined(values: Sequence[str], r: random.Random) -> str:
    """Values as an enumeration, with commas or with "and"."""
    if len(values) < 2 or r.random() < 0.4:
        return ", ".join(values)
    return ", ".join(values[:-1]) + " and " + values[-1]


class Written(Builder):
    """A world of entities with attributes, written down in one or several styles.

    `facts` are in order of appearance.
    """

    def __init__(
        self,
        r: random.Random,
        held_out: bool,
        tokens: int,
        kind: Kind,
        style: str | None,
        filler: Callable[[random.Random], str] | None,
    ) -> None:
        super().__init__(r, held_out, filler)
        self.prefix = self._prefix(kind)
        self.schema = self._schema(kind)
        self.styles = self._styles(style)
        self.bare = r.random() < 0.5  # fields name a numbered document by its number alone
        self.addresses = r.random() < 0.4  # fields add an address to an author
        room = int(tokens * CHARACTERS_PER_TOKEN)
        spare = 0
        if filler is not None:
            spare = int(room * r.choice((0.1, 0.25, 0.4, 0.6, 0.8)))
        per_entity = 30 + 42 * sum(len(a) for a in self.schema.values()) / len(self.schema)
        count = max(2, int((room - spare) / per_entity))
        for _ in range(4):
            self.entities, self.facts = self._draw(count)
            written = self._write()
            size = sum(len(text) + 2 for _, text, _ in written)
            fit = (room - spare) / size
            if 0.93 <= fit <= 1.15 or (count <= 2 and fit < 1):
                break
            count = max(2, int(count * fit))
        if filler is not None:
            spare = room - size
        self.strew(written, spare)

    # -- what there is -------------------------------------------------------------------------------------------

    def _prefix(self, kind: Kind) -> str:
        r = self.r
        if r.random() < 0.45:
            return "PEP"
        return r.choice(
            ("RFC", "Standard", "Policy", "Rule", "Proposal", "".join(r.choice("ABCDEFGIKLMNPRSTZ") for _ in range(3)))
        )

    def _schema(self, kind: Kind) -> dict[str, list[Attribute]]:
        """The attributes of each kind of entity: the main kind first, then those that relations lead to."""
        r = self.r
        schema: dict[str, list[Attribute]] = {}
        wanted = [kind.key]
        while wanted:
            key = wanted.pop(0)
            if key in schema:
                continue
            pool = list(KINDS[key].attributes)
            plain = [a for a in pool if a.target is None]
            relations = [a for a in pool if a.target is not None]
            many = r.randint(1, 6) if not schema else r.randint(1, 3)
            chosen = r.sample(plain, min(many, len(plain)))
            if len(schema) < 3 and relations and r.random() < (0.75 if not schema else 0.4):
                chosen += r.sample(relations, min(len(relations), r.choice((1, 1, 2))))
            if r.random() < 0.2:
                invented = made_up_attribute(r, self.h)
                if all(invented.label not in (a.label, a.key) for a in pool):
                    chosen.append(invented)
            r.shuffle(chosen)
            schema[key] = chosen
            wanted += [a.target for a in chosen if a.target is not None]
        return schema

    def _draw(self, count: int) -> tuple[dict[str, list[str]], list[Fact]]:  # noqa: C901
        r = self.r
        entities: dict[str, list[str]] = {}
        taken: set[str] = set()
        for index, key in enumerate(self.schema):
            kind, size = (
                KINDS[key],
                count if index == 0 else max(2, int(count / r.choice((1.5, 2, 3, 4) if self.h else (1, 1.5, 2, 3)))),
            )
            found: list[str] = []
            while len(found) < size:
                candidate = name_of(
                    kind, r, self.h, self.prefix if kind.namer == "spec" else r.choice(("ticket ", "ticket #"))
                )
                if candidate not in taken:
                    taken.add(candidate)
                    found.append(candidate)
            entities[key] = found
        scale = 1.0 / sum(len(e) for e in entities.values()) * count
        if scale < 0.999:  # the size was meant for all kinds together
            entities = {k: e[: max(2, int(len(e) * scale))] for k, e in entities.items()}
        several = r.random() < 0.3
        missing = r.choice((0.0, 0.0, 0.08, 0.2))
        facts: list[Fact] = []
        for key, attributes in self.schema.items():
            few = {
                a.key: [draw(a.value, r, self.h) for _ in range(r.randint(2, 6))]
                for a in attributes
                if a.target is None and r.random() < (0.25 if self.h else 0.4)
            }  # values that many entities share
            many = {a.key for a in attributes if a.target and several and r.random() < 0.6}
            for entity in entities[key]:
                for a in attributes:
                    if r.random() < missing:
                        continue
                    if a.target is not None:
                        others = [e for e in entities[a.target] if e != entity]
                        if not others:
                            continue
                        values = r.sample(others, min(len(others), r.randint(1, 3) if a.key in many else 1))
                    elif a.key in few:
                        values = [r.choice(few[a.key])]
                    else:
                        values = [draw(a.value, r, self.h)]
                    facts.append(Fact(entity, KINDS[key], a, values))
        if not facts:  # everything was left out
            return self._draw(count + 1)
        return entities, facts

    # -- how it is written ---------------------------------------------------------------------------------------

    def _styles(self, style: str | None) -> list[str]:
        if style is not None:
            return [style]
        r = self.r
        if "spec" in self.schema and r.random() < 0.5:
            return ["header"]
        pool = ["prose"] * 4 + ["titled"] * 2 + ["sentences"] * 3 + list(STYLES[3:])
        return [r.choice(pool)] if r.random() < 0.6 else r.sample(pool, 3)

    def _write(self) -> list[tuple[str, str, list[Fact]]]:  # noqa: C901
        """Documents as (title, text, facts); also puts `self.facts` into order of appearance."""
        r = self.r
        grouped: dict[str, list[Fact]] = {}
        for fact in self.facts:
            grouped.setdefault(fact.entity, []).append(fact)
        everyone = list(grouped)
        if r.random() < 0.7:
            r.shuffle(everyone)
        written: list[tuple[str, str, list[Fact]]] = []
        todo: dict[str, list[str]] = {}
        for entity in everyone:
            todo.setdefault(r.choice(self.styles), []).append(entity)
        for style, chosen in todo.items():
            if style == "sentences":
                facts = [f for e in chosen for f in grouped[e]]
                r.shuffle(facts)
                step = r.choice((1, 4, 8, 20))
                joint = r.choice((" ", " ", "\n"))
                for i in range(0, len(facts), step):
                    part = facts[i : i + step]
                    written.append(("", joint.join(self._state(f) for f in part), part))
            elif style in ("csv", "table", "directory"):
                for key in self.schema:
                    rows = [e for e in chosen if grouped[e][0].kind.key == key]
                    step = r.choice((4, 8, 16, 40))
                    for i in range(0, len(rows), step):
                        written.append(self._tabulate(style, key, [grouped[e] for e in rows[i : i + step]]))
            else:
                for entity in chosen:
                    facts = grouped[entity]
                    if r.random() < 0.5:
                        r.shuffle(facts)
                    written.append(self._describe(style, entity, facts))
        r.shuffle(written)
        self.facts = [f for _, _, facts in written for f in facts]
        return written

    def _state(self, fact: Fact, subject: str | None = None) -> str:
        """A sentence that states `fact`."""
        r = self.r
        entity, a = fact.entity, fact.attribute
        value = joined(fact.values, r)
        if a.statements and r.random() < 0.8:
            form = r.choice(a.statements)
            if len(fact.values) > 1 and form.startswith("{v}"):
                form = a.statements[0]
            if subject is not None and form.startswith("{e}"):
                entity = subject
            elif subject is None and r.random() < 0.05 and form.startswith("{e}"):
                form = r.choice(("According to the records, ", "As of this year, ", "It is known that ")) + form
        else:
            form = r.choice(("The {l} of {e} is {v}.", "The {l} of {e} is {v}.", "{e} has the {l} {v}.", "{e}'s {l} is {v}.",  # noqa: E501
                             "For {e}, the {l} is {v}.", "As {l}, {e} has {v}."))  # fmt: skip
            if len(fact.values) > 1:
                form = form.replace(" is ", " are ") if "{l} is" in form or "{e} is" in form else form
        if form.startswith("{e}"):
            form = titled(entity) + form[3:]
        sentence = form.replace("{l}", a.label).replace("{e}", entity).replace("{v}", value)
        if subject is None or entity != subject:
            fact.sentence = sentence
        return sentence

    def _prose(self, facts: list[Fact]) -> str:
        r = self.r
        pronoun = "It" if facts[0].kind.pronoun == "it" else r.choice(("He", "She"))
        habit = r.choice((0.0, 0.0, 0.4, 0.8))
        parts: list[str] = []
        for i, fact in enumerate(facts):
            parts.append(self._state(fact, pronoun if i and r.random() < habit else None))
        return " ".join(parts)

    def _shown(self, fact: Fact) -> str:
        """The value as fields show it: numbered documents sometimes by their number alone, authors with an address."""
        values = fact.values
        if fact.attribute.target == "spec" and self.bare:
            values = [v.split(" ")[-1] for v in values]
        elif fact.attribute.key == "author" and self.addresses:
            values = [f"{v} <{v.split(' ')[0].lower()}@{names.made_up(self.r)}.org>" for v in values]
        return ", ".join(values)

    def _unasked(self) -> list[str]:
        """Fields that nobody asks about, as real headers have them."""
        r = self.r
        dates = [names.date(r, self.h) for _ in range(4)]
        return [
            f"Version: {r.choice(('$Revision$', str(r.randint(1000, 99999))))}", f"Last-Modified: {dates[0]}",
            f"Post-History: {', '.join(dates[1 : r.randint(2, 4)])}", "Content-Type: text/x-rst",
            f"Sponsor: {names.person(r, self.h)}", f"Delegate: {names.person(r, self.h)}",
            f"Resolution: https://{names.made_up(r)}.org/archives/{r.randint(2000, 2026)}/{r.randint(1, 12):02}.html",
        ]  # fmt: skip

    _FIELD: ClassVar = {"created": "Created", "version": "Python-Version", "requires": "Requires", "successor": "Superseded-By",  # noqa: E501
              "discussions": "Discussions-To"}  # fmt: skip

    def _describe(self, style: str, entity: str, facts: list[Fact]) -> tuple[str, str, list[Fact]]:  # noqa: C901
        r = self.r
        title = titled(entity)
        if style == "prose":
            return "", self._prose(facts), facts
        if style == "titled":
            return title, f"{title}\n{self._prose(facts)}", facts
        if style == "mail":
            sender = f"{names.person(r, self.h)} <{names.email(r, self.h)}>"
            head = f"From: {sender}\nTo: {names.email(r, self.h)}\nDate: {names.date(r, self.h)}\nSubject: {title}\n\n"
            return title, head + r.choice(("", "Hello,\n\n", "Dear all,\n\n")) + self._prose(facts), facts
        labels = [capital(f.attribute.label) for f in facts]
        shown = [self._shown(f) for f in facts]
        if style == "json":
            keys = [f.attribute.label.replace(" ", "_").replace("-", "_") for f in facts]
            values = [f.values if len(f.values) > 1 else v for f, v in zip(facts, shown, strict=True)]
            record = {r.choice(("name", "name", "id")): entity, **dict(zip(keys, values, strict=True))}
            return title, json.dumps(record, indent=r.choice((None, 2)), ensure_ascii=False), facts
        if style == "header":
            if facts[0].kind.key == "spec":
                word, _, digits = entity.rpartition(" ")
                body = [f for f in facts if f.attribute.key == "topic" and r.random() < 0.8]
                rest = [f for f in facts if f not in body]
                lines = [f"{word}: {digits}"]
                lines += [
                    f"{self._FIELD.get(f.attribute.key, capital(f.attribute.label))}: {self._shown(f)}" for f in rest
                ]
                for line in [] if self.h else r.sample(self._unasked(), r.choice((0, 0, 1, 3, 5))):
                    lines.insert(r.randint(1, len(lines)), line)
                text = "\n".join(lines)
                for f in body:
                    mark = r.choice(("Abstract\n========\n\n", "## Abstract\n\n", "Abstract:\n\n", ""))
                    verb = r.choice(
                        ("describes", "proposes", "documents", "defines", "specifies", "introduces", "adds")
                    )
                    f.sentence = f"This {word} {verb} {f.values[0]}."
                    text += f"\n\n{mark}{f.sentence}"
                    f.sentence = ""
                return title, text, rest + body
            name_field = r.choice(("Name", facts[0].kind.singular.capitalize(), "Title"))
            hyphen = r.random() < 0.4
            lines = [
                f"{lb.title().replace(' ', '-') if hyphen else lb}: {v}" for lb, v in zip(labels, shown, strict=True)
            ]
            return title, "\n".join([f"{name_field}: {entity}", *lines]), facts
        lines = [f"{lb}: {v}" for lb, v in zip(labels, shown, strict=True)]
        if style == "markdown":
            bold = r.random() < 0.5
            lines = [f"- **{lb}**: {v}" if bold else f"- {lb}: {v}" for lb, v in zip(labels, shown, strict=True)]
            mark = "#" * r.randint(1, 3)
            if r.random() < 0.3:
                return title, f"{mark} {title}\n\n{self._prose(facts)}", facts
            return title, f"{mark} {title}\n\n" + "\n".join(lines), facts
        underline = r.choice("=-~")
        if r.random() < 0.4:
            lines = [f":{lb}: {v}" for lb, v in zip(labels, shown, strict=True)]
        else:
            lines = [f"* {line}" for line in lines]
        return title, f"{title}\n{underline * len(title)}\n\n" + "\n".join(lines), facts

    def _tabulate(self, style: str, key: str, rows: list[list[Fact]]) -> tuple[str, str, list[Fact]]:
        r = self.r
        attributes = self.schema[key]
        cells = [
            [rows_[0].entity] + [next((self._shown(f) for f in rows_ if f.attribute is a), "") for a in attributes]
            for rows_ in rows
        ]
        head = [r.choice(("name", KINDS[key].singular))] + [a.label for a in attributes]
        facts = [f for row in rows for f in row]
        title = capital(KINDS[key].plural)
        if style == "directory":
            dash = r.choice((" — ", "; ", " | ", " / "))
            note = f"{title} ({', '.join(head)})"
            return title, note + "\n" + "\n".join(dash.join(c or "-" for c in row) for row in cells), facts
        if style == "csv":
            mark = r.choice((",", ",", ";", "\t"))
            quoted = [[f'"{c}"' if mark in c else c for c in row] for row in [head, *cells]]
            return title, "\n".join(mark.join(row) for row in quoted), facts
        lines = ["| " + " | ".join(row) + " |" for row in [[capital(x) for x in head], *cells]]
        lines.insert(1, "|" + "---|" * len(head))
        return title, "\n".join(lines), facts
