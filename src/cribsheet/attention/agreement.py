"""Whether a faster path may be used: it can be run here, and gives what its slow reference gives."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


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
