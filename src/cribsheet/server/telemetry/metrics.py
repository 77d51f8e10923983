"""Counters for Prometheus, in its text format. Labels are sheet names, routes and status codes, never texts."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
Labels = tuple[tuple[str, str], ...]


class Counter:
    """A number that only grows, for each set of labels."""

    kind = "counter"

    def __init__(self, name: str, what: str) -> None:
        self.name, self.what = name, what
        self._values: defaultdict[Labels, float] = defaultdict(float)
        self._lock = threading.Lock()

    def add(self, amount: float = 1, **labels: str) -> None:
        """Grow."""
        with self._lock:
            self._values[tuple(labels.items())] += amount

    def lines(self) -> Iterator[str]:
        """Samples."""
        with self._lock:
            values = list(self._values.items())
        for labels, value in values:
            yield f"{self.name}{_labels(labels)} {value:g}"


class Histogram:
    """How seconds are distributed, for each set of labels."""

    kind = "histogram"

    def __init__(self, name: str, what: str) -> None:
        self.name, self.what = name, what
        self._counts: defaultdict[Labels, list[int]] = defaultdict(lambda: [0] * (len(_BUCKETS) + 1))
        self._sums: defaultdict[Labels, float] = defaultdict(float)
        self._lock = threading.Lock()

    def observe(self, seconds: float, **labels: str) -> None:
        """Count a measurement."""
        key = tuple(labels.items())
        place = next((n for n, bound in enumerate(_BUCKETS) if seconds <= bound), len(_BUCKETS))
        with self._lock:
            self._counts[key][place] += 1
            self._sums[key] += seconds

    def lines(self) -> Iterator[str]:
        """Samples."""
        with self._lock:
            counted = [(labels, list(counts), self._sums[labels]) for labels, counts in self._counts.items()]
        for labels, counts, total in counted:
            reached = 0
            for bound, count in zip((*map(str, _BUCKETS), "+Inf"), counts, strict=True):
                reached += count
                yield f"{self.name}_bucket{_labels((*labels, ('le', bound)))} {reached}"
            yield f"{self.name}_sum{_labels(labels)} {total:.6f}"
            yield f"{self.name}_count{_labels(labels)} {reached}"


class Gauge:
    """Numbers that are read when somebody looks."""

    kind = "gauge"

    def __init__(self, name: str, what: str, read: Callable[[], Mapping[Labels, float]]) -> None:
        self.name, self.what, self._read = name, what, read

    def lines(self) -> Iterator[str]:
        """Samples."""
        for labels, value in self._read().items():
            yield f"{self.name}{_labels(labels)} {_number(value)}"


class Metrics:
    """Everything that a server counts."""

    def __init__(self, *gauges: Gauge) -> None:
        self.requests = Counter("cribsheet_requests_total", "Requests by route, sheet and status.")
        self.tokens = Counter(
            "cribsheet_tokens_total", "Tokens by sheet and kind: prompt, cached of these, completion."
        )
        self.seconds = Histogram("cribsheet_request_seconds", "Time from request to the end of the answer.")
        self.first = Histogram("cribsheet_first_token_seconds", "Time from request to the first text.")
        counted = (self.requests, self.tokens, self.seconds, self.first)
        self._all: Sequence[Counter | Histogram | Gauge] = (*counted, *gauges)

    def render(self) -> str:
        """All of it in Prometheus' text format."""
        parts: list[str] = []
        for each in self._all:
            parts += [f"# HELP {each.name} {each.what}", f"# TYPE {each.name} {each.kind}", *each.lines()]
        return "\n".join(parts) + "\n"


def _number(value: float) -> str:
    """A number as Prometheus reads it; of a count beyond all floats it says that, and the others are told too."""
    try:
        return f"{value:g}"
    except OverflowError:
        return "+Inf" if value > 0 else "-Inf"


def _labels(labels: Labels) -> str:
    said = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels)
    return f"{{{said}}}" if said else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
