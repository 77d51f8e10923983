"""The presses of kvpress on the same weights, prompts and questions, in an environment of their own.

kvpress reads arguments that current transformers no longer passes, so it cannot run in our process (decision 7). A job
is written as JSON, `peers_runner.py` does it with the other interpreter, and its answers are judged here like ours.

Prompts are token ids, made by our template: where a press needs a window of queries, it is the guide that our scorers
read (task and examples). A press that keeps its window ("FinchPress", "SnapKV") is asked as after a resident guide,
whose tokens count in its budget; "guide dropped" gives the window the worst score instead of the best.
"""

from __future__ import annotations

import json
import logging
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from cribsheet.build import build_sheet
from cribsheet.corpus.documents import Document
from cribsheet.engine.pool import LoadedModel
from cribsheet.errors import BudgetError, CribsheetError
from cribsheet.model.backbone import Backbone
from cribsheet.prompt.chunks import TokenizedCorpus
from cribsheet.prompt.template import ChatLayout
from cribsheet.sheet.sheet import Sheet
from cribsheet_bench.quality.case import Case, Row, judged
from cribsheet_bench.quality.peers_runner import FULL, WAYS

logger = logging.getLogger(__name__)

RUNNER = Path(__file__).with_name("peers_runner.py")
_TIMED_TOKENS, _TIMED_RATE, _ROUNDS = 1024, 8.0, 3
_COMPARED = 3  # families of which a case's kept tokens are compared with FinchPress


@dataclass(frozen=True, slots=True)
class Found:
    """Rows like those of our methods, what failed, and whether a full cache answered there as it did here."""

    rows: list[Row]
    failed: list[dict[str, Any]]
    same: list[bool]


def ask(
    python: Path,
    model: LoadedModel,
    case: Case,
    rates: Sequence[float],
    full: Sequence[Row],
    presses: Sequence[str] = tuple(WAYS),
) -> Found:
    """Answer the questions of a case by every press at every rate, with the interpreter `python`.

    `full` are our rows from full context, which say which questions count. Raises `CribsheetError` if the other
    interpreter ends badly.
    """
    right = [row.retained for row in full]
    found = Found([], [], [])
    for line in run(python, {**job_of(model), "presses": list(presses), "cases": [prompts(model, case, rates)]}):
        if "error" in line:
            found.failed.append({key: line[key] for key in ("press", "rate", "case", "error")})
        elif "press" in line:
            texts = [model.backbone.tokenizer.decode(ids, skip_special_tokens=True) for ids in line["answers"]]
            size = (line["tokens"], line["bytes"], line["held"])
            made = judged(case, f"kvpress {line['press']}", line["rate"], texts, size, right)
            if line["press"] == FULL:
                found.same.extend(a.exact == b.exact for a, b in zip(made, full, strict=True))
            else:
                found.rows.extend(made)
    return found


def report(python: Path, model: LoadedModel, cases: Sequence[Case], rates: Sequence[float]) -> dict[str, Any]:
    """Versions there, our `finch` against FinchPress on the first cases of different families, and build times."""
    first = list({case.family: case for case in reversed(cases)}.values())[-_COMPARED:]
    documents = timed_documents(model, cases)
    layout = ChatLayout(model.backbone.tokenizer)
    long = TokenizedCorpus.build(documents, layout.preamble(cases[0].task.instruction), layout.encoder)
    told = [prompts(model, case, rates) for case in first]
    timing = {
        "context": long.ids.tolist(),
        "guide": prompts(model, cases[0], rates)["guide"],
        "budget": int(len(long) / _TIMED_RATE),
        "rounds": _ROUNDS,
    }
    results = run(python, {**job_of(model), "finch": told, "timing": timing})
    build = next(line for line in results if "build" in line)
    return {
        "versions": next(line["versions"] for line in results if "versions" in line),
        "finch": finch_against(model, first, [line for line in results if "finch" in line]),
        "build": build_against(model, documents, cases[0], timing, build),
    }


def job_of(model: LoadedModel) -> dict[str, Any]:
    """What every job says; budgets are those of our sheets at the same rates."""
    backbone = model.backbone
    return {
        "model": str(backbone.model.config._name_or_path),
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "device": str(backbone.device),
        "full": True,
        "threads": torch.get_num_threads(),
        "stop": sorted(backbone.eos_ids),
        "presses": [],
        "cases": [],
        "finch": [],
        "timing": None,
    }


def prompts(model: LoadedModel, case: Case, rates: Sequence[float]) -> dict[str, Any]:
    """Token ids of a case exactly as we read them: context, guide, and questions after either."""
    layout = ChatLayout(model.backbone.tokenizer)
    corpus = TokenizedCorpus.build(case.documents, layout.preamble(case.task.instruction), layout.encoder)

    def asked(question: str, resident: bool) -> list[int]:
        text = layout.question([{"role": "user", "content": question}], case.task, resident)
        ids: list[int] = layout.encoder.after(text).tolist()
        return ids

    return {
        "name": case.name,
        "context": corpus.ids.tolist(),
        "guide": layout.encoder.after(layout.guide(case.task).scored).tolist(),
        "questions": [asked(question, False) for question in case.questions],
        "after_guide": [asked(question, True) for question in case.questions],
        "most": case.most_tokens(model.backbone.tokenizer),
        "budgets": [[rate, int(len(corpus) / rate)] for rate in rates],
    }


def run(python: Path, job: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines that the runner wrote. Raises `CribsheetError` with the end of what it said if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        given, told = Path(folder, "job.json"), Path(folder, "results.jsonl")
        given.write_text(json.dumps(job), encoding="utf-8")
        try:
            done = subprocess.run([python, RUNNER, given, told], capture_output=True, text=True, check=False)
        except OSError as error:
            raise CribsheetError(f"There is no python at {python}: {error}; `make peers` makes one.") from error
        if done.returncode:
            raise CribsheetError(f"{python} ended with {done.returncode}: {done.stderr[-800:]}")
        return [json.loads(line) for line in told.read_text(encoding="utf-8").splitlines()]


def finch_against(
    model: LoadedModel, cases: Sequence[Case], results: Iterable[dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """How many heads keep the very tokens that our `finch` keeps, and the share of tokens that both keep."""
    by_name = {case.name: case for case in cases}
    same: dict[str, list[bool]] = {}
    shared: dict[str, list[float]] = {}
    for line in results:
        if "error" in line:
            logger.warning("FinchPress failed at %gx: %s", line["rate"], line["error"])
            continue
        case = by_name[line["finch"]]
        try:
            sheet = build_sheet(
                model.backbone,
                case.documents,
                case.task,
                rate=line["rate"],
                scorer="finch",
                guide="dropped",
                chunk_tokens=0,
            )
        except BudgetError as error:  # a preamble that is pinned may be all of a small budget
            logger.warning("finch is not compared at %gx: %s", line["rate"], error)
            continue
        for form, layers in line["kept"].items():
            for mine, theirs in zip(sheet.indices, layers, strict=True):
                for head, other in zip(mine.tolist(), theirs, strict=True):
                    same.setdefault(form, []).append(sorted(head) == sorted(other))
                    shared.setdefault(form, []).append(len(set(head) & set(other)) / len(head))
    return {
        form: {"same": sum(same[form]) / len(same[form]), "shared": sum(shared[form]) / len(shared[form])}
        for form in same
    }


def timed_documents(model: LoadedModel, cases: Sequence[Case]) -> list[Document]:
    """Documents of the cases, up to a length at which a build can be timed."""
    count, taken = ChatLayout(model.backbone.tokenizer).encoder.count, []
    room = _TIMED_TOKENS
    for case in cases:
        for document in case.documents:
            taken.append(replace(document, id=f"{case.name}/{document.id}"))
            room -= count([document.text])
            if room <= 0:
                return taken
    return taken


def build_against(
    model: LoadedModel, documents: Sequence[Document], case: Case, job: dict[str, Any], theirs: dict[str, Any]
) -> dict[str, Any]:
    """Seconds of plain prefill and of builds, there and here, each with its ratio to the plain prefill beside it."""
    ids, backbone = torch.tensor(job["context"]), model.backbone

    def built(scorer: str | None) -> Sheet:
        return build_sheet(backbone, documents, case.task, rate=_TIMED_RATE, scorer=scorer, guide="dropped")

    here = _medians(
        {
            "plain prefill": lambda: _plain(backbone, ids),
            "finch": lambda: built("finch"),
            "default": lambda: built(None),
        }
    )
    there = theirs.get("seconds")
    sides = {f"{name}, here": (took, here["plain prefill"]) for name, took in here.items()}
    if there:
        sides |= {f"{name}, kvpress": (took, there["plain prefill"]) for name, took in there.items()}
    told = {name: {"seconds": took, "ratio": took / plain} for name, (took, plain) in sides.items()}
    return {"tokens": len(ids), "rate": _TIMED_RATE, "rounds": _ROUNDS, "sides": told, "error": theirs.get("error")}


def _medians(runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median processor seconds of each, in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_ROUNDS):
        for name, run_once in runs.items():
            began = time.process_time()
            run_once()
            times[name].append(time.process_time() - began)
    return {name: median(each) for name, each in times.items()}


@torch.no_grad()
def _plain(backbone: Backbone, ids: Tensor) -> None:
    backbone.model.model(input_ids=ids[None], **backbone.cached(DynamicCache()), use_cache=True)
