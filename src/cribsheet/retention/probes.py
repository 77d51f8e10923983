"""Probes: questions that show what a sheet has lost, with nothing of the questions to come in them.

The model writes them itself, each about one stretch of the documents that stands alone before it: in the user's place
of the conversation, where a task's examples show the form, or because it is asked to, whichever it is better at. A
question stays if the stretch alone answers it with words of its own, and names something that few other stretches do.
Those that the model answers the same with nothing before it are known: they say what it needs no documents for.
Examples that a task can spare are probes too. A small model writes few questions that may serve; where they are not
enough, something is left out of the documents' sentences by plain rules (`retention/gaps.py`), and the model asked for
it.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import islice

from cribsheet.corpus.documents import Document
from cribsheet.corpus.task import Task
from cribsheet.retention.exam import Exam, Way
from cribsheet.retention.gaps import gaps
from cribsheet.retrieval.content_words import new_in
from cribsheet.retrieval.retriever import Passage, cut_into_passages, words

logger = logging.getLogger(__name__)

PROBES = 24  # questions that are asked of a sheet
AGREEMENT = 0.5  # F1 in words from which two answers say the same
EXAMPLES_TO_SPARE = 8  # with so many examples, every fourth is held back
_STRETCH = 600  # characters that a question is written about
_SHORTEST = 60  # characters; less says nothing
_ROUNDS = 3  # of questions twice as many as are wanted
_WORTH = 0.25  # share of what is wanted that a round must give for another one to be worth its time
_COVERED = 0.8  # share of an answer's words that must stand in its stretch
_RARE = 0.25  # share of the stretches that a word which tells them apart is in at most
_LONGEST = 240  # characters of a question

_OPENINGS = ("What", "Who", "When", "Which", "Where", "How many", "What", "How", "Why")
_ABOUT_ITSELF = re.compile(
    r"\bof the following\b|\b(?:th(?:is|e|ese)|above|following|given) (?:\w+ )?"
    r"(?:passage|excerpt|paragraph|text|document|section|article|statement|question|task)s?\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Probe:
    """A question with two answers of the model: from its `stretch` alone (or an example's own), and `closed` book."""

    question: str
    answer: str
    closed: str = ""
    stretch: Passage | None = None

    @property
    def known(self) -> bool:
        """Whether the model needs no documents for it."""
        return agree(self.question, self.answer, self.closed)


def make_probes(
    exam: Exam,
    documents: Sequence[Document],
    count: int = PROBES,
    *,
    seed: int = 0,
    held: Sequence[tuple[str, str]] = (),
) -> list[Probe]:
    """At most `count` probes about the documents in their order, and behind them those that are `known`.

    Stretches are spread evenly over the documents; `seed` says which. `held` are examples that the exam's task does
    without: they come first. The same every time. There may be none: where the documents are short, or the model writes
    no question that its own answer bears out.
    """
    stretches = _spread(cut_into_passages(documents, _STRETCH), 2 * count, seed)
    shown = [question for question, _ in (*exam.task.examples, *held)]
    found = _judged(exam, [Probe(question, answer) for question, answer in held])
    written = [words(question) for question in shown]
    attempts = _attempts(stretches, exam.task, seed)
    rare = rare_words(stretches, _RARE)
    ways: Sequence[Way] = ("request", "user")
    for number in range(_ROUNDS):
        batch = list(islice(attempts, 2 * count))
        if not batch or sum(not probe.known for probe in found) >= count:
            break
        tries = [(stretch, opening, ways[(n + number) % len(ways)]) for n, (stretch, opening) in enumerate(batch)]
        asked = exam.questions([(stretch.text, opening, way) for stretch, opening, way in tries])
        kept: dict[str, tuple[Passage, Way]] = {}
        for (stretch, _, way), question in zip(tries, asked, strict=True):
            if words(question) not in written and is_apt(question, stretch, rare):
                written.append(words(question))
                kept[question] = stretch, way
        new = _judged(exam, _answered(exam, [(question, stretch) for question, (stretch, _) in kept.items()]))
        ways = _better(ways, Counter(kept[probe.question][1] for probe in new if not probe.known))
        logger.info("round %d: of %d questions %d may serve", number + 1, len(asked), len(new))
        found += new
        if number and len(new) < _WORTH * count:  # the first one only shows which way is better
            break
    missing = count - sum(not probe.known for probe in found)
    found += _of_gaps(exam, stretches, rare, missing, seed)
    fresh, known = ([probe for probe in found if probe.known is wanted] for wanted in (False, True))
    order = {stretch: number for number, stretch in enumerate(stretches)}
    fresh.sort(key=lambda probe: -1 if probe.stretch is None else order[probe.stretch])
    return _even(fresh, count) + known


def held_back(task: Task) -> tuple[Task, tuple[tuple[str, str], ...]]:
    """A task without the examples that it can spare, and those: every fourth of many, none of a few."""
    if len(task.examples) < EXAMPLES_TO_SPARE:
        return task, ()
    held = task.examples[3::4]
    return replace(task, examples=tuple(pair for pair in task.examples if pair not in held)), held


def agree(question: str, first: str, second: str) -> bool:
    """Whether two answers to a question say the same: equal words, or an F1 of at least `AGREEMENT`.

    Words of the question count only where an answer has no others: "Bo lives in Oslo" and "Bo lives in Rome" are
    nearly the same words.
    """
    mine, other = (Counter(words(answer)) for answer in (first, second))
    new, others = (Counter(new_in(answer, question)) for answer in (first, second))
    if new and others:
        mine, other = new, others
    shared, total = (mine & other).total(), mine.total() + other.total()
    return mine.total() > 0 and (mine == other or 2 * shared >= AGREEMENT * total)


def _of_gaps(exam: Exam, stretches: Sequence[Passage], rare: Set[str], missing: int, seed: int) -> list[Probe]:
    """Probes that are gaps in sentences, where so many are `missing`; about twice as many are tried."""
    each = [list(gaps(stretch, rare)) for stretch in stretches]
    turns = max(map(len, each), default=0)
    every = [own[(turn + seed) % len(own)] for turn in range(turns) for own in each if turn < len(own)]
    tried = every[: 2 * max(0, missing)]
    answers = exam.alone([(gap.stretch.text, gap.question) for gap in tried])
    right = [
        Probe(gap.question, answer, stretch=gap.stretch)
        for gap, answer in zip(tried, answers, strict=True)
        if agree(gap.question, answer, gap.answer)
    ]
    if tried:
        logger.info("of %d gaps in sentences %d may serve", len(tried), len(right))
    return _judged(exam, right)


def _answered(exam: Exam, asked: Sequence[tuple[str, Passage]]) -> list[Probe]:
    """Probes of questions that their stretches answer with words of their own."""
    answers = exam.alone([(stretch.text, question) for question, stretch in asked])
    return [
        Probe(question, answer, stretch=stretch)
        for (question, stretch), answer in zip(asked, answers, strict=True)
        if is_told(question, answer, stretch)
    ]


def _judged(exam: Exam, probes: Sequence[Probe]) -> list[Probe]:
    """The same with what the model answers to them closed book."""
    closed = exam.alone([("", probe.question) for probe in probes])
    return [replace(probe, closed=answer) for probe, answer in zip(probes, closed, strict=True)]


def rare_words(stretches: Sequence[Passage], share: float) -> set[str]:
    """Words that tell a stretch from others: in at most one, or in a small `share` of all."""
    spread = Counter(word for stretch in stretches for word in set(words(stretch.text)))
    return {word for word, places in spread.items() if places <= max(1, share * len(stretches))}


def is_apt(question: str, stretch: Passage, rare: Set[str]) -> bool:
    """Whether a question can stand without its stretch: it has a word of it that is `rare` elsewhere.

    Nor may it ask about the text as such.
    """
    if not question or len(question) > _LONGEST or _ABOUT_ITSELF.search(question):
        return False
    return not rare.isdisjoint(set(words(question)) & set(words(stretch.text)))


def is_told(question: str, answer: str, stretch: Passage) -> bool:
    """Whether an answer says something that the question does not, in words of the stretch."""
    new, told = new_in(answer, question), set(words(stretch.text))
    return bool(new) and sum(word in told for word in new) >= _COVERED * len(new)


def _spread(passages: Sequence[Passage], count: int, seed: int) -> list[Passage]:
    """At most so many passages that say something, evenly over all."""
    found = [passage for passage in passages if len(passage.text.strip()) >= _SHORTEST]
    return [found[(n * len(found) + seed % len(found)) // count] for n in range(count)] if len(found) > count else found


def _attempts(stretches: Sequence[Passage], task: Task, seed: int) -> Iterator[tuple[Passage, str]]:
    """What to write about, and in which words to begin: every stretch in turn, then all again with other openings."""
    openings = _openings(task)
    for turn in range(len(openings)):
        for number, stretch in enumerate(stretches):
            yield stretch, openings[(number + turn + seed) % len(openings)]


def _better(ways: Sequence[Way], served: Mapping[Way, int]) -> Sequence[Way]:
    """The ways that go on: one alone if it gave twice as many questions as the other."""
    best = max(ways, key=lambda way: served.get(way, 0))
    return (best,) if all(served.get(best, 0) >= 2 * served.get(way, 0) for way in ways if way != best) else ways


def _openings(task: Task) -> tuple[str, ...]:
    """The words that questions begin with: those of the examples, and ours unless these are of another language."""
    theirs = tuple(dict.fromkeys(question.split()[0] for question, _ in task.examples))
    ours = {opening.split()[0] for opening in _OPENINGS}
    return _OPENINGS if not theirs or ours & set(theirs) else theirs


def _even(probes: Sequence[Probe], count: int) -> list[Probe]:
    """At most so many of the probes: examples first, then the others evenly over the documents."""
    first, rest = ([probe for probe in probes if (probe.stretch is None) is wanted] for wanted in (True, False))
    left = max(0, count - len(first))
    if len(rest) > left:
        rest = [rest[n * len(rest) // left] for n in range(left)]
    return (first + rest)[:count]
