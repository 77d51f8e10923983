"""Measure the pocket model: `python -m cribsheet_pocket_training.evaluate --out FILE [--wiki PATH] ...`.

Everything is held out: worlds with other seeds and names than training's, and articles that training never drew.
Every question is asked alone after the documents (default instruction, no task line, no examples), answered greedily,
and counted right only if the whole answer is; lists also by F1 over their parts.  The closed-book form asks the same
questions without documents.  Parts measured apart (`--only`, `--lengths`) are put together with `--join`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cribsheet_pocket import path
from cribsheet_pocket_training import reading
from cribsheet_pocket_training.feeding import held_out_article, read_wiki
from cribsheet_pocket_training.figures import Asked, Score, f1, joined, summary
from cribsheet_pocket_training.peps import pep_files, pep_set
from cribsheet_pocket_training.reader import Reader
from cribsheet_pocket_training.worlds import World, make_world

WORLDS = {600: (40, 5), 1000: (30, 5), 2000: (24, 6), 4000: (20, 8), 8000: (14, 12)}  # worlds, questions of each kind
NOTES = {600: 24, 1500: 16, 4000: 8}  # requests for notes
READING = {1000: 24, 2000: 16, 4000: 12, 8000: 8}  # sets of articles
PEPS = 5  # sets of four
PARTS = ("worlds", "closed", "notes", "reading", "peps", "packing")
Note = Callable[[str], None]


def chosen(world: World, each: int) -> list[Asked]:
    """Up to `each` questions of every kind."""
    count: dict[str, int] = defaultdict(int)
    picked = []
    for q in world.questions:
        if count[q.kind] < each:
            count[q.kind] += 1
            picked.append(Asked(q.text, q.answer, q.kind, q.answers))
    return picked


def ask(reader: Reader, score: Score, text: str, asked: Sequence[Asked]) -> None:
    """Ask all questions about `text` and count the answers."""
    tokens, answers = reader.answers(text, [a.text for a in asked])
    score.tokens.append(tokens)
    for a, answer in zip(asked, answers, strict=True):
        score.add(a, answer)


def measure_worlds(
    reader: Reader, length: int, worlds: int, each: int, seed: int, kind: str, note: Note
) -> dict[str, Any]:
    """Accuracy by kind of question in `worlds` held-out worlds of `length` tokens."""
    score = Score()
    for index in range(worlds):
        world = make_world(f"evaluate.{seed}.{length}.{index}", length, kind, questions=150)
        ask(reader, score, world.text, chosen(world, each))
        note(f"worlds {length}: {index + 1}/{worlds} {score.table()['all']}")
    return score.table()


def measure_closed(reader: Reader) -> dict[str, Any]:
    """Accuracy about worlds that are not shown, without the questions that can be guessed."""
    score = Score()
    for index in range(10):
        asked = chosen(make_world(f"closed.{index}", 600, questions=60), 2)
        ask(reader, score, "", [a for a in asked if a.sort not in ("yesno", "absent", "count", "compare")])
    return score.table()


def measure_notes(reader: Reader, length: int, requests: int) -> dict[str, Any]:
    """F1 of the lines that a bare task line is answered with."""
    found: list[float] = []
    for index in range(requests):
        world = make_world(f"notes.{length}.{index}", length, questions=60)
        task = next((t for t in world.tasks if len(t.notes) > 2), None)
        if task is not None:
            _, (answer,) = reader.answers(world.text, [f"Task: {task.description}"], most=600)
            found.append(f1(answer.split("\n"), task.notes))
    return {"n": len(found), "f1": round(sum(found) / max(1, len(found)), 4)}


def reading_set(articles: Sequence[str], tokens: int, seed: str, each: int) -> tuple[str, list[Asked]]:
    """Documents of about `tokens` tokens from held-out articles, and up to `each` questions per rule about them."""
    r = random.Random(f"evaluate:{seed}")
    room = int(tokens * 3.6)
    texts: list[str] = []
    pool: list[reading.ReadingQuestion] = []
    while room > 400:
        group = next(reading.passages([r.choice(articles)]), [])[: r.choice((1, 2, 3))]
        group = [p for p in group if len(p.text) < room]
        if not group or any(group[0].title in t for t in texts):
            room -= 20
            continue
        texts.append(reading.laid_out(group, r))
        room -= len(texts[-1]) + 2
        pool += [q for p in group for q in reading.questions(p, r)]
    r.shuffle(pool)
    body = "\n\n".join(texts)
    plain = " ".join(body.split())  # some documents are hard-wrapped
    count: dict[str, int] = defaultdict(int)
    asked = []
    for q in pool:
        if count[q.rule] < each and q.answer in plain:
            count[q.rule] += 1
            asked.append(Asked(q.text, q.answer, q.rule))
    return body, asked


def measure_reading(
    reader: Reader, articles: Sequence[str], length: int, sets: int, each: int, note: Note
) -> dict[str, Any]:
    """Accuracy by rule with the documents, and closed book."""
    opened, closed = Score(), Score()
    for index in range(sets):
        body, asked = reading_set(articles, length, f"{length}.{index}", each)
        ask(reader, opened, body, asked)
        ask(reader, closed, "", asked)
        note(f"reading {length}: {index + 1}/{sets} {opened.table()['all']} closed book {closed.table()['all']}")
    return {"open": opened.table(), "closed": closed.table()}


def measure_peps(reader: Reader, files: Sequence[Path], sets: int, note: Note) -> dict[str, Any]:
    """Accuracy by field of PEPs' headers."""
    score = Score()
    for index in range(sets):
        ask(reader, score, *pep_set(files, str(index)))
        note(f"peps: {index + 1}/{sets} {score.table()['all']}")
    return score.table()


def packing_loss(packed: Reader, original: Reader, texts: Sequence[str]) -> dict[str, Any]:
    """What 8-bit rows cost: loss on held-out text and answers in worlds of 600 tokens."""
    scores = (Score(), Score())
    for index in range(10):
        world = make_world(f"packing.{index}", 600, questions=30)
        for score, reader in zip(scores, (packed, original), strict=True):
            ask(reader, score, world.text, chosen(world, 3))
    tables = [s.table()["all"] for s in scores]
    worlds = [make_world(f"packing.{i}", 600, questions=0).text for i in range(10, 20)]
    return {
        "packed": packed.loss([*texts, *worlds]), "original": original.loss([*texts, *worlds]), "n": tables[0]["n"],
        "packed_exact": tables[0]["exact"], "original_exact": tables[1]["exact"],
    }  # fmt: skip


class Evaluation:
    """What one command measures, saved after every part."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a = a
        self.began = time.monotonic()
        self.reader = Reader(a.model or path(), a.device)
        self.articles = [x for x in read_wiki(a.wiki) if held_out_article(x)] if a.wiki else []
        self.result: dict[str, Any] = {"commands": [" ".join(sys.argv[1:])], "worlds": {}, "notes": {}, "reading": {}}

    def note(self, text: str) -> None:
        """Say how far it is."""
        sys.stderr.write(f"[{time.monotonic() - self.began:6.0f} s] {text}\n")
        sys.stderr.flush()

    def lengths(self, table: dict[int, Any]) -> list[int]:
        """The lengths of `table` that the command asks for."""
        return [n for n in table if not self.a.lengths or n in self.a.lengths]

    def count(self, full: int) -> int:
        """The number of texts, scaled."""
        return max(1, round(full * float(self.a.scale)))

    def worlds(self) -> None:
        """Held-out worlds by length."""
        for n in self.lengths(WORLDS):
            texts, each = WORLDS[n]
            key = "worlds" if self.a.kind == "mixed" else self.a.kind
            self.result.setdefault(key, {})[str(n)] = measure_worlds(
                self.reader, n, self.count(texts), each, self.a.seed, self.a.kind, self.note
            )

    def closed(self) -> None:
        """Worlds that are not shown."""
        self.result["closed_book_worlds"] = measure_closed(self.reader)

    def notes(self) -> None:
        """Requests for notes by length."""
        for n in self.lengths(NOTES):
            self.result["notes"][str(n)] = measure_notes(self.reader, n, self.count(NOTES[n]))

    def reading(self) -> None:
        """Real text by length."""
        for n in self.lengths(READING) if self.articles else ():
            sets = self.count(READING[n])
            self.result["reading"][str(n)] = measure_reading(self.reader, self.articles, n, sets, 6, self.note)

    def peps(self) -> None:
        """Headers of PEPs."""
        if self.a.peps:
            self.result["peps"] = measure_peps(self.reader, pep_files(self.a.peps), self.count(PEPS), self.note)

    def packing(self) -> None:
        """The weights as shipped against those that were trained."""
        if self.a.original and self.articles:
            original = Reader(self.a.original, self.a.device)
            self.result["packing"] = packing_loss(self.reader, original, [x[:4000] for x in self.articles[:20]])

    def run(self) -> dict[str, Any]:
        """Measure every part that the command asks for."""
        for part in self.a.only or PARTS:
            getattr(self, part)()
            self.result["minutes"] = round((time.monotonic() - self.began) / 60, 1)
            self.a.out.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")
        return self.result


def main() -> None:
    """Run the evaluation that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m cribsheet_pocket_training.evaluate", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("--model", type=Path, help="a plain model folder, instead of the package's own")
    parser.add_argument("--wiki", type=Path, help="wiki.txt.xz, for real text (a build-time input)")
    parser.add_argument("--peps", type=Path, help="a folder of PEPs (pep-0020.rst, ...)")
    parser.add_argument("--original", type=Path, help="the trained bf16 folder, to tell what packing costs")
    parser.add_argument("--only", nargs="*", choices=PARTS, help="measure these parts")
    parser.add_argument("--lengths", type=int, nargs="*", help="measure texts of these lengths, in tokens")
    parser.add_argument("--kind", choices=("mixed", "connected"), default="mixed", help="of worlds")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full number of texts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--join", type=Path, nargs="*", help="put these results together and measure nothing")
    a = parser.parse_args()
    if a.join:
        result = joined([json.loads(file.read_text(encoding="utf-8")) for file in a.join])
        a.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    else:
        result = Evaluation(a).run()
    sys.stdout.write(summary(result))


if __name__ == "__main__":
    main()
