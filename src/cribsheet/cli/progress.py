"""The progress of a build on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from cribsheet.cli.console import note

Progress = Callable[[int, int], None]
_SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def build_progress(*, hidden: bool = False) -> Iterator[Progress | None]:
    """What `build_sheet(progress=)` takes: shows tokens read, tokens/s and time left until the block is left."""
    if hidden:
        yield None
    elif sys.stderr.isatty():
        with _bar() as update:
            yield update
    else:
        yield lines()


class Speed:
    """Tokens per second and seconds left; the first call, before any work, starts the clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began: tuple[float, int] | None = None

    def __call__(self, read: int, total: int) -> tuple[float, float] | None:
        """(tokens per second, seconds left), or none before there is anything to measure."""
        now = self._clock()
        if self._began is None or read < self._began[1]:
            self._began = now, read
        began, before = self._began
        if read == before or now <= began:
            return None
        speed = (read - before) / (now - began)
        return speed, (total - read) / speed


def lines(seconds_between: float = _SECONDS_BETWEEN_LINES, clock: Callable[[], float] = time.monotonic) -> Progress:
    """Progress as plain lines, at most one in so many seconds, so that a log stays readable."""
    measure, shown = Speed(clock), clock()

    def update(read: int, total: int) -> None:
        nonlocal shown
        measured = measure(read, total)
        if measured is None or clock() - shown < seconds_between or read >= total:
            return
        shown = clock()
        note(f"read {read:,} of {total:,} tokens, {measured[0]:,.0f} tokens/s, {measured[1]:.0f} s left")

    return update


@contextlib.contextmanager
def _bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"))
    measure = Speed()
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading the model", total=None, figures="")

        def update(read: int, total: int) -> None:
            measured = measure(read, total)
            figures = f"{read:,}/{total:,} tokens"
            if measured is not None:
                figures += f", {measured[0]:,.0f} tokens/s, {measured[1]:.0f} s left"
            bar.update(task, description="reading", completed=read, total=total, figures=figures)

        yield update
