"""Questions with gold answers: JSON lines in, judgements out.

One question a line: `{"question", "answers": [..], "type", "documents": [ids]}`. `answers` are alternatives, any of
which is right, and each may be a list ("Oslo, Rome"); with `"all": true` they are the items of one list instead.
`type` groups questions in reports, `documents` are those that hold the answer. Two types are judged in their own way by
`Asked.marks`: the answer to a "choice" is a letter, and a "summary" is compared by ROUGE-L.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cribsheet.compare.metrics import exact_match, included, rouge_l, same_letter, set_f1, word_f1
from cribsheet.errors import DocumentError

CHOICE, SUMMARY = "choice", "summary"
_KEYS = ("question", "answers", "type", "documents", "all")


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, its gold answers (alternatives), its type, and the ids of the documents that hold the answer."""

    text: str
    golds: tuple[str, ...]
    type: str = "question"
    documents: tuple[str, ...] = ()

    def judge(self, answer: str) -> tuple[float, float, float]:
        """Exact match (lists in any order), word F1 and set F1 of an answer, each 0 to 1."""
        items = set_f1(answer, self.golds)
        return float(items == 1 or exact_match(answer, self.golds)), word_f1(answer, self.golds), items

    def marks(self, answer: str) -> tuple[float, float, float]:
        """Exact match, score and inclusion of a model's answer, each 0 to 1; which score is a matter of the type.

        Models go on after an answer, so the score of words is that of the first line, and inclusion that of all of it.
        """
        if self.type == CHOICE:
            return (same_letter(answer, self.golds),) * 3
        if self.type == SUMMARY:
            return 0.0, rouge_l(answer, self.golds), 0.0
        first = answer.strip().partition("\n")[0]
        return exact_match(first, self.golds), word_f1(first, self.golds), included(answer, self.golds)


def read_questions(path: str | Path) -> list[Asked]:
    """The questions of a file of JSON lines. Raises `DocumentError` with the line's number for what makes no sense."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DocumentError(f"cannot read the questions in {path}: {error}; check the path") from error
    asked = [_question(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not asked:
        raise DocumentError(
            f'{path} holds no questions; write lines like {{"question": "Where?", "answers": ["Oslo"]}}'
        )
    return asked


def write_questions(path: str | Path, questions: Iterable[Asked]) -> None:
    """The inverse of `read_questions`."""
    rows = [{"question": q.text, "answers": q.golds, "type": q.type, "documents": q.documents} for q in questions]
    Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def draw_examples(questions: Sequence[Asked], count: int, seed: int) -> tuple[list[Asked], list[Asked]]:
    """(`count` examples, the questions that remain), each type in turn; at most a quarter of all become examples."""
    order = list(questions)
    random.Random(seed).shuffle(order)
    by_type: dict[str, list[Asked]] = {}
    for question in order:
        by_type.setdefault(question.type, []).append(question)
    kinds = [own for _, own in sorted(by_type.items())]
    dealt = [own[n] for n in range(max(map(len, kinds), default=0)) for own in kinds if n < len(own)]
    picked = dealt[: min(count, len(questions) // 4)]
    return picked, [question for question in questions if question not in picked]


def _question(line: str, where: str) -> Asked:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DocumentError(f"{where} is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise DocumentError(f'{where} is {row!r}; write an object with "question" and "answers"')
    unknown = [key for key in row if key not in _KEYS]
    if unknown:
        raise DocumentError(f"{where} has the unknown key {unknown[0]!r}; allowed are {', '.join(_KEYS)}")
    text, answers = row.get("question"), _strings(row, "answers", where)
    if not isinstance(text, str) or not text.strip() or not answers:
        raise DocumentError(f'{where} needs a text under "question" and at least one text under "answers"')
    golds = (", ".join(answers),) if row.get("all") else answers
    return Asked(text.strip(), golds, str(row.get("type") or "question"), _strings(row, "documents", where))


def _strings(row: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = row.get(key)
    listed = value if isinstance(value, list) else [] if value is None else [value]
    strange = [each for each in listed if isinstance(each, bool) or not isinstance(each, str | int | float)]
    if strange:
        raise DocumentError(f"{where} has {strange[0]!r} where texts belong; write texts under {key!r}")
    return tuple(str(each) for each in listed if str(each).strip())
