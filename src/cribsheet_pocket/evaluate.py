"""Measure the pocket model: `python -m cribsheet_pocket.evaluate --out FILE [--wiki PATH] [--original FOLDER]`.

Everything is held out: worlds with other seeds and names than training's, and articles that training never drew.
Every question is asked alone after the documents (default instruction, no task line, no examples), answered greedily,
and counted right only if the whole answer is; lists also by F1 over their parts.  The closed-book form asks the same
questions without documents.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

from . import INSTRUCTION, path, reading
from .quantize import load_folder
from .worlds import QUESTION_KINDS, World, make_world

LENGTHS = (600, 1000, 2000, 4000, 8000)


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, its gold answer, its parts if it is a list, and the sort under which it is counted."""

    text: str
    answer: str
    sort: str
    parts: tuple[str, ...] = ()


class Reader:
    """The model with the documents read once, for many questions side by side.

    Written out here because the usual cache copies itself for every token and every question, which on two cores takes
    longer than the model.  A test holds it to the answers of `transformers`.
    """

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.end = self.tokenizer.eos_token_id
        c = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.layers, self.heads, self.head = c["num_hidden_layers"], c["num_key_value_heads"], c["head_dim"]
        self.rate = c["rope_theta"] ** (-torch.arange(0, self.head, 2).double() / self.head)
        self.weights = {k.removeprefix("model."): v.float() for k, v in load_folder(folder).items()}

    def prompt(self, text: str) -> tuple[str, str]:
        """The rendered prompt of a user turn, cut where its question begins."""
        whole = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{text}\0"}], tokenize=False, add_generation_prompt=True
        )
        left, right = whole.split("\0")
        return left, right

    def ids(self, text: str) -> Tensor:
        """Token ids (T,)."""
        found: Tensor = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        return found

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weights[f"{name}.weight"], 1e-5)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary embedding of x (B, T, heads, D) by angles (B, T, 1, D)."""
        half = self.head // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def _forward(
        self,
        ids: Tensor,
        positions: Tensor,
        mask: Tensor,
        prefix: list[tuple[Tensor, Tensor]],
        own: list[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Hidden states (B, T, width) of ids (B, T) after a shared prefix (K, S, D) and rows' own keys (B, K, U, D).

        `own` grows by the new tokens; `mask` (B, T, U + T) says which of a row's own tokens each new one sees.
        """
        x = F.embedding(ids, self.weights["embed_tokens.weight"])
        batch, new = ids.shape
        angle = (positions[..., None, None].double() * self.rate).repeat(1, 1, 1, 2)
        cos, sin = angle.cos().float(), angle.sin().float()
        for i in range(self.layers):
            at = f"layers.{i}.self_attn."
            h = self._norm(x, f"layers.{i}.input_layernorm")
            q, k, v = (self._linear(h, at + n).view(batch, new, -1, self.head) for n in ("q_proj", "k_proj", "v_proj"))
            q, k = self._turn(q, cos, sin) / self.head**0.5, self._turn(k, cos, sin)
            keys = torch.cat([own[i][0], k.transpose(1, 2)], 2)  # (B, K, U + T, D)
            values = torch.cat([own[i][1], v.transpose(1, 2)], 2)
            own[i] = (keys, values)
            q = q.view(batch, new, self.heads, -1, self.head).permute(2, 0, 3, 1, 4)  # (K, B, G, T, D)
            far = (q.flatten(1, 3) @ prefix[i][0].mT).view(*q.shape[:4], -1)  # (K, B, G, T, S)
            near = torch.einsum("kbgtd,bkud->kbgtu", q, keys).masked_fill(~mask[None, :, None], float("-inf"))
            share = torch.cat([far, near], -1).softmax(-1)
            size = far.shape[-1]
            o = (share[..., :size].flatten(1, 3) @ prefix[i][1]).view(q.shape)
            o = o + torch.einsum("kbgtu,bkud->kbgtd", share[..., size:], values)
            x = x + self._linear(o.permute(1, 3, 0, 2, 4).reshape(batch, new, -1), at + "o_proj")
            h, m = self._norm(x, f"layers.{i}.post_attention_layernorm"), f"layers.{i}.mlp."
            x = x + self._linear(
                F.silu(self._linear(h, m + "gate_proj")) * self._linear(h, m + "up_proj"), m + "down_proj"
            )
        return self._norm(x, "norm")

    def _nothing(self, rows: int | None) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of no tokens, of a prefix or of `rows` rows."""
        empty = torch.zeros(self.heads, 0, self.head) if rows is None else torch.zeros(rows, self.heads, 0, self.head)
        return [(empty, empty)] * self.layers

    def _read(self, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (K, S, D) of each layer for ids (S,)."""
        prefix = self._nothing(None)
        for start in range(0, len(ids), 512):
            part = ids[None, start : start + 512]
            new = part.shape[1]
            own = self._nothing(1)
            self._forward(
                part,
                torch.arange(start, start + new)[None],
                torch.ones(1, new, new, dtype=torch.bool).tril(),
                prefix,
                own,
            )
            prefix = [
                (torch.cat([a, k[0]], 1), torch.cat([b, v[0]], 1)) for (a, b), (k, v) in zip(prefix, own, strict=True)
            ]
        return prefix

    @torch.inference_mode()
    def answers(self, documents: str, questions: Sequence[str], most: int = 60) -> tuple[int, list[str]]:
        """Tokens of the documents' prompt, and a greedy answer to each question."""
        left, right = self.prompt(f"{INSTRUCTION}\n\n{documents}\n\n" if documents else f"{INSTRUCTION}\n\n")
        ids = self.ids(left)
        prefix = self._read(ids)
        together = max(1, 100_000 // len(ids))
        order = sorted(range(len(questions)), key=lambda i: len(questions[i]))
        found = [""] * len(questions)
        for start in range(0, len(order), together):
            part = order[start : start + together]
            for i, answer in zip(part, self._batch(prefix, [questions[i] + right for i in part], most), strict=True):
                found[i] = answer
        return len(ids), found

    def _batch(self, prefix: list[tuple[Tensor, Tensor]], texts: Sequence[str], most: int) -> list[str]:
        """Greedy continuations of the prefix and each text, side by side (padded on the left)."""
        ids = [self.ids(t) for t in texts]
        longest, read = max(map(len, ids)), prefix[0][0].shape[1]
        lengths = torch.tensor([len(x) for x in ids])
        following = torch.stack([F.pad(x, (longest - len(x), 0)) for x in ids])  # (B, longest)
        real = torch.arange(longest)[None] >= (longest - lengths)[:, None]
        diagonal = torch.eye(longest, dtype=torch.bool)
        mask = (real[:, None, :] & torch.ones(longest, longest, dtype=torch.bool).tril()) | diagonal
        positions = read + (torch.arange(longest)[None] - (longest - lengths)[:, None]).clamp(min=0)
        own = self._nothing(len(texts))
        answers: list[list[int]] = [[] for _ in texts]
        open_ = list(range(len(texts)))
        for _ in range(most):
            hidden = self._forward(following, positions, mask, prefix, own)[:, -1]
            token = F.linear(hidden, self.weights["embed_tokens.weight"]).argmax(-1)  # (B,)
            going = (token != self.end).nonzero()[:, 0]  # rows whose answer has not ended
            open_ = [open_[i] for i in going.tolist()]
            if not open_:
                break
            token, positions, real = token[going], positions[going, -1:] + 1, F.pad(real[going], (0, 1), value=True)
            for i, t in zip(open_, token.tolist(), strict=True):
                answers[i].append(t)
            own = [(k[going], v[going]) for k, v in own]
            following, mask = token[:, None], real[:, None, :]
        return [self.tokenizer.decode(a) for a in answers]

    @torch.inference_mode()
    def loss(self, texts: Sequence[str]) -> float:
        """Mean cross-entropy per token over texts."""
        total = count = 0.0
        for text in texts:
            ids = self.ids(text)
            n = len(ids)
            seen = torch.ones(1, n, n, dtype=torch.bool).tril()
            hidden = self._forward(ids[None], torch.arange(n)[None], seen, self._nothing(None), self._nothing(1))
            logits = F.linear(hidden[0, :-1], self.weights["embed_tokens.weight"])
            total += float(F.cross_entropy(logits, ids[1:], reduction="sum"))
            count += n - 1
        return total / count


def list_f1(answer: str, gold: Sequence[str]) -> float:
    """F1 of a comma-separated answer's parts against the gold ones."""
    given, wanted = {p.strip() for p in answer.split(", ")}, set(gold)
    shared = len(given & wanted)
    return 2 * shared / (len(given) + len(wanted)) if shared else 0.0


class Score:
    """Right answers and list F1 by sort."""

    def __init__(self) -> None:
        self.exact: dict[str, list[float]] = defaultdict(list)
        self.f1: dict[str, list[float]] = defaultdict(list)
        self.tokens: list[int] = []

    def add(self, asked: Asked, answer: str) -> None:
        """Count an answer."""
        self.exact[asked.sort].append(float(answer.strip() == asked.answer.strip()))
        if len(asked.parts) > 1:
            self.f1[asked.sort].append(list_f1(answer, asked.parts))

    def table(self) -> dict[str, Any]:
        """Per sort: questions, share right, list F1 where there are lists."""
        rows: dict[str, Any] = {}
        for sort, values in self.exact.items():
            rows[sort] = {"n": len(values), "exact": round(sum(values) / len(values), 4)}
            if self.f1[sort]:
                rows[sort]["f1"] = round(sum(self.f1[sort]) / len(self.f1[sort]), 4)
        everything = [v for values in self.exact.values() for v in values]
        rows["all"] = {"n": len(everything), "exact": round(sum(everything) / max(1, len(everything)), 4)}
        rows["prompt_tokens"] = round(sum(self.tokens) / max(1, len(self.tokens)))
        return rows


def chosen(world: World, each: int) -> list[Asked]:
    """Up to `each` questions of every kind."""
    count: dict[str, int] = defaultdict(int)
    picked = []
    for q in world.questions:
        if count[q.kind] < each:
            count[q.kind] += 1
            picked.append(Asked(q.text, q.answer, q.kind, q.answers))
    return picked


def measure_worlds(reader: Reader, length: int, worlds: int, each: int, seed: int, note: Any) -> dict[str, Any]:
    """Accuracy by kind of question in `worlds` held-out worlds of `length` tokens."""
    score = Score()
    for index in range(worlds):
        world = make_world(f"evaluate.{seed}.{length}.{index}", length, questions=150)
        asked = chosen(world, each)
        tokens, answers = reader.answers(world.text, [a.text for a in asked])
        score.tokens.append(tokens)
        for a, answer in zip(asked, answers, strict=True):
            score.add(a, answer)
        note(f"worlds {length}: {index + 1}/{worlds} {score.table()['all']}")
    return score.table()


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
    count: dict[str, int] = defaultdict(int)
    asked = []
    for q in pool:
        if count[q.rule] < each and q.answer in body:
            count[q.rule] += 1
            asked.append(Asked(q.text, q.answer, q.rule))
    return body, asked


def measure_reading(
    reader: Reader, articles: Sequence[str], length: int, sets: int, each: int, note: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Accuracy by rule with the documents, and closed book."""
    opened, closed = Score(), Score()
    for index in range(sets):
        body, asked = reading_set(articles, length, f"{length}.{index}", each)
        for score, text in ((opened, body), (closed, "")):
            tokens, answers = reader.answers(text, [a.text for a in asked])
            score.tokens.append(tokens)
            for a, answer in zip(asked, answers, strict=True):
                score.add(a, answer)
        note(f"reading {length}: {index + 1}/{sets} {opened.table()['all']} closed book {closed.table()['all']}")
    return opened.table(), closed.table()


def summary(result: dict[str, Any]) -> str:
    """The figures as Markdown tables, as the card shows them."""
    lengths = list(result["worlds"])
    lines = ["| question | " + " | ".join(lengths) + " |", "|---|" + "---:|" * len(lengths)]
    for kind in (*QUESTION_KINDS, "all"):
        cells = []
        for length in lengths:
            row = result["worlds"][length].get(kind)
            cells.append(
                ""
                if row is None
                else f"{100 * row['exact']:.1f}"
                + (f" (F1 {100 * row['f1']:.1f})" if kind == "list" else "")
                + f" · {row['n']}"
            )
        if any(cells):
            lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    if result.get("closed_book_worlds"):
        lines += [
            "",
            f"Worlds closed book: {100 * result['closed_book_worlds']['all']['exact']:.1f} % of {result['closed_book_worlds']['all']['n']}.",  # noqa: E501
        ]
    if result.get("reading"):
        lengths = list(result["reading"])
        lines += [
            "",
            "| real text | " + " | ".join(f"{n} | closed book" for n in lengths) + " |",
            "|---|" + "---:|" * 2 * len(lengths),
        ]
        for rule in (*reading.TASKS, "all"):
            cells = []
            for length in lengths:
                for form in ("open", "closed"):
                    row = result["reading"][length][form].get(rule)
                    cells.append("" if row is None else f"{100 * row['exact']:.1f} · {row['n']}")
            lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    if result.get("packing"):
        p = result["packing"]
        lines += [
            "",
            f"Loss per token on held-out text: {p['packed']:.4f} as shipped (8-bit rows), {p['original']:.4f} as trained (bf16).",  # noqa: E501
        ]
        lines += [
            f"Right answers on the same {p['n']} questions: {100 * p['packed_exact']:.1f} % and {100 * p['original_exact']:.1f} %."  # noqa: E501
        ]
    return "\n".join(lines) + "\n"


def packing_loss(packed: Reader, original: Reader, texts: Sequence[str], note: Any) -> dict[str, Any]:
    """What 8-bit rows cost: loss on held-out text and answers in worlds of 600 tokens."""
    scores = (Score(), Score())
    for index in range(10):
        world = make_world(f"packing.{index}", 600, questions=30)
        asked = chosen(world, 3)
        for score, reader in zip(scores, (packed, original), strict=True):
            for a, answer in zip(asked, reader.answers(world.text, [x.text for x in asked])[1], strict=True):
                score.add(a, answer)
    tables = [s.table()["all"] for s in scores]
    worlds = [make_world(f"packing.{i}", 600, questions=0).text for i in range(10, 20)]
    note("packing")
    return {
        "packed": packed.loss([*texts, *worlds]), "original": original.loss([*texts, *worlds]), "n": tables[0]["n"],
        "packed_exact": tables[0]["exact"], "original_exact": tables[1]["exact"],
    }  # fmt: skip


def main() -> None:  # noqa: C901
    """Run the evaluation that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m cribsheet_pocket.evaluate", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("--wiki", type=Path, help="wiki.txt.xz, for real text (a build-time input)")
    parser.add_argument("--original", type=Path, help="the trained bf16 folder, to tell what packing costs")
    parser.add_argument("--only", choices=("worlds", "reading"), help="leave out the other half")
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full number of worlds")
    parser.add_argument("--seed", type=int, default=1)
    a = parser.parse_args()
    began = time.monotonic()

    def note(text: str) -> None:
        sys.stderr.write(f"[{time.monotonic() - began:6.0f} s] {text}\n")
        sys.stderr.flush()

    reader = Reader(path())
    result: dict[str, Any] = {"command": " ".join(sys.argv[1:]), "worlds": {}, "reading": {}}

    def keep() -> None:
        result["worlds"] = dict(sorted(result["worlds"].items(), key=lambda item: int(item[0])))
        a.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    plan = {600: (30, 5), 1000: (20, 5), 2000: (14, 6), 4000: (12, 8), 8000: (6, 12)}
    for length in a.lengths if a.only != "reading" else ():
        worlds, each = plan.get(length, (10, 6))
        result["worlds"][str(length)] = measure_worlds(
            reader, length, max(1, round(worlds * a.scale)), each, a.seed, note
        )
        keep()
    closed = Score()
    for index in range(10 if a.only != "reading" else 0):
        asked = chosen(make_world(f"closed.{index}", 600, questions=60), 2)
        for one, answer in zip(asked, reader.answers("", [x.text for x in asked])[1], strict=True):
            if one.sort not in ("yesno", "absent", "count", "compare"):  # which can be guessed
                closed.add(one, answer)
    if a.only != "reading":
        result["closed_book_worlds"] = closed.table()
    if a.wiki and a.only != "worlds":
        from .train import held_out_article, read_wiki

        articles = [x for x in read_wiki(a.wiki) if held_out_article(x)]
        for length, sets in {1000: 12, 4000: 10}.items():
            opened, shut = measure_reading(reader, articles, length, max(1, round(sets * a.scale)), 6, note)
            result["reading"][str(length)] = {"open": opened, "closed": shut}
            keep()
        if a.original:
            texts = [x[:4000] for x in articles[:20]]
            result["packing"] = packing_loss(reader, Reader(a.original), texts, note)
    result["minutes"] = round((time.monotonic() - began) / 60, 1)
    keep()
    sys.stdout.write(summary(result))


if __name__ == "__main__":
    main()
