"""A fresh process that loads a model and a sheet and is asked: each line that it prints is a row in JSON.

python -m cribsheet_bench.minute.fresh SHAPE DEVICE SHEET
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from cribsheet.engine.pool import LoadedModel
from cribsheet.llm import CompressedKnowledgeLLM
from cribsheet.model.passes import prepare
from cribsheet.retrieval.retriever import Passage
from cribsheet_bench.speed import sides
from cribsheet_bench.speed.parts import NEW
from cribsheet_bench.speed.setting import Setting, make_setting

_PASSAGE_TOKENS = 1000
_MANY = 32
_SECOND, _HYBRID, _TOGETHER = "second answer, other length", "hybrid with 1000 tokens", "32 at once"
_BOUNDS = {_SECOND: 1.0, _HYBRID: 1.0, _TOGETHER: 2.0}  # seconds that are promised of a first time


def tell(name: str, turn: str, ours: float, peer: float, target: float | None = None) -> None:
    """One row."""
    row = {"name": name, "turn": turn, "ours": ours, "peer": peer, "target": target}
    sys.stdout.write(f"{json.dumps(row)}\n")
    sys.stdout.flush()


class Minute:
    """A sheet on a model, and questions of different lengths about it."""

    def __init__(self, setting: Setting, kb: CompressedKnowledgeLLM) -> None:
        self.setting, self.kb = setting, kb
        self._asked = 0

    def question(self) -> str:
        """One that nobody asked yet, of another length than the one before."""
        self._asked += 1
        others = " and ".join(f"person {self._asked * 13 + n}" for n in range(1 + self._asked % 7))
        return f"Where do person {self._asked} and {others} live?"

    def passages(self, query: str) -> Sequence[Passage]:
        """Passages of more tokens than are told, others for each question."""
        first = self._asked * 41 % 200
        lines = [f"Person {n} lives in house {n * 7 % 31} and keeps {n % 9} goats." for n in range(first, first + 80)]
        return [Passage(" ".join(lines[n : n + 4])) for n in range(0, len(lines), 4)]

    def ask(self, **how: Any) -> Any:
        """One new question."""
        return self.kb.ask(self.question(), max_tokens=NEW, **how)

    def hybrid(self) -> Any:
        """One new question with passages."""
        return self.ask(mode="hybrid", retriever=self.passages, passage_tokens=_PASSAGE_TOKENS)

    def many(self) -> None:
        """Many new questions at once."""
        questions = [self.question() for _ in range(_MANY)]
        with ThreadPoolExecutor(_MANY) as threads:
            list(threads.map(lambda question: self.kb.ask(question, max_tokens=NEW), questions))


def main(shape: str, device: str, sheet: str) -> None:
    """Load, ask each kind of question twice, wait until kernels are ready, and ask again beside stock transformers."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    began = time.perf_counter()
    setting = make_setting(shape, device, dtype, 2)
    loaded = time.perf_counter() - began
    kb = CompressedKnowledgeLLM.load(sheet, model=LoadedModel.get(setting.backbone))
    minute = Minute(setting, kb)
    minute.ask()
    tell("load to first answer", "first, against loading the model", time.perf_counter() - began, loaded)
    kinds: dict[str, Callable[[], Any]] = {_SECOND: minute.ask, _HYBRID: minute.hybrid, _TOGETHER: minute.many}
    for name, run in kinds.items():
        tell(name, "first, against what is promised", setting.once(run), _BOUNDS[name], 1.0)
    preparation = prepare(setting.backbone)
    if preparation is not None:
        preparation.wait()
    for run in [*kinds.values()] * 2:  # whatever is captured is captured now
        run()
    prompt, short = setting.ids(_PASSAGE_TOKENS + 60), setting.ids(40)
    peers: dict[str, tuple[Callable[[], Any], float | None]] = {
        _SECOND: (lambda: sides.fresh(setting, short, NEW), None),
        _HYBRID: (lambda: sides.fresh(setting, prompt, NEW), 1 / 1.5),
        _TOGETHER: (lambda: sides.fresh(setting, short, NEW, _MANY), None),
    }
    for name, (peer, target) in peers.items():
        best = setting.interleaved({"ours": kinds[name], "peer": peer})
        tell(name, "warm, against stock with as many new tokens and no corpus", best["ours"], best["peer"], target)
    kb.close()


if __name__ == "__main__":
    main(*sys.argv[1:4])
