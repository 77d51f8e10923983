"""Scorers: one small class each with one method, and the table by which they are chosen.

To add one: write its file, add its row here, and it is offered by the command line, the benches and `build`.
"""

from __future__ import annotations

from collections.abc import Callable

from cribsheet.compress.scoring.finch import Finch
from cribsheet.compress.scoring.floors import Random, Recent
from cribsheet.compress.scoring.recall import Recall
from cribsheet.compress.scoring.reconstruction import Reconstruction
from cribsheet.compress.scoring.task_attention import TaskAttention
from cribsheet.compress.scoring.view import LayerView, Reads, Scorer
from cribsheet.errors import CribsheetError

__all__ = ["SCORERS", "LayerView", "Reads", "Scorer", "make_scorer"]

SCORERS: dict[str, Callable[[], Scorer]] = {
    "recall": Recall,
    "reconstruction": Reconstruction,
    "task": TaskAttention,
    "finch": Finch,
    "recent": Recent,
    "random": Random,
}


class UnknownScorerError(CribsheetError, ValueError):
    """A scorer name that is not in the table, or a scorer that does not say what it reads."""


def make_scorer(scorer: str | Scorer) -> tuple[str, Scorer]:
    """The scorer's name and a fresh instance; an instance of your own passes through under its class name."""
    if not isinstance(scorer, str):
        name, reads = type(scorer).__name__, getattr(scorer, "reads", None)
        if not isinstance(reads, Reads):
            raise UnknownScorerError(
                f"The scorer {name} reads {reads!r} after a chunk; set its `reads` to Reads(task=True), "
                "Reads(repetition=True), both or neither, from cribsheet.compress.scoring."
            )
        return name, scorer
    if scorer not in SCORERS:
        raise UnknownScorerError(f"There is no scorer {scorer!r}; use one of {', '.join(SCORERS)}.")
    return scorer, SCORERS[scorer]()
