"""Whether a faster path may be used: it can be run here, and gives what its slow reference gives.

To find out takes seconds where kernels have to be compiled. Builds wait for it, so that a sheet is the same whenever it
is built; whoever answers is in a hurry and takes the slower path until somebody else has found out.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

finding_out = threading.RLock()  # held by whoever finds out: two at once would only be in each other's way
_this = threading.local()


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
    """L2 norm of the difference over that of what is wanted."""
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


def _triton_errors() -> tuple[type[Exception], ...]:
    """What Triton raises where it cannot compile something."""
    try:
        from triton.errors import TritonError  # the package is no dependency: torch brings it along for CUDA
    except ImportError:
        return ()
    return (TritonError,)
