"""How many threads of a processor compute what the calling thread asks for.

OpenMP, and MKL where PyTorch has it, keep a number for each thread that calls them. `torch.set_num_threads` sets that
of the caller, and one for the process, which every thread takes over that starts later: this is its owner's to set.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

logger = logging.getLogger(__name__)

_AS_LONG = 20  # rows whose products take as long as reading weights, or keys and values, from memory once
_LEAST = 150_000_000  # products of two numbers in a layer that dividing must save: two to three milliseconds


class _Setters(NamedTuple):
    """What sets the number of the calling thread; that of MKL gives the one before."""

    openmp: Callable[[int], object]
    mkl: Callable[[int], int] | None


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """The calling thread computes alone inside; nobody else's number changes, and its own is as before afterwards.

    Where PyTorch has threads that are set otherwise, nothing changes.
    """
    before = torch.get_num_threads()  # of a thread that has not computed yet, this takes that of the process over
    setters = _setters() if before > 1 else None
    if setters is None:
        yield
        return
    of_mkl = before
    try:  # Ctrl-C may come behind each call
        setters.openmp(1)
        of_mkl = setters.mkl(1) if setters.mkl else 0
        yield
    finally:
        try:
            setters.openmp(before)
        finally:
            if setters.mkl:
                setters.mkl(of_mkl)


def pays_to_divide(rows: int, weights: int, query_size: int, kv_size: int, before: int) -> bool:
    """Whether several threads save more than it costs to wake them, for each of a layer's small products anew.

    A layer multiplies `rows` with so many `weights`, and looks at keys and values of `before` tokens, of `kv_size`
    numbers each, with queries of `query_size` numbers a row.
    """
    work = (rows + _AS_LONG) * weights + 2 * before * (rows * query_size + _AS_LONG * kv_size)
    threads = torch.get_num_threads()
    return work * (threads - 1) >= _LEAST * threads


@functools.cache
def _setters() -> _Setters | None:
    name = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
    try:
        library = ctypes.PyDLL(str(Path(torch.__file__).parent / "lib" / name))
        setters = _Setters(library.omp_set_num_threads, _of_mkl(library))
    except (OSError, AttributeError) as error:
        logger.info("small passes are made by as many threads as large ones, as OpenMP is not found: %s", error)
        return None
    if not _serve(setters):
        logger.info("small passes are made by as many threads as large ones, as PyTorch does not ask this OpenMP")
        return None
    return setters


def _of_mkl(library: ctypes.CDLL) -> Callable[[int], int] | None:
    if not torch.backends.mkl.is_available():
        return None
    set_number: Callable[[int], int] = library.MKL_Set_Num_Threads_Local
    return set_number


def _serve(setters: _Setters) -> bool:
    """Whether they set what PyTorch goes by."""
    before = torch.get_num_threads()
    try:
        setters.openmp(before + 1)
        return torch.get_num_threads() == before + 1
    finally:
        setters.openmp(before)
