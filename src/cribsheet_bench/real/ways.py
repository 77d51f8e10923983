"""The ways to answer that the bench on real models compares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from cribsheet.compare.compare import CLOSED, FULL
from cribsheet.vocabulary import Mode
from cribsheet_bench.quality.run import Method

KVZIP, INT4 = "kvzip", "int4"
_INT4_TOKENS = 3.5  # times as many tokens fit the bytes that 16 bits take
_MINUTES = 3.0  # of study, on whatever device there is
_OUR_DEFAULT = Method("default", guide="resident")


@dataclass(frozen=True, slots=True)
class Way:
    """A way to answer: how its sheet is made, if it has one, and how passages of which retriever join in.

    A sheet of a `share` of the budget keeps so many times its tokens; passages get the rest. It studies for so many
    `minutes` before it is asked.
    """

    name: str
    sheet: Method | None = None
    mode: Mode = "sheet"
    retriever: str = ""
    share: float = 1.0
    minutes: float = 0.0


def _sheet(name: str, scorer: str | None = None, *, share: float = 1.0, minutes: float = 0.0, **how: Any) -> Way:
    return Way(name, Method(name, scorer, guide="resident", **how), share=share, minutes=minutes)


def _studied(name: str, minutes: float, scorer: str | None = None, **how: Any) -> Way:
    return _sheet(name, scorer, dtype="int4", share=_INT4_TOKENS, minutes=minutes, **how)


def _both(name: str, mode: Mode, retriever: str) -> Way:
    return Way(name, replace(_OUR_DEFAULT, archive=mode == "recall"), mode, retriever, share=0.5)


WAYS = (
    Way(FULL),
    Way(CLOSED, mode="retrieval"),
    Way("bm25", mode="retrieval", retriever="bm25"),
    Way("dense", mode="retrieval", retriever="dense"),
    Way("default", _OUR_DEFAULT),
    _sheet("zero-shot", examples=False),
    _sheet("uniform", "recall", allocation="uniform"),
    _sheet("adaptive", "recall", allocation="adaptive"),
    _sheet(INT4, dtype="int4", share=_INT4_TOKENS),
    _sheet("reconstruction", "reconstruction", allocation="adaptive"),
    _sheet("task", "task", allocation="uniform"),
    _sheet("finch", "finch", allocation="uniform"),
    _sheet("random", "random", allocation="uniform"),
    _sheet("refit", "recall", correction="refit"),
    _sheet("study", minutes=_MINUTES),
    _studied("study-int4", _MINUTES),
    _studied("study-int4-1", 1.0),
    _studied("study-int4-5", 5.0),
    _studied("study-int4-10", 10.0),
    _studied("study-int4-60", 60.0),  # for a processor
    _sheet("study-uniform", minutes=_MINUTES, for_engines=True),  # which llama.cpp and vLLM read
    _sheet("study-uniform-10", minutes=10.0, for_engines=True),
    _studied("study-random", _MINUTES, "random", allocation="uniform"),  # of tokens that nobody chose
    Way(KVZIP),
    _both("hybrid-bm25", "hybrid", "bm25"),
    _both("hybrid-dense", "hybrid", "dense"),
    _both("auto-bm25", "auto", "bm25"),
    _both("auto-dense", "auto", "dense"),
    _both("recall-bm25", "recall", "bm25"),
    _both("recall-dense", "recall", "dense"),
    _both("recall-sheet", "recall", "sheet"),
)
BY_NAME = {way.name: way for way in WAYS}
NAMES = tuple(BY_NAME)
USUAL = tuple(name for name, way in BY_NAME.items() if not way.minutes)  # where nothing is said: minutes add up
