"""How far a build is: told to whoever asks, after each chunk and within it, or shown as a bar.

A bar stands on stderr in a terminal and below the cell in a notebook; elsewhere there is a line now and then.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from cribsheet.errors import BudgetError

Progress = Callable[[int, int], None]  # is told tokens read, and tokens
Listener = Progress | bool | None  # whom to tell: a function of the caller's, a bar for true, nobody

WITHIN_SECONDS = 0.25  # a chunk that takes longer is told of before it is done
_SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def shown(progress: Listener) -> Iterator[Progress | None]:
    """What a build tells of its tokens: the caller's own function, or until the block is left, what shows them.

    Raises `BudgetError` for what is neither a function nor a truth value.
    """
    if progress is None or progress is False:
        yield None
    elif callable(progress):
        yield progress
    elif progress is not True:
        raise BudgetError(f"progress is {progress!r}; pass True for a bar, or a function of tokens read and tokens.")
    elif (display := _notebook()) is not None:
        yield _below_cell(display)
    elif sys.stderr.isatty():
        with _bar() as update:
            yield update
    else:
        yield lines(_SECONDS_BETWEEN_LINES)


class Steps:
    """Tells of a chunk while it is read: `start` tokens are before it, and it takes so many `steps` of equal size.

    Called after each step. `wait` lets what was launched on an accelerator come to its end, as nothing is known before.
    """

    def __init__(
        self, tell: Callable[[int], None], start: int, tokens: int, steps: int, wait: Callable[[], None]
    ) -> None:
        self._tell, self._start, self._tokens, self._steps, self._wait = tell, start, tokens, steps, wait
        self._done, self._told = 0, time.monotonic()

    def __call__(self) -> None:
        """One more step is done."""
        self._done += 1
        if self._done >= self._steps or time.monotonic() - self._told < WITHIN_SECONDS:
            return  # the whole chunk is told of when it is kept
        self._wait()
        self._tell(self._start + self._tokens * self._done // self._steps)
        self._told = time.monotonic()


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


def figures(read: int, total: int, measured: tuple[float, float] | None) -> str:
    """Tokens, and once they are known, speed and time left, in words."""
    left = f", {measured[0]:,.0f} tokens/s, {measured[1]:.0f} s left" if measured else ""
    return f"{read:,} of {total:,} tokens{left}"


def lines(seconds_between: float, clock: Callable[[], float] = time.monotonic) -> Progress:
    """Progress as plain lines on stderr, at most one in so many seconds, so that a log stays readable."""
    measure, told = Speed(clock), clock()

    def update(read: int, total: int) -> None:
        nonlocal told
        measured = measure(read, total)
        if measured is None or clock() - told < seconds_between or read >= total:
            return
        told = clock()
        sys.stderr.write(f"read {figures(read, total, measured)}\n")
        sys.stderr.flush()

    return update


@contextlib.contextmanager
def _bar() -> Iterator[Progress]:
    """A bar on a terminal, which is gone when the block is left."""
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"))
    measure = Speed()
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading the model", total=None, figures="")

        def update(read: int, total: int) -> None:
            words = figures(read, total, measure(read, total))
            bar.update(task, description="reading", completed=read, total=total, figures=words)

        yield update


def _notebook() -> Callable[..., Any] | None:
    """What shows things below a notebook's cell, if this is one; rich's own bar would want `ipywidgets` there."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is None or not hasattr(shell, "kernel"):
        return None
    display: Callable[..., Any] = sys.modules["IPython.display"].display
    return display


class _Html:
    """A piece of HTML, as notebooks ask objects for it."""

    def __init__(self, html: str, text: str) -> None:
        self._html, self._text = html, text

    def _repr_html_(self) -> str:
        return self._html

    def __repr__(self) -> str:
        return self._text


def _below_cell(display: Callable[..., Any]) -> Progress:
    """A bar below the cell, which stays there full."""
    measure, handle = Speed(), display(_Html("<progress></progress> loading the model", "loading"), display_id=True)

    def update(read: int, total: int) -> None:
        words = figures(read, total, measure(read, total))
        handle.update(_Html(f'<progress value="{read}" max="{total}"></progress> {words}', words))

    return update
