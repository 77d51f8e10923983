"""Figures of the card: how answers are scored, and how the results of an evaluation become tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cribsheet_pocket_training import reading
from cribsheet_pocket_training.worlds import QUESTION_KINDS


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, its gold answer, its parts if it is a list, and the sort under which it is counted."""

    text: str
    answer: str
    sort: str
    parts: tuple[str, ...] = ()


BY_LENGTH = ("worlds", "connected", "reading", "notes")  # parts of a result that hold a table for each length


def f1(given: Sequence[str], wanted: Sequence[str]) -> float:
    """F1 of parts, each counted once."""
    left, right = {part.strip() for part in given}, set(wanted)
    shared = len(left & right)
    return 2 * shared / (len(left) + len(right)) if shared else 0.0


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
            self.f1[asked.sort].append(f1(answer.split(", "), asked.parts))

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


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One result from those of several runs; what more than one of them holds must be of different lengths."""
    whole: dict[str, Any] = {"commands": [], "worlds": {}, "reading": {}}
    for part in parts:
        whole["commands"] += part.pop("commands")
        for key, value in part.items():
            if key in BY_LENGTH:
                whole[key] = dict(sorted({**whole.get(key, {}), **value}.items(), key=lambda item: int(item[0])))
            else:
                whole[key] = value
    return whole


def _cell(row: dict[str, Any] | None, with_f1: bool = False) -> str:
    if row is None:
        return ""
    return f"{100 * row['exact']:.1f}" + (f" (F1 {100 * row['f1']:.1f})" if with_f1 else "") + f" · {row['n']}"


def _table(name: str, heads: Sequence[str], rows: Sequence[str], columns: Sequence[dict[str, Any]]) -> list[str]:
    lines = [f"| {name} | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for row in rows:
        cells = [_cell(column.get(row), with_f1=row == "list") for column in columns]
        if any(cells):
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return lines


def summary(result: dict[str, Any]) -> str:
    """The figures as Markdown tables, as the card shows them."""
    lines: list[str] = []
    for kind, name in (("worlds", "question"), ("connected", "people in groups")):
        if worlds := result.get(kind):
            lines += ["", *_table(name, list(worlds), (*QUESTION_KINDS, "all"), list(worlds.values()))]
    if closed := result.get("closed_book_worlds"):
        lines += ["", f"Worlds closed book: {100 * closed['all']['exact']:.1f} % of {closed['all']['n']}."]
    if notes := result.get("notes"):
        found = ", ".join(f"{100 * row['f1']:.1f} at {length} tokens ({row['n']})" for length, row in notes.items())
        lines += ["", f"Notes (F1 of lines · requests): {found}."]
    if read := result.get("reading"):
        heads = [head for length in read for head in (length, "closed book")]
        columns = [row[form] for row in read.values() for form in ("open", "closed")]
        lines += ["", *_table("real text", heads, (*reading.TASKS, "all"), columns)]
    if peps := result.get("peps"):
        rows = [row for row in peps if row not in ("all", "prompt_tokens")]
        lines += ["", *_table("PEPs", [str(peps["prompt_tokens"])], (*rows, "all"), [peps])]
    if p := result.get("packing"):
        lines += ["", f"Loss per token on held-out text: {p['packed']:.4f} as shipped (8-bit rows), {p['original']:.4f} as trained (bf16).",  # noqa: E501
                  f"Right answers on the same {p['n']} questions: {100 * p['packed_exact']:.1f} % and {100 * p['original_exact']:.1f} %."]  # fmt: skip  # noqa: E501
    return "\n".join(lines).strip() + "\n"
