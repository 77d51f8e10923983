"""Our own kernels (`kernels/columns.py`) where they work: on CUDA, in half precision, if Triton is there and agrees.

And products on a CPU (`kernels/products.py`), if it has them.

Before a kind of model uses them, they are compared on a small example with the plain path that they stand for; where
they cannot be compiled or differ, that is logged once and the plain path stays, as it does for whoever is in a hurry
(`attention/agreement.py`) until they have been compared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from cribsheet.attention import plain
from cribsheet.attention.agreement import agrees, finding_out, is_in_a_hurry, relative_error
from cribsheet.attention.backends import is_hopper, on_cuda
from cribsheet.kernels import products

_BOUND = 2e-2  # relative L2 error at which bfloat16 is no excuse
_FLASHED_ROWS, _FLASHED_SIZES = 2048, (64, 128)  # rows from which our causal attention pays, and its head sizes


def usable(q: Tensor, kv_heads: int, softcap: float | None = None) -> bool:
    """Whether the kernels take these queries (B, H, T, D) or (H, T, D)."""
    if softcap is not None or not on_cuda(q):
        return False
    return agree(_attending, q.device, q.dtype, q.shape[-1], q.shape[-3] // kv_heads)


def can_merge(out: Tensor) -> bool:
    """Whether `merge` takes such outputs (B, H, T, D)."""
    return on_cuda(out) and agree(_merging, out.device, out.dtype, out.shape[-1], 1)


def can_flash(q: Tensor, k: Tensor) -> bool:
    """Whether `causal` takes such queries (B, H, T, D) and keys (B, K, T, D)."""
    if q.shape[2] < _FLASHED_ROWS or q.shape[-1] not in _FLASHED_SIZES or not (on_cuda(q) and is_hopper(q.device)):
        return False
    return agree(_flashing, q.device, q.dtype, q.shape[-1], q.shape[1] // k.shape[1])


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`attention.attend` of rows that see up to their own key, by one kernel for Hopper."""
    from cribsheet.kernels import flash

    return flash.causal(q, k, v, scale)


def can_span(q: Tensor) -> bool:
    """Whether products on a CPU make attention of these queries (B, H, T, D) over spans; they take no gradients.

    Unlike kernels they need not be compiled, so whoever is in a hurry finds it out too.
    """
    return q.device.type == "cpu" and not torch.is_grad_enabled() and _spans_agree(q.dtype)


@functools.cache
def _spans_agree(dtype: torch.dtype) -> bool:
    name = f"products in {dtype} on this processor"
    return products.are_there(dtype) and agrees(name, lambda: _spanning(torch.device("cpu"), dtype, 64, 3), _BOUND)


def columns(q: Tensor, k: Tensor, lse: Tensor, scale: float, row_weight: Tensor | None, *, peak: bool) -> Tensor:
    """`attention.column_mass`, or `column_peak`: (H, S) in float32 for q (H, T, D), k (K, S, D) and lse (H, T)."""
    from cribsheet.kernels import columns as kernels

    heads, size, _ = k.shape
    rows = q.reshape(heads, -1, *q.shape[1:])  # (K, G, T, D)
    seen = lse if row_weight is None else plain.weighted(lse, row_weight)
    starts = torch.arange(heads + 1, device=q.device, dtype=torch.int32) * size
    found = kernels.columns(
        rows, seen.reshape(rows.shape[:3]), k.flatten(0, 1), starts, size, size, scale, peak=peak
    )  # (G, K, S)
    return found.transpose(0, 1).reshape(-1, size)


def around(q: Tensor, lse: Tensor, keys: Tensor, block: int, margin: int, scale: float) -> Tensor:
    """Largest weight (H, R) of each key from the rows about its block, as `kernels.columns.around` takes them."""
    from cribsheet.kernels import columns as kernels

    return kernels.around(q, lse, keys, block, margin, scale)


def on_prefix(q: Tensor, lse: Tensor, keys: Tensor, starts: Tensor, longest: int, width: int, scale: float) -> Tensor:
    """Weights (B, K, width) of the keys (N, D) of a prefix, summed over the rows of q (B, H, T, D).

    `lse` (B, H, T) holds the rows' weights already (`plain.weighted`); the others are as in `kernels.columns`.
    """
    from cribsheet.kernels import columns as kernels

    batch, heads = q.shape[0], len(starts) - 1
    rows = q.reshape(batch, heads, -1, q.shape[-1]).transpose(0, 1)  # (K, B, G * T, D)
    seen = lse.reshape(batch, heads, -1).transpose(0, 1)
    return kernels.columns(rows, seen, keys, starts, longest, width, scale, peak=False)


def newest(
    q: Tensor, keys: Tensor, values: Tensor, index: Tensor, scale: float, before: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """`attend_each` with `merge` of a step's newest tokens, as `kernels.columns.newest` takes them."""
    from cribsheet.kernels import columns as kernels

    return kernels.newest(q, keys, values, index, scale, before)


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`plain_merge` by one kernel."""
    from cribsheet.kernels import columns as kernels

    return kernels.merge(first, second)


Check = Callable[[torch.device, torch.dtype, int, int], dict[str, float]]


_verdicts: dict[tuple[Check, torch.device, torch.dtype, int, int], bool] = {}


def agree(check: Check, device: torch.device, dtype: torch.dtype, size: int, shared_by: int) -> bool:
    """Whether kernels can be compiled for such heads and give what the plain path gives."""
    heads = check, device, dtype, size, shared_by
    if heads not in _verdicts and not is_in_a_hurry():
        with finding_out:
            if heads not in _verdicts:
                _verdicts[heads] = agrees(
                    f"our kernels on {device}", lambda: check(device, dtype, size, shared_by), _BOUND
                )
    return _verdicts.get(heads, False)


def disagrees(check: Check, device: torch.device, dtype: torch.dtype, size: int, shared_by: int) -> bool:
    """Whether it is known that they cannot, or do not."""
    return not _verdicts.get((check, device, dtype, size, shared_by), True)


def check(device: torch.device, dtype: torch.dtype, size: int, shared_by: int) -> dict[str, float]:
    """Relative L2 errors of all kernels on small random examples, by case."""
    found = _attending(device, dtype, size, shared_by) | _merging(device, dtype, size, shared_by)
    return found | _flashing(device, dtype, size, shared_by) if size in _FLASHED_SIZES else found


def _attending(device: torch.device, dtype: torch.dtype, size: int, shared_by: int) -> dict[str, float]:
    found: dict[str, float] = {}
    scale, random = size**-0.5, _Random(device, dtype)
    q, k, v = random(2 * shared_by, 70, size), random(2, 300, size), random(2, 300, size)
    lse = plain.attend_plain(q[None], k[None], v[None], scale=scale)[1][0]
    weight = torch.linspace(0, 1, 71, device=device)[1:]
    for name, peak, reference in (("mass", False, plain.plain_mass), ("peak", True, plain.plain_peak)):
        got = columns(q, k, lse, scale, weight, peak=peak)
        found[f"{name} of rows"] = relative_error(got, reference(q, k, lse, scale, weight, None))
    own, far = k[:, :70], torch.arange(70, device=device)
    logits = q.float() @ own.float().repeat_interleave(shared_by, 0).transpose(1, 2) * scale - lse.unsqueeze(-1)
    first = far // 32 * 32
    near = (far[:, None] >= first - 5) & (far[:, None] < first + 37)  # rows about the block of a key
    wanted = logits.exp().masked_fill(~near, 0.0).amax(1)
    found["peak of rows about"] = relative_error(around(q, lse, own, 32, 5, scale), wanted)
    for sequences in (1, 33):
        found[f"mass of {sequences} sequences"] = relative_error(*_on_heads(random, sequences, size, shared_by))
    q, keys, values = random(3, 2 * shared_by, 1, size), random(4, 2, 130, size), random(4, 2, 130, size)
    index = torch.tensor([0, 70, 129], device=device)
    mask = (torch.arange(130, device=device) <= index[:, None])[:, None, None]
    suffix = plain.attend_plain(q, keys[:3], values[:3], scale=scale, mask=mask)
    before = random(3, 2 * shared_by, 1, size), random(3, 2 * shared_by, 1).float() + suffix[1]
    cases = {"suffix": (None, suffix), "suffix and prefix": (before, plain.plain_merge(before, suffix))}
    for name, (given, wanted) in cases.items():
        found[name] = _worse(newest(q, keys, values, index, scale, given), wanted)
    return found


def _on_heads(random: _Random, sequences: int, size: int, shared_by: int) -> tuple[Tensor, Tensor]:
    """What sequences look at in a prefix of two heads of different lengths, by the kernel and by definition."""
    q, keys, scale = random(sequences, 2 * shared_by, 1, size), random(200, size), size**-0.5
    heads = list(zip(q.split(shared_by, 1), keys.split([130, 70]), strict=True))
    logits = [rows.float() @ own.float().t() * scale for rows, own in heads]  # (B, G, 1, S)
    lse = torch.cat([each.logsumexp(-1) for each in logits], 1)
    masses = [each.softmax(-1).sum((1, 2)) for each in logits]
    wanted = torch.stack([torch.nn.functional.pad(mass, (140 - mass.shape[1], 0)) for mass in masses], 1)
    starts = torch.tensor([0, 130, 200], device=q.device, dtype=torch.int32)
    return on_prefix(q, lse, keys, starts, 130, 140, scale), wanted


def _merging(device: torch.device, dtype: torch.dtype, size: int, shared_by: int) -> dict[str, float]:
    random = _Random(device, dtype)
    first = random(2, 37, 3 * shared_by, size).transpose(1, 2), random(2, 3 * shared_by, 37).float()
    second = random(2, 3 * shared_by, 37, size), random(2, 3 * shared_by, 37).float()
    second[1][:, 0] = float("-inf")  # a part in which rows saw nothing
    return {"merge": _worse(merge(first, second), plain.plain_merge(first, second))}


def _spanning(device: torch.device, dtype: torch.dtype, size: int, shared_by: int) -> dict[str, float]:
    """Of few and of more rows, over heads that have room behind them, or before them, or none at all."""
    found: dict[str, float] = {}
    random, scale = _Random(device, dtype), size**-0.5
    for counts in ((100, 300), (130,)):
        keys, values = random(sum(counts), size), random(sum(counts), size)
        spans = products.spans_of(keys, values, counts)
        for tokens in (1, 20):
            rows = random(len(counts), shared_by * tokens, size)
            out, lse, weights = products.attend(rows, spans, scale, noted=True)
            assert weights is not None
            for head, (k, v) in enumerate(zip(keys.split(counts), values.split(counts), strict=True)):
                q, span = rows[head], spans[head]
                wanted = plain.attend_plain(q[None, None], k[None, None], v[None, None], scale=scale)
                noted = weights.heads[head][:, span.first : span.last]
                found[f"{len(q)} rows over {len(k)} keys"] = max(
                    _worse((out[None, head : head + 1], lse[None, head : head + 1]), wanted),
                    relative_error(noted, (q.float() @ k.float().t() * scale).softmax(-1)),
                )
    return found


def _flashing(device: torch.device, dtype: torch.dtype, size: int, shared_by: int) -> dict[str, float]:
    random, found = _Random(device, dtype), dict[str, float]()
    for tokens in (70, 300):
        q, k, v = (random(2, heads, tokens, size) for heads in (2 * shared_by, 2, 2))
        wanted = plain.attend_plain(q, k, v, scale=size**-0.5, causal=True)
        found[f"causal attention of {tokens}"] = _worse(causal(q, k, v, size**-0.5), wanted)
    return found


class _Random:
    """The same random tensors every time."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype, self._generator = device, dtype, torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(self._device, self._dtype)


def _worse(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> float:
    return max(relative_error(one, other) for one, other in zip(got, wanted, strict=True))
