"""A decoding step of Llama-like models with a quarter of the kernels: products take along what stands around them.

It reads the weights where the model has them and runs none of its modules but that of the rotations. A model is taken
only if all its parts are the plain ones that we know, nobody hooks into them (`backbone.plain_parts`), and steps on
small examples give what the model's own give; for all others, and without Triton, the model's own step stays.

Letters as in `attention/slots.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cribsheet.attention import dispatch as fused
from cribsheet.attention.agreement import agrees as agree
from cribsheet.attention.agreement import relative_error
from cribsheet.attention.backends import on_cuda
from cribsheet.attention.prefix import LayerPrefix
from cribsheet.attention.slots import Rows, SlotLayer, step_cache
from cribsheet.model.backbone import Backbone, Linear, PlainLayer, PlainParts, plain_parts

_BOUND = 0.1  # relative L2 error of logits: one norm or one factor that we do not know of would be several times that
_MOST_OWN = 32  # rows up to which our own products are used: measured to be faster at 1 and at 32
_CHECKED = (1, 3, _MOST_OWN, _MOST_OWN + 1)  # rows of the steps that are compared with the model's own: every kernel


class LeanStep:
    """One step of a model of plain `parts`; `own` are the most rows of a batch that our own products take."""

    def __init__(self, parts: PlainParts, scale: float, *, own: int = _MOST_OWN) -> None:
        self._parts, self._scale, self._own = parts, scale, own

    @torch.no_grad()
    def __call__(self, ids: Tensor, positions: Tensor, layers: Sequence[SlotLayer]) -> Tensor:
        """Logits (B, V) after one more token (B,) of each sequence, at its position (B,)."""
        rows = F.embedding(ids, self._parts.embed)
        cos, sin = self._parts.turns(rows[:, None], positions[:, None])
        turn = cos.reshape(len(ids), -1).contiguous(), sin.reshape(len(ids), -1).contiguous()
        run = self._by_own_products if len(ids) <= self._own else self._by_torch
        return run(rows, turn, layers)

    def _by_own_products(self, rows: Tensor, turn: tuple[Tensor, Tensor], layers: Sequence[SlotLayer]) -> Tensor:
        """Norms, gates and sums are part of the products."""
        from cribsheet.kernels.step import gated, normed, product

        for mine, layer in zip(self._parts.layers, layers, strict=True):
            qkv = product(rows, mine.qkv, norm=mine.before)
            seen = self._attend(qkv, turn, layer, mine)
            rows = product(seen, [mine.out], residual=rows)
            inner = gated(rows, mine.gate[0], mine.up[0], norm=mine.between)
            rows = product(inner, [mine.down], residual=rows)
        if len(rows) == 1:
            return product(rows, [(self._parts.head, None)], norm=self._parts.norm)
        return F.linear(normed(rows, *self._parts.norm)[1], self._parts.head)  # read at 3.9 TB/s on an H200

    def _by_torch(self, rows: Tensor, turn: tuple[Tensor, Tensor], layers: Sequence[SlotLayer]) -> Tensor:
        """Products of many rows by the library that PyTorch brings, with our own kernels between them."""
        from cribsheet.kernels.step import normed, silu_times

        more: Tensor | None = None
        for mine, layer in zip(self._parts.layers, layers, strict=True):
            rows, inner = normed(rows, *mine.before, more)
            qkv = self._beside(inner, mine.qkv)
            seen = self._attend(qkv, turn, layer, mine)
            rows, inner = normed(rows, *mine.between, F.linear(seen, *mine.out))
            inner = silu_times(self._beside(inner, (mine.gate, mine.up)))
            more = F.linear(inner, *mine.down)
        return F.linear(normed(rows, *self._parts.norm, more)[1], self._parts.head)

    def _beside(self, rows: Tensor, parts: Sequence[Linear]) -> Tensor:
        return beside(rows, parts)

    def _attend(self, qkv: Tensor, turn: tuple[Tensor, Tensor], layer: SlotLayer, mine: PlainLayer) -> Tensor:
        """Append keys and values to the suffix, and attend: (B, H * D)."""
        from cribsheet.kernels import step_attention
        from cribsheet.kernels.step import placed

        q = placed(qkv, turn, layer.rows.index, layer.keys, layer.values, mine.heads)
        prefix, suffix = layer.prefix, (layer.keys, layer.values, layer.rows.index)
        keys, values = prefix.keys, prefix.values
        if not prefix.counts:
            keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        whole = keys, values, prefix.starts, prefix.longest
        found, lse = step_attention.attend(q, whole, suffix, self._scale)
        if layer.watch is not None:
            layer.watch(layer, q, lse, self._scale, None)
        return found.reshape(len(qkv), -1)


def beside(rows: Tensor, parts: Sequence[Linear]) -> Tensor:
    """Products (M, N1 + N2 + ...) of the same rows."""
    widths = [len(weight) for weight, _ in parts]
    out = rows.new_empty(len(rows), sum(widths))
    for (weight, bias), mine in zip(parts, out.split(widths, 1), strict=True):
        if bias is None:
            torch.mm(rows, weight.t(), out=mine)
        else:
            torch.addmm(bias, rows, weight.t(), out=mine)
    return out


def find(backbone: Backbone) -> LeanStep | None:
    """The lean step of a model, checked at the first call; none where the model's own must be used."""
    if backbone.lean is None:
        backbone.lean = _checked(backbone) if backbone.device.type == "cuda" else False
    found: LeanStep | bool = backbone.lean
    return found if isinstance(found, LeanStep) else None


def made(backbone: Backbone, *, own: int = _MOST_OWN) -> LeanStep | None:
    """The lean step of a plain model, not checked."""
    parts = plain_parts(backbone)
    return None if parts is None else LeanStep(parts, backbone.scale, own=own)


def _checked(backbone: Backbone) -> LeanStep | bool:
    """A lean step that agrees with the model's own, or false."""
    found = made(backbone)
    return found if found and agrees(backbone, "steps", lambda: errors(backbone, found, _CHECKED)) else False


def agrees(backbone: Backbone, what: str, check: Callable[[], dict[str, float]]) -> bool:
    """Whether kernels can be compiled, and the errors found by a check are what half precision leaves."""
    like = torch.empty(1, backbone.num_heads, 1, backbone.head_size, device=backbone.device, dtype=backbone.dtype)
    if not on_cuda(like) or not fused.usable(like, backbone.kv_heads):
        return False
    return agree(f"{what} of few kernels for {backbone.name}", check, _BOUND)


def errors(backbone: Backbone, step: LeanStep, sizes: Iterable[int] = (1, 3)) -> dict[str, float]:
    """Relative L2 errors of the logits of a lean step on small random examples, by batch size."""
    return {f"{size} answers": _error(backbone, step, size) for size in sizes}


def _error(backbone: Backbone, step: LeanStep, size: int) -> float:
    """That of a batch, over a prefix of a few random tokens; what is in the suffix by then must be equal, too."""
    outcomes, generator = [], torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(backbone.device, backbone.dtype)

    heads, entries, tokens = backbone.kv_heads, backbone.head_size, 24
    prefix = [
        LayerPrefix(random(heads, tokens, entries), random(heads, tokens, entries)) for _ in range(backbone.num_layers)
    ]
    ids = torch.randint(0, backbone.config.vocab_size, (size,), generator=generator).to(backbone.device)
    lengths = torch.arange(5, 5 + size, device=backbone.device)
    suffix = [(random(size, heads, 64, entries), random(size, heads, 64, entries)) for _ in prefix]
    runs: list[Callable[[list[SlotLayer]], Tensor]] = [
        lambda layers: step(ids, lengths + tokens, layers),
        lambda layers: backbone.step(ids[:, None], (lengths + tokens)[:, None], step_cache(layers))[:, -1],
    ]
    for run in runs:
        rows = Rows()
        rows.fix(lengths, 64)
        layers = [SlotLayer(layer, tokens, rows) for layer in prefix]
        for layer, (keys, values) in zip(layers, suffix, strict=True):
            layer.keys, layer.values = keys.clone(), values.clone()
        logits = run(layers).float()
        outcomes.append(
            [logits, *(torch.stack([layer.keys[:, :, 5:], layer.values[:, :, 5:]]).float() for layer in layers)]
        )
    pairs = zip(*outcomes, strict=True)
    return max(relative_error(got, wanted) for got, wanted in pairs)
