"""Questions about other things than a sheet's documents, with what the model answers where it has none.

A sheet that has practised nothing but its documents answers everything out of them (docs/decisions/0028). Here the
model asks itself about subjects of all kinds, with nothing before it, and answers so: those answers are to stay.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from cribsheet.attention.prefix import Prefix
from cribsheet.retention.exam import Exam
from cribsheet.retrieval.retriever import words
from cribsheet.study.exercises import Exercise
from cribsheet.study.teacher import Row, taught

_SUBJECTS = (
    *("a river", "a war", "a king or queen", "a novel", "a film", "a song", "a painter", "an animal", "a plant"),
    *("a disease", "a city", "a language", "a sport", "a planet", "a chemical element", "an invention", "a machine"),
    *("a law", "a company", "a religion", "a dish", "a number", "a word", "a computer program", "a building"),
    *("a mountain", "a scientist", "a bone of the body", "a currency", "a ship", "a holiday", "a tool"),
)
_OPENINGS = ("What", "Who", "When", "Where", "Which", "How many", "Why", "How")
_ASKED = "Write one short question about {}, as a stranger would ask it. Write the question only."
_QUESTION_TOKENS, _ANSWER_TOKENS = 28, 48
_TEMPERATURE = 0.8


def asides(exam: Exam, nothing: Prefix, count: int, *, seed: int = 0) -> list[Exercise]:
    """At most so many exercises; `nothing` are preamble and guide without documents. The same every time."""
    asked = list(_requests(count, seed))
    if not asked:
        return []
    begun = [exam.led(_request(exam, subject), opening) for subject, opening in asked]
    written = exam.written(
        exam.read(exam.documents("")),
        begun,
        stop=("?", "？", "\n"),
        most=_QUESTION_TOKENS,
        temperature=_TEMPERATURE,
        seed=seed,
    )
    pairs = zip(asked, written, strict=True)
    questions = {" ".join(words(text)): f"{opening} {text}?" for (_, opening), text in pairs if text}.values()
    turns = [exam.turn(question) for question in questions]
    answers = exam.answers(nothing, turns, [{"logprobs": 0}] * len(turns), _ANSWER_TOKENS)
    rows = [
        Row.of(question, turn, answer)
        for question, turn, answer in zip(questions, turns, answers, strict=True)
        if answer is not None and answer.finish_reason == "stop" and answer.text.strip()
    ]
    return taught(exam.backbone, nothing, rows, float("-inf"))


def _requests(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Subjects, each with how a question begins: all of them before one comes again."""
    chance = random.Random(seed)
    subjects: list[str] = []
    for _ in range(count):
        if not subjects:
            subjects = chance.sample(_SUBJECTS, len(_SUBJECTS))
        yield subjects.pop(), chance.choice(_OPENINGS)


def _request(exam: Exam, subject: str) -> str:
    return exam.layout.question([{"role": "user", "content": _ASKED.format(subject)}], exam.task, False)
