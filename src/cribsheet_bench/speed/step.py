"""Where a decoding step's time goes on a GPU, and what our own step makes of it.

    python -m cribsheet_bench.speed.step --json step.json
    python -m cribsheet_bench.speed.step --int4 --shape 1.5b   # only steps over int4 against 16 bits
    TRITON_INTERPRET=1 python -m cribsheet_bench.speed.step --device cpu --shape tiny   # a rehearsal

Kernels of one captured step by kind, the model's own step beside ours, both against the time that reading the weights
takes, tiles of our products against the library's, and how far both are from float32. Every part is guarded: one that
fails is told and the next goes on.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cribsheet.attention.prefix import Prefix
from cribsheet.attention.slots import Rows, SlotLayer
from cribsheet.compare.journal import write_rows
from cribsheet.compare.versions import versions
from cribsheet.engine.graphs import StepGraph, fixed_step
from cribsheet.model import llama_read, llama_step
from cribsheet.model.backbone import Backbone
from cribsheet.model.llama_weights import Linear, LlamaWeights
from cribsheet.testing import tiny_backbone
from cribsheet_bench.speed.setting import SHAPES, Setting, make_setting
from cribsheet_bench.speed.sheets import in_four_bits
from cribsheet_bench.speed.step_clock import body, copy_rate, timed
from cribsheet_bench.speed.step_tiles import parts, tiles

_TOKENS, _BEFORE = 256, 40  # of the suffix buffers, and of the suffixes
_KINDS = {  # by what stands in a kernel's name, the first that fits
    "attention": ("flash", "_newest", "_parted", "_joined", "_merge", "fmha"),
    "sources": ("_columns",),
    "products": ("_product", "_gated", "gemm", "gemv", "nvjet", "cutlass", "splitk", "xmma", "dot_kernel"),
    "norms, rotations, gates": ("_normed", "_placed", "_silu_times", "triton"),
    "reductions": ("reduce",),
    "copies": ("copy", "cat", "fill", "memset", "memcpy", "index", "arange"),
}


@dataclass
class Found:
    """What was measured so far, written to a file after every part."""

    console: Console
    path: Path | None
    seconds: float
    began: float = field(default_factory=time.perf_counter)
    facts: dict[str, Any] = field(default_factory=dict)
    table: list[tuple[str, ...]] = field(default_factory=list)

    def fact(self, name: str, value: Any) -> None:
        """Note and print one figure or table."""
        self.facts[name] = value
        self.console.print(f"{name}: {value}", markup=False, highlight=False)
        self.keep()

    def keep(self) -> None:
        """Write the file."""
        if self.path is not None:
            write_rows(self.path, {"facts": self.facts, "table": self.table})

    def part(self, name: str, run: Callable[[], Any]) -> Any:
        """One part, guarded; nothing if it failed or time is up."""
        spent = time.perf_counter() - self.began
        if spent > self.seconds:
            self.fact(f"left out: {name}", "time was up")
            return None
        self.console.print(f"[dim]{spent:6.1f} s  {name}[/]", highlight=False)
        try:
            return run()
        except Exception:
            self.fact(f"failed: {name}", traceback.format_exc()[-1800:])
            return None
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


class Step:
    """One decoding step of a batch over a prefix, captured on a GPU; it always writes to the same places."""

    def __init__(self, setting: Setting, prefix: Prefix, size: int, *, evidence: bool) -> None:
        made, self._setting = setting.backbone, setting
        rows, generator = Rows(), torch.Generator().manual_seed(3)
        self.layers = [SlotLayer(layer, prefix.tokens, rows) for layer in prefix.layers]
        for layer in self.layers:
            layer.reserve(size, _TOKENS - 64, layer.keys)  # a block more is reserved
            for buffer in (layer.keys, layer.values):
                buffer.copy_(torch.randn(buffer.shape[1:], generator=generator)[None])
        self.ids = torch.randint(20, 900, (size,), generator=generator).tolist()
        self._given = self.ids, [prefix.tokens + _BEFORE] * size, [_BEFORE] * size
        self.run: Callable[[], Any]
        if setting.device.type == "cuda":
            graph = StepGraph(made, self.layers, rows, size, evidence=evidence)
            self.run, self.replay = partial(graph.replay, *self._given), graph._step.replay
        else:
            inputs = torch.tensor(self._given)
            self.run = partial(
                fixed_step, made, self.layers, rows, inputs, self.layers[0].keys.shape[2], evidence=evidence
            )
            self.replay = self.run

    def logits(self) -> Tensor:
        """A copy of the step's logits (B, V) in float32."""
        logits: Tensor = self.run()[0]
        return logits.float().clone()

    def seconds(self) -> float:
        """Best of several rounds of replays."""
        self.run()
        return timed(self._setting, self.replay)


def profile(setting: Setting, found: Found, name: str, step: Step) -> None:
    """Kernels of one step, by kind and by name."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    step.run()
    setting.now()
    with profiled(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(3):
            step.replay()
        setting.now()
    kinds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    names: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in seen.key_averages():
        took = getattr(event, "self_device_time_total", 0.0)
        if not str(event.device_type).endswith("CUDA") or not took:
            continue
        own = event.key.lower()
        kind = next((kind for kind, words in _KINDS.items() if any(word in own for word in words)), "elementwise")
        for group, key in ((kinds, kind), (names, event.key[:90])):
            group[key][0] += took / 3
            group[key][1] += event.count / 3
    layers = setting.backbone.num_layers
    lines = [
        f"{took:8.1f} us a step, {took / layers:6.2f} us and {count / layers:5.1f} kernels a layer  {key}"
        for group in (kinds, names)
        for key, (took, count) in sorted(group.items(), key=lambda item: -item[1][0])[:16]
    ]
    weights = body(setting)
    if kinds.get("products"):
        lines.append(f"products read {weights / kinds['products'][0] * 1e6 / 1e12:.2f} TB/s of weights")
    found.fact(f"profile, {name}", "\n" + "\n".join(lines))


class Beside(llama_step.LlamaStep):
    """Our step with PyTorch's products, of weights that were put one below the other: four products a layer."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(_weights(setting.backbone), own=0, products=self._stacked)
        self._joined: dict[int, Tensor] = {}

    def _stacked(self, rows: Tensor, parts: Sequence[Linear]) -> Tensor:
        key = id(parts[0][0])
        if key not in self._joined:
            self._joined[key] = torch.cat([weight for weight, _ in parts])
        return F.linear(rows, self._joined[key])


class Compiled(llama_step.LlamaStep):
    """Our step with what stands between products compiled by PyTorch instead, single-row products included."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(_weights(setting.backbone), own=0)
        options: dict[str, Any] = {"coordinate_descent_tuning": True}
        self._before: Any = torch.compile(_before, dynamic=False, options=options)
        self._after: Any = torch.compile(_after, dynamic=False, options=options)

    def _by_torch(self, rows: Tensor, turn: tuple[Tensor, Tensor], layers: Sequence[SlotLayer]) -> Tensor:
        for mine, layer in zip(self.weights.layers, layers, strict=True):
            qkv = self._before(rows, *mine.before, *(weight for weight, _ in mine.qkv))
            seen = self._attend(qkv, turn, layer, mine)
            weights = (weight for weight, _ in (mine.out, mine.gate, mine.up, mine.down))
            rows = self._after(rows, seen, *mine.between, *weights)
        return F.linear(_normed(rows, *self.weights.norm), self.weights.lm_head)


def _weights(backbone: Backbone) -> LlamaWeights:
    weights = backbone.plain_weights()
    assert weights is not None
    return weights


def _normed(rows: Tensor, gain: Tensor, eps: float) -> Tensor:
    own = rows.float()
    return (own * torch.rsqrt(own.square().mean(-1, keepdim=True) + eps)).to(rows.dtype) * gain


def _before(rows: Tensor, gain: Tensor, eps: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    own = _normed(rows, gain, eps)
    return torch.cat([F.linear(own, weight) for weight in (q, k, v)], 1)


def _after(
    rows: Tensor, seen: Tensor, gain: Tensor, eps: float, out: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    rows = rows + F.linear(seen, out)
    own = _normed(rows, gain, eps)
    return rows + F.linear(F.silu(F.linear(own, gate)) * F.linear(own, up), down)


def steps(
    setting: Setting,
    found: Found,
    prefix: Prefix,
    makes: dict[str, Callable[[], Any]],
    sizes: Sequence[int],
    label: str = "",
) -> None:
    """Time and error of a step by each way of making it, for each batch size, with and without sources."""
    rate = found.facts.get("copy, bytes/s", 4e12)
    held = sum(layer.nbytes for layer in prefix.layers)
    for size in sizes:
        wanted = _WANTED.get((size, label))
        for name, make in makes.items():
            for evidence in (False, True) if name in _WITH_SOURCES else (False,):
                made = found.part(f"{name}, {size}", partial(_step, setting, prefix, size, make, evidence))
                if made is None:
                    continue
                took, logits = made
                if name == "stock":
                    wanted = logits
                apart = "" if wanted is None else f"{_apart(logits, wanted):.3f}"
                same = "" if wanted is None else f"{(logits.argmax(-1) == wanted.argmax(-1)).float().mean():.3f}"
                lowest = (body(setting) + held) / rate
                row = (
                    f"{name}, {size} answers{label}{', sources' if evidence else ''}", f"{took * 1e3:.3f}",
                    f"{body(setting) / rate * 1e3:.3f}", f"{took / (body(setting) / rate):.2f}",
                    f"{lowest / took:.0%}", apart, same,
                )  # fmt: skip
                found.table.append(row)
                found.fact(" | ".join(row[:1]), " | ".join(row[1:]))
        _WANTED[size, label] = wanted


_WITH_SOURCES = ("stock", "ours", "torch's products")
_WANTED: dict[tuple[int, str], Tensor | None] = {}  # logits of the model's own step, by batch size and prefix


def _apart(got: Tensor, wanted: Tensor) -> float:
    """The largest relative L2 error of a row."""
    return float(((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


def _step(setting: Setting, prefix: Prefix, size: int, make: Callable[[], Any], evidence: bool) -> tuple[float, Tensor]:
    llama_step.use(setting.backbone, make())
    step = Step(setting, prefix, size, evidence=evidence)
    return step.seconds(), step.logits()


def four_bits(setting: Setting, found: Found, tokens: int, sizes: Sequence[int], *, ragged: bool) -> None:
    """A step over a sheet in int4 as codes and in 16 bits, taking turns, and the bytes that each takes."""
    prefixes, taken = {}, {}
    for name in ("16 bits", "int4"):
        before = _allocated(setting)
        prefixes[name] = in_four_bits(setting, tokens, ragged=ragged, packed=name == "int4")
        taken[name] = _allocated(setting) - before
    label = f"{tokens:,} tokens{', adaptive' if ragged else ''}"
    ours = llama_step.unchecked(setting.backbone)
    for size in sizes:
        for evidence in (False, True):
            llama_step.use(setting.backbone, ours)
            steps = {name: Step(setting, prefix, size, evidence=evidence) for name, prefix in prefixes.items()}
            best = dict.fromkeys(steps, float("inf"))
            for _ in range(4):
                for name, step in steps.items():
                    step.run()
                    best[name] = min(best[name], timed(setting, step.replay, rounds=1))
            wanted, got = (steps[name].logits() for name in ("16 bits", "int4"))
            value: dict[str, Any] = {f"{name}, ms": round(took * 1e3, 3) for name, took in best.items()}
            value |= {
                "times": round(best["16 bits"] / best["int4"], 3),
                "apart": round(_apart(got, wanted), 4),
                "same choice": round(float((got.argmax(-1) == wanted.argmax(-1)).float().mean()), 3),
                "bytes": taken,
            }
            found.fact(f"int4, {size} answers, {label}{', sources' if evidence else ''}", value)


def _allocated(setting: Setting) -> int:
    """Bytes of tensors on a GPU."""
    if setting.device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def truth(setting: Setting, found: Found) -> None:
    """How far the model's own step and ours are from float32, on a model of as wide layers, but few of them."""
    few = SHAPES[setting.shape] | {"num_hidden_layers": 4, "vocab_size": 1000}
    for kind in ("stock", "ours"):
        apart = []
        for size in (1, 5, 70):
            made = {}
            for dtype in (torch.float32, setting.backbone.dtype):
                torch.manual_seed(1)
                small = make_setting("few", str(setting.device), torch.float32, 1, few)
                small.backbone.model.to(setting.backbone.dtype).to(dtype)
                prefix = small.prefix(512)
                for number, layer in enumerate(prefix.layers):
                    torch.manual_seed(number)
                    for part in (layer.keys, layer.values):
                        part.copy_(torch.randn(part.shape, device=part.device).to(setting.backbone.dtype))
                exact = dtype == torch.float32 and setting.device.type == "cuda"
                own_layers = exact or kind == "stock"
                llama_step.use(small.backbone, None if own_layers else llama_step.unchecked(small.backbone))
                with torch.no_grad():
                    made[dtype] = Step(small, prefix, size, evidence=False).logits()
            apart.append(round(_apart(made[setting.backbone.dtype], made[torch.float32]), 4))
        found.fact(f"error against float32, 4 layers, 1, 5 and 70 answers: {kind}", apart)


def families(setting: Setting, found: Found) -> None:
    """Whether steps of other families agree, and whether the check of a real model lets it through."""
    found.fact("the model is plain", setting.backbone.plain_weights() is not None)
    llama_step.forget(setting.backbone)
    found.fact("the model passed its check", llama_step.find(setting.backbone) is not None)
    found.fact("so did reads", setting.backbone.fast_read is not None)
    for family in ("qwen3", "mistral"):
        backbone = tiny_backbone(family, dtype=torch.bfloat16, head_dim=32)
        backbone.model.to(setting.device)
        weights = _weights(backbone)
        errors = llama_step.errors(backbone, llama_step.LlamaStep(weights))
        own = backbone.read_by_own_layers, backbone.step, backbone.tokenizer
        errors |= llama_read.errors(llama_read.LlamaRead(weights), *own)
        found.fact(f"errors, {family}", errors)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--seconds", type=float, default=190, help="start no part after so long")
    parser.add_argument("--int4", action="store_true", help="only steps over a sheet in int4 against 16 bits")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = Found(Console(width=170), arguments.json, arguments.seconds)
    (only_int4 if arguments.int4 else run)(found, arguments.device, arguments.shape)
    table = Table("step", "ms", "weights alone, ms", "times that", "of weights and prefix", "error", "same choice")
    for row in found.table:
        table.add_row(*row)
    found.console.print(table)
    found.keep()
    return 0


def only_int4(found: Found, device: str, shape: str) -> None:
    """Steps over a sheet in int4 against 16 bits."""
    real = device == "cuda"
    found.facts |= versions()
    setting = make_setting(shape, device, torch.bfloat16 if real else torch.float32, 2)
    found.fact("device", torch.cuda.get_device_name() if real else device)
    for ragged in (False, True):
        part = partial(four_bits, setting, found, 32768 if real else 64, (1, 16) if real else (1, 3), ragged=ragged)
        found.part(f"int4{', adaptive' if ragged else ''}", part)


def run(found: Found, device: str, shape: str) -> None:
    """All parts, what matters most first."""
    real = device == "cuda"
    found.facts |= versions()
    setting = make_setting(shape, device, torch.bfloat16 if real else torch.float32, 2)
    prefix, many = setting.prefix(16384 if real else 64), 32 if real else 3
    found.facts["copy, bytes/s"] = found.part("copy", partial(copy_rate, setting)) or 4e12
    found.fact("device", torch.cuda.get_device_name() if real else device)

    def profiled(name: str, size: int, make: Callable[[], Any], evidence: bool) -> None:
        llama_step.use(setting.backbone, make())
        name = f"{name}, {size}{', sources' if evidence else ''}"
        profile(setting, found, name, Step(setting, prefix, size, evidence=evidence))

    stock: dict[str, Callable[[], Any]] = {"stock": lambda: None}
    ours = {"ours": lambda: llama_step.unchecked(setting.backbone)}
    library = {"torch's products": lambda: llama_step.unchecked(setting.backbone, own=0)}
    steps(setting, found, prefix, stock | ours | library, (1, many))
    ragged = setting.prefix(16384 if real else 64, ragged=True)
    steps(setting, found, ragged, stock | ours | library, (1, many), ", adaptive")
    for name, make in (stock | ours).items() if real else ():
        for size in (1, many):
            for evidence in (False, True):
                part = partial(profiled, name, size, make, evidence)
                found.part(f"profile, {name}, {size}", part)
    found.part("families", partial(families, setting, found))
    found.part("truth", partial(truth, setting, found))
    for size in (1, many):
        found.part(f"tiles, {size}", partial(tiles, setting, found.fact, size))
        found.part(f"parts, {size}", partial(parts, setting, found.fact, prefix, size))
    steps(setting, found, prefix, {"best tiles": ours["ours"]}, (1, many))
    steps(setting, found, prefix, {"torch's products, joined": lambda: Beside(setting)}, (1, many))
    if real:
        steps(setting, found, prefix, {"compiled": lambda: Compiled(setting)}, (1, many))


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        sys.exit(main())
