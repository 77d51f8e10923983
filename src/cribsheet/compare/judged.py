"""The differences that decide whether sheet and retrieval together are worth it, each with its interval.

Pairs of answers to the same question are compared, and intervals are drawn by document, as in `compare.summary`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from cribsheet.compare.compare import Record
from cribsheet.compare.metrics import clustered_interval

SHEET, RETRIEVAL, HYBRID, AUTO = "few-shot", "retrieval", "hybrid", "auto"
CONNECTED = 4  # projects of each person from which on a join takes more passages than a small budget holds


def judged(
    records: Sequence[Record], *, broad: str, connected: Iterable[str] = (), seed: int = 0
) -> list[dict[str, Any]]:
    """Rows of rate, type, what is compared, and the mean difference of set F1 in points with its 95 % interval.

    `broad` is the type of question for which a sheet is made, `connected` the corpora whose joins are judged apart.
    Methods that were not run leave their rows out.
    """
    rows: list[dict[str, Any]] = []
    many = set(connected)
    for rate in sorted({each.rate for each in records if each.method == SHEET}):
        own = [each for each in records if each.rate == rate]
        for kind in sorted({each.type for each in own}):
            group = [each for each in own if each.type == kind]
            rows += _row(rate, kind, "hybrid - max(sheet, retrieval)", group, HYBRID, (SHEET, RETRIEVAL), seed)
            rows += _row(rate, kind, "auto - best mode", group, AUTO, (SHEET, RETRIEVAL, HYBRID), seed)
        wide = [each for each in own if each.type == broad and each.corpus in many]
        rows += _row(
            rate, f"{broad}, connectivity >= {CONNECTED}", "sheet - retrieval", wide, SHEET, (RETRIEVAL,), seed
        )
        asked = [each for each in own if each.type == broad and each.method == AUTO]
        if asked:
            shares = [float(each.mode != "sheet") for each in asked]
            rows.append(_measured(rate, broad, "auto retrieves for", shares, asked, seed))
    return rows


def print_judged(rows: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    """One line each."""
    table = Table("rate", "type", "compared", "points", "95 % interval", "n")
    for row in rows:
        interval = f"{row['ci_low']:+.1f} to {row['ci_high']:+.1f}"
        table.add_row(
            f"{row['rate']:g}", row["type"], row["compared"], f"{row['points']:+.1f}", interval, str(row["n"])
        )
    (console or Console(width=120)).print(table)


def _row(
    rate: float, kind: str, name: str, group: Sequence[Record], method: str, others: Sequence[str], seed: int
) -> list[dict[str, Any]]:
    """A method against the best of others, over the questions that all of them answered; nothing without any."""
    by_method = {m: {(each.corpus, each.number): each for each in group if each.method == m} for m in (method, *others)}
    shared = sorted(set.intersection(*(set(found) for found in by_method.values())))
    if not shared:
        return []
    best = max(others, key=lambda other: sum(by_method[other][key].set_f1 for key in shared))
    mine = [by_method[method][key] for key in shared]
    gains = [each.set_f1 - by_method[best][key].set_f1 for each, key in zip(mine, shared, strict=True)]
    return [_measured(rate, kind, name, gains, mine, seed) | {"best": best}]


def _measured(
    rate: float, kind: str, name: str, values: Sequence[float], records: Sequence[Record], seed: int
) -> dict[str, Any]:
    low, high = clustered_interval(values, [each.cluster for each in records], seed=seed)
    return {
        "rate": rate,
        "type": kind,
        "compared": name,
        "points": round(100 * sum(values) / len(values), 1),
        "ci_low": round(100 * low, 1),
        "ci_high": round(100 * high, 1),
        "n": len(values),
    }
