"""The parts of the speed bench: each measures one thing on a setting and reports rows and points of curves.

A ratio is the peer's figure over ours, so more is better; `limit` is what physics or arithmetic allow where we know it,
`target` what we want to reach.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cribsheet.attention.prefix import Prefix
from cribsheet.vocabulary import Allocation
from cribsheet_bench.speed import sides
from cribsheet_bench.speed.setting import Setting

QUESTION, NEW = 64, 32  # tokens of a question, and of an answer
ALLOCATIONS: dict[str, bool] = {"uniform": False, "adaptive": True}


@dataclass
class Report:
    """What was measured so far; `keep` is called after every row, so that being cut off loses nothing."""

    keep: Callable[[], None] = lambda: None
    rows: list[dict[str, Any]] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    model: str = ""  # what is being measured

    def row(
        self,
        name: str,
        ours: float,
        peer: float,
        *,
        unit: str = "s",
        limit: float | None = None,
        target: float | None = None,
    ) -> None:
        """A ratio."""
        self.rows.append(
            {
                "model": self.model,
                "name": name,
                "ours": ours,
                "peer": peer,
                "ratio": peer / max(ours, 1e-12),
                "limit": limit,
                "target": target,
                "unit": unit,
            }
        )
        self.keep()

    def point(self, curve: str, x: float, y: float, unit: str = "s") -> None:
        """A point of a curve."""
        self.curves.append({"model": self.model, "curve": curve, "x": x, "y": y, "unit": unit})
        self.keep()

    def fact(self, name: str, value: Any) -> None:
        """Anything else that a reader wants to know."""
        self.facts[name] = value
        self.keep()


def build(setting: Setting, report: Report, lengths: Sequence[int], rates: Sequence[float], target: float) -> None:
    """Building with the published score against stock prefill of the same tokens in one pass."""
    for length in lengths:
        corpus = setting.corpus(length)
        runs: dict[str, Callable[[], Any]] = {"plain": partial(sides.plain_prefill, setting, corpus)}
        for rate in rates:
            for name in ALLOCATIONS:
                runs[f"{name} {rate:g}"] = _builder(setting, corpus, rate, "task", name)
        best = setting.interleaved(runs)
        report.point("plain prefill", length, best["plain"])
        for rate in rates:
            for name in ALLOCATIONS:
                took = best[f"{name} {rate:g}"]
                report.point(f"build, task, {name}, {rate:g}×", length, took)
                if length == lengths[-1]:
                    report.row(
                        f"build against plain prefill, {length} tokens, {rate:g}×, {name}",
                        took,
                        best["plain"],
                        target=target,
                    )


def default_build(setting: Setting, report: Report, length: int, rate: float) -> None:
    """What the default (recall, which reads every chunk again) costs against the other scorers."""
    corpus = setting.corpus(length)
    named = {
        "recall, adaptive (default)": ("recall", "adaptive"),
        "recall, uniform": ("recall", "uniform"),
        "reconstruction, adaptive": ("reconstruction", "adaptive"),
        "task, uniform": ("task", "uniform"),
    }
    runs: dict[str, Callable[[], Any]] = {
        name: _builder(setting, corpus, rate, scorer, allocation) for name, (scorer, allocation) in named.items()
    }
    runs["plain prefill"] = lambda: sides.plain_prefill(setting, corpus)
    best = setting.interleaved(runs, 1)
    for name in named:
        report.row(
            f"build, {name}, {length} tokens, {rate:g}×, against plain prefill", best[name], best["plain prefill"]
        )


def _builder(setting: Setting, corpus: Any, rate: float, scorer: str, allocation: str) -> Callable[[], Any]:
    kind: Allocation = "adaptive" if allocation == "adaptive" else "uniform"
    return lambda: sides.build(setting, corpus, rate, scorer=scorer, allocation=kind)


def first_token(
    setting: Setting,
    report: Report,
    length: int,
    rates: Sequence[float],
    targets: tuple[float, float],
    full: float | None = None,
) -> None:
    """Time to the first token of an answer: against full prefill, and against a cache that holds everything (CAG).

    `full` are the seconds of a full prefill, if they were measured before.
    """
    question = setting.ids(QUESTION)
    whole = sides.copied(setting, setting.prefix(length))
    askers = {"": sides.Asker(setting), ", no sources": sides.Asker(setting, evidence=False)}
    prefixes = {
        f"{rate:g}×, {name}": setting.prefix(int(length / rate), ragged=ragged)
        for rate in rates
        for name, ragged in ALLOCATIONS.items()
    }
    runs: dict[str, Callable[[], Any]] = {"cag": lambda: sides.stock(setting, whole, [question], 1)}
    ours = {
        name + how: _asker(asker, prefix, [question], 1)
        for name, prefix in prefixes.items()
        for how, asker in askers.items()
    }
    for _ in range(2):  # the second question of a length is captured, where questions are
        for run in ours.values():
            run()
    best = setting.interleaved(runs | ours)
    for asker in askers.values():
        asker.close()
    full = full or setting.once(lambda: sides.plain_prefill(setting, setting.corpus(length)))
    for name in ours:
        report.row(f"first token against CAG, {length} tokens, {name}", best[name], best["cag"], target=targets[0])
        report.row(f"first token against full prefill, {length} tokens, {name}", best[name], full, target=targets[1])


def retrieval(setting: Setting, report: Report, lengths: Sequence[int], kept: int, target: float) -> None:
    """First token and whole answer against stock transformers that read so many retrieved tokens with each question.

    Our sheet holds `kept` tokens; finding the passages is not counted.
    """
    asker, question, prefix = sides.Asker(setting), setting.ids(QUESTION), setting.prefix(kept, ragged=True)
    for new, what in ((1, "first token"), (NEW, f"answer of {NEW} tokens")):
        runs: dict[str, Callable[[], Any]] = {"ours": _asker(asker, prefix, [question], new)}
        for length in lengths:
            runs[str(length)] = partial(sides.fresh, setting, setting.ids(length + QUESTION), new)
        runs["ours"]()
        best = setting.interleaved(runs)
        for length in lengths:
            report.row(
                f"{what} against {length} retrieved tokens, sheet of {kept}, adaptive",
                best["ours"],
                best[str(length)],
                target=target if new == 1 and length == lengths[-1] else None,
            )
    asker.close()


def _asker(asker: sides.Asker, prefix: Prefix, questions: Sequence[Any], new: int) -> Callable[[], Any]:
    return partial(asker.ask, prefix, questions, new)


def decode(setting: Setting, report: Report, lengths: Sequence[int], rate: float, target: float) -> None:
    """One token of one answer, against a cache that holds everything."""
    question = setting.ids(QUESTION)
    for length in lengths:
        whole = sides.copied(setting, setting.prefix(length))
        best = _per_token(setting, {"cag": partial(sides.stock, setting, whole, [question])})["cag"]
        del whole
        report.point("token, CAG", length, best)
        for name, ragged in ALLOCATIONS.items():
            prefix = setting.prefix(int(length / rate), ragged=ragged)
            found = {}
            for evidence in (True, False):
                asker = sides.Asker(setting, evidence=evidence)
                found[evidence] = _per_token(setting, {"ours": partial(asker.ask, prefix, [question])})["ours"]
                asker.close()
            report.point(f"token, {name}, {rate:g}×", length, found[True])
            report.point(f"token, {name}, {rate:g}×, no sources", length, found[False])
            if length == lengths[-1]:
                report.row(f"token against CAG, {length} tokens, {rate:g}×, {name}", found[True], best, target=target)


def _per_token(
    setting: Setting, asks: Mapping[str, Callable[[int], Any]], rounds: int | None = None
) -> dict[str, float]:
    """Seconds a token, from answers of two lengths; the shorter is long enough for whatever is made at first use."""
    few, many = 2, 2 + NEW
    runs: dict[str, Callable[[], Any]] = {}
    for name, ask in asks.items():
        runs[f"{name} few"] = partial(ask, few)
        runs[f"{name} many"] = partial(ask, many)
    best = setting.interleaved(runs, rounds)
    return {name: (best[f"{name} many"] - best[f"{name} few"]) / NEW for name in asks}


def batch(setting: Setting, report: Report, length: int, sizes: Sequence[int], target: float) -> None:
    """Many questions at once over one prefix against stock transformers, which copies it for each."""
    shared = {name: setting.prefix(length, ragged=ragged) for name, ragged in ALLOCATIONS.items()}
    for size in sizes:
        questions = [setting.ids(QUESTION) for _ in range(size)]
        asks: dict[str, Callable[[int], Any]] = {}
        asker = sides.Asker(setting)
        for name, prefix in shared.items():
            asks[name] = partial(asker.ask, prefix, questions)
        asks["no prefix"] = partial(asker.ask, setting.prefix(1), questions)
        best = _per_token(setting, asks)
        peer = _repeated(setting, shared["uniform"], questions)
        asker.close()
        report.point(f"token of a batch, repeated prefix of {length}", size, peer)
        for name in shared:
            report.point(f"token of a batch, shared prefix of {length}, {name}", size, best[name])
            if size == sizes[-1]:
                report.row(
                    f"token of {size} answers, shared prefix of {length} against repeated, {name}",
                    best[name],
                    peer,
                    limit=peer / best["no prefix"],
                    target=target,
                )


def _repeated(setting: Setting, prefix: Prefix, questions: Sequence[Tensor]) -> float:
    """Seconds a step of stock transformers with the prefix once for each question; NaN if that does not fit."""
    try:
        copies = sides.copied(setting, prefix, len(questions))
        return _per_token(setting, {"stock": partial(sides.stock, setting, copies, questions)})["stock"]
    except torch.OutOfMemoryError:
        return float("nan")


def equal_length(setting: Setting, report: Report, length: int) -> None:
    """Our attention against stock transformers where both hold equally many tokens."""
    question, prefix = setting.ids(QUESTION), setting.prefix(length)
    whole, asker = sides.copied(setting, prefix), sides.Asker(setting, evidence=False)
    asks: dict[str, Callable[[int], Any]] = {
        "stock": partial(sides.stock, setting, whole, [question]),
        "ours": partial(asker.ask, prefix, [question]),
    }
    best = _per_token(setting, asks, 12)  # a twentieth is to be seen, which three rounds hide in noise
    asker.close()
    report.row(
        f"token, ours against stock at equal length, {length} tokens", best["ours"], best["stock"], target=1 / 1.05
    )


def opening(setting: Setting, report: Report, mib: int = 512) -> None:
    """Opening a sheet of so many MiB, and having it on the device."""
    from cribsheet.sheet import file
    from cribsheet_bench.speed.sheets import sheet_of

    layers = setting.backbone.num_layers
    tokens = (mib << 20) // (layers * 2 * setting.backbone.kv_heads * setting.backbone.head_size * 2)
    sheet = sheet_of(setting, tokens)
    with tempfile.TemporaryDirectory() as folder:
        path = file.save(sheet, Path(folder) / "one.sheet")
        del sheet
        best = setting.interleaved({"open": lambda: file.load(path)})["open"]
        report.row(f"open a sheet of {mib} MiB", best, 0.005, target=1.0)
        opened = file.load(path)
        kind = torch.bfloat16

        def place() -> None:
            for layer in opened.layers:
                layer.restored(setting.device, kind)

        report.fact(f"{mib} MiB onto the device, s", setting.interleaved({"place": place})["place"])
