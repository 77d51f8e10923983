"""Parts of the speed bench: the first questions after loading, whole builds, and the paper's promise.

A row is a peer's seconds over ours, as in `speed/parts.py`; where there is a bound instead of a peer, it stands in its
place and the ratio is to be 1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cribsheet.corpus.documents import Document
from cribsheet.corpus.task import Task
from cribsheet.engine.pool import LoadedModel
from cribsheet.llm import CompressedKnowledgeLLM
from cribsheet_bench.speed import sides
from cribsheet_bench.speed.parts import NEW, QUESTION, Report
from cribsheet_bench.speed.setting import Setting

_TASK = Task("Answer questions about the people.", (("Who lives in house 3?", "Person 14"),))
_LONGEST_WAIT = 300.0  # seconds for a process of the first minute


def documents(setting: Setting, tokens: int) -> list[Document]:
    """Documents of about so many tokens in all."""
    tokenizer, made, held = setting.backbone.tokenizer, list[Document](), 0
    while held < tokens:
        people = range(20 * len(made), 20 * len(made) + 20)
        text = " ".join(f"Person {n} lives in house {n * 7 % 31} and keeps {n % 9} goats." for n in people)
        made.append(Document(text=text, id=f"street {len(made)}"))
        held += len(tokenizer(text).input_ids)
    return made


def builds(setting: Setting, report: Report, targets: dict[int, float]) -> None:
    """Whole builds, from documents to a sheet, against stock prefill of as many tokens, by length with its target.

    Documents are whole, so that a few hundred tokens more than the length are read, by both.
    """
    loaded = LoadedModel.get(setting.backbone)
    for length, target in targets.items():
        given = documents(setting, length)
        with CompressedKnowledgeLLM.build(given, _TASK, model=loaded, rate=8) as kb:
            tokens = kb.sheet.manifest.corpus_tokens
        ways: dict[str, dict[str, Any]] = {"default": {}, "adaptive": {"allocation": "adaptive"}}
        runs: dict[str, Callable[[], Any]] = {"plain": partial(sides.plain_prefill, setting, setting.corpus(tokens))}
        for name, options in ways.items():
            runs[name] = _builder(loaded, given, options)
        best = setting.interleaved(runs)
        for name in ways:
            label = f"whole build, {name}, {length} tokens, 8×, against plain prefill"
            report.row(label, best[name], best["plain"], target=1 / target)


def _builder(loaded: LoadedModel, given: Sequence[Document], options: dict[str, Any]) -> Callable[[], Any]:
    return lambda: CompressedKnowledgeLLM.build(given, _TASK, model=loaded, rate=8, **options).close()


def promise(setting: Setting, report: Report, length: int, rate: float = 30) -> None:
    """Question to answer over a long corpus: a sheet against full context, read with the question or held in a cache.

    The paper has 0.43 s of full context and 0.16 s at 30 times, a ratio of 2.7 (arXiv 2503.04973).
    """
    question = setting.ids(QUESTION)
    prefix, asker = setting.prefix(int(length / rate), ragged=True), sides.Asker(setting)
    ours = partial(asker.ask, prefix, [question], NEW)
    for _ in range(2):  # the second question of a length is captured
        ours()
    held = partial(sides.stock, setting, sides.copied(setting, setting.prefix(length)), [question], NEW)
    best = setting.interleaved({"ours": ours, "held": held})
    del held
    read = setting.once(lambda: sides.fresh(setting, setting.ids(length + QUESTION), NEW))
    asker.close()
    label = f"question to answer of {NEW} tokens, {length} tokens at {rate:g}×"
    report.row(f"{label}, against full context in a cache", best["ours"], best["held"], target=2.7)
    report.row(f"{label}, against full context that is read", best["ours"], read)


def first_minute(setting: Setting, report: Report, length: int) -> None:
    """The first questions of two processes: one that has to compile its kernels, and one that finds them on disk."""
    loaded = LoadedModel.get(setting.backbone)
    with tempfile.TemporaryDirectory() as folder:
        kb = CompressedKnowledgeLLM.build(documents(setting, length), _TASK, model=loaded, rate=8)
        sheet = kb.save(Path(folder) / "people.sheet")
        kb.close()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
        for kernels in ("cold", "on disk"):
            for row in _in_a_process(setting, sheet, Path(folder) / "kernels"):
                name = f"{row['name']}, {row['turn']}, kernels {kernels}, {length} tokens at 8×"
                report.row(name, row["ours"], row["peer"], target=row["target"])


def _in_a_process(setting: Setting, sheet: Path, kernels: Path) -> list[dict[str, Any]]:
    """What `minute/fresh.py` tells, in a process that has nothing but what Triton keeps in a folder."""
    command = [sys.executable, "-m", "cribsheet_bench.minute.fresh", setting.shape, setting.device.type, str(sheet)]
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(kernels), "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_LONGEST_WAIT)
    if done.returncode:
        raise RuntimeError(f"the process of the first minute failed:\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
