"""Compile the kernels that a model needs before anybody waits for them, in a process of its own.

    python -m cribsheet.kernels.ahead SHAPE

Compiling holds Python's lock, so a thread that compiled would stop whoever is answered meanwhile. A process does not,
and leaves its work where Triton looks first: in its cache on disk. It loads nothing onto the device and launches
nothing: the kernels' own functions are called with tensors that have shapes and no memory, under a driver that goes
nowhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cribsheet.kernels.codes import TILE, Codes

logger = logging.getLogger(__name__)

_MOST_SECONDS = 120  # then the compiler is given up, and kernels are compiled where they are used first
_THREADS = 8
_ROWS = 70  # more than share a block


@dataclass(frozen=True)
class Shape:
    """What kernels are compiled for: sizes of a model's attention and, if it is Llama-like, of the rest of a layer.

    `arch` is the compute capability of the device, as in 90; `hidden` is 0 where the model keeps its own layers.
    """

    arch: int
    dtype: str
    heads: int
    kv_heads: int
    head_size: int
    hidden: int = 0
    inner: int = 0
    vocabulary: int = 0
    biased: tuple[bool, bool, bool] = (False, False, False)  # products of queries, of what attention gives, and `down`
    normed: bool = False  # whether queries and keys are normalised
    codes: bool = False  # whether it is the kernels that read sheets in four bits, and none of the others


def compile_ahead(shape: Shape, closing: threading.Event) -> None:
    """Have another process compile what this shape needs, unless one did; come back when it is done, or on `closing`.

    What goes wrong there is logged and costs time later: kernels are compiled at their first use.
    """
    mark = _mark(shape)
    if mark is None or os.path.exists(mark):  # where one may not look, there is none
        return
    command = [sys.executable, "-P", "-m", "cribsheet.kernels.ahead", json.dumps(asdict(shape))]
    source = str(Path(__file__).parents[2])
    paths = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        with subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": paths}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, errors="replace", process_group=0,
        ) as process:  # fmt: skip
            failure = _waited(process, closing)
        if failure is None:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        elif failure:
            logger.info("kernels could not be compiled ahead, and are at their first use: %s", failure)
    except (OSError, TypeError) as error:  # a program that holds Python inside may not say where it is
        logger.info("kernels could not be compiled ahead, and are at their first use: %r", error)


def _waited(process: subprocess.Popen[str], closing: threading.Event) -> str | None:
    """Nothing if a process did its work; else why not, in words if anybody is to know."""
    for _ in range(_MOST_SECONDS * 20):
        try:
            _, errors = process.communicate(timeout=0.05)
            return None if process.returncode == 0 else (errors.strip().splitlines() or ["no reason given"])[-1]
        except subprocess.TimeoutExpired:
            if closing.is_set():
                break
    _end(process)
    return "" if closing.is_set() else f"it took more than {_MOST_SECONDS} s"


def _end(process: subprocess.Popen[str]) -> None:
    """Kill a process that leads a group, with the assemblers that it has running."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def _mark(shape: Shape) -> Path | None:
    """A file in Triton's cache that says that all kernels of a shape are there; none where there is no Triton."""
    try:
        import triton
        from triton import knobs

        folder = Path(knobs.cache.dir)
    except (ImportError, AttributeError):
        return None
    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    made = [triton.__version__, torch.__version__, json.dumps(asdict(shape))]
    return folder / f"cribsheet-{hashlib.sha256(b''.join(sources) + repr(made).encode()).hexdigest()}"


def tasks(shape: Shape) -> Iterator[Callable[[], Any]]:
    """Calls that need every kernel of a model once, those of builds and questions first."""
    from cribsheet.kernels import columns, flash

    dtype = getattr(torch, shape.dtype)

    def made(*sizes: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(*sizes, dtype=kind, device="meta")

    def floats(*sizes: int) -> Tensor:
        return made(*sizes, kind=torch.float32)

    heads, kv_heads, size = shape.heads, shape.kv_heads, shape.head_size
    group, starts = heads // kv_heads, made(kv_heads + 1, kind=torch.int32)
    part = made(1, heads, _ROWS, size), floats(1, heads, _ROWS)
    keys = made(300, size)
    if shape.codes:
        yield from _codes(shape, made)
        return
    many = made(kv_heads, group, _ROWS, size), floats(kv_heads, group, _ROWS)
    if shape.hidden:
        yield from _layers(shape, made)
    yield from _keeping(shape, made)
    rows = made(heads, _ROWS, size), floats(heads, _ROWS)
    yield partial(columns.around, *rows, made(kv_heads, _ROWS, size), 64, 16, 0.1)
    if shape.arch == 90 and size in flash.TILES:
        seen = made(1, kv_heads, 300, size)
        yield partial(flash.causal, made(1, heads, 300, size), seen, seen, 0.1)
    for peak in (True, False):
        yield partial(columns.columns, *many, keys, starts, 300, 300, 0.1, peak=peak)
    yield partial(columns.merge, part, part)
    for batch in (1, _ROWS):  # a step's rows
        few = made(kv_heads, batch, group, size), floats(kv_heads, batch, group)
        yield partial(columns.columns, *few, keys, starts, 300, 300, 0.1, peak=False)
    q, suffix, index = made(2, heads, 1, size), made(2, kv_heads, 64, size), made(2, kind=torch.int64)
    for before in (None, (q, floats(2, heads, 1))):
        yield partial(columns.newest, q, suffix, suffix, index, 0.1, before)


def _keeping(shape: Shape, made: Callable[..., Tensor]) -> Iterator[Callable[[], Any]]:
    """What builds take and set."""
    from cribsheet.kernels import keeping

    heads, size = shape.kv_heads, shape.head_size
    floats, whole = partial(made, kind=torch.float32), partial(made, kind=torch.int64)
    turn = floats(40, size // 2), floats(40, size // 2)
    old, new = (floats(heads, 30, size), made(heads, 30, size)), (made(heads, 40, size), made(heads, 40, size))
    yield partial(keeping.take, whole(heads, 35), old, new, turn, whole(heads, 70), floats(2, heads, 70))
    starts = made(heads + 1, kind=torch.int32)
    yield partial(keeping.place, *old, starts, 60, turn, 10)


def _layers(shape: Shape, made: Callable[..., Tensor]) -> Iterator[Callable[[], Any]]:
    """What stands between the products of reads, and all of steps, of which one and several rows are two kinds."""
    from cribsheet.kernels import rotation, step, step_attention

    heads, kv_heads, size, hidden = shape.heads, shape.kv_heads, shape.head_size, shape.hidden
    widths = [heads * size, kv_heads * size, kv_heads * size]
    gain, epsilon = made(hidden), 1e-6
    norms = (made(size), made(size), epsilon) if shape.normed else None

    def linear(width: int, entries: int, biased: bool) -> tuple[Tensor, Tensor | None]:
        return made(width, entries), made(width) if biased else None

    qkv = [linear(width, hidden, shape.biased[0]) for width in widths]
    out, down = linear(hidden, widths[0], shape.biased[1]), linear(hidden, shape.inner, shape.biased[2])
    gate, head = made(shape.inner, hidden), linear(shape.vocabulary, hidden, False)
    for more in (None, made(2, hidden)):
        yield partial(step.normed, made(2, hidden), gain, epsilon, more)
    yield partial(step.silu_times, made(2, 2 * shape.inner))
    yield partial(rotation.turned, made(2, sum(widths)), (made(2, size), made(2, size)), kv_heads, size, norms)
    suffix, starts, keys = made(4, kv_heads, 64, size), made(kv_heads + 1, kind=torch.int32), made(300, size)
    for count in (1, 4):
        x, index = made(count, hidden), made(count, kind=torch.int64)
        prefix, turn = (keys, keys, starts, 300), (made(count, size), made(count, size))
        yield partial(step_attention.attend, made(count, heads, 1, size), prefix, (suffix, suffix, index), 0.1)
        yield partial(step.product, x, qkv, norm=(gain, epsilon))
        yield partial(step.product, made(count, widths[0]), [out], residual=x)
        yield partial(step.gated, x, gate, gate, norm=(gain, epsilon))
        yield partial(step.product, made(count, shape.inner), [down], residual=x)
        yield partial(rotation.placed, made(count, sum(widths)), turn, index, suffix, suffix, norms)
    yield partial(step.product, made(1, hidden), [head], norm=(gain, epsilon))


def _codes(shape: Shape, made: Callable[..., Tensor]) -> Iterator[Callable[[], Any]]:
    """What reads keys and values in four bits: a step and few rows, what they look at, and layers as a whole."""
    from cribsheet.kernels import packed, step_attention

    heads, kv_heads, size = shape.heads, shape.kv_heads, shape.head_size
    half, whole = torch.float16, torch.int32
    codes = Codes(
        made(TILE, size // 8, kind=whole), made(1, size // 2, 4, 2, TILE // 32, kind=whole),
        made(1, 6, size // 2, kind=half), made(1, 2 * -(-size // 64), TILE, kind=half), made(1, 3, kind=whole),
        made(kv_heads, 2, kind=whole), made(size // 2, kind=torch.float32), made(TILE, 2, size // 2, kind=half), 1,
    )  # fmt: skip
    for batch in (1, _ROWS):
        q, suffix, index = made(batch, heads, 1, size), made(batch, kv_heads, 64, size), made(batch, kind=torch.int64)
        yield partial(step_attention.attend, q, codes, (suffix, suffix, index), 0.1)
        few = made(kv_heads, batch, heads // kv_heads, size)
        yield partial(packed.glances, codes, few, made(*few.shape[:3], kind=torch.float32), 300, 0.1)
    yield partial(packed.unpack, codes, made(TILE, size), made(TILE, size))


class Nowhere:
    """A driver of Triton's for an architecture and no device: kernels are compiled, and nothing is loaded or run."""

    def __init__(self, arch: int) -> None:
        self._arch = arch
        self.utils = self
        self.compiled: list[str] = []  # names of kernels, once for each time that one was made

    def get_current_target(self) -> Any:
        """What is compiled for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The only one."""
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        """What a kernel may need, without a bound: who runs it knows its device."""
        return {"max_shared_mem": 1 << 30}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[str, str, int, int, int]:
        """Handles of a kernel that is not loaded, its registers and spills, and the most threads of it."""
        self.compiled.append(name)
        return name, name, 0, 0, 1 << 10

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """What launches nothing; the launcher of the real driver is compiled on the way, if it can be."""
        with contextlib.suppress(Exception):  # it needs a C compiler, and CUDA's library beside it
            from triton.backends.nvidia.driver import CudaLauncher

            CudaLauncher(source, metadata)
        return lambda *given: None


def run(shape: Shape, threads: int = _THREADS) -> Nowhere:
    """Compile all kernels of a shape in this process, which is of no use for running any afterwards."""
    from triton.runtime import driver

    nowhere = Nowhere(shape.arch)
    driver.set_active(nowhere)
    with contextlib.suppress(Exception):
        from triton.backends.nvidia.driver import CudaUtils

        CudaUtils()
    with ThreadPoolExecutor(threads) as executor:
        for done in [executor.submit(task) for task in tasks(shape)]:
            done.result()
    return nowhere


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    run(Shape(**{**given, "biased": tuple(given["biased"])}), min(_THREADS, os.cpu_count() or 1))
