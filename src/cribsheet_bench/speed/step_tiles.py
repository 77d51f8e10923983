"""Our products against PyTorch's, by tile, and our attention, by parts; the best tiles are used afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cribsheet.attention.prefix import Prefix
from cribsheet_bench.speed.setting import Setting
from cribsheet_bench.speed.step_clock import graphed, timed

_TILES: dict[tuple[str, bool], list[tuple[int, ...]]] = {  # as in `Tile`; by kind and by whether there is a single row
    ("product", True): [
        (4, 1024, 4, 1), (8, 1024, 4, 1), (16, 1024, 4, 1), (4, 2048, 8, 1), (16, 512, 2, 1), (8, 1024, 4, 3),
        (16, 512, 2, 4),
    ],
    ("product", False): [
        (16, 256, 4, 4), (32, 128, 4, 5), (32, 256, 4, 3), (64, 128, 4, 4), (64, 64, 4, 6), (64, 128, 4, 5, True),
        (64, 64, 4, 6, True), (64, 256, 4, 3, True), (64, 128, 8, 4, True), (64, 128, 4, 4, True),
        (64, 128, 8, 5, True), (128, 64, 8, 6, True), (32, 256, 4, 4, True),
    ],
    ("gated", True): [(2, 1024, 4, 1), (4, 1024, 4, 1), (8, 1024, 4, 1), (8, 512, 2, 1), (4, 1024, 4, 3)],
    ("gated", False): [
        (16, 128, 4, 4), (32, 128, 4, 4), (64, 64, 4, 4), (64, 128, 8, 3), (64, 64, 4, 4, True), (64, 64, 4, 5, True),
        (64, 128, 4, 3, True),
    ],
}  # fmt: skip
_CUTS = [  # as in `Cut`
    (rows, keys, warps, stages, programs)
    for rows, keys, warps, stages in (
        (128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 4, 3), (128, 128, 8, 3),
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (64, 32, 4, 4), (64, 64, 8, 3),
    )
    for programs in (66, 132, 264)
]  # fmt: skip
Fact = Callable[[str, Any], None]


@torch.no_grad()
def tiles(setting: Setting, fact: Fact, size: int) -> None:
    """Each product of all layers, one after the other, for so many rows."""
    layers = setting.backbone.model.model.layers
    both = [(each.mlp.gate_proj.weight, each.mlp.up_proj.weight) for each in layers]
    gain = layers[0].input_layernorm.weight, 1e-5
    _gates(setting, fact, size, both, gain)
    attention = [each.self_attn for each in layers]
    _products(setting, fact, "down", size, [[each.mlp.down_proj.weight] for each in layers], None)
    _products(setting, fact, "out", size, [[each.o_proj.weight] for each in attention], None)
    qkv = [[each.q_proj.weight, each.k_proj.weight, each.v_proj.weight] for each in attention]
    _products(setting, fact, "qkv", size, qkv, gain)
    _products(setting, fact, "head", size, [[setting.backbone.model.lm_head.weight]], gain)


@torch.no_grad()
def parts(setting: Setting, fact: Fact, prefix: Prefix, size: int) -> None:
    """Attention of so many answers over a uniform prefix, all layers one after the other, by programs that share it."""
    from cribsheet.kernels.step_attention import CUTS, Cut, attend

    backbone, layers = setting.backbone, prefix.layers
    like = layers[0].keys
    q = torch.randn(size, backbone.num_heads, 1, backbone.head_size).to(like)
    newer = torch.randn(size, backbone.kv_heads, 256, backbone.head_size).to(like)
    suffix = newer, newer, torch.full((size,), 40, device=like.device)

    def ours(cut: Cut) -> None:
        for layer in layers:
            whole = layer.keys.flatten(0, 1), layer.values.flatten(0, 1), layer.starts, layer.longest
            attend(q, whole, suffix, backbone.scale, cut=cut)

    moved = sum(2 * layer.keys.nbytes for layer in layers)
    rows = size * backbone.num_heads // backbone.kv_heads
    most = next(most for most in CUTS if rows <= most)
    line, best = [], 0.0
    for sizes in _CUTS:
        rate = _tried(setting, partial(ours, Cut(*sizes)), moved)
        line.append(f"{sizes} {rate}")
        if isinstance(rate, float) and rate > best:
            best, CUTS[most] = rate, Cut(*sizes)
    fact(f"TB/s, attention, {size} answers", " | ".join(line))


def _gates(
    setting: Setting, fact: Fact, size: int, both: Sequence[tuple[Tensor, Tensor]], gain: tuple[Tensor, float]
) -> None:
    from cribsheet.kernels.step import Tile, gated

    width, entries = both[0][0].shape
    x = torch.randn(size, entries, device=setting.device, dtype=setting.backbone.dtype)

    def by_torch() -> None:
        for gate, up in both:
            F.silu(F.linear(x, gate)) * F.linear(x, up)

    def ours(tile: Tile) -> None:
        for gate, up in both:
            gated(x, gate, up, norm=gain, tile=tile)

    moved = sum(gate.nbytes + up.nbytes for gate, up in both)
    _compare(setting, fact, ("gated", entries, width, size == 1), f"gated, {size} rows", by_torch, ours, moved)


def _products(
    setting: Setting,
    fact: Fact,
    name: str,
    size: int,
    weights: Sequence[list[Tensor]],
    gain: tuple[Tensor, float] | None,
) -> None:
    from cribsheet.kernels.step import Tile, product

    entries = weights[0][0].shape[1]
    x = torch.randn(size, entries, device=setting.device, dtype=setting.backbone.dtype)

    def by_torch() -> None:
        for own in weights:
            for each in own:
                F.linear(x, each)

    def ours(tile: Tile) -> None:
        for own in weights:
            product(x, [(each, None) for each in own], norm=gain, tile=tile)

    moved = sum(each.nbytes for own in weights for each in own)
    key = "product", entries, sum(len(each) for each in weights[0]), size == 1
    _compare(setting, fact, key, f"{name}, {size} rows", by_torch, ours, moved)


def _compare(
    setting: Setting,
    fact: Fact,
    key: tuple[str, int, int, bool],
    name: str,
    by_torch: Callable[[], None],
    ours: Callable[[Any], None],
    moved: int,
) -> None:
    """Bytes a second by PyTorch and by each tile, of which the best is kept."""
    from cribsheet.kernels.step import Tile, tuned

    line, best = [f"torch {_rate(setting, by_torch, moved)}"], 0.0
    for sizes in _TILES[key[0], key[3]]:
        tile = Tile(*sizes)  # type: ignore[arg-type]
        rate = _tried(setting, partial(ours, tile), moved)
        line.append(f"{sizes} {rate}")
        if isinstance(rate, float) and rate > best:
            best, tuned[key] = rate, tile
    fact(f"TB/s, {name}", " | ".join(line))


def _tried(setting: Setting, run: Callable[[], Any], moved: int) -> float | str:
    """Bytes a second, or why not: a tile may need more memory than there is."""
    try:
        return _rate(setting, run, moved)
    except Exception as failure:
        return type(failure).__name__


def _rate(setting: Setting, run: Callable[[], Any], moved: int) -> float:
    return round(moved / timed(setting, graphed(setting, run), 10, 2) / 1e12, 3)
