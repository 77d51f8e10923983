"""How close building and answering come to the limit, and how far they leave their peers behind.

    python -m cribsheet_bench.speed.run --quick
    python -m cribsheet_bench.speed.run --device cuda --shape 8b --json speed.json

Ours and its peers take turns in one process, and the best of several rounds counts; what is timed is checked against
the plain float32 path first. Each part runs on its own: one that fails is reported with its traceback, the next goes
on, and the JSON file is written after every row.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cribsheet.compare.journal import write_rows
from cribsheet_bench.minute import parts as minute
from cribsheet_bench.speed import checks, cuda, parts
from cribsheet_bench.speed.page import page as markdown
from cribsheet_bench.speed.parts import Report
from cribsheet_bench.speed.setting import SHAPES, Setting, make_setting

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Part = tuple[str, Callable[[], Any]]


class Run:
    """One run of the bench: its parts, what they found, and the file that is kept up to date."""

    def __init__(self, path: Path | None, seconds: float, console: Console, only: Sequence[str] = ()) -> None:
        self.path, self.seconds, self.console, self.only = path, seconds, console, only
        self.began = time.perf_counter()
        self.setup: dict[str, Any] = {}
        self.errors: dict[str, str] = {}
        self.took: dict[str, float] = {}
        self.report = Report(self.keep)

    def keep(self) -> None:
        """Write the file."""
        if self.path is not None:
            write_rows(self.path, self.result())

    def on(self, setting: Setting) -> None:
        """What follows is about this model."""
        facts = setting.facts()
        for name in ("model", "layers", "parameters"):
            facts[name] = [*self.setup.get(name, []), facts[name]]
        self.setup.update(facts)
        self.report.model = setting.backbone.name

    def result(self) -> dict[str, Any]:
        """Everything so far."""
        found = self.report
        return {
            "setup": self.setup,
            "rows": found.rows,
            "curves": found.curves,
            "facts": found.facts,
            "errors": self.errors,
            "seconds": self.took,
        }

    def part(self, name: str, run: Callable[[], Any], *, always: bool = False) -> Any:
        """One part, guarded; nothing if it failed, if time is up, or if only others are wanted, unless `always`."""
        if self.only and not always and name.split(": ")[-1] not in self.only:
            return None
        if time.perf_counter() - self.began > self.seconds:
            self.errors[name] = "left out: time was up"
            return None
        began = time.perf_counter()
        self.console.print(f"[dim]{began - self.began:6.1f} s  {name}[/]", highlight=False)
        try:
            return run()
        except Exception:
            self.errors[name] = traceback.format_exc()
            self.console.print(self.errors[name][-1500:], markup=False, highlight=False)
        finally:
            self.took[name] = round(time.perf_counter() - began, 2)
            self.keep()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def correctness(run: Run, device: str, dtypes: Sequence[torch.dtype], *, answers: bool, quick: bool = False) -> None:
    """What is timed must be right: errors go to the facts, and those above their bound to the errors."""
    for dtype in dtypes:
        kind = str(dtype).removeprefix("torch.")
        tests: list[Part] = [(f"attention, {kind}", partial(checks.attention_errors, device, dtype))]
        if dtype != torch.float16 and not quick:
            tests.append((f"models, {kind}", partial(checks.model_errors, device, dtype)))
        for name, test in tests:
            found = run.part(name, test, always=True)
            if found is None:
                continue
            bound = checks.BOUND[dtype] * (1 if name.startswith("attention") else 4)
            wrong = {case: error for case, error in found.items() if not error <= bound}
            run.report.fact(f"errors: {name}", {"bound": bound, "largest": max(found.values()), "above": wrong})
            if wrong:
                run.errors[f"wrong: {name}"] = str(wrong)
    if answers:
        run.report.fact("pocket answers", run.part("whole answers", lambda: checks.whole_answers(device, dtypes[-1])))


def on_cpu(run: Run, shape: str, dtype: torch.dtype | None, *, quick: bool) -> None:
    """The ratios that mean something on a CPU."""
    setting = make_setting(shape, "cpu", dtype, 1)
    run.on(setting)
    report, small = run.report, quick or shape == "tiny"
    length = 1536 if small else 8192
    lengths = [length] if quick else [length // 4, length]
    prefix, many = (512, 8) if small else (1024, 16)
    todo: list[Part] = [
        ("build", lambda: parts.build(setting, report, lengths, [8], 1.4)),
        ("first token", lambda: parts.first_token(setting, report, length, [8], (5, 50))),
        ("decode", lambda: parts.decode(setting, report, lengths, 8, 1.7)),
        ("batch", lambda: parts.batch(setting, report, prefix, [many] if quick else [4, many], 2.5)),
        ("equal length", lambda: parts.equal_length(setting, report, prefix)),
        ("opening", lambda: parts.opening(setting, report, 64 if small else 512)),
    ]
    if not quick:
        todo.append(("retrieval", lambda: parts.retrieval(setting, report, [length // 4, length // 2], length // 8, 3)))
        todo.append(("default build", lambda: parts.default_build(setting, report, length // 2, 8)))
        todo.append(("promise", lambda: minute.promise(setting, report, length)))
    for name, part in todo:
        run.part(f"{shape}: {name}", part)


def on_cuda(run: Run, shape: str, *, device: str) -> None:
    """Ceilings, floors, ratios and growth on a GPU; on a CPU with a tiny shape, a rehearsal of the same.

    What matters most comes first, because such machines are lent for minutes.
    """
    real = device == "cuda"
    setting = make_setting(shape, device, torch.bfloat16, 2)
    run.on(setting)
    report, k = run.report, 1024 if real else 16
    full = partial(report.facts.get, f"full prefill of {128 * k}, s")

    def floor() -> None:
        cuda.floor(setting, report, 16 * k, report.facts.get("copy, TB/s (read and written)", 3.0))

    def shown(profile: Callable[[Setting, Report], str]) -> None:
        run.console.print(profile(setting, report), markup=False, highlight=False)

    first: list[Part] = [
        ("kernels agree", lambda: report.fact("errors: our kernels", checks.kernel_errors(device))),
        ("ceilings", lambda: cuda.ceilings(setting, report)),
    ]
    todo: list[Part] = [
        ("graphs agree", lambda: checks.steps_agree(setting, report)),
        ("build at length", lambda: cuda.build_long(setting, report, 128 * k)),
        ("first token", lambda: parts.first_token(setting, report, 128 * k, [8, 64], (2, 300), full())),
        ("floor", floor),
        ("correctness", lambda: correctness(run, device, [torch.bfloat16], answers=False)),
        ("profile of a build", lambda: shown(cuda.profile_build)),
        ("profile", lambda: shown(cuda.profile)),
        ("batch", lambda: parts.batch(setting, report, 16 * k, [16], 3.5)),
        ("decode", lambda: parts.decode(setting, report, [128 * k], 8, 3)),
        ("retrieval", lambda: parts.retrieval(setting, report, [2 * k, 4 * k, 8 * k], 16 * k, 4)),
        ("growth", lambda: parts.decode(setting, report, [16 * k, 64 * k], 8, 3)),
        ("batches", lambda: parts.batch(setting, report, 16 * k, [1, 8], 3.5)),
        ("opening", lambda: parts.opening(setting, report, 512 if real else 4)),
        ("answers", lambda: correctness(run, device, [torch.float16, torch.bfloat16], answers=True)),
        ("default build", lambda: parts.default_build(setting, report, 2 * k, 8)),
    ]
    of_a_card: list[Part] = [
        ("compiled", lambda: cuda.compiled(setting, report, 16 * k)),
        ("kernels", lambda: cuda.kernels(setting, report)),
    ]
    by_name: list[Part] = [  # a page of their own
        ("first minute", lambda: minute.first_minute(setting, report, 16 * k)),
        ("whole builds", lambda: minute.builds(setting, report, {4 * k: 3.0, 16 * k: 3.0, 64 * k: 2.5})),
        ("promise", lambda: minute.promise(setting, report, min(128 * k, setting.backbone.window))),
    ]
    wanted = [*first, *todo, *of_a_card] if real else todo
    for name, part in [*wanted, *by_name] if run.only else wanted:
        run.part(name, part)


def print_table(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """The rows, for people."""
    table = Table("what", "ours", "peer", "ratio", "target")
    for row in rows:
        cells = [f"{row[side] * 1e3:,.2f} ms" for side in ("ours", "peer")]
        target = f"{row['target']:.2f}" if row["target"] else ""
        table.add_row(row["name"], *cells, f"{row['ratio']:.2f}", target)
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--shape", nargs="+", metavar="NAME", help=f"{', '.join(SHAPES)}, or a model  [default: pocket and 50m, or 8b]"
    )
    parser.add_argument("--gpu-parts", action="store_true", help="on a CPU too: a rehearsal, with a tiny shape")
    parser.add_argument("--dtype", choices=list(_DTYPES), help="on a CPU  [default: what a user gets]")
    parser.add_argument("--quick", action="store_true", help="end within a minute on a CPU")
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="PART", help='parts by name: build, "first token", ...'
    )
    parser.add_argument("--seconds", type=float, default=3600, help="start no part after so long")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--title", default="Speed", help="of the page  [default: %(default)s]")
    arguments = parser.parse_args(argv)
    return run(**vars(arguments))


def run(
    *,
    device: str = "cpu",
    shape: Sequence[str] | None = None,
    gpu_parts: bool = False,
    dtype: str | None = None,
    quick: bool = False,
    only: Sequence[str] = (),
    seconds: float = 3600,
    json: Path | None = None,
    page: Path | None = None,
    title: str = "Speed",
) -> int:
    """The bench; the exit code is 1 if a part failed or something is wrong."""
    torch.set_num_threads(1)
    console = Console(width=150)
    made = Run(json, seconds, console, only)
    if device == "cuda" or gpu_parts:
        for each in shape or ["8b" if device == "cuda" else "tiny"]:
            on_cuda(made, each, device=device)
    else:
        kind = _DTYPES[dtype] if dtype else None
        correctness(made, device, [kind or torch.float32], answers=False, quick=quick)
        for each in shape or (["pocket"] if quick else ["pocket", "50m"]):
            on_cpu(made, each, kind, quick=quick)
    print_table(console, made.report.rows)
    for name, error in made.errors.items():
        console.print(f"{name}: {error[-600:]}", markup=False, highlight=False)
    made.keep()
    if page is not None:
        flags = [f"--device {device}", *(f"--shape {name}" for name in shape or ()), *["--quick"] * quick]
        command = " ".join(["cribsheet bench speed", *flags, *(f'--only "{part}"' for part in only)])
        page.write_text(markdown(made.result(), command=command, title=title), encoding="utf-8")
    return 1 if made.errors else 0


if __name__ == "__main__":
    sys.exit(main())
