"""Fused attention kernels that also return log-sum-exps; `attention/attend.py` chooses one and says what they compute.

All are PyTorch's own operators. Causal means a square here: rectangular causal masks are aligned at the first key on a
CPU and at the last on CUDA. Letters as in `attention/attend.py`.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Hashable

import torch
from torch import Tensor

from cribsheet.attention.agreement import agrees, relative_error
from cribsheet.kernels.products import are_there

_CPU_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_CUDA_TYPES = (torch.bfloat16, torch.float16)
_PLANNED_ROWS = 4096  # rows and keys from which cuDNN is worth its plan
_USES_THAT_PAY = 600  # a plan takes 0.6 s and saves a millisecond at each use: no process loses more than one plan
_PLANNED_BOUND = 1e-2
_ONE_TOKEN_ROWS = 1024  # up to so many rows a head, keys are split over the chip (see `flash_ragged`)

_seen: Counter[Hashable] = Counter()  # how often shapes came
_planned: dict[Hashable, bool] = {}  # whether cuDNN takes them, of those that came often


def on_cpu(q: Tensor) -> bool:
    """Whether `flash_cpu` takes these queries."""
    return q.device.type == "cpu" and q.dtype in _CPU_TYPES


def on_cuda(q: Tensor) -> bool:
    """Whether `flash_cuda` and `flash_ragged` take these queries."""
    return q.device.type == "cuda" and q.dtype in _CUDA_TYPES and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def flash_cpu(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`attend` on a CPU."""
    bias = None if mask is None else torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    tokens = q.shape[2]
    if tokens == 1 and q.dtype == torch.bfloat16 and are_there(q.dtype):
        q = q.repeat(1, 1, 2, 1)  # of one row, its products take four times as long as of two
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=bias, scale=scale
    )
    out, lse = out[:, :, :tokens], lse[:, :, :tokens]
    if mask is not None:  # for a row that may look at nothing the kernel yields NaN or a log-sum-exp of 0
        blind = ~mask.any(-1)  # (B, 1, T)
        out, lse = out.masked_fill(blind.unsqueeze(-1), 0.0), lse.masked_fill(blind, float("-inf"))
    return out, lse


def flash_cuda(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """`attend` without a mask on CUDA by FlashAttention 2, which takes any shape at once.

    Key/value heads are shared, not repeated.
    """
    found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return found[0], found[1].reshape(*q.shape[:2], -1)[..., : q.shape[2]]


def cudnn_cuda(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """The same by cuDNN, which is faster on Hopper once it has planned a shape."""
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return found[0], found[1].reshape(*q.shape[:2], -1)[..., : q.shape[2]]


def is_planned(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> bool:
    """Whether cuDNN is to be used: on Hopper, for a large shape that came so often that a plan will have paid.

    The first time, both are compared on what is at hand.
    """
    if q.shape[2] < _PLANNED_ROWS or k.shape[2] < _PLANNED_ROWS or not is_hopper(q.device):
        return False
    shape = (q.device, q.dtype, q.shape, k.shape, q.stride(), k.stride(), v.stride(), causal)  # as plans are kept
    if shape not in _planned:
        _seen[shape] += 1
        if _seen[shape] <= _USES_THAT_PAY:
            return False
        name = f"cuDNN's kernels for {tuple(q.shape)}"
        _planned[shape] = agrees(name, lambda: _cudnn_errors(q, k, v, scale, causal), _PLANNED_BOUND)
    return _planned[shape]


def _cudnn_errors(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> dict[str, float]:
    """Of the output, relative; of log-sum-exps the largest difference."""
    (out, lse), (wanted, wanted_lse) = (run(q, k, v, scale, causal) for run in (cudnn_cuda, flash_cuda))
    return {"output": relative_error(out, wanted), "log-sum-exp": float((lse - wanted_lse).abs().max())}


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether a GPU is of the generation of the H100 and H200."""
    return torch.cuda.get_device_capability(device)[0] == 9


def flash_ragged(
    rows: Tensor, keys: Tensor, values: Tensor, ends: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of R rows for each of K heads over as many tokens as that head has, on CUDA in one call.

    `rows` is (K, R, D), `keys` and `values` (N, D) of all heads one behind the other, `ends` (K + 1,) int32 where each
    begins, `longest` the most tokens of a head. Output (K, R, D) and log-sum-exp (K, R) in float32.
    """
    heads, count, size = rows.shape
    if 1 < count <= _ONE_TOKEN_ROWS:  # as query heads of one token: only then does the kernel split long keys
        q, at_once = rows.contiguous(), 1
    else:
        q, at_once = rows.reshape(heads * count, 1, size), count
    firsts = torch.arange(heads + 1, device=rows.device, dtype=torch.int32) * at_once
    found = torch.ops.aten._flash_attention_forward(
        q, keys.unsqueeze(1), values.unsqueeze(1), firsts, ends, at_once, longest, 0.0, False, False, scale=scale
    )
    out, lse = found[0].reshape(heads, count, size), found[1]
    if at_once == 1 and lse.dim() == 2 and count > 1:  # rows first, heads last
        return out, lse.reshape(count, heads).t()
    return out, lse.reshape(heads, count)
