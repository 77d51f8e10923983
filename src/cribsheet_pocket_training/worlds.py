"""Synthetic worlds: documents about made-up entities, and questions whose answers stand in those documents.

The pocket model was trained on worlds and is measured on held-out ones: other seeds and other names (see `names`).
The library's benchmarks, demo and tests draw their worlds here too:

    world = make_world(seed=7, tokens=600)
    world.documents[0].text, world.questions[0].text, world.questions[0].answer

Lists are in order of appearance; what the documents do not say has the answer `ABSENT`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from cribsheet_pocket_training.connected import Connected
from cribsheet_pocket_training.names import Narrow
from cribsheet_pocket_training.needles import Needles, Variables
from cribsheet_pocket_training.records import Records
from cribsheet_pocket_training.schemas import KINDS
from cribsheet_pocket_training.world import ABSENT, QUESTION_KINDS, STYLES, Document, Question, Task, World

__all__ = ["ABSENT", "KINDS", "QUESTION_KINDS", "STYLES", "Document", "Question", "Task", "World", "make_world"]

_SHARE = {"person": 4.5, "company": 1.5, "project": 1.5, "spec": 3.0, "package": 1.2}


def make_world(
    seed: int | str,
    tokens: int = 600,
    kind: str = "mixed",
    *,
    style: str | None = None,
    questions: int = 40,
    kinds_of_question: Sequence[str] | None = None,
    emphasis: Mapping[str, float] | None = None,
    filler: Callable[[random.Random], str] | None = None,
    held_out: bool = True,
) -> World:
    """A world of about `tokens` tokens of documents.

    `kind` is a kind of entity ("person", "spec", ...), "needles", "variables", "connected" (people in groups), or
    "mixed" for any but the last.  `filler` makes paragraphs that say nothing about the world; they are strewn between
    its documents.  `emphasis` multiplies how often a kind of question is asked.  Training used `held_out=False`, whose
    seeds and names never meet those of the default; there "mixed" draws connected worlds too.
    """
    r = random.Random(f"{'held-out' if held_out else 'training'}:{seed}")
    if not held_out and r.random() < 0.5:
        r = Narrow(f"narrow:{seed}", r.choice((3, 5, 8, 16)))
    if kind == "mixed":
        if not held_out and r.random() < 0.18:
            kind = "connected"
        else:
            kind = r.choices((*KINDS, "needles", "variables"), (*(_SHARE.get(k, 1.0) for k in KINDS), 2.0, 0.5))[0]
    builder: Needles | Variables | Connected | Records
    if kind == "needles":
        builder = Needles(r, held_out, tokens, filler)
    elif kind == "variables":
        builder = Variables(r, held_out, tokens, filler)
    elif kind == "connected":
        builder = Connected(r, held_out, tokens, filler)
    elif kind in KINDS:
        builder = Records(r, held_out, tokens, KINDS[kind], style, filler)
    else:
        raise ValueError(
            f"There is no world of kind {kind!r}; the kinds are {', '.join(KINDS)}, needles, variables, connected."
        )
    drawn = builder.questions(questions, kinds_of_question, emphasis)
    return World(seed, kind, tuple(builder.documents), tuple(drawn), tuple(builder.tasks(drawn)))
