"""Whether a faster path may be used: it can be run here, and gives what its slow reference gives.

To find out takes seconds where kernels have to be compiled. Builds wait for it, so that a sheet is the same whenever it
is built; whoever answers is in a hurry and takes the slower path until somebody else has found out. Who finds out in
the background gives way to answers, as both would share one processor for Python.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

finding_out = threading.RLock()  # held by whoever finds out: two at once would only be in each other's way
_this = threading.local()
_PATIENCE = 5.0  # seconds that somebody gives way in all, so that what is always busy becomes faster too
_GLANCE = 0.02  # seconds after which somebody who gives way looks again
_answering: list[object] = []  # who is being answered


def hurry() -> None:
    """Nothing that takes long is found out by this thread from now on."""
    _this.hurries = True


@contextlib.contextmanager
def in_a_hurry() -> Iterator[None]:
    """Nothing that takes long is found out by this thread inside."""
    before, _this.hurries = is_in_a_hurry(), True
    try:
        yield
    finally:
        _this.hurries = before


def is_in_a_hurry() -> bool:
    """Whether this thread takes the slower path rather than wait."""
    return getattr(_this, "hurries", False)


@contextlib.contextmanager
def answering() -> Iterator[None]:
    """Somebody is answered inside, and those who are patient give way."""
    mark = object()
    _answering.append(mark)
    try:
        yield
    finally:
        _answering.remove(mark)


def be_patient(closing: threading.Event) -> None:
    """Have this thread give way to answers from now on, until `closing`."""
    _this.closing, _this.patience = closing, _PATIENCE


def give_way() -> None:
    """Wait while somebody is answered, if this thread is patient, and as long as it is."""
    patience = getattr(_this, "patience", 0.0)
    if not patience:
        return
    began = time.monotonic()
    while _answering and time.monotonic() - began < patience and not _this.closing.wait(_GLANCE):
        pass
    _this.patience = max(0.0, patience - (time.monotonic() - began))


def agrees(path: str, check: Callable[[], Mapping[str, float]], bound: float) -> bool:
    """Whether no error that `check` finds, by case, is beyond the bound; why a `path` is not used is logged.

    A path that cannot be compiled or run here does not agree. Raises `torch.OutOfMemoryError`, which says nothing of
    the path.
    """
    known: tuple[type[Exception], ...] = (ImportError, RuntimeError, OSError, subprocess.SubprocessError)
    try:
        errors = check()
    except torch.OutOfMemoryError:
        raise
    except (*known, *_triton_errors()) as failure:
        logger.warning("%s cannot be used, and slower ones are: %r", path, failure)
        return False
    wrong = {case: error for case, error in errors.items() if not error <= bound}  # not a number is no agreement
    if wrong:
        case, error = next(iter(wrong.items()))
        logger.warning("%s are off by %.1e (%s, at most %.0e), and slower ones are used", path, error, case, bound)
    return not wrong


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """L2 norm of the difference over that of what is wanted; whoever compares much gives way before each."""
    give_way()
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


def _triton_errors() -> tuple[type[Exception], ...]:
    """What Triton raises where it cannot compile something."""
    try:
        from triton.errors import TritonError  # the package is no dependency: torch brings it along for CUDA
    except ImportError:
        return ()
    return (TritonError,)
