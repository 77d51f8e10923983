"""What only a GPU has to show: its ceilings and kernels, the floor of decoding, and where an answer's time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from cribsheet.attention import backends
from cribsheet.attention.prefix import LayerPrefix
from cribsheet.engine.engine import Engine
from cribsheet.engine.request import Request
from cribsheet.engine.sampling import SamplingParams
from cribsheet.prompt.chunks import TokenizedCorpus
from cribsheet_bench.speed import sides
from cribsheet_bench.speed.parts import ALLOCATIONS, QUESTION, Report
from cribsheet_bench.speed.setting import Setting
from cribsheet_bench.speed.step_clock import body, graphed


def ceilings(setting: Setting, report: Report) -> None:
    """Bytes and operations a second that this card does at best."""
    source = torch.randn(1 << 29, device=setting.device)  # 2 GiB
    target = torch.empty_like(source)
    best = setting.interleaved({"copy": lambda: target.copy_(source)}, 5)["copy"]
    report.fact("copy, TB/s (read and written)", 2 * source.nbytes / best / 1e12)
    left = torch.randn(8192, 8192, device=setting.device, dtype=torch.bfloat16)
    right = torch.randn_like(left)
    best = setting.interleaved({"product": lambda: left @ right}, 5)["product"]
    report.fact("bfloat16 product, TFLOP/s", 2 * 8192**3 / best / 1e12)


def kernels(setting: Setting, report: Report) -> None:
    """FlashAttention against cuDNN at the shapes of a build, their first call apart."""
    made, dtype = setting.backbone, torch.bfloat16
    for rows, keys, causal in ((8192, 8192, True), (8192, 16384, False), (1024, 16384, False)):
        q = torch.randn(1, made.num_heads, rows, made.head_size, device=setting.device, dtype=dtype)
        k = torch.randn(1, made.kv_heads, keys, made.head_size, device=setting.device, dtype=dtype)
        v = torch.randn_like(k)
        flops = 4 * made.num_heads * made.head_size * rows * keys * (0.5 if causal else 1)
        for name, run in (("flash", backends.flash_cuda), ("cudnn", backends.cudnn_cuda)):
            call = partial(run, q, k, v, 0.1, causal)
            first = setting.once(call)
            best = setting.interleaved({name: call}, 5)[name]
            found = {"first call, ms": first * 1e3, "ms": best * 1e3, "TFLOP/s": flops / best / 1e12}
            report.fact(f"{name}, {rows} rows, {keys} keys, causal {causal}", found)
    for batch in (1, 32):
        q = torch.randn(batch, made.num_heads, 1, made.head_size, device=setting.device, dtype=dtype)
        for name, ragged in ALLOCATIONS.items():
            prefix = setting.prefix(16384, ragged=ragged).layers[:8]
            moved = sum(layer.keys.nbytes * 2 for layer in prefix)
            replay = graphed(setting, partial(_attend_all, prefix, q))
            best = setting.interleaved({"run": replay}, 5)["run"]
            report.fact(f"prefix of 16384, {name}, batch {batch}: TB/s", moved / best / 1e12)


def _attend_all(layers: Sequence[LayerPrefix], q: Tensor) -> None:
    for layer in layers:
        layer.attend(q, 0.1)


def floor(setting: Setting, report: Report, length: int, tbs: float) -> None:
    """A step of one answer against streaming the weights once, and of 32 answers against weights and prefix."""
    weights = body(setting)
    question = setting.ids(QUESTION)
    for size, tokens, most in ((1, length, 1 / 1.3), (32, length, 0.8)):
        for name, ragged in ALLOCATIONS.items():
            prefix = setting.prefix(tokens, ragged=ragged)
            held = sum(layer.keys.nbytes * 2 for layer in prefix.layers)
            for evidence in (True, False):
                asker = sides.Asker(setting, evidence=evidence)
                few, many = 8, 72
                runs = {n: partial(asker.ask, prefix, [question] * size, n) for n in (few, many)}
                best = setting.interleaved({str(n): run for n, run in runs.items()})
                asker.close()
                step = (best[str(many)] - best[str(few)]) / (many - few)
                label = f"{size} answers, prefix {tokens}, {name}{'' if evidence else ', no sources'}"
                lowest = weights / tbs / 1e12
                report.row(f"step against weights alone: {label}", step, lowest, limit=1.0, target=most)
                report.row(f"step against weights and prefix: {label}", step, lowest + held / tbs / 1e12, limit=1.0)


def build_long(setting: Setting, report: Report, length: int) -> None:
    """A build at length against the fastest stock prefill that there is."""
    corpus = setting.corpus(length)
    warm = setting.corpus(length // 8)  # our kernels are compiled, and libraries loaded, at a first use
    for name in ALLOCATIONS:
        _built(setting, warm, 8, name)
    on_gpu = setting.device.type == "cuda"
    backend = SDPBackend.CUDNN_ATTENTION if on_gpu else SDPBackend.FLASH_ATTENTION  # the fastest on Hopper
    runs: dict[str, Callable[[], Any]] = {"plain": partial(sides.plain_prefill, setting, corpus, [backend])}
    for rate in (8, 64):
        for name in ALLOCATIONS:
            runs[f"{name}, {rate}×"] = partial(_built_within, setting, report, corpus, rate, name)
    best = setting.interleaved(runs, 1)
    report.fact(f"full prefill of {length}, s", best["plain"])
    report.point("plain prefill", length, best["plain"])
    for rate, target in ((8, 2.0), (64, 2.3)):
        for name in ALLOCATIONS:
            took = best[f"{name}, {rate}×"]
            report.point(f"build, task, {name}, {rate}×", length, took)
            label = f"build against plain prefill, {length} tokens, {rate}×, {name}"
            report.row(label, took, best["plain"], target=target)


def _built_within(setting: Setting, report: Report, corpus: TokenizedCorpus, rate: float, name: str) -> None:
    """A build, and the most memory that it took."""
    on_gpu = setting.device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    _built(setting, corpus, rate, name)
    most = torch.cuda.max_memory_allocated() if on_gpu else 0
    report.fact(f"build {len(corpus)}, {name}, {rate}×: peak GiB above the model", (most - before) / 2**30)


def _built(setting: Setting, corpus: TokenizedCorpus, rate: float, name: str) -> None:
    sides.build(setting, corpus, rate, allocation="adaptive" if name == "adaptive" else "uniform")


def compiled(setting: Setting, report: Report, length: int) -> None:
    """One token of one answer against a static cache and a compiled model: stock transformers at its best."""
    question, prefix = setting.ids(QUESTION), setting.prefix(length)
    step = sides.Compiled(setting, prefix, length + 256)
    took = setting.interleaved({"step": step})["step"]
    asker = sides.Asker(setting)
    ask = partial(asker.ask, prefix, [question])
    best = setting.interleaved({"few": partial(ask, 8), "many": partial(ask, 72)})
    asker.close()
    report.row(
        f"token against a static cache and a compiled model, {length} tokens each",
        (best["many"] - best["few"]) / 64,
        took,
    )


def profile_build(setting: Setting, report: Report) -> str:
    """Where the time of a build goes: the kernels of its last chunks."""
    corpus = setting.corpus(32768 if setting.device.type == "cuda" else 256)
    tables = []
    for name in ALLOCATIONS:
        _built(setting, corpus, 8, name)
        began = setting.now()
        table, _ = _profiled(setting, partial(_built, setting, corpus, 8, name))
        report.fact(f"profiled build, {name}, s", setting.now() - began)
        report.fact(f"profile of a build, {name}", table)
        tables.append(f"{name}\n{table}")
    return "\n".join(tables)


def _profiled(setting: Setting, run: Callable[[], Any]) -> tuple[str, str]:
    """What a device and what a CPU spend on a computation, as tables."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    on_gpu = setting.device.type == "cuda"
    with profiled(activities=[ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])) as found:
        run()
        setting.now()
    sort = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    events = found.key_averages()
    return (
        events.table(sort_by=sort, row_limit=32, max_name_column_width=70),
        events.table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=60),
    )


def profile(setting: Setting, report: Report) -> str:
    """Where the time of one answer goes: kernels, and Python."""
    prefix, question = setting.prefix(2048, ragged=True), setting.ids(QUESTION)
    engine = Engine(setting.backbone)

    def answer() -> None:
        """All steps in this thread, which is the one that the profiler sees."""
        params = SamplingParams(max_tokens=16)
        engine._waiting.append(Request(prefix, question, params, lambda event: None, evidence=True))
        while engine.step():
            pass
        setting.now()

    for _ in range(3):
        answer()
    began = time.perf_counter()
    answer()
    report.fact("answer to be profiled, s", time.perf_counter() - began)
    table, cpu = _profiled(setting, answer)
    report.fact("profile", table)
    report.fact("profile, CPU side", cpu)
    return f"{table}\n{cpu}"
