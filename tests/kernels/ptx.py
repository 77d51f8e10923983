"""The few instructions of a device that kernels ask for by name, in numpy: Triton's interpreter has none."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
from triton.runtime.interpreter import TensorHandle


def _halves(words):
    return np.ascontiguousarray(words).view(np.float16)


def _fused(a, b, c):
    exact = _halves(a).astype(np.float64) * _halves(b).astype(np.float64) + _halves(c).astype(np.float64)
    return exact.astype(np.float16).view(np.uint32)


DOES = {
    "shl.b32": lambda a, count: a << count,
    "shr.u32": lambda a, count: a >> count,
    "lop3.b32": lambda a, b, c, table: (a & b) | c if (table == 0xEA).all() else 1 / 0,
    "fma.rn.f16x2": _fused,
    "mul.rn.f16x2": lambda a, b: (_halves(a) * _halves(b)).view(np.uint32),
    "neg.f16x2": lambda a: a ^ np.uint32(0x80008000),
    "mov.b32": lambda a: a,
}


def create_inline_asm(builder, text, constraints, values, kinds, is_pure, pack):
    """In place of `InterpreterBuilder.create_inline_asm`."""
    outputs = constraints.count("=")
    held = {f"${outputs + n}": np.ascontiguousarray(each.data).view(np.uint32) for n, each in enumerate(values)}
    for line in re.findall(r"[^;{}]+", text):
        name, _, rest = line.strip().partition(" ")
        if name not in DOES:
            assert name in ("", ".reg"), line
            continue
        target, *given = (each.strip() for each in rest.split(","))
        like = next(iter(held.values()))
        numbers = [held[each] if each in held else np.full_like(like, int(each, 0)) for each in given]
        held[target] = DOES[name](*numbers)
    like, kinds = values[0].data, [kind.scalar if hasattr(kind, "scalar") else kind for kind in kinds]
    found = [
        TensorHandle(np.ascontiguousarray(held[f"${n}"]).view(like.dtype).reshape(like.shape), kind)
        for n, kind in enumerate(kinds)
    ]
    return SimpleNamespace(get_result=found.__getitem__)
