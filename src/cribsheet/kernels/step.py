"""Kernels of our own for the rest of a decoding step, in Triton: products with what stands around them.

A step is bound by how fast the weights can be read. Stock layers run some forty kernels between their products, each of
which takes longer to begin than to work; these take their work along. Only `model/llama_step.py` and
`model/llama_read.py` import this file, because importing it needs Triton. Their slow reference is the model itself.

Letters: `M` rows, one for each sequence; `K` entries of a row; `N` rows of a weight (N, K).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """How a product is cut: rows of the weight and entries of a row at once, warps, and loads that are under way.

    If it is `swapped`, the weight stands left in the product, where Hopper's tensor cores take at least 64 rows.
    """

    rows: int
    entries: int
    warps: int
    stages: int = 3
    swapped: bool = False


# By kind and by whether there is a single row: the tile that is best for all measured products of a kind together.
TILES = {
    ("product", True): Tile(rows=16, entries=512, warps=2, stages=4),
    ("product", False): Tile(rows=64, entries=128, warps=4, stages=5, swapped=True),
    ("gated", True): Tile(rows=4, entries=1024, warps=4, stages=1),
    ("gated", False): Tile(rows=64, entries=64, warps=4, stages=4, swapped=True),
}
# By kind, size and width as well, where another is measured to be better (`make step-gpu`, one H200, 1 and 32 rows).
tuned: dict[tuple[str, int, int, bool], Tile] = {
    ("product", 4096, 4096, True): Tile(rows=4, entries=2048, warps=8, stages=1),
    ("product", 4096, 6144, True): Tile(rows=4, entries=2048, warps=8, stages=1),
    ("product", 4096, 128256, True): Tile(rows=4, entries=2048, warps=8, stages=1),
}


@triton.jit
def _one(
    x: tl.tensor, gain: tl.tensor, eps: tl.tensor, weight: tl.tensor, n: tl.tensor, most: tl.tensor, K: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr, EVEN: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """A row times some rows of a weight (BN,), in float32; the row is normalised on the way, if asked for."""
    k = tl.arange(0, BK)[None, :]  # in two dimensions, so that row and weight lie alike in the threads
    places = weight + n.to(tl.int64)[:, None] * K + k
    total = tl.zeros((BN, BK), tl.float32)
    squares = tl.zeros((1, BK), tl.float32)
    for first in tl.range(0, K, BK, num_stages=STAGES):
        if EVEN:
            own = tl.load(x + first + k).to(tl.float32)
            w = tl.load(places + first, eviction_policy="evict_first").to(tl.float32)
        else:
            own = tl.load(x + first + k, mask=first + k < K, other=0.0).to(tl.float32)
            inside = (n[:, None] < most) & (first + k < K)
            w = tl.load(places + first, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if NORM:
            squares += own * own
            own = own * tl.load(gain + first + k, mask=first + k < K, other=0.0).to(tl.float32)
        total += w * own
    found = tl.sum(total, 1)
    if NORM:
        found = found / tl.sqrt(tl.sum(squares) / K + eps)
    return found


@triton.jit
def _many(
    x: tl.tensor, weight: tl.tensor, m: tl.tensor, n: tl.tensor, rows: tl.tensor, most: tl.tensor, K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
    SWAPPED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Some rows times some rows of a weight (BM, BN), in float32."""
    k = tl.arange(0, BK)
    if SWAPPED:
        lefts = weight + n.to(tl.int64)[:, None] * K + k[None, :]
        rights = x + m[None, :] * K + k[:, None]
        total = tl.zeros((BN, BM), tl.float32)
    else:
        lefts = x + m[:, None] * K + k[None, :]
        rights = weight + n.to(tl.int64)[None, :] * K + k[:, None]
        total = tl.zeros((BM, BN), tl.float32)
    for first in tl.range(0, K, BK, num_stages=STAGES):
        if SWAPPED:
            if EVEN:
                left = tl.load(lefts + first, eviction_policy="evict_first")
                right = tl.load(rights + first, mask=m[None, :] < rows, other=0.0)
            else:
                inside = (n[:, None] < most) & (first + k[None, :] < K)
                left = tl.load(lefts + first, mask=inside, other=0.0, eviction_policy="evict_first")
                right = tl.load(rights + first, mask=(m[None, :] < rows) & (first + k[:, None] < K), other=0.0)
        elif EVEN:
            left = tl.load(lefts + first, mask=m[:, None] < rows, other=0.0)
            right = tl.load(rights + first, eviction_policy="evict_first")
        else:
            left = tl.load(lefts + first, mask=(m[:, None] < rows) & (first + k[None, :] < K), other=0.0)
            inside = (n[None, :] < most) & (first + k[:, None] < K)
            right = tl.load(rights + first, mask=inside, other=0.0, eviction_policy="evict_first")
        total = tl.dot(left, right, total, input_precision="ieee")
    return total.trans() if SWAPPED else total


@triton.jit(do_not_specialize=["rows"])
def _product(
    x: tl.tensor, gain: tl.tensor, eps: tl.tensor, w1: tl.tensor, w2: tl.tensor, w3: tl.tensor,
    b1: tl.tensor, b2: tl.tensor, b3: tl.tensor, residual: tl.tensor, out: tl.tensor, rows: tl.tensor,
    K: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, EVEN: tl.constexpr, SWAPPED: tl.constexpr,
) -> None:  # fmt: skip
    """A block of up to three products of the same rows, one beside the other."""
    WIDTH: tl.constexpr = N1 + N2 + N3
    block = tl.program_id(0)
    weight, bias, before, most = w1, b1, block * 0, block * 0 + N1
    if N2 > 0:
        second = tl.cdiv(N1, BN)
        third = second + tl.cdiv(N2, BN)
        if block >= third:
            weight, bias, before, most, block = w3, b3, before + (N1 + N2), most * 0 + N3, block - third
        elif block >= second:
            weight, bias, before, most, block = w2, b2, before + N1, most * 0 + N2, block - second
    n = block * BN + tl.arange(0, BN)
    if BM == 1:
        found = _one(x, gain, eps, weight, n, most, K, BN, BK, STAGES, NORM, EVEN)
        if BIAS:
            found += tl.load(bias + n, mask=n < most, other=0.0).to(tl.float32)
        if RESIDUAL:
            found += tl.load(residual + before + n, mask=n < most, other=0.0).to(tl.float32)
        tl.store(out + before + n, found.to(out.dtype.element_ty), mask=n < most)
    else:
        m = tl.program_id(1) * BM + tl.arange(0, BM)
        many = _many(x, weight, m, n, rows, most, K, BM, BN, BK, STAGES, EVEN, SWAPPED)
        real = (m[:, None] < rows) & (n[None, :] < most)
        place = m[:, None] * WIDTH + before + n[None, :]
        if BIAS:
            many += tl.load(bias + n, mask=n < most, other=0.0).to(tl.float32)[None, :]
        if RESIDUAL:
            many += tl.load(residual + place, mask=real, other=0.0).to(tl.float32)
        tl.store(out + place, many.to(out.dtype.element_ty), mask=real)


def product(
    x: Tensor,
    parts: Sequence[tuple[Tensor, Tensor | None]],
    *,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Rows (M, K) times one or three weights (N, K), side by side: (M, N), or (M, N1 + N2 + N3).

    Rows are normalised before if `norm` gives gain (K,) and epsilon; the biases (N,), which all weights have or none,
    and the `residual` (M, N) are added.
    """
    if norm is not None and len(x) > 1:
        x, norm = normed(x, *norm)[1], None
    count, size = x.shape
    widths = [len(weight) for weight, _ in parts]
    biased = parts[0][1] is not None
    first, *others = (weight for weight, _ in parts)
    second, third = others or (first, first)
    b1, b2, b3 = (first if bias is None else bias for _, bias in (*parts, parts[0], parts[0])[:3])
    gain, eps = norm or (x, 0.0)
    out = x.new_empty(count, sum(widths))
    tile = tile or _tile("product", size, sum(widths), count)
    rows = _rows(count)
    _product[(sum(triton.cdiv(width, tile.rows) for width in widths), triton.cdiv(count, rows))](
        x, gain, eps, first, second, third, b1, b2, b3, out if residual is None else residual, out, count,
        K=size, N1=widths[0], N2=widths[1] if others else 0, N3=widths[2] if others else 0,
        BM=rows, BN=tile.rows, BK=_entries(tile, size), STAGES=tile.stages,
        NORM=norm is not None, BIAS=biased, RESIDUAL=residual is not None,
        EVEN=_even(tile, size, widths), SWAPPED=tile.swapped, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


@triton.jit
def _gated_one(
    x: tl.tensor, gain: tl.tensor, eps: tl.tensor, gate: tl.tensor, up: tl.tensor, out: tl.tensor,
    K: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
) -> None:  # fmt: skip
    """`silu(x · gate) * (x · up)` of a single row, which is normalised on the way."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    line = tl.arange(0, BK)[None, :]
    shift = n.to(tl.int64)[:, None] * K + line
    left, right = tl.zeros((BN, BK), tl.float32), tl.zeros((BN, BK), tl.float32)
    squares = tl.zeros((1, BK), tl.float32)
    for first in tl.range(0, K, BK, num_stages=STAGES):
        own = tl.load(x + first + line, mask=first + line < K, other=0.0).to(tl.float32)
        if EVEN:
            g = tl.load(gate + shift + first, eviction_policy="evict_first")
            u = tl.load(up + shift + first, eviction_policy="evict_first")
        else:
            inside = (n[:, None] < N) & (first + line < K)
            g = tl.load(gate + shift + first, mask=inside, other=0.0, eviction_policy="evict_first")
            u = tl.load(up + shift + first, mask=inside, other=0.0, eviction_policy="evict_first")
        squares += own * own
        own = own * tl.load(gain + first + line, mask=first + line < K, other=0.0).to(tl.float32)
        left += g.to(tl.float32) * own
        right += u.to(tl.float32) * own
    root = tl.sqrt(tl.sum(squares) / K + eps)
    one, two = tl.sum(left, 1) / root, tl.sum(right, 1) / root
    tl.store(out + n, (one / (1.0 + tl.exp(-one)) * two).to(out.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["rows"])
def _gated_many(
    x: tl.tensor, gate: tl.tensor, up: tl.tensor, out: tl.tensor, rows: tl.tensor,
    K: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, SWAPPED: tl.constexpr,
) -> None:  # fmt: skip
    """`silu(x · gate) * (x · up)` of some rows that are normalised already."""
    n, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    if SWAPPED:
        places = x + m[None, :] * K + k[:, None]
        shift = n.to(tl.int64)[:, None] * K + k[None, :]
        a, b = tl.zeros((BN, BM), tl.float32), tl.zeros((BN, BM), tl.float32)
    else:
        places = x + m[:, None] * K + k[None, :]
        shift = n.to(tl.int64)[None, :] * K + k[:, None]
        a, b = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    for first in tl.range(0, K, BK, num_stages=STAGES):
        if SWAPPED:
            row = tl.load(places + first, mask=(m[None, :] < rows) & (first + k[:, None] < K), other=0.0)
            inside = (n[:, None] < N) & (first + k[None, :] < K)
        else:
            row = tl.load(places + first, mask=(m[:, None] < rows) & (first + k[None, :] < K), other=0.0)
            inside = (n[None, :] < N) & (first + k[:, None] < K)
        if EVEN:
            g = tl.load(gate + shift + first, eviction_policy="evict_first")
            u = tl.load(up + shift + first, eviction_policy="evict_first")
        else:
            g = tl.load(gate + shift + first, mask=inside, other=0.0, eviction_policy="evict_first")
            u = tl.load(up + shift + first, mask=inside, other=0.0, eviction_policy="evict_first")
        if SWAPPED:
            a = tl.dot(g, row, a, input_precision="ieee")
            b = tl.dot(u, row, b, input_precision="ieee")
        else:
            a = tl.dot(row, g, a, input_precision="ieee")
            b = tl.dot(row, u, b, input_precision="ieee")
    found = a / (1.0 + tl.exp(-a)) * b
    if SWAPPED:
        found = found.trans()
    real = (m[:, None] < rows) & (n[None, :] < N)
    tl.store(out + m[:, None] * N + n[None, :], found.to(out.dtype.element_ty), mask=real)


def gated(x: Tensor, gate: Tensor, up: Tensor, *, norm: tuple[Tensor, float], tile: Tile | None = None) -> Tensor:
    """`silu(x @ gate.T) * (x @ up.T)` (M, N) of rows (M, K) that are normalised with gain (K,) and epsilon before."""
    count, size = x.shape
    width = len(gate)
    out = x.new_empty(count, width)
    tile = tile or _tile("gated", size, width, count)
    blocks, entries = triton.cdiv(width, tile.rows), _entries(tile, size)
    even = _even(tile, size, [width])
    if count == 1:
        _gated_one[(blocks,)](
            x, *norm, gate, up, out, K=size, N=width, BN=tile.rows, BK=entries, STAGES=tile.stages, EVEN=even,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    else:
        rows = _rows(count)
        _gated_many[(blocks, triton.cdiv(count, rows))](
            normed(x, *norm)[1], gate, up, out, count, K=size, N=width, BM=rows, BN=tile.rows, BK=entries,
            STAGES=tile.stages, EVEN=even, SWAPPED=tile.swapped, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


def _tile(kind: str, size: int, width: int, count: int) -> Tile:
    return tuned.get((kind, size, width, count == 1)) or TILES[kind, count == 1]


def _rows(count: int) -> int:
    """Rows that are multiplied at once: one, or as many as most batches have, so that few kernels are compiled."""
    return 1 if count == 1 else 32 if count <= 32 else 64


def _entries(tile: Tile, size: int) -> int:
    return min(tile.entries, max(16, 1 << (size - 1).bit_length()))


def _even(tile: Tile, size: int, widths: Sequence[int]) -> bool:
    """Whether nothing sticks out, so that no load needs a mask."""
    return size % _entries(tile, size) == 0 and all(width % tile.rows == 0 for width in widths)


@triton.jit
def _normed(
    x: tl.tensor, more: tl.tensor, gain: tl.tensor, eps: tl.tensor, total: tl.tensor, out: tl.tensor,
    K: tl.constexpr, BK: tl.constexpr, MORE: tl.constexpr,
) -> None:  # fmt: skip
    """One row: the sum, if there is more, and its normalised form."""
    k = tl.arange(0, BK)
    place = tl.program_id(0) * K + k
    row = tl.load(x + place, mask=k < K, other=0.0).to(tl.float32)
    if MORE:
        row += tl.load(more + place, mask=k < K, other=0.0).to(tl.float32)
        kept = row.to(total.dtype.element_ty)
        tl.store(total + place, kept, mask=k < K)
        row = kept.to(tl.float32)
    row = row / tl.sqrt(tl.sum(row * row, 0) / K + eps)
    row = row * tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(out + place, row.to(out.dtype.element_ty), mask=k < K)


def normed(x: Tensor, gain: Tensor, eps: float, more: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows (M, K), plus `more` if there is any, and the same with a root mean square of one, times gain."""
    total, out = x if more is None else torch.empty_like(x), torch.empty_like(x)
    size = x.shape[1]
    _normed[(len(x),)](
        x, x if more is None else more, gain, eps, total, out,
        K=size, BK=triton.next_power_of_2(size), MORE=more is not None, num_warps=8,
    )  # fmt: skip
    return total, out


@triton.jit
def _silu_times(gate_up: tl.tensor, out: tl.tensor, N: tl.constexpr, BN: tl.constexpr) -> None:
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.program_id(1)
    gate = tl.load(gate_up + row * 2 * N + n, mask=n < N, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * N + N + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + row * N + n, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=n < N)


def silu_times(gate_up: Tensor) -> Tensor:
    """`silu(left half) * right half` of rows (M, 2 N)."""
    count, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(count, width)
    _silu_times[(triton.cdiv(width, 1024), count)](gate_up, out, N=width, BN=1024, num_warps=4)
    return out
