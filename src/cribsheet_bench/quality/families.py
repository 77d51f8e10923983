"""What the quality bench asks: families of corpora, each with a task whose examples share no entity with the questions.

Four of RULER's six forms (arXiv 2404.06654) are drawn from the pocket model's worlds, which it was never trained on:
held-out seeds and names. The other two, common and frequent words, are made in `ruler.py`; `reading` asks real text
by rule (`prose.py`), and `connectivity` is the set of arXiv 2503.04973.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import TYPE_CHECKING

from cribsheet.corpus.documents import Document
from cribsheet.corpus.task import Task
from cribsheet.errors import RequestError
from cribsheet_bench.connectivity import make_corpus
from cribsheet_bench.quality import prose, ruler
from cribsheet_bench.quality.case import Case, divided

if TYPE_CHECKING:
    from cribsheet_pocket_training.world import Question, World

logger = logging.getLogger(__name__)

Maker = Callable[["Wanted"], Iterator[Case]]

_PATIENCE = 60  # worlds drawn for one that fits
_FEW, _MANY = 10, 12  # needles in prose, and needles that distract from each other
_APART = 400  # tokens for each needle of a long text
_LEVELS = (1, 2, 4)  # projects of each person


@dataclass(frozen=True, slots=True)
class Wanted:
    """What cases should be like: tokens of documents, seed of all draws, the user's own text for `reading`."""

    tokens: int = 600
    seed: int = 0
    text: str | None = None
    questions: int = 4


def make_cases(families: Sequence[str], each: int, wanted: Wanted) -> list[Case]:
    """Up to `each` cases of every family. Raises `RequestError` for a family that does not exist."""
    for name in families:
        if name not in FAMILIES:
            raise RequestError(f"There is no family {name!r}; use {', '.join(FAMILIES)}.")
    made = [
        (name, number, case) for name in families for number, case in enumerate(islice(FAMILIES[name](wanted), each))
    ]
    for name in families:
        if (found := sum(name == family for family, _, _ in made)) < each:
            logger.warning("%s has %d of %d cases at %d tokens, seed %d", name, found, each, wanted.tokens, wanted.seed)
    return [
        replace(
            case,
            family=name,
            name=f"{name}/{wanted.tokens}/{wanted.seed}/{number}",
            **{part: getattr(case, part)[: wanted.questions] for part in ("questions", "answers", "kinds")},
        )
        for name, number, case in made
    ]


def held_out_cases(count: int, tokens: int, seed: int) -> list[Case]:
    """Worlds that the pocket model was not trained on, each with a task that has examples and questions to spare."""
    return list(islice(_worlds(Wanted(tokens, seed)), count))


def _worlds(wanted: Wanted) -> Iterator[Case]:
    for world in _drawn(wanted, "mixed", seed=f"bench/{wanted.seed}"):
        for task in world.tasks:
            if len(task.families) > 1:  # "anything about the staff" tells no token from another
                continue
            case = _case(world, task.description, [q for q in world.questions_of(task) if q.kind != "absent"])
            if case:
                yield case
                break


def _needle(wanted: Wanted) -> Iterator[Case]:
    """Few needles in prose, one value each; in long texts no more for their length than in short ones."""
    most = max(_FEW, wanted.tokens // _APART)
    for world in _drawn(wanted, "needles", filler=True):
        asked = _once(q for q in world.questions if q.kind == "needle")
        if len(asked) <= most and all(len(q.answers) == 1 for q in asked):
            yield from _cases(world, asked, examples=2, least=2)


def _multikey(wanted: Wanted) -> Iterator[Case]:
    """Nothing but needles, one value each: all but one distract."""
    for world in _drawn(wanted, "needles"):
        asked = _once(q for q in world.questions if q.kind == "needle")
        if len(asked) >= _MANY and all(len(q.answers) == 1 for q in asked):
            yield from _cases(world, asked)


def _multivalue(wanted: Wanted) -> Iterator[Case]:
    """Needles with several values under one key, all of which are asked for."""
    for world in _drawn(wanted, "needles"):
        yield from _cases(world, _once(q for q in world.questions if q.kind == "needle" and len(q.answers) > 1))


def _variables(wanted: Wanted) -> Iterator[Case]:
    """Chains of assignments, strewn in prose; no two questions, or examples, are about the same chain."""
    for world in _drawn(wanted, "variables", filler=True):
        yield from _cases(world, list({_value(q): q for q in world.questions}.values()))


def _value(question: Question) -> str:
    """The number at the end of the chain that a question is about: its answer, or what it asks about."""
    found = re.search(r"\d+", question.answer) or re.search(r"\d+", question.text)
    return found[0] if found else question.text


def _connectivity(wanted: Wanted) -> Iterator[Case]:
    """Direct and join questions; none names a person or project of the examples."""
    for number in count():
        level = _LEVELS[number % len(_LEVELS)]
        seed = 1000 * wanted.seed + number // len(_LEVELS)
        made = make_corpus(level, seed=seed, characters=int(2.7 * wanted.tokens), wording="chain")
        shown = " ".join(f"{text} {gold}" for text, gold in made.task.examples)
        known = [d.id.rpartition("/")[2] for d in made.documents]
        named = [name for name in known if name in shown]
        asked = [(q.text, q.golds[0], q.type) for q in made.questions if not any(name in q.text for name in named)]
        random.Random(f"connectivity:{seed}").shuffle(asked)
        yield Case.of(made.name, list(made.documents), made.task, asked)


def _reading(wanted: Wanted) -> Iterator[Case]:
    return prose.reading(wanted.tokens, wanted.seed, wanted.text)


FAMILIES: dict[str, Maker] = {
    "worlds": _worlds,
    "needle": _needle,
    "multi-key": _multikey,
    "multi-value": _multivalue,
    "variables": _variables,
    "common words": lambda wanted: ruler.lists("common", wanted.tokens, wanted.seed),
    "frequent words": lambda wanted: ruler.lists("frequent", wanted.tokens, wanted.seed),
    "reading": _reading,
    "connectivity": _connectivity,
}


def _drawn(wanted: Wanted, kind: str, *, filler: bool = False, seed: str = "") -> Iterator[World]:
    """Held-out worlds of a kind, for as long as any of the last ones might have fitted."""
    from cribsheet_pocket_training.worlds import make_world

    strewn = _paragraph() if filler else None
    for number in range(1, 50 * _PATIENCE):
        name = f"{seed or f'{kind}/{wanted.seed}'}/{number}"
        yield make_world(name, tokens=wanted.tokens, kind=kind, questions=80, filler=strewn)


def _paragraph() -> Callable[[random.Random], str]:
    paragraphs = [each.text for each in prose.demo_passages()]
    return lambda r: r.choice(paragraphs)


def _once(questions: Iterator[Question] | Sequence[Question]) -> list[Question]:
    """One question about each entity."""
    return list({q.entity: q for q in questions}.values())


def _cases(world: World, questions: Sequence[Question], *, examples: int = 3, least: int = 3) -> Iterator[Case]:
    """The case of a world's only task, if there are questions enough."""
    case = _case(world, world.tasks[0].description, questions, examples=examples, least=least)
    if case:
        yield case


def _case(
    world: World, description: str, questions: Sequence[Question], *, examples: int = 3, least: int = 3
) -> Case | None:
    """A case, unless too few questions are left besides examples."""
    shown, asked = divided(questions, examples, lambda q: q.entity, lambda q: f"{q.text} {q.answer}")
    if len(shown) < examples or len(asked) < least:
        return None
    documents = [Document(text=d.text, id=d.id) for d in world.documents]
    task = Task(description, tuple((q.text, q.answer) for q in shown))
    return Case.of(str(world.seed), documents, task, [(q.text, q.answer, q.kind) for q in asked])
