"""Questions by rule about real text: the demo's PEPs and textbook chapter, or a text of the user's.

The rules are those of `cribsheet_pocket_training.reading` ("X was founded in 1923" asks when; a name is blanked out).
Examples come from other paragraphs than the questions, and no answer of theirs is one of the questions' or stands in
them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cribsheet.corpus.documents import Document
from cribsheet.corpus.task import Task
from cribsheet.demo import FOLDER
from cribsheet_bench.quality.case import MOST_QUESTIONS, Case

if TYPE_CHECKING:
    from cribsheet_pocket_training.reading import Passage, ReadingQuestion

_CHARACTERS_PER_TOKEN = 3.6
_EXAMPLES, _LEAST = 3, 3
_TITLE = re.compile(r"^Title: *(.+)$", re.MULTILINE)
_TIMES = 12  # draws of the rules, some of which are left to chance
_PROSE = re.compile(r"[a-z]{2,}[.:!?)]?$")

Found = tuple["ReadingQuestion", "Passage"]


def reading(tokens: int, seed: int, text: str | None = None) -> Iterator[Case]:
    """Cases of about `tokens` tokens of consecutive paragraphs, for each rule that asks enough about them.

    Of the demo's text, which has some 4,000 tokens, there are none that are longer by more than a third.
    """
    passages = passages_of(text, "The text") if text is not None else demo_passages()
    room = int(tokens * _CHARACTERS_PER_TOKEN)
    if text is None and sum(len(passage.text) for passage in passages) < 0.75 * room:
        return
    windows = _windows(passages, room)
    random.Random(f"reading:{seed}").shuffle(windows)
    for number, window in enumerate(windows):
        yield from _asked(window, f"{seed}/{number}", random.Random(f"reading:{seed}:{number}"))


def demo_passages() -> list[Passage]:
    """The paragraphs of the demo's documents, hard-wrapped lines joined; headers, code and tables are left out."""
    files = sorted((FOLDER / "documents").iterdir())
    texts = [file.read_text(encoding="utf-8") for file in files]
    return [each for file, text in zip(files, texts, strict=True) for each in passages_of(text, file.stem)]


def passages_of(text: str, title: str) -> list[Passage]:
    """The paragraphs of a text that are prose, under its title if it says one."""
    from cribsheet_pocket_training.reading import Passage

    named = _TITLE.search(text)
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n|\n(?=[A-Z][^\n]{200})", text)]
    kept = [
        part for part in paragraphs if len(part) > 80 and _PROSE.search(part) and not part.startswith(("PEP:", ".."))
    ]
    return [Passage(named[1].strip() if named else title, part) for part in kept]


def _windows(passages: Sequence[Passage], room: int) -> list[list[Passage]]:
    windows: list[list[Passage]] = [[]]
    for passage in passages:
        if windows[-1] and sum(len(p.text) for p in windows[-1]) + len(passage.text) > room:
            windows.append([])
        windows[-1].append(passage)
    return windows


def _asked(window: Sequence[Passage], name: str, r: random.Random) -> Iterator[Case]:
    """One case for each rule with questions enough about these paragraphs."""
    from cribsheet_pocket_training.reading import TASKS

    by_rule: dict[str, list[Found]] = {}
    for question, passage in _questions(window, r):
        by_rule.setdefault(question.rule, []).append((question, passage))
    documents = [Document(passage.text, f"p{number}") for number, passage in enumerate(window, 1)]
    for rule, found in sorted(by_rule.items(), key=lambda each: (each[0] == "quote", -len(each[1]))):
        r.shuffle(found)
        shown, asked = _divided(found)
        if len(shown) == _EXAMPLES and len(asked) >= _LEAST:
            task = Task(TASKS[rule][0], tuple((q.text, q.answer) for q in shown))
            yield Case.of(f"{name}/{rule}", documents, task, [(q.text, q.answer, rule) for q in asked[:MOST_QUESTIONS]])


def _questions(window: Sequence[Passage], r: random.Random) -> list[Found]:
    """Different questions about different answers, as the rules and chance give them."""
    from cribsheet_pocket_training.reading import questions

    found: dict[tuple[str, str], Found] = {}
    for _ in range(_TIMES):
        for passage in window:
            for question in questions(passage, r):
                found.setdefault((question.rule, question.answer), (question, passage))
    return [(q, p) for q, p in found.values() if q.answer in p.text]


def _divided(found: Sequence[Found]) -> tuple[list[ReadingQuestion], list[ReadingQuestion]]:
    """Three examples, and the questions about other paragraphs that share no answer with them."""
    shown: list[ReadingQuestion] = []
    read: set[str] = set()
    for question, passage in found:
        if len(shown) == _EXAMPLES:
            break
        if len(question.answer) < 60:
            shown.append(question)
            read.add(passage.text)
    said = " ".join(f"{q.text} {q.answer}" for q in shown)
    left = [q for q, p in found if p.text not in read and q.answer not in said]
    return shown, [q for q in left if not any(example.answer in f"{q.text} {q.answer}" for example in shown)]
