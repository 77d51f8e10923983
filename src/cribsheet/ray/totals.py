"""Prometheus' text of several replicas as one: what each has counted is added up."""

from __future__ import annotations

from collections.abc import Sequence

_SAME = "cribsheet_sheet_tokens"  # is a property of the sheets, not of the replicas


def added(texts: Sequence[str]) -> str:
    """One text with the sum of every sample; comments stand where they stood."""
    comments: dict[str, None] = {}
    samples: dict[str, dict[str, float]] = {}
    for text in texts:
        family = ""
        for line in text.splitlines():
            if line.startswith("#"):
                family = line.split(" ")[2]
                comments[line] = None
                samples.setdefault(family, {})
                continue
            name, _, value = line.rpartition(" ")
            mine = samples[family]
            mine[name] = max(mine.get(name, 0), float(value)) if family == _SAME else mine.get(name, 0) + float(value)
    lines = []
    for family, values in samples.items():
        lines += [comment for comment in comments if comment.split(" ")[2] == family]
        lines += [f"{name} {value:.15g}" for name, value in values.items()]
    return "\n".join(lines) + "\n"
