"""What the bench on real models shows: full context first, then differences on the same questions, with intervals.

Where full context is not better than a closed book beyond its interval, a group is "near the floor": whatever stands
before the question makes no difference there, so nothing is claimed, and the pools leave the group out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cribsheet.compare.compare import CLOSED, FULL
from cribsheet.compare.journal import read_lines
from cribsheet.compare.metrics import clustered_interval
from cribsheet.errors import RequestError
from cribsheet_bench.real.corpora import group_of
from cribsheet_bench.real.ways import INT4, KVZIP, NAMES

ALL = "all"
RIVALS = (FULL, "random", KVZIP, "dense")
_MANY = 10  # cases from which on cases are drawn whole; of fewer, no interval would be wide enough


@dataclass(frozen=True, slots=True)
class Row:
    """One answer: where, how, and how good, from 0 to 1 (`Asked.marks`).

    `leaked` says that it is the answer of an example; `tokens` are those before the question, per layer and head, and
    `nbytes` their keys and values; `mode` is what was used, which `auto` chooses.
    """

    model: str
    case: str
    method: str
    rate: float
    number: int
    type: str
    exact: float
    score: float
    included: float
    leaked: bool
    tokens: int
    nbytes: int
    mode: str
    answer: str

    @property
    def key(self) -> tuple[str, str, str, float, int]:
        """What tells it apart."""
        return self.model, self.case, self.method, self.rate, self.number


@dataclass(frozen=True, slots=True)
class Result:
    """Rows with what they were made with: the terms of a run, and what each model is."""

    setup: dict[str, Any]
    models: dict[str, Any]
    rows: list[Row]


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean difference in points on `n` questions that both answered, with its 95 % interval."""

    points: float
    low: float
    high: float
    n: int

    @property
    def is_beyond(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        shown = f"{self.points:+.1f} [{self.low:.1f}, {self.high:.1f}]"
        return f"**{shown}**" if self.is_beyond else shown


def read_result(path: Path) -> Result:
    """The result in a file, or the rows of a run that has not finished. Raises `RequestError` for anything else."""
    try:
        text = path.read_text(encoding="utf-8")
        try:
            found = json.loads(text)
        except ValueError:  # a journal: JSON by the line
            setup, lines = read_lines(path)
            return Result(setup, {}, [Row(**line) for line in lines])
        if "rows" not in found:  # a journal of its first line only
            return Result(found, {}, [])
        return Result(found["setup"], found["models"], [Row(**row) for row in found["rows"]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{path} holds no result of `cribsheet bench real`: {error}") from error


def merged(results: Sequence[Result]) -> Result:
    """One result of the results of several runs. Raises `RequestError` if their models differ under one name."""
    models: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        for name, told in result.models.items():
            models.setdefault(name, []).append(told)
            if models[name][0]["weights"] != told["weights"]:
                raise RequestError(f"Two models are called {name!r} in these files, and have other weights.")
    setup = joined(result.setup for result in results)
    rows = [row for result in results for row in result.rows]
    return Result(setup, {name: joined(told) for name, told in models.items()}, rows)


def joined(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What several runs say of themselves, as one: where they differ, all of it."""
    said: dict[str, list[Any]] = {}
    for part in parts:
        for key, value in part.items():
            said.setdefault(key, []).append(value)
    return {key: values[0] if len(set(map(str, values))) == 1 else _and(values) for key, values in said.items()}


def _and(values: Iterable[Any]) -> str:
    """Each of them once, also of those that were joined before."""
    return " and ".join(sorted({each for value in values for each in str(value).split(" and ")}))


def result_of(result: Result) -> Result:
    """The same with each answer once, in the order of models, cases, rates, methods and questions."""
    order = {name: number for number, name in enumerate(NAMES)}
    known = {row.key: row for row in result.rows}
    rows = sorted(known.values(), key=lambda row: (row.model, row.case, row.rate, order[row.method], row.number))
    return Result(result.setup, result.models, rows)


class View:
    """The rows of one model, by method and rate, and which groups say something."""

    def __init__(self, rows: Iterable[Row], *, seed: int = 0, is_wide: bool = False) -> None:
        """`is_wide` says that the model computes in 32 bits; sizes are then shown as of 16."""
        self.seed, self.is_wide = seed, is_wide
        self._by_way: dict[tuple[str, float], dict[tuple[str, int], Row]] = {}
        for row in rows:
            self._by_way.setdefault((row.method, row.rate), {})[row.case, row.number] = row
        found = (group_of(case) for rows in self._by_way.values() for case, _ in rows)
        self.groups = sorted(set(found), key=_by_length)
        self.lifts = {group: self.difference((FULL, 1.0), (CLOSED, 1.0), [group]) for group in self.groups}
        self.telling = [group for group, lift in self.lifts.items() if lift and lift.low > 0]

    @property
    def rates(self) -> list[float]:
        """All rates but 1."""
        return sorted({rate for method, rate in self._by_way if method not in (FULL, CLOSED)})

    def methods(self, rate: float) -> list[str]:
        """The methods of a rate, full context and closed book first."""
        return [name for name in NAMES if (name, 1.0 if name in (FULL, CLOSED) else rate) in self._by_way]

    def at(self, method: str, rate: float, groups: Sequence[str]) -> list[Row]:
        """The rows of a method in some groups; full context and closed book have one rate."""
        rows = self._by_way.get((method, 1.0 if method in (FULL, CLOSED) else rate), {})
        return [row for (case, _), row in rows.items() if group_of(case) in groups]

    def difference(self, way: tuple[str, float], rival: tuple[str, float], groups: Sequence[str]) -> Difference | None:
        """How much better a method scores than another, on the questions that both answered; none without any.

        Intervals are drawn by case, as the questions of one stand or fall together, where there are enough cases.
        """
        mine, theirs = self._by_way.get(way, {}), self._by_way.get(rival, {})
        shared = sorted(key for key in mine.keys() & theirs.keys() if group_of(key[0]) in groups)
        if not shared or way == rival:
            return None
        gains = [100 * (mine[key].score - theirs[key].score) for key in shared]
        cases = {case for case, _ in shared}
        clusters = [case for case, _ in shared] if len(cases) >= _MANY else list(range(len(shared)))
        low, high = clustered_interval(gains, clusters, seed=self.seed)
        return Difference(_mean(gains), low, high, len(shared))

    def retained(self, method: str, rate: float, groups: Sequence[str]) -> tuple[float, int] | None:
        """Of the questions that full context answers, the percentage that a method answers, and how many these are."""
        right = {(row.case, row.number) for row in self.at(FULL, 1.0, groups) if row.included}
        kept = [row.included for row in self.at(method, rate, groups) if (row.case, row.number) in right]
        return (100 * _mean(kept), len(kept)) if kept else None


def views(result: Result) -> dict[str, View]:
    """The rows of each model."""
    rows: dict[str, list[Row]] = {}
    for row in result.rows:
        rows.setdefault(row.model, []).append(row)
    wide = {model for model, about in result.models.items() if about.get("dtype") == "float32"}
    seed = result.setup.get("seed", 0)
    return {model: View(own, seed=seed, is_wide=model in wide) for model, own in rows.items()}


def print_table(result: Result, console: Console) -> None:
    """Methods of each rate over all groups that say something; and of which nothing is claimed."""
    for model, view in views(result).items():
        for line in [f"\n{model}", *_floor(view)]:
            console.print(line, markup=False, highlight=False)
        for rate in view.rates if view.telling else ():
            table = Table(f"{rate:g}×", "score", "n", *(f"- {rival}" for rival in _rivals(view)), "retained")
            for cells in _pooled(view, rate, view.telling):
                table.add_row(*(Text(cell.strip("*")) for cell in cells[: len(table.columns)]))
            console.print(table)


def page(result: Result) -> str:
    """The page of the docs that shows a result, setup included."""
    parts = [_HEAD]
    for model, view in views(result).items():
        parts += [f"## {model}\n", _first(view), *(f"{line}\n" for line in _floor(view))]
        for rate in view.rates if view.telling else ():
            parts += [f"### {rate:g}×\n", _all_groups(view, rate), _each_group(view, rate)]
    told = {**result.setup, **{name: _listed(about) for name, about in result.models.items()}}
    parts.append("Setup: " + ", ".join(f"{key} {value}" for key, value in told.items()) + ".\n")
    return "\n".join(part for part in parts if part)


_HEAD = """# Real models

Models that nobody trained for this, real documents, and questions that people wrote about them, from
[public data sets](real-data.md). Every method has the same number of tokens before the question at a rate, the
template's preamble and the task's examples included, and every prompt has the same examples; `zero-shot` has the task
line alone, and `int4` keeps as many tokens as fit the same bytes; `study-int4` is that after three minutes of study
(`-1`, `-5` and `-10`: one, five and ten; `-60`: an hour, of a processor), `study-random` the same of tokens drawn at
random, and `study-uniform` three minutes of a sheet that other engines read, which keeps 16-bit tokens. This page
is written by the bench (`make real`).

*Score* is the F1 of words, the share of right letters in multiple choice, or ROUGE-L of summaries, in points from 0 to
100. Differences are those on the questions that both methods were asked, with 95 % intervals, drawn by case from ten
cases on and by question below; those beyond their interval are bold. *Retained* is the share of the questions that full
context answers (the answer's words stand in what the model says) that the method answers too. *Retrieved* is the share
of answers that were told passages; *leaked* that of answers that are an example's. *KiB* are keys and values before the
question, in 16 bits a number where they are not in `int4`.
"""


def _first(view: View) -> str:
    """Full context beside closed book, for each group."""
    rows = ["| documents | questions | full context | closed book | full − closed |", "|---|---|---|---|---|"]
    for group in view.groups:
        scores = [_score(view.at(method, 1.0, [group])) for method in (FULL, CLOSED)]
        lift = view.lifts[group]
        rows.append(f"| {group} | {lift.n if lift else 0} | {scores[0]} | {scores[1]} | {lift or '–'} |")
    return "\n".join(rows) + "\n"


def _floor(view: View) -> list[str]:
    """Of what nothing is claimed, and why."""
    near = [group for group in view.groups if group not in view.telling and view.lifts[group]]
    unknown = [group for group in view.groups if not view.lifts[group]]
    lines = []
    if near:
        lines.append(
            f"Near the floor, so that nothing is claimed: {', '.join(near)}. Full context is not better there than no "
            "documents, beyond the interval."
        )
    if unknown:
        lines.append(f"Not asked both with full context and without documents, so nothing is claimed: "
                     f"{', '.join(unknown)}.")  # fmt: skip
    return lines


def _rivals(view: View) -> list[str]:
    return [rival for rival in RIVALS if any(rival in view.methods(rate) for rate in view.rates)]


def _pooled(view: View, rate: float, groups: Sequence[str]) -> Iterable[list[str]]:
    """Cells for each method of a rate: name, score, questions, differences, retained, sizes and shares."""
    for method in view.methods(rate):
        rows = view.at(method, rate, groups)
        if not rows:
            continue
        own = method, 1.0 if method in (FULL, CLOSED) else rate
        gains = [view.difference(own, (rival, 1.0 if rival == FULL else rate), groups) for rival in _rivals(view)]
        kept, unit = view.retained(method, rate, groups), 2048 if view.is_wide and method != INT4 else 1024
        told = method != CLOSED and _mean(row.mode in ("hybrid", "retrieval", "recall") for row in rows)
        yield [
            method,
            _score(rows),
            str(len(rows)),
            *(str(gain) if gain else "–" for gain in gains),
            f"{kept[0]:.0f} % of {kept[1]}" if kept else "–",
            f"{_mean(row.tokens for row in rows):.0f}",
            f"{_mean(row.nbytes for row in rows) / unit:,.0f}",
            f"{100 * told:.0f} %",
            f"{100 * _mean(row.leaked for row in rows):.1f} %",
        ]


def _all_groups(view: View, rate: float) -> str:
    heads = ["method", "score", "n", *(f"− {rival}" for rival in _rivals(view)), "retained", "tokens", "KiB",
             "retrieved", "leaked"]  # fmt: skip
    return _table(heads, _pooled(view, rate, view.telling))


def _each_group(view: View, rate: float) -> str:
    """Scores of all methods in each group that says something."""
    methods = view.methods(rate)
    cells = ([group, *(_score(view.at(method, rate, [group])) for method in methods)] for group in view.telling)
    return _table(["", *methods], cells) if len(view.telling) > 1 else ""


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]]) + "\n"


def _score(rows: Sequence[Row]) -> str:
    return f"{100 * _mean(row.score for row in rows):.1f}" if rows else "–"


def _by_length(group: str) -> tuple[str, int, str]:
    """4000 before 16000."""
    first, _, last = group.rpartition("/")
    return (first, int(last), "") if last.isdigit() else (group, 0, "")


def _listed(about: Mapping[str, Any]) -> str:
    return "(" + ", ".join(str(value) for value in about.values()) + ")"


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0
