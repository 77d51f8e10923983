"""What a build costs against what survives it: scorers by processor time over a plain prefill, and by answers retained.

    python -m cribsheet_bench.quality.frontier --seed 0 1 2 --json frontier.json

Cases and questions are those of `cribsheet bench quality`; every case is also built once by each method at the first
rate, without what the methods share, and read once by a plain forward pass.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import DynamicCache

from cribsheet.build import build_sheet
from cribsheet.compare.journal import write_rows
from cribsheet.engine.pool import LoadedModel
from cribsheet.prompt.chunks import TokenizedCorpus
from cribsheet.prompt.template import ChatLayout
from cribsheet_bench.quality.case import Case, Row
from cribsheet_bench.quality.families import FAMILIES, Wanted, make_cases
from cribsheet_bench.quality.page import ALL, summary
from cribsheet_bench.quality.run import METHODS, Method, measure, setup

COMPARED = (
    "default", "reconstruction, adaptive", "few-shot",
)  # fmt: skip
USUAL = tuple(name for name in FAMILIES if not name.endswith("words"))


def main() -> None:
    """Measure, print a table, and write setup, lines and rows to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--family", nargs="+", default=list(USUAL))
    parser.add_argument("--method", nargs="+", default=list(COMPARED))
    parser.add_argument("--rate", nargs="+", type=float, default=[8.0, 16.0, 32.0])
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = LoadedModel.get(options.model)
    methods = [method for method in METHODS if method.name in options.method]
    cases = [
        case
        for seed in options.seed
        for case in make_cases(options.family, 1, Wanted(options.tokens, seed, None, options.questions))
    ]
    rows: list[Row] = []
    costs: dict[str, list[float]] = {method.name: [] for method in methods}
    for case in cases:
        rows += measure(model, [case], methods, options.rate)
        for name, cost in build_costs(model, case, methods, options.rate[0]).items():
            costs[name].append(cost)
        result = {"setup": setup(model, options), "costs": costs, "lines": summary(rows)}
        if options.json:
            write_rows(options.json, {**result, "rows": rows})
    sys.stdout.write(table(result, options.rate) + "\n")


def build_costs(model: LoadedModel, case: Case, methods: Sequence[Method], rate: float) -> dict[str, float]:
    """Processor time of one build by each method, over that of a plain forward pass over the corpus."""
    layout = ChatLayout(model.backbone.tokenizer)
    ids = TokenizedCorpus.build(case.documents, layout.preamble(case.task.instruction), layout.encoder).ids

    def plain() -> None:
        with torch.no_grad():
            model.backbone.model.base_model(
                input_ids=ids[None], **model.backbone.cached(DynamicCache()), use_cache=True
            )

    def built(method: Method) -> None:
        build_sheet(
            model.backbone,
            case.documents,
            method.task(case),
            rate=rate,
            scorer=method.scorer,
            guide=method.guide,
            allocation=method.allocation,
            correction=method.correction,
            dtype=method.dtype,
            chunk_tokens=method.chunk_tokens,
        )

    plain()
    once = _seconds(plain)
    return {method.name: _seconds(lambda method=method: built(method)) / once for method in methods}  # type: ignore[misc]


def _seconds(work: Callable[[], None]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def table(result: dict[str, Any], rates: Sequence[float]) -> str:
    """Methods down; cost, then the share retained at each rate with its interval, across."""
    lines = {(line["method"], line["rate"]): line for line in result["lines"] if line["family"] == ALL}
    shown = ["| method | build over plain prefill | " + " | ".join(f"{rate:g}×" for rate in rates) + " | questions |"]
    shown.append("|---|---|" + "---|" * (len(rates) + 1))
    for name, cost in result["costs"].items():
        cells = [lines[name, rate] for rate in rates]
        shares = [f"{cell['retained']:.2f} [{cell['ci_low']:.2f}, {cell['ci_high']:.2f}]" for cell in cells]
        shown.append(f"| {name} | {median(cost):.2f} | {' | '.join(shares)} | {cells[0]['retained_n']} |")
    return "\n".join(shown)


if __name__ == "__main__":
    main()
