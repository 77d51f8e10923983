"""Tensors of a safetensors file, read into memory: what is written to the file later changes nothing that was read.

Mapping the file instead would copy nothing, but a page that a truncation takes away ends the process with a bus error,
and one that is written to is another tensor. Nothing is read before it is asked for, and nothing is allocated that the
file does not hold.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import struct
import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LARGEST = 1e30  # of keys, values and scales: what models have is far from it, and products with more overflow float32
_LONGEST_HEADER = 100_000_000  # bytes, as the safetensors library has it
_MOST = 1 << 48  # numbers of a tensor, its empty dimensions counted as 1, so that no stride overflows
_METADATA = "__metadata__"
_PIECE = 1 << 26


class NoTensorFileError(ValueError):
    """What was never written as a safetensors file, as its first bytes show; others may be damaged ones."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor as a file's header announces it; its bytes are those from `start` to `stop` of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Kind:
    """Type and shape of a tensor that is not there yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of such a tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """An open safetensors file. It stays the file that was opened, whatever comes to stand at its path.

    Raises `ValueError` for anything that is no sound safetensors file, saying what is wrong with it, and `OSError` for
    what cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe would wait for ever
        self._file = os.fdopen(os.open(path, flags), "rb", buffering=0)
        self._closing, self._lock = weakref.finalize(self, self._file.close), threading.Lock()
        found = os.fstat(self._file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is no regular file")
        self.size = found.st_size
        self._version = self.version()
        self.begin = 0  # of the tensors' bytes
        self.metadata, self.entries = self._header()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by name, in memory of their own. Raises `ValueError` if the file was written to in between."""
        found = {name: self._tensor(self.entries[name]) for name in names}
        if self.version() != self._version:
            raise ValueError("it was written to after it was opened")
        return found

    def rows(self, name: str, first: int, stop: int) -> Tensor:
        """Rows `first` to `stop` of a tensor, in memory of their own; several threads may read."""
        entry = self.entries[name]
        row = math.prod(entry.shape[1:])
        tensor = torch.empty((stop - first) * row, dtype=entry.dtype)
        with self._lock:
            self._fill(tensor.view(torch.uint8).numpy().data, entry.start + first * row * entry.dtype.itemsize)
        return tensor.reshape(stop - first, *entry.shape[1:])

    def like(self) -> dict[str, Tensor]:
        """Tensors without contents, by name: their types and shapes."""
        return {name: torch.empty(each.shape, dtype=each.dtype, device="meta") for name, each in self.entries.items()}

    def close(self) -> None:
        """Read nothing more."""
        self._closing()

    def is_same(self, path: Path) -> bool:
        """Whether it is this file that lies at a path."""
        return os.path.samestat(os.fstat(self._file.fileno()), os.stat(path))

    def is_alone(self) -> bool:
        """Whether the file has one name, or none any more, so that nobody opens it by another one."""
        return os.fstat(self._file.fileno()).st_nlink < 2

    def version(self) -> tuple[int, int]:
        """What changes when somebody writes to the file."""
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns

    def _tensor(self, entry: Entry) -> Tensor:
        tensor = torch.empty(math.prod(entry.shape), dtype=entry.dtype)
        self._fill(tensor.view(torch.uint8).numpy().data, entry.start)
        return tensor.reshape(entry.shape)

    def _fill(self, memory: memoryview, start: int) -> None:
        self._file.seek(start)
        done = 0
        while done < len(memory):
            read = self._file.readinto(memory[done : done + _PIECE])
            if not read:
                raise ValueError("it ends before what its header announces")
            done += read

    def _header(self) -> tuple[dict[str, str], dict[str, Entry]]:
        """Metadata and tensors, which must fill the file without gaps and overlaps."""
        length = struct.unpack("<Q", self.piece(8, 0))[0]
        self.begin = 8 + length
        if not 2 <= length <= _LONGEST_HEADER:
            raise NoTensorFileError("it does not begin as a safetensors file does")
        if length > self.size - 8:
            raise ValueError(f"its header is said to have {length} bytes")
        try:
            header = json.loads(self.piece(length, 8).decode(), object_pairs_hook=unique)
        except RecursionError as error:
            raise ValueError("its header nests too deeply") from error
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        metadata = header.pop(_METADATA, {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are no texts")
        entries = {name: _entry(name, raw, 8 + length) for name, raw in header.items()}
        end = 8 + length
        for name, entry in sorted(entries.items(), key=lambda each: (each[1].start, each[1].stop)):
            if entry.start != end:
                raise ValueError(f"its tensor {name!r} does not stand where the one before it ends")
            end = entry.stop
        if end != self.size:
            raise ValueError(f"it has {self.size} bytes, and its header announces {end}")
        return metadata, entries

    def piece(self, count: int, start: int) -> bytes:
        """So many of the file."""
        if count > self.size - start:
            raise ValueError(f"it has only {self.size} bytes")
        memory = bytearray(count)
        with self._lock:
            self._fill(memoryview(memory), start)
        return bytes(memory)


def header_of(tensors: Mapping[str, Kind], metadata: Mapping[str, str]) -> bytes:
    """What a file of these tensors begins with; they stand behind it in this order, without gaps."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    start = 0
    for name, kind in tensors.items():
        stop = start + kind.nbytes
        header[name] = {"dtype": names[kind.dtype], "shape": list(kind.shape), "data_offsets": [start, stop]}
        start = stop
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    return struct.pack("<Q", len(written)) + written


def _entry(name: str, raw: Any, first: int) -> Entry:
    """A tensor of a header; the bytes of tensors begin at `first`."""
    given = raw if isinstance(raw, dict) else {}
    dtype = given.get("dtype")
    shape: Any = given.get("shape")
    offsets: Any = given.get("data_offsets")
    kind = _DTYPES.get(dtype) if isinstance(dtype, str) else None
    if kind is None:
        raise ValueError(f"its tensor {name!r} is of the type {dtype!r}")
    if not (_are_counts(shape) and _are_counts(offsets) and len(offsets) == 2):
        raise ValueError(f"its tensor {name!r} has the shape {shape!r} at {offsets!r}")
    if math.prod(max(1, size) for size in shape) > _MOST:
        raise ValueError(f"its tensor {name!r} has the shape {shape!r}")
    if offsets[1] - offsets[0] != math.prod(shape) * kind.itemsize:
        raise ValueError(f"its tensor {name!r} of the shape {shape!r} has {offsets[1] - offsets[0]} bytes")
    return Entry(kind, tuple(shape), first + offsets[0], first + offsets[1])


def _are_counts(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names differ; of two with one name, readers may see one or the other."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return made


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_with(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Of everything that a file holds but the digest itself, which stands in its metadata under `sha256`."""
    told = json.dumps({name: text for name, text in metadata.items() if name != "sha256"}, sort_keys=True)
    return hashlib.sha256(f"{told}{digest_of(tensors)}".encode()).hexdigest()


def is_usable(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN, nothing infinite and nothing beyond `LARGEST`; one pass over its bytes."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = (float(each) for each in tensor.aminmax())
    return -LARGEST <= low <= high <= LARGEST
