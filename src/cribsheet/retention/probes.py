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
from typing import Any, Literal

import torch
from torch import Tensor

from cribsheet.asking.answer import Answer
from cribsheet.asking.prepared import Prepared
from cribsheet.asking.session import Session
from cribsheet.asking.streams import AnswerStream
from cribsheet.attention.prefix import Prefix
from cribsheet.compress.loop import nothing_read
from cribsheet.corpus.documents import Document
from cribsheet.corpus.task import Task
from cribsheet.engine.pool import LoadedModel
from cribsheet.engine.sampling import SamplingParams
from cribsheet.model.backbone import Backbone
from cribsheet.prompt.template import ChatLayout
from cribsheet.retention.gaps import gaps
from cribsheet.retrieval.content_words import new_in
from cribsheet.retrieval.passages import GAP
from cribsheet.retrieval.placing import Told
from cribsheet.retrieval.retriever import Passage, cut_into_passages, words

logger = logging.getLogger(__name__)

PROBES = 24  # questions that are asked of a sheet
AGREEMENT = 0.5  # F1 in words from which two answers say the same
EXAMPLES_TO_SPARE = 8  # with so many examples, every fourth is held back
_STRETCH = 600  # characters that a question is written about
_SHORTEST = 60  # characters; less says nothing
_QUESTION_TOKENS, _ANSWER_TOKENS = 32, 32
_ROUNDS = 3  # of questions twice as many as are wanted
_WORTH = 0.25  # share of what is wanted that a round must give for another one to be worth its time
_AT_ONCE = 64  # questions that are handed to the engine together
_COVERED = 0.8  # share of an answer's words that must stand in its stretch
_RARE = 0.25  # share of the stretches that a word which tells them apart is in at most
_LONGEST = 240  # characters of a question

_OPENINGS = ("What", "Who", "When", "Which", "Where", "How many", "What", "How", "Why")
_REQUEST = (
    "Ask a question about a detail in the text above, such as a name, a number, a date or a place. Name what the "
    "question is about, so that it can be understood without the text."
)
_SHORTLY = "Answer with a few words."
_ABOUT_ITSELF = re.compile(
    r"\bof the following\b|\b(?:th(?:is|e|ese)|above|following|given) (?:\w+ )?"
    r"(?:passage|excerpt|paragraph|text|document|section|article|statement|question|task)s?\b",
    re.IGNORECASE,
)

Way = Literal["user", "request"]  # whether a question is written in the user's place, or on request


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


class Exam:
    """A model that is asked many questions at once, over any prefix, in the form in which a sheet would be asked.

    Where the guide is `resident`, task line and examples, or their `form`, stand before every question; without
    examples, each question asks for a short answer, as long ones cannot be compared.
    """

    def __init__(
        self, model: Backbone | LoadedModel, layout: ChatLayout, task: Task, *, resident: bool = True, form: str = ""
    ) -> None:
        self.loaded = LoadedModel.get(model)
        self.layout, self.task, self.resident, self._shown = layout, task, resident, task.shown(form)
        self._nothing = Prefix(nothing_read(self.backbone), 0)

    @classmethod
    def of(cls, session: Session) -> Exam:
        """That of an open sheet: `Exam.of(kb.session)`."""
        sheet = session.sheet
        return cls(session.loaded, session.layout, sheet.task, resident=sheet.resident, form=sheet.manifest.form)

    @property
    def backbone(self) -> Backbone:
        """The model that is asked."""
        return self.loaded.backbone

    @property
    def guide(self) -> Tensor:
        """Tokens (T,) of task line and examples as they stand after the documents; none if they are dropped."""
        guide = self.layout.guide(self._shown).resident if self.resident else ""
        return self.layout.encoder.after(guide, continues=True)

    @property
    def opening(self) -> str:
        """What the template writes before the first document."""
        return self.layout.preamble(self.task.instruction)

    def read(self, *parts: Tensor) -> Prefix:
        """Tokens (T,) plainly read, one part after the other."""
        layers, done = nothing_read(self.backbone), 0
        for part in parts:
            if not len(part):
                continue
            read = self.backbone.read(layers, done, part, part[:0])
            layers = [old.followed_by(new.chunk_keys, new.chunk_values) for old, new in zip(layers, read, strict=True)]
            done += len(part)
        return Prefix(layers, done)

    def over(self, prefix: Prefix, questions: Sequence[str]) -> list[str]:
        """Answers of a prefix, in which the guide stands already if it is resident."""
        return self.written(prefix, [self._after(question) for question in questions])

    def alone(self, asked: Sequence[tuple[str, str]]) -> list[str]:
        """Answers to questions, each with a text, or nothing, where the documents would stand."""
        guide = self.guide
        return self.written(
            self._nothing,
            [torch.cat([self.documents(text), guide, self._after(question)]) for text, question in asked],
        )

    def questions(self, asked: Sequence[tuple[str, str, Way]]) -> list[str]:
        """Questions about texts, each begun with an opening; empty where none came to its end."""
        begun = [torch.cat([self.documents(text), self._begun(opening, way)]) for text, opening, way in asked]
        written = self.written(self._nothing, begun, stop=("?", "？", "\n"), most=_QUESTION_TOKENS)
        pairs = zip(asked, written, strict=True)
        return [f"{opening} {text}?" if text else "" for (_, opening, _), text in pairs]

    def _after(self, question: str) -> Tensor:
        text = question if self.task.few_shot else f"{question} {_SHORTLY}"
        return self.turn(text)

    def turn(self, text: str) -> Tensor:
        """Tokens (T,) of a user's turn, as they follow documents and guide."""
        turns = [{"role": "user", "content": text}]
        return self.layout.encoder.after(self.layout.question(turns, self._shown, self.resident))

    def documents(self, text: str) -> Tensor:
        """Tokens (T,) of the preamble and of a text, or nothing, where the documents would stand."""
        encoder = self.layout.encoder
        return encoder.left(self.opening + (encoder.defuse(text) + GAP if text else ""))[0]

    def _begun(self, opening: str, way: Way) -> Tensor:
        """The beginning of a question (T,): in the user's next turn, or in the answer to a request."""
        layout = self.layout
        if way == "user":
            text = layout.guide(self.task).resident
        else:  # right behind the text: small models write about what they read last
            text = layout.question([{"role": "user", "content": _REQUEST}], self.task, False)
            text += f"{'' if text[-1:].isspace() else ' '}Question:"
        return layout.encoder.after(f"{text}{'' if text[-1:].isspace() else ' '}{opening}")

    def written(
        self,
        prefix: Prefix,
        asked: Sequence[Tensor],
        *,
        stop: tuple[str, ...] = (),
        most: int = _ANSWER_TOKENS,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """What the model writes after tokens (T,) over a prefix; nothing where it comes to no `stop`.

        The most probable tokens, or at a `temperature` such as the `seed` draws, each time others for each of `asked`.
        """
        settings = {"stop": stop, "temperature": temperature}
        answers = self.answers(prefix, asked, [{**settings, "seed": seed + n} for n in range(len(asked))], most)
        return [
            "" if each is None or (stop and each.finish_reason != "stop") else each.text.strip() for each in answers
        ]

    def answers(
        self, prefix: Prefix, asked: Sequence[Tensor], settings: Sequence[Mapping[str, Any]], most: int
    ) -> list[Answer | None]:
        """Answers to tokens (T,) over a prefix, each with its settings; none where the window has no room for one."""
        found: list[Answer | None] = []
        self.loaded.enter(self)
        try:
            for first in range(0, len(asked), _AT_ONCE):
                pairs = zip(asked[first : first + _AT_ONCE], settings[first : first + _AT_ONCE], strict=True)
                streams = [self._stream(prefix, ids, each, most) for ids, each in pairs]
                self.loaded.engine.submit(*(stream.request(prefix) for stream in streams if stream))
                found += [_read(stream) if stream else None for stream in streams]
        finally:
            self.loaded.leave(self)
        return found

    def _stream(self, prefix: Prefix, ids: Tensor, settings: Mapping[str, Any], most: int) -> AnswerStream | None:
        """A question for the engine, or none where the window leaves no room for an answer."""
        left = min(most, self.backbone.window - prefix.tokens - len(ids))
        if left < 1:
            return None
        params = SamplingParams(**settings, max_tokens=left)
        return AnswerStream(Prepared(Told(ids), prefix.tokens, params, ends=self.layout.stop))


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


def _read(stream: AnswerStream) -> Answer:
    """An answer, once it is there; an interrupt ends it."""
    with stream:
        for _ in stream:
            pass
    return stream.answer
