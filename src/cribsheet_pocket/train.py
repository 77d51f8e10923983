"""Train the pocket model: `python -m cribsheet_pocket.train --wiki PATH --out DIR --seconds N`.

A run takes a wall-clock budget; learning rate and context length are functions of the fraction of it that has
passed.  Worker processes generate text while the accelerator learns.  The run saves a checkpoint every minute or so
and `--resume` continues from it; weights are written as bf16 shards.  Worlds and articles of the evaluation are never
drawn (see `worlds.make_world` and `held_out_article`).
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import multiprocessing as mp
import os
import queue
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from . import model as models
from . import tokenizer as tokenizers_
from .prompts import ANSWERED, ASKED, COPIED, GENERATED, NONE, PLAIN, PROSE, Sampler
from .worlds import make_world

BLOCK = 16384  # tokens that a worker hands over at once
_SHARES = {NONE: 0.0, GENERATED: 0.05, ASKED: 0.08, ANSWERED: 1.0, PROSE: 0.12, PLAIN: 0.4, COPIED: 0.6}
WEIGHTS = [_SHARES[i] for i in range(7)]


@dataclass(frozen=True, slots=True)
class Stage:
    """What is read from `start` (a fraction of the run) on: row lengths, one per worker in turn, and copying."""

    start: float
    lengths: tuple[int, ...]
    copying: float
    repetition: float


STAGES = (
    Stage(0.0, (256,), 0.75, 0.9),
    Stage(0.02, (256,), 0.4, 0.4),
    Stage(0.04, (256, 512), 0.15, 0.4),
    Stage(0.09, (512, 512, 1024), 0.05, 0.4),
    Stage(0.26, (512, 1024, 1024, 2048), 0.03, 0.4),
    Stage(0.48, (1024, 2048, 2048, 4096), 0.02, 0.4),
    Stage(0.72, (1024, 2048, 4096, 4096, 8192), 0.015, 0.4),
    Stage(0.88, (1024, 2048, 4096, 8192, 8192, 8192), 0.01, 0.4),
)


def read_wiki(path: Path) -> list[str]:
    """Articles (title on the first line) of an xz file in which NUL parts them."""
    return lzma.open(path, "rt", encoding="utf-8").read().split("\0")


def held_out_article(article: str) -> bool:
    """Whether an article belongs to the evaluation: one in forty, by the checksum of its title."""
    return zlib.crc32(article.split("\n", 1)[0].encode()) % 40 == 0


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


def _work(index: int, out: Any, stage: Any, tokenizer: Path, articles: list[str], seed: int) -> None:
    """Generate blocks of rows forever: (length, ids, weight classes)."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    loaded = Tokenizer.from_file(str(tokenizer))
    encode = tokenizers_.FastEncoder(loaded)
    sampler = Sampler(encode, articles, seed * 1000 + index, loaded.get_vocab_size())
    while True:
        now = STAGES[stage.value]
        length = now.lengths[index % len(now.lengths)]
        sampler.copying, sampler.repetition = now.copying, now.repetition
        try:
            rows = [sampler.row(length) for _ in range(BLOCK // length)]
        except Exception as problem:  # one world that cannot be written must not stop a run that took a machine
            sys.stderr.write(f"worker {index}: {problem!r}\n")
            continue
        ids = np.array([row[0] for row in rows], np.uint16)
        classes = np.array([row[1] for row in rows], np.uint8)
        out.put((length, ids, classes))


class Blocks:
    """Batches of equal row length, from the workers' queue; a block is read a second time, later, if they are slow."""

    def __init__(self, out: Any, batch_tokens: int) -> None:
        self.out = out
        self.need = batch_tokens // BLOCK
        self.fresh: dict[int, list[tuple[Any, Any]]] = {}
        self.seen: dict[int, list[tuple[Any, Any]]] = {}
        self.repeated = 0

    def next(self, lengths: tuple[int, ...]) -> tuple[int, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Row length (of those wanted, when anything must be read again), ids (rows, length) and weight classes."""
        while True:
            for length, blocks in self.fresh.items():
                if len(blocks) >= self.need:
                    taken, self.fresh[length] = blocks[: self.need], blocks[self.need :]
                    self.seen.setdefault(length, []).extend(taken)
                    return self._joined(length, taken)
            length = max(lengths, key=lambda n: len(self.seen.get(n, ())))
            old = self.seen.get(length, [])
            try:
                length, ids, classes = self.out.get(timeout=0.05 if len(old) > 40 * self.need else None)
            except queue.Empty:
                taken, self.seen[length] = old[: self.need], old[self.need :]
                self.repeated += 1
                return self._joined(length, taken)
            self.fresh.setdefault(length, []).append((ids, classes))

    @staticmethod
    def _joined(length: int, taken: list[tuple[Any, Any]]) -> tuple[int, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        return length, np.concatenate([b[0] for b in taken]), np.concatenate([b[1] for b in taken])


class Muon:
    """Momentum whose update is made orthogonal, for matrices (Jordan et al. 2024), with decoupled weight decay."""

    def __init__(self, parameters: list[torch.nn.Parameter], momentum: float = 0.95, decay: float = 0.02) -> None:
        self.momentum, self.decay = momentum, decay
        self.groups: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for p in parameters:
            self.groups.setdefault(p.shape, []).append(p)
        self.state = {shape: torch.zeros((len(ps), *shape), device=ps[0].device) for shape, ps in self.groups.items()}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move every matrix against its gradient."""
        for shape, group in self.groups.items():
            parameters: list[Tensor] = list(group)
            gradient = torch.stack([p.grad for p in group if p.grad is not None]).float()
            state = self.state[shape]
            state.lerp_(gradient, 1 - self.momentum)
            update = _orthogonal(gradient.lerp(state, self.momentum))
            update *= -rate * max(1.0, shape[0] / shape[1]) ** 0.5
            torch._foreach_mul_(parameters, 1 - rate * self.decay)
            torch._foreach_add_(parameters, list(update.to(parameters[0].dtype).unbind(0)))


def _orthogonal(g: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices of a stack (N, rows, columns), by Newton-Schulz in bf16."""
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    result: Tensor = x.mT if tall else x
    return result


def rate_at(fraction: float, step: int) -> float:
    """Learning rate as a share of its peak: a short warm-up, a plateau, and a line down to nothing."""
    return min(1.0, (step + 1) / 100) * (1.0 if fraction < 0.4 else max(0.0, 1.0 - (fraction - 0.4) / 0.6))


def stage_at(fraction: float) -> int:
    """Index of the stage that a fraction of the run falls into."""
    return max(i for i, stage in enumerate(STAGES) if stage.start <= fraction)


@torch.no_grad()
def exact_answers(
    reader: models.Reader, sets: dict[int, Any], dtype: torch.dtype, device: torch.device
) -> dict[int, float]:
    """Share of answers whose every token is the best guess, by row length (teacher-forced)."""
    found: dict[int, float] = {}
    for length, (ids, classes) in sets.items():
        hits = total = 0
        for start in range(0, len(ids), max(1, BLOCK // length)):
            x = torch.from_numpy(ids[start : start + max(1, BLOCK // length)].astype(np.int64)).to(device)
            targets = torch.cat([x[:, 1:], x[:, :1]], 1)
            _, right = reader(x, targets, dtype)
            ok = right.view(x.shape).cpu().numpy()
            c = classes[start : start + len(x)]
            for row in range(len(x)):
                answered = np.flatnonzero(c[row] == ANSWERED)
                if len(answered) == 0:
                    continue
                for part in np.split(answered, np.flatnonzero(np.diff(answered) > 1) + 1):
                    hits += bool(ok[row, part - 1].all())
                    total += 1
        found[length] = round(hits / max(total, 1), 4)
    return found


def main() -> None:
    """Run the training that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m cribsheet_pocket.train", description=__doc__)
    parser.add_argument("--wiki", type=Path, required=True, help="wiki.txt.xz: articles parted by NUL")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, checkpoint and log")
    parser.add_argument("--seconds", type=float, default=1300, help="wall-clock budget of all runs together")
    parser.add_argument("--stop-after", type=float, help="leave this run after so many seconds, to be resumed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=models.SHAPES, default="pocket")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--batch-tokens", type=int, default=6 * BLOCK)
    parser.add_argument("--muon-rate", type=float, default=0.02)
    parser.add_argument("--adam-rate", type=float, default=0.003)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--articles", type=int, help="use only the first so many articles (for trials)")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    run(parser.parse_args())


def run(a: argparse.Namespace) -> None:  # noqa: C901
    """Train until the budget is spent."""
    a.out.mkdir(parents=True, exist_ok=True)
    articles = read_wiki(a.wiki)[: a.articles]
    held = [x for x in articles if held_out_article(x)]
    articles = [x for x in articles if not held_out_article(x)]
    tokenizer = Path(__file__).parent / "data" / "tokenizer.json"
    if not tokenizer.exists():
        tokenizers_.save(tokenizers_.train(tokenizer_texts(articles)), tokenizer.parent)
    vocabulary = Tokenizer.from_file(str(tokenizer)).get_vocab_size()
    out: Any = mp.get_context("fork").Queue(64)
    stage = mp.get_context("fork").Value("i", 0)
    checkpoint = a.out / "checkpoint.pt"
    resumed = (
        torch.load(checkpoint, map_location="cpu", weights_only=True) if a.resume and checkpoint.exists() else None
    )
    seed = a.seed + (resumed["step"] if resumed else 0)  # a resumed run draws other text
    workers = [
        mp.get_context("fork").Process(target=_work, args=(i, out, stage, tokenizer, articles, seed), daemon=True)
        for i in range(a.workers)
    ]
    if resumed:
        stage.value = stage_at(min(1.0, resumed["seconds"] / a.seconds))
    for worker in workers:
        worker.start()

    device = torch.device(a.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(a.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    reader = models.Reader(models.SHAPES[a.shape], compiled=not a.no_compile).to(device)
    matrices = [p for n, p in reader.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in reader.named_parameters() if not (p.dim() == 2 and "embed" not in n)]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=a.adam_rate, betas=(0.9, 0.97), weight_decay=0.0, fused=device.type == "cuda")
    step, tokens, before = 0, 0, 0.0
    if resumed:
        reader.load_state_dict(resumed["model"])
        adam.load_state_dict(resumed["adam"])
        muon.state = {torch.Size(k): v.to(device) for k, v in resumed["muon"]}
        step, tokens, before = resumed["step"], resumed["tokens"], resumed["seconds"]
    weights = torch.tensor(WEIGHTS, device=device)
    log = (a.out / "log.jsonl").open("a", encoding="utf-8")

    def note(**values: Any) -> None:
        log.write(json.dumps(values) + "\n")
        log.flush()
        sys.stdout.write(" ".join(f"{k}={v}" for k, v in values.items()) + "\n")
        sys.stdout.flush()

    def keep() -> None:
        state = {"model": reader.state_dict(), "adam": adam.state_dict(), "muon": [(tuple(k), v) for k, v in muon.state.items()],  # noqa: E501
                 "step": step, "tokens": tokens, "seconds": passed()}  # fmt: skip
        torch.save(state, a.out / "checkpoint.part")
        os.replace(a.out / "checkpoint.part", checkpoint)
        models.save(reader, a.out / "weights")

    encode = tokenizers_.FastEncoder(Tokenizer.from_file(str(tokenizer)))
    probe = Sampler(encode, held, 7, vocabulary, held_out=True)
    probe.copying = 0.0
    sets = {}
    for length, rows in {512: 32, 2048: 16, 8192: 4}.items() if device.type == "cuda" else {256: 16, 512: 8}.items():
        drawn = [probe.row(length) for _ in range(rows)]
        sets[length] = (np.array([r[0] for r in drawn], np.uint16), np.array([r[1] for r in drawn], np.uint8))
    blocks = Blocks(out, a.batch_tokens)
    size = sum(p.numel() for p in reader.parameters())
    note(
        event="start",
        parameters=size,
        articles=len(articles),
        held_out=len(held),
        vocabulary=vocabulary,
        arguments={k: str(v) for k, v in vars(a).items()},
    )

    trial = torch.zeros((a.batch_tokens // 256, 256), dtype=torch.long, device=device)
    reader(trial, trial, dtype)[0].mean().backward()  # compile before the clock starts
    reader.zero_grad(set_to_none=True)
    began = time.monotonic()

    def passed() -> float:
        return before + time.monotonic() - began

    spoken, kept, tested = passed(), passed(), passed()
    waited, seen = 0.0, tokens
    total = torch.zeros(4, device=device)
    while True:
        fraction = passed() / a.seconds
        if fraction >= 1 or (a.stop_after and passed() - before > a.stop_after):
            break
        stage.value = stage_at(fraction)
        start = time.monotonic()
        length, ids, classes = blocks.next(STAGES[stage.value].lengths)
        waited += time.monotonic() - start
        x = torch.from_numpy(ids.astype(np.int64))
        c = torch.from_numpy(classes.astype(np.int64))
        if device.type == "cuda":
            x, c = x.pin_memory().to(device, non_blocking=True), c.pin_memory().to(device, non_blocking=True)
        targets = torch.cat([x[:, 1:], x[:, :1]], 1)
        c = torch.cat([c[:, 1:], torch.zeros_like(c[:, :1])], 1).reshape(-1)  # the class of what is to be guessed
        w = weights[c]
        losses, right = reader(x, targets, dtype)
        loss = (losses * w).sum() / w.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        scale = rate_at(fraction, step)
        muon.step(a.muon_rate * scale)
        for group in adam.param_groups:
            group["lr"] = a.adam_rate * scale
        adam.step()
        reader.zero_grad(set_to_none=True)
        with torch.no_grad():
            answered = (c == ANSWERED) | (c == COPIED)
            read = (c == PROSE) | (c == PLAIN)
            total += torch.stack([(losses * answered).sum(), (right & answered).sum(), answered.sum(), loss])
            prose = (losses * read).sum() / read.sum().clamp(min=1)
        step += 1
        tokens += x.numel()
        now = passed()
        if now - spoken > 10 or step == 1:
            answer_loss, hits, count, _ = total.tolist()
            note(step=step, seconds=round(now, 1), tokens_m=round(tokens / 1e6, 1), rate_k=round((tokens - seen) / (now - spoken + 1e-9) / 1e3),  # noqa: E501
                 waited=round(waited, 1), length=length, answer=round(answer_loss / max(count, 1), 4), accuracy=round(hits / max(count, 1), 4),  # noqa: E501
                 prose=round(prose.item(), 3), queued=out.qsize(), repeated=blocks.repeated)  # fmt: skip
            total.zero_()
            spoken, seen, waited = now, tokens, 0.0
            if not math.isfinite(answer_loss):
                raise SystemExit("The loss is not finite; resume from the checkpoint with a lower --muon-rate.")
        if now - tested > min(60.0, a.seconds / 8):
            note(event="test", step=step, seconds=round(now, 1), exact=exact_answers(reader, sets, dtype, device))
            tested = passed()
        if now - kept > min(90.0, a.seconds / 4):
            keep()
            kept = passed()
    keep()
    note(
        event="end",
        step=step,
        seconds=round(passed(), 1),
        tokens_m=round(tokens / 1e6, 1),
        exact=exact_answers(reader, sets, dtype, device),
    )
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main()
