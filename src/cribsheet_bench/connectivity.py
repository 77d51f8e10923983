"""The synthetic set of arXiv 2503.04973, section 6, rebuilt: people, projects and who works on what.

Each person works on exactly `connectivity` projects. Direct questions are answered by the documents about one person,
join questions by these and by the documents of each of the person's projects: about twice the connectivity. Documents
may be padded with neutral sentences, and names may differ in their number only (Person_01, Person_02).

    python -m cribsheet_bench.connectivity --levels 1 2 4 8 --json connectivity.json

answers both kinds by every method at equal budgets, 18 questions of each kind at each level, in about 35 minutes on one
core. What the paper leaves open is said here: how many people and
projects there are, and the filler. Metric of the paper: `set_f1`.
"""

from __future__ import annotations

import itertools
import json
import logging
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cribsheet.compare.compare import ALL, FULL, NAMES, Corpus, Record, Settings, compare, summary
from cribsheet.compare.journal import write_rows
from cribsheet.compare.judged import CONNECTED, judged, print_judged
from cribsheet.compare.questions import Asked
from cribsheet.compare.report import page, print_table, setup_of
from cribsheet.corpus.documents import Document
from cribsheet.corpus.task import Task
from cribsheet_bench.command import begin, options

logger = logging.getLogger(__name__)

DIRECT, JOIN = "direct", "join"
TASK = "Answer questions about people and their projects."
_FIRST = "Ada Boris Chiara Daria Emil Farah Goran Hilde Imre Jonna Kaito Leonie Milan Noor Orla Petar Quentin Rania Soren Talia".split()  # noqa: E501, SIM905
_LAST = "Abel Brandt Castell Dorn Engel Falk Grau Hartig Ibsen Junker Kolb Lorenz Mahler Nolde Ohm Pohl Quist Ritter Sand Thoma".split()  # noqa: E501, SIM905
_TITLE = "Amber Basalt Cobalt Dune Ember Fjord Garnet Heath Indigo Juniper Kelp Larch Marble Nectar Onyx Pebble Quartz Reed Slate Tundra".split()  # noqa: E501, SIM905
_SECOND = "Anchor Beacon Circle Delta Engine Falcon Garden Harbour Island Journey Kernel Ladder Mirror Needle Orbit Pillar Quiver River Summit Tunnel".split()  # noqa: E501, SIM905
_DOMAIN = (
    "healthcare",
    "education",
    "agriculture",
    "transport",
    "cybersecurity",
    "forestry",
    "retail",
    "energy",
    "tourism",
    "robotics",
    "climate research",
    "water supply",
)
_SPONSOR = tuple(f"{a} {b}" for a in ("Orion", "Helix", "Corvus", "Lumen") for b in ("Bank", "Foods", "Labs", "Motors"))
_OCCUPATION = ("engineer", "nurse", "architect", "chemist", "teacher", "lawyer", "translator", "pilot")
_CITY = ("Lisbon", "Oslo", "Cairo", "Lima", "Kyoto", "Quito", "Dakar", "Turin", "Delhi", "Perth")
_HOBBY = ("chess", "sailing", "pottery", "climbing", "archery", "baking", "fencing", "gardening")
_ROLE = ("Engineer", "Manager", "Analyst", "Designer", "Tester", "Consultant")
_DEPARTMENT = ("R&D", "Marketing", "Finance", "Legal", "Operations", "Sales")
_AIM = (
    "cut costs",
    "train beginners",
    "replace old machines",
    "collect measurements",
    "find new markets",
    "save energy",
)
# As published, and as chains of relations: the form of join that the pocket model was trained on.
_OF_A_CORPUS = ("seed", "people", "questions", "characters", "near_names", "wording")
_WORDINGS = {
    "published": (
        "What are {name}'s project domains?",
        "In which years did {name}'s projects begin?",
        "Who sponsors {name}'s projects?",
    ),
    "chain": (
        "What is the domain of the project that {name} works on?",
        "In which year did the project that {name} works on begin?",
        "Who sponsors the project that {name} works on?",
    ),
}
_FILLER = (
    "The meeting room was booked for the whole afternoon.",
    "Minutes are kept in the usual place.",
    "Nothing else was reported this week.",
    "The form has been signed and returned.",
    "Further remarks may be added later.",
    "A copy was sent to the archive.",
    "The weather was mild and the office quiet.",
    "Coffee was served during the break.",
)


@dataclass(frozen=True, slots=True)
class _Project:
    title: str
    domain: str
    sponsor: str
    year: int


def make_corpus(
    connectivity: int,
    *,
    seed: int = 0,
    people: int = 6,
    projects: int | None = None,
    questions: int = 25,
    characters: int = 0,
    near_names: bool = False,
    wording: str = "published",
    examples: int = 4,
) -> Corpus:
    """A corpus whose people work on `connectivity` projects each, with up to `questions` of each kind.

    Documents are padded with neutral sentences, each in turn, until the corpus has so many `characters`. `projects` is
    how many there are to choose from, by default two more than the connectivity. `wording` of join
    questions is "published" or "chain". The first two people serve as `examples` and are not asked about.
    """
    if not 1 <= connectivity <= 8:
        raise ValueError(f"The connectivity is {connectivity}; use 1 to 8.")
    r = random.Random(f"connectivity:{connectivity}:{seed}:{near_names}")
    names = _names(r, people, "Person", _FIRST, _LAST, near_names)
    titles = _names(r, projects or connectivity + 2, "Project", _TITLE, _SECOND, near_names)
    all_projects = [_Project(title, r.choice(_DOMAIN), r.choice(_SPONSOR), r.randint(1990, 2024)) for title in titles]
    texts = {f"project/{p.title}": _about_project(r, p) for p in all_projects}
    asked: dict[str, list[list[Asked]]] = {DIRECT: [], JOIN: []}
    for name in names:
        own = r.sample(all_projects, connectivity)
        department = r.choice(_DEPARTMENT)
        roles = {project.title: r.choice(_ROLE) for project in own}
        texts[f"person/{name}"] = _about_person(r, name)
        for title, role in roles.items():
            texts[f"membership/{name}/{title}"] = _membership(name, title, role, department)
        asked[DIRECT].append(_direct(name, own, roles, department))
        asked[JOIN].append(_join(name, own, wording))
    documents = _padded(texts, characters, r)
    r.shuffle(documents)
    shown = [asked[(DIRECT, JOIN)[n % 2]][n % 2][n // 2] for n in range(min(examples, 6))]
    left = [q for kind in (DIRECT, JOIN) for q in _dealt(asked[kind][2:])[:questions]]
    task = Task(TASK, tuple((q.text, q.golds[0]) for q in shown))
    return Corpus(f"connectivity {connectivity}", documents, task, left)


def _names(
    r: random.Random, count: int, word: str, first: Sequence[str], second: Sequence[str], near: bool
) -> list[str]:
    if near:
        return [f"{word}_{number:02d}" for number in range(1, count + 1)]
    return [f"{a} {b}" for a, b in zip(r.sample(first, count), r.sample(second, count), strict=True)]


def _padded(texts: dict[str, str], characters: int, r: random.Random) -> list[Document]:
    sizes = sum(map(len, texts.values()))
    for name in itertools.cycle(list(texts)):
        if sizes >= characters:
            break
        more = " " + r.choice(_FILLER)
        texts[name] += more
        sizes += len(more)
    return [Document(text, name) for name, text in texts.items()]


def _about_person(r: random.Random, name: str) -> str:
    return (
        f"{name} is {r.randint(22, 64)} years old and works as a {r.choice(_OCCUPATION)}. {name} lives in "
        f"{r.choice(_CITY)} and enjoys {r.choice(_HOBBY)}."
    )


def _about_project(r: random.Random, p: _Project) -> str:
    return (
        f"{p.title} is in the domain of {p.domain}. {p.title} is sponsored by {p.sponsor}. {p.title} began in "
        f"{p.year}. The aim of {p.title} is to {r.choice(_AIM)}."
    )


def _membership(name: str, title: str, role: str, department: str) -> str:
    return f"{name} is a member of {title}. The role of {name} in {title} is {role}. {name} is part of the {department} department."  # noqa: E501


def _direct(name: str, own: Sequence[_Project], roles: dict[str, str], department: str) -> list[Asked]:
    memberships = tuple(f"membership/{name}/{p.title}" for p in own)
    one = own[0]  # as random as any; so all questions about a person name the same document first
    return [
        Asked(f"Which projects does {name} belong to?", (_listed(p.title for p in own),), DIRECT, memberships),
        Asked(f"Which role does {name} have in {one.title}?", (roles[one.title],), DIRECT, (f"membership/{name}/{one.title}",)),  # noqa: E501
        Asked(f"Which department is {name} part of?", (department,), DIRECT, memberships[:1]),
    ]  # fmt: skip


def _join(name: str, own: Sequence[_Project], wording: str) -> list[Asked]:
    needed = tuple(f"membership/{name}/{p.title}" for p in own) + tuple(f"project/{p.title}" for p in own)
    golds = (_listed(p.domain for p in own), _listed(str(p.year) for p in own), _listed(p.sponsor for p in own))
    texts = (text.format(name=name) for text in _WORDINGS[wording])
    return [Asked(text, (gold,), JOIN, needed) for text, gold in zip(texts, golds, strict=True)]


def _listed(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _dealt(hands: Sequence[Sequence[Asked]]) -> list[Asked]:
    """One of each hand in turn."""
    return [hand[n] for n in range(max(map(len, hands), default=0)) for hand in hands if n < len(hand)]


def rows_of(records: Sequence[Record], *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows for each kind of question over all levels, and for each kind at each level ("join, connectivity 4")."""
    levels = [replace(each, type=f"{each.type}, {each.corpus}") for each in records]
    return [*summary(records, seed=seed), *(row for row in summary(levels, seed=seed) if row["type"] != ALL)]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the set from the command line; run again, it goes on after the answers that are in the JSON file."""
    parser = options(__doc__, written="write setup, rows and answers here, and a page beside it")
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rates", type=float, nargs="+", default=[8.0, 16.0, 32.0])
    parser.add_argument(
        "--methods", nargs="+", choices=NAMES, default=[FULL, "few-shot", "retrieval", "hybrid", "auto"]
    )
    parser.add_argument(
        "--people", type=int, default=8, help="of each level; three questions of each kind on all but two"
    )
    parser.add_argument("--questions", type=int, default=25, help="of each kind at each level, at most")
    parser.add_argument("--characters", type=int, default=8000, help="least size of each corpus, padded with filler")
    parser.add_argument("--near-names", action="store_true", help="Person_01, Person_02, ...")
    parser.add_argument("--wording", choices=list(_WORDINGS), default="published", help="of join questions")
    parser.add_argument("--scorer", help="what makes the sheets; by default what build does")
    arguments = parser.parse_args(argv)
    model, settings = begin(arguments), Settings(scorer=arguments.scorer, seed=arguments.seed)
    given = {key: value for key, value in vars(arguments).items() if key not in ("json", "levels")}
    records = _before(arguments.json, given)
    for level in arguments.levels:
        corpus = make_corpus(level, **{name: given[name] for name in _OF_A_CORPUS})
        logger.info("connectivity %d: %d questions", level, len(corpus.questions))
        setup = setup_of(model, corpus, arguments.methods, arguments.rates, settings) | {"arguments": given}

        def progress(name: str, rate: float, setup: dict[str, Any] = setup) -> None:
            logger.info("%s, rate %g", name, rate)
            _write(arguments.json, setup, records)  # what was answered before, should this be the last

        running = compare(
            model, corpus, methods=arguments.methods, rates=arguments.rates, settings=settings, done=list(records),
            progress=progress,
        )  # fmt: skip
        for record in running:
            records.append(record)
        result = _write(arguments.json, setup, records)
    print_table(result["rows"])
    print_judged(result["judged"])


def _write(file: Path | None, setup: dict[str, Any], records: Sequence[Record]) -> dict[str, Any]:
    """The result so far, in files if there is one to write to."""
    if not records:
        return {}
    setup = {**setup, "corpus": sorted({each.corpus for each in records})}
    setup["questions"] = len({(each.corpus, each.number) for each in records})
    seed = setup["seed"]
    many = [name for name in setup["corpus"] if int(name.rsplit(" ", 1)[1]) >= CONNECTED]
    result = {"setup": setup, "judged": judged(records, broad=JOIN, connected=many, seed=seed)}
    result["rows"] = rows_of(records, seed=seed)
    if file is not None:
        write_rows(file, {**result, "answers": [*records]})
        shown = page(result, title="Direct and join questions by connectivity", metric="set_f1")
        file.with_suffix(".html").write_text(shown, encoding="utf-8")
    return result


def _before(file: Path | None, given: dict[str, object]) -> list[Record]:
    """The answers of an earlier run with the same arguments."""
    if file is None or not file.exists():
        return []
    result = json.loads(file.read_text(encoding="utf-8"))
    if result["setup"]["arguments"] != given:
        raise SystemExit(f"{file} was made with other arguments; name another file")
    return [Record(**each) for each in result["answers"]]


if __name__ == "__main__":
    main()
