"""Train the pocket model: `python -m cribsheet_pocket_training.train --wiki PATH --out DIR --seconds N`.

On several accelerators: `torchrun --nproc-per-node 2 -m cribsheet_pocket_training.train ...` (see `ranks`).

A run takes a wall-clock budget; learning rate and context length are functions of the fraction of it that has
passed (`feeding.PLANS`).  Worker processes generate text while the accelerator learns.  The run saves a checkpoint
every minute or so and `--resume` continues from it; `--init` begins with the weights of a model folder, which may have
fewer layers.  Weights are written as bf16 shards.  Worlds and articles of the evaluation are never drawn (see
`worlds.make_world` and `feeding.held_out_article`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from cribsheet_pocket import path
from cribsheet_pocket.quantize import load_folder
from cribsheet_pocket_training import attention
from cribsheet_pocket_training import model as models
from cribsheet_pocket_training import tokenizer as tokenizers_
from cribsheet_pocket_training.feeding import BLOCK, PLANS, Blocks, Rows, Workers, held_out_article, read_wiki, rows
from cribsheet_pocket_training.optimise import Optimiser, rate_at
from cribsheet_pocket_training.prompts import ANSWERED, ASKED, BRIDGE, COPIED, GENERATED, NONE, PLAIN, PROSE, Sampler
from cribsheet_pocket_training.ranks import Ranks
from cribsheet_pocket_training.worlds import make_world

_SHARES = {NONE: 0.0, GENERATED: 0.03, ASKED: 0.05, ANSWERED: 1.0, PROSE: 0.1, PLAIN: 0.4, COPIED: 0.6}
WEIGHTS = [_SHARES[i] for i in range(7)]
BRIDGES = 0.3  # what the first steps of joins weigh beside everything else
TOKENIZER = Path(__file__).parent / "data" / "tokenizer.json"


def tokenizer_texts(articles: list[str]) -> Iterator[str]:
    """What the vocabulary is learnt from: every tenth article, and worlds."""
    yield from tokenizers_.wiki_texts(articles[::10], 2500)
    for seed in range(400):
        world = make_world(f"tokenizer.{seed}", 1200, held_out=False)
        yield world.text
        for question in world.questions:
            yield f"{question.text} {question.answer}"
        for task in world.tasks:
            yield f"Task: {task.description}"


@torch.no_grad()
def exact_answers(
    reader: models.Reader, sets: list[Rows], dtype: torch.dtype, device: torch.device
) -> dict[int, float]:
    """Share of answers whose every token is the best guess, by row length (teacher-forced)."""
    found: dict[int, float] = {}
    for length, ids, classes, _ in sets:
        hits: list[bool] = []
        together = max(1, BLOCK // length)
        for start in range(0, len(ids), together):
            x = torch.from_numpy(ids[start : start + together].astype(np.int64)).to(device)
            _, right, _ = reader(x, torch.cat([x[:, 1:], x[:, :1]], 1), dtype)
            for ok, c in zip(right.view(x.shape).cpu().numpy(), classes[start : start + together], strict=False):
                answered = np.flatnonzero(c == ANSWERED)
                parts = np.split(answered, np.flatnonzero(np.diff(answered) > 1) + 1) if len(answered) else []
                hits += [bool(ok[part - 1].all()) for part in parts]
        found[length] = round(sum(hits) / max(len(hits), 1), 4)
    return found


class Log:
    """Lines of JSON in a file, and the same in words on standard output."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("a", encoding="utf-8")

    def __call__(self, **values: Any) -> None:
        """Write one line."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        sys.stdout.write(" ".join(f"{k}={v}" for k, v in values.items()) + "\n")
        sys.stdout.flush()


class Run:
    """One process's part of a training run."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a, self.plan, self.ranks = a, PLANS[a.plan], Ranks()
        a.out.mkdir(parents=True, exist_ok=True)
        articles = read_wiki(a.wiki)[: a.articles]
        held = [x for x in articles if held_out_article(x)]
        articles = [x for x in articles if not held_out_article(x)]
        if not TOKENIZER.exists():
            tokenizers_.save(tokenizers_.train(tokenizer_texts(articles)), TOKENIZER.parent)
        self.checkpoint = a.out / "checkpoint.pt"
        saved = self._saved()
        self.step, self.tokens, self.before = saved.get("step", 0), saved.get("tokens", 0), saved.get("seconds", 0.0)
        # A resumed run draws other text.
        seed = a.seed + self.step + 1_000_000 * self.ranks.index
        self.workers = Workers(a.workers, self.plan, TOKENIZER, articles, seed)
        self.workers.stage.value = self.plan.at(min(1.0, self.before / a.seconds))
        self.workers.start()

        self.device = self.ranks.device(a.device)
        self.ranks.join(self.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        torch.manual_seed(a.seed)
        torch.backends.cuda.matmul.allow_tf32 = True
        self.reader = models.Reader(models.SHAPES[a.shape], compiled=not a.no_compile)
        if a.init is not None:
            self.reader.grow_from(load_folder(path() if str(a.init) == "shipped" else a.init))
        self.reader.to(self.device)
        self.optimiser = Optimiser(self.reader, a.muon_rate or self.plan.muon_rate, a.adam_rate or self.plan.adam_rate)
        if saved:
            self.reader.load_state_dict(saved["model"])
            self.optimiser.restore(saved)
        self.weights = torch.tensor(WEIGHTS, device=self.device)
        self.blocks = Blocks(self.workers.blocks, a.batch_tokens)
        self.sets = self._probes(held)
        self.log = Log(a.out / ("log.jsonl" if self.ranks.index == 0 else f"log-{self.ranks.index}.jsonl"))
        self.log(event="start", parameters=sum(p.numel() for p in self.reader.parameters()), articles=len(articles),
                 held_out=len(held), arguments={k: str(v) for k, v in vars(a).items()})  # fmt: skip

    def _saved(self) -> dict[str, Any]:
        """The checkpoint that this run continues, or nothing."""
        if not (self.a.resume and self.checkpoint.exists()):
            return {}
        saved: dict[str, Any] = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        return saved

    def _probes(self, held: list[str]) -> list[Rows]:
        """Held-out rows that tell how the run goes."""
        loaded = Tokenizer.from_file(str(TOKENIZER))
        probe = Sampler(tokenizers_.FastEncoder(loaded), held, 7, loaded.get_vocab_size(), held_out=True)
        probe.copying = 0.0
        sizes = {512: 40, 2048: 20, 10240: 4} if self.device.type == "cuda" else {256: 16, 512: 8}
        return [rows(probe, length, count) for length, count in sizes.items()]

    def passed(self) -> float:
        """Seconds of the budget that are spent."""
        return float(self.before) + time.monotonic() - self.began

    def keep(self) -> None:
        """Save the checkpoint and the weights."""
        state = {"model": self.reader.state_dict(), **self.optimiser.state()}
        state |= {"step": self.step, "tokens": self.tokens, "seconds": self.passed()}
        torch.save(state, self.a.out / "checkpoint.part")
        os.replace(self.a.out / "checkpoint.part", self.checkpoint)
        models.save(self.reader, self.a.out / "weights")

    def test(self, event: str) -> None:
        """Log how many answers of the held-out rows are right."""
        exact = exact_answers(self.reader, self.sets, self.dtype, self.device)
        self.log(
            event=event,
            step=self.step,
            seconds=round(self.passed(), 1),
            tokens_m=round(self.tokens / 1e6, 1),
            exact=exact,
        )

    def _batch(self) -> tuple[int, Tensor, Tensor, Tensor]:
        """Row length, ids (rows, length), of what follows each the weight class (rows · length,), and marks."""
        length, ids, classes, marks = self.blocks.next(self.plan.stages[self.workers.stage.value].lengths)
        x, c, m = (torch.from_numpy(array.astype(np.int64)) for array in (ids, classes, marks))
        if self.device.type == "cuda":
            x, c, m = (t.pin_memory().to(self.device, non_blocking=True) for t in (x, c, m))
        return length, x, torch.cat([c[:, 1:], torch.zeros_like(c[:, :1])], 1).reshape(-1), m

    def _learn(self, x: Tensor, c: Tensor, marks: Tensor, fraction: float) -> Tensor:
        """One step; sums (answer loss, right, answers, prose loss, prose tokens, bridge loss, 1), on the device."""
        losses, right, bridged = self.reader(x, torch.cat([x[:, 1:], x[:, :1]], 1), self.dtype, marks)
        w = self.weights[c]
        ((losses * w).sum() / w.sum() + self.a.bridges * bridged).backward()
        self.ranks.average([p.grad for p in self.reader.parameters() if p.grad is not None])
        self.optimiser.step(rate_at(fraction, self.step, self.plan.plateau))
        self.reader.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += x.numel() * self.ranks.count
        with torch.no_grad():
            answered = (c == ANSWERED) | (c == COPIED)
            read = (c == PROSE) | (c == PLAIN)
            sums = [
                (losses * answered).sum(),
                (right & answered).sum(),
                answered.sum(),
                (losses * read).sum(),
                read.sum(),
                bridged,
                torch.ones_like(bridged),
            ]
            return torch.stack([value.float() for value in sums])

    def train(self) -> None:
        """Learn until the budget is spent."""
        attention.choose(self.device, self.reader.shape, self.dtype, self.log)
        trial = torch.zeros((self.a.batch_tokens // 256, 256), dtype=torch.long, device=self.device)
        self.reader(trial, trial, self.dtype, trial.new_ones(1, 2 + BRIDGE))[
            0
        ].mean().backward()  # compile before the clock starts
        self.ranks.agreed(0.0, self.device)
        self.reader.zero_grad(set_to_none=True)
        self.began = time.monotonic()
        spoken = kept = tested = self.passed()
        seen, waited = self.tokens, 0.0
        total = torch.zeros(7, device=self.device)
        fraction = self.before / self.a.seconds
        while True:
            if self.step % 10 == 0:  # all processes learn at one rate and end at one step
                stopped = self.a.stop_after and self.passed() - self.before > self.a.stop_after
                fraction = self.ranks.agreed(1.0 if stopped else self.passed() / self.a.seconds, self.device)
                if fraction >= 1:
                    break
            self.workers.stage.value = self.plan.at(fraction)
            start = time.monotonic()
            length, x, c, marks = self._batch()
            waited += time.monotonic() - start
            total += self._learn(x, c, marks, fraction)
            now = self.passed()
            if self.ranks.index:
                continue
            if now - spoken > 10 or self.step == 1:
                self._speak(total, length, (self.tokens - seen) / (now - spoken + 1e-9), waited)
                total.zero_()
                spoken, seen, waited = now, self.tokens, 0.0
            if now - tested > min(60.0, self.a.seconds / 8):
                self.test("test")
                tested = self.passed()
            if now - kept > min(90.0, self.a.seconds / 4):
                self.keep()
                kept = self.passed()
        if self.ranks.index == 0:
            self.keep()
            self.test("end")
        self.workers.stop()
        self.ranks.leave()

    def _speak(self, total: Tensor, length: int, speed: float, waited: float) -> None:
        """Log the means since the last line; a loss that is no number ends the run."""
        answer, hits, answers, prose, read, bridged, steps = total.tolist()
        self.log(step=self.step, seconds=round(self.passed(), 1), tokens_m=round(self.tokens / 1e6, 1), rate_k=round(speed / 1e3),  # noqa: E501
                 waited=round(waited, 1), length=length, answer=round(answer / max(answers, 1), 4), accuracy=round(hits / max(answers, 1), 4),  # noqa: E501
                 prose=round(prose / max(read, 1), 3), bridges=round(bridged / max(steps, 1), 3), queued=self.workers.blocks.qsize(), repeated=self.blocks.repeated)  # fmt: skip  # noqa: E501
        if not math.isfinite(answer):
            raise SystemExit("The loss is not finite; resume from the checkpoint with a lower --muon-rate.")


def main() -> None:
    """Run the training that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m cribsheet_pocket_training.train", description=__doc__)
    parser.add_argument("--wiki", type=Path, required=True, help="wiki.txt.xz: articles parted by NUL")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, checkpoint and log")
    parser.add_argument("--seconds", type=float, default=1300, help="wall-clock budget of all runs together")
    parser.add_argument("--stop-after", type=float, help="leave this run after so many seconds, to be resumed")
    parser.add_argument("--plan", choices=PLANS, default="fresh")
    parser.add_argument("--init", type=Path, help="a model folder to begin with, or 'shipped' for the package's own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=models.SHAPES, default="pocket")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--batch-tokens", type=int, default=5 * BLOCK)
    parser.add_argument("--muon-rate", type=float, help="peak, instead of the plan's")
    parser.add_argument("--adam-rate", type=float, help="peak, instead of the plan's")
    parser.add_argument("--bridges", type=float, default=BRIDGES, help="weight of the first steps of joins")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--articles", type=int, help="use only the first so many articles (for trials)")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    Run(parser.parse_args()).train()


if __name__ == "__main__":
    main()
