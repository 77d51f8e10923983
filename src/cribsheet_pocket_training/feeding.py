"""What a training run reads and when: stages, the processes that write text, and batches of their rows."""

from __future__ import annotations

import lzma
import multiprocessing as mp
import os
import queue
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from cribsheet_pocket_training.prompts import BRIDGE, Sampler
from cribsheet_pocket_training.tokenizer import FastEncoder

BLOCK = 20480  # tokens that a worker hands over at once; all row lengths divide it
# Length, ids (rows, length), weight classes (rows, length), and marks (M, 2 + BRIDGE): row, place, tokens of an entity.
Rows = tuple[int, NDArray[np.uint16], NDArray[np.uint8], NDArray[np.uint16]]


@dataclass(frozen=True, slots=True)
class Stage:
    """What is read from `start` (a fraction of the run) on: row lengths, one per worker in turn, and copying."""

    start: float
    lengths: tuple[int, ...]
    copying: float
    repetition: float


@dataclass(frozen=True, slots=True)
class Plan:
    """The course of a run: its stages, the peak rates, and the fraction of the run that they last."""

    stages: tuple[Stage, ...]
    muon_rate: float
    adam_rate: float
    plateau: float

    def at(self, fraction: float) -> int:
        """Index of the stage that a fraction of the run falls into."""
        return max(i for i, stage in enumerate(self.stages) if stage.start <= fraction)


PLANS = {
    # From random weights: copying first, then longer and longer rows.
    "fresh": Plan(
        (
            Stage(0.0, (256,), 0.75, 0.9),
            Stage(0.02, (256,), 0.4, 0.4),
            Stage(0.04, (256, 512), 0.15, 0.4),
            Stage(0.09, (512, 512, 1024), 0.05, 0.4),
            Stage(0.26, (512, 1024, 1024, 2048), 0.03, 0.4),
            Stage(0.48, (1024, 2048, 2048, 4096), 0.02, 0.4),
            Stage(0.72, (1024, 2048, 4096, 4096, 10240), 0.015, 0.4),
            Stage(0.88, (1024, 2048, 4096, 10240, 10240, 10240), 0.01, 0.4),
        ),
        0.02,
        0.003,
        0.4,
    ),
    # From trained weights: short rows while the rate is high, because they hold the most joins per second.
    "continued": Plan(
        (
            Stage(0.0, (512, 1024, 1024, 2048, 4096), 0.02, 0.4),
            Stage(0.3, (512, 1024, 2048, 4096, 4096), 0.015, 0.4),
            Stage(0.5, (1024, 2048, 4096, 4096, 10240), 0.01, 0.4),
            Stage(0.75, (1024, 2048, 4096, 10240, 10240), 0.01, 0.4),
        ),
        0.008,
        0.0012,
        0.2,
    ),
    # From trained weights that answer at 1,000 tokens and lose the thread at 8,000: long rows from the start.
    "lengthened": Plan(
        (
            Stage(0.0, (10240, 1024, 4096, 2048, 4096), 0.01, 0.4),
            Stage(0.4, (10240, 4096, 10240, 1024, 4096), 0.01, 0.4),
            Stage(0.75, (10240, 4096, 10240, 2048, 10240), 0.005, 0.4),
        ),
        0.008,
        0.0012,
        0.25,
    ),
    # After "continued": mostly long rows, at a rate that only falls.
    "settled": Plan(
        (Stage(0.0, (1024, 2048, 4096, 4096, 10240), 0.01, 0.4), Stage(0.5, (1024, 4096, 10240), 0.01, 0.4)),
        0.005,
        0.0008,
        0.0,
    ),
}


def read_wiki(path: Path) -> list[str]:
    """Articles (title on the first line) of an xz file in which NUL parts them."""
    return lzma.open(path, "rt", encoding="utf-8").read().split("\0")


def held_out_article(article: str) -> bool:
    """Whether an article belongs to the evaluation: one in forty, by the checksum of its title."""
    return zlib.crc32(article.split("\n", 1)[0].encode()) % 40 == 0


def rows(sampler: Sampler, length: int, count: int) -> Rows:
    """`count` rows of `length` tokens."""
    drawn = [sampler.row(length) for _ in range(count)]
    marks = [(row, at, *entity) for row, (_, _, found) in enumerate(drawn) for at, entity in found]
    return (
        length,
        np.array([ids for ids, _, _ in drawn], np.uint16),
        np.array([classes for _, classes, _ in drawn], np.uint8),
        np.array(marks, np.uint16).reshape(-1, 2 + BRIDGE),
    )


class Workers:
    """Processes that write blocks of rows forever, of the stage that `stage` names."""

    def __init__(self, count: int, plan: Plan, tokenizer: Path, articles: Sequence[str], seed: int) -> None:
        context = mp.get_context("fork")
        self.blocks: Any = context.Queue(64)
        self.stage: Any = context.Value("i", 0)
        self._running = [
            context.Process(
                target=_work, args=(i, self.blocks, self.stage, plan, tokenizer, articles, seed), daemon=True
            )
            for i in range(count)
        ]

    def start(self) -> None:
        """Fork them; to be called before the accelerator is first used."""
        for process in self._running:
            process.start()

    def stop(self) -> None:
        """End them."""
        for process in self._running:
            process.kill()
        for process in self._running:
            process.join()


def _work(index: int, out: Any, stage: Any, plan: Plan, tokenizer: Path, articles: Sequence[str], seed: int) -> None:
    """Write blocks of rows forever."""
    os.nice(10)  # the process that learns must never wait for a core
    os.environ["RAYON_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    loaded = Tokenizer.from_file(str(tokenizer))
    sampler = Sampler(FastEncoder(loaded), articles, seed * 1000 + index, loaded.get_vocab_size())
    while True:
        now = plan.stages[stage.value]
        length = now.lengths[index % len(now.lengths)]
        sampler.copying, sampler.repetition = now.copying, now.repetition
        try:
            block = rows(sampler, length, BLOCK // length)
        except Exception as problem:  # one world that cannot be written must not stop a run that took a machine
            sys.stderr.write(f"worker {index}: {problem!r}\n")
            continue
        out.put(block)


class Blocks:
    """Batches of equal row length, from the workers' queue; a block is read a second time, later, if they are slow."""

    def __init__(self, out: Any, batch_tokens: int) -> None:
        self.out = out
        self.need = batch_tokens // BLOCK
        self.fresh: dict[int, list[Rows]] = {}
        self.seen: dict[int, list[Rows]] = {}
        self.repeated = 0

    def next(self, lengths: tuple[int, ...]) -> Rows:
        """A batch; when anything must be read again, of one of the wanted lengths."""
        while True:
            for length, blocks in self.fresh.items():
                if len(blocks) >= self.need:
                    taken, self.fresh[length] = blocks[: self.need], blocks[self.need :]
                    self.seen.setdefault(length, []).extend(taken)
                    return self._joined(taken)
            length = max(lengths, key=lambda n: len(self.seen.get(n, ())))
            old = self.seen.get(length, [])
            try:
                block = self.out.get(timeout=0.05 if len(old) > 40 * self.need else None)
            except queue.Empty:
                taken, self.seen[length] = old[: self.need], old[self.need :]
                self.repeated += 1
                return self._joined(taken)
            self.fresh.setdefault(block[0], []).append(block)

    @staticmethod
    def _joined(taken: list[Rows]) -> Rows:
        marks = []
        for index, block in enumerate(taken):
            marks.append(block[3].copy())
            marks[-1][:, 0] += index * len(block[1])
        return (
            taken[0][0],
            np.concatenate([b[1] for b in taken]),
            np.concatenate([b[2] for b in taken]),
            np.concatenate(marks),
        )
