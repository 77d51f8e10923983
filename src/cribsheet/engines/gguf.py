"""GGUF files of llama.cpp: what their header says of a model, and the small tensors that are stored as they are.

Nothing but the header is read until a tensor is asked for, and of lists only their length: vocabularies are long.
Version 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from cribsheet.errors import ModelError

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}  # numbers of the types that are no blocks
_MOST = 1 << 24  # entries of a list, tensors, dimensions: more of them are damage
_LONGEST = 1 << 27  # bytes of a text
_NUMBERS_AT_MOST = 1 << 48  # of a tensor
_ALIGNMENT = 32


class Length(int):
    """What is kept of a list: how long it is."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor as the header announces it, its outermost dimension first; its bytes begin at `start` of the file."""

    shape: tuple[int, ...]
    kind: int
    start: int

    @property
    def is_plain(self) -> bool:
        """Whether it is stored in a float type, and not in blocks of fewer bits."""
        return self.kind in _FLOATS


@dataclass(frozen=True)
class Gguf:
    """The header of a GGUF file.

    `values` are its settings by name, of lists only the length; `tensors` what it holds.
    """

    path: Path
    values: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @classmethod
    def open(cls, path: str | Path) -> Gguf:
        """Read the header. Raises `ModelError` for what is no sound GGUF file."""
        place = Path(path)
        if not place.is_file():
            raise ModelError(f"There is no GGUF file {str(path)!r}; give the file that llama.cpp loads.")
        try:
            with place.open("rb") as file:
                values, tensors = _Header(file).read()
        except (OSError, ValueError, struct.error, MemoryError, RecursionError) as error:
            raise ModelError(
                f"{str(path)!r} is no readable GGUF file: {error}; download or convert it again."
            ) from error
        return cls(place, values, tensors)

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model's family."""
        return str(self.values.get("general.architecture", "?"))

    def of_model(self, name: str, default: Any = None) -> Any:
        """A setting of the architecture, such as `block_count`."""
        return self.values.get(f"{self.architecture}.{name}", default)

    def count(self, name: str, default: int = 0) -> int:
        """A setting of the architecture that is a whole number; the default where the file has none."""
        return self.number(f"{self.architecture}.{name}", default)

    def number(self, name: str, default: int = 0) -> int:
        """A setting that is a whole number, by its whole name; the default where the file has none."""
        value = self.values.get(name)
        return value if type(value) is int else default

    @property
    def vocabulary(self) -> int:
        """Tokens that it knows; 0 where it says nothing of them."""
        size = self.values.get("tokenizer.ggml.tokens")
        return size if isinstance(size, Length) else 0

    def read(self, name: str) -> Tensor:
        """A plain tensor, in float32. Raises `ModelError` if the file ends before it."""
        tensor = self.tensors[name]
        kind = _FLOATS[tensor.kind]
        size = math.prod(tensor.shape) * kind.itemsize
        with self.path.open("rb") as file:
            whole = os.fstat(file.fileno()).st_size >= tensor.start + size
            file.seek(tensor.start if whole else 0)
            held = bytearray(file.read(size) if whole else b"")
        if len(held) < size:
            raise ModelError(f"{str(self.path)!r} ends before its tensor {name!r}; download or convert it again.")
        return torch.frombuffer(held, dtype=kind).reshape(tensor.shape).float()


class _Header:
    """A header while it is read. Raises `ValueError` for what makes no sense."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size = file, os.fstat(file.fileno()).st_size

    def read(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        """Settings and tensors."""
        if self._bytes(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self._number("I")
        if version not in _VERSIONS:
            raise ValueError(
                f"its version is {version}, and {' and '.join(map(str, _VERSIONS))} are read, little-endian"
            )
        tensors, values = self._count("Q"), self._count("Q")
        told = {self._text(): self._value(self._number("I")) for _ in range(values)}
        announced = [self._tensor() for _ in range(tensors)]
        alignment = told.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"its alignment is {alignment!r}")
        first = -(-self._file.tell() // alignment) * alignment
        return told, {name: GgufTensor(shape, kind, first + start) for name, shape, kind, start in announced}

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text()
        shape = [self._number("Q") for _ in range(self._count("I", most=8))]
        if not all(shape) or math.prod(shape) > _NUMBERS_AT_MOST:
            raise ValueError(f"its tensor {name!r} has the shape {shape}")
        return name, tuple(reversed(shape)), self._number("I"), self._number("Q")

    def _value(self, kind: int) -> Any:
        """A setting; of a list, how long it is."""
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            return self._number(_form(kind))
        kind, count = self._number("I"), self._count("Q")
        if kind in (_STRING, _ARRAY):
            for _ in range(count):
                self._skip(self._number("Q")) if kind == _STRING else self._value(kind)
        else:
            self._skip(count * struct.calcsize(_form(kind)))
        return Length(count)

    def _text(self) -> str:
        length = self._number("Q")
        if length > _LONGEST:
            raise ValueError(f"a text of {length} bytes is announced")
        return self._bytes(length).decode(errors="replace")

    def _count(self, form: str, most: int = _MOST) -> int:
        count: int = self._number(form)
        if count > most:
            raise ValueError(f"{count} entries are announced where at most {most} can be")
        return count

    def _number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self._bytes(struct.calcsize(form)))[0]

    def _bytes(self, count: int) -> bytes:
        held = self._file.read(count)
        if len(held) < count:
            raise ValueError(f"it ends after {self._size} bytes, within its header")
        return held

    def _skip(self, count: int) -> None:
        if self._file.tell() + count > self._size:
            raise ValueError(f"it ends after {self._size} bytes, within its header")
        self._file.seek(count, os.SEEK_CUR)


def _form(kind: int) -> str:
    if kind not in _NUMBERS:
        raise ValueError(f"a setting is of the type {kind}, which there is not")
    return _NUMBERS[kind]
