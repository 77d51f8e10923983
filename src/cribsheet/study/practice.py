"""What a sheet practises on: questions that the model makes of the documents, with its answers where it sees the text.

Stretch by stretch, with nothing else before it, the model writes questions about each sentence, begun with words that
it is given, so that they are not all of one kind; every other time it sees the task's own questions. The stretch
answers them with the guide as the sheet has it, and a question stays if that answer comes to an end, says something
new in words of the stretch, is not given closed book as well, and is not doubted by the model itself. Gaps in
sentences (`retention/gaps.py`) join them. The documents' own text, to be gone on with, is the rest, and some questions
about other things, so that the sheet does not come to answer everything out of its documents
(`study/asides.py`).

On a GPU several stretches are asked about at once: each question has the keys and values of its own stretch before it,
and all of them run as one batch over nothing, whose captured steps serve every stretch.

What is learnt of an answer is what the model would write at each of its tokens (`study/teacher.py`).
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cribsheet.asking.answer import Answer
from cribsheet.corpus.documents import Document
from cribsheet.engine.pool import LoadedModel
from cribsheet.errors import RequestError
from cribsheet.prompt.template import ChatLayout
from cribsheet.retention.exam import Apart, Exam
from cribsheet.retention.gaps import SENTENCE, gaps
from cribsheet.retention.probes import agree, is_apt, is_told, rare_words
from cribsheet.retrieval.passages import GAP
from cribsheet.retrieval.retriever import Passage, cut_into_passages, words
from cribsheet.sheet.sheet import Sheet
from cribsheet.study.asides import asides
from cribsheet.study.exercises import Draft, Exercise, Practice, practice_of
from cribsheet.study.teacher import Row, taught

logger = logging.getLogger(__name__)

_STRETCH = 2000  # characters that are read at once, of one document or of several short ones
_QUESTION_TOKENS, _ANSWER_TOKENS = 28, 48
_AT_ONCE = 2  # questions about a sentence that are tried in a round, so that all stretches have some when time is up
_AT_ONCE_ON_GPU = 8  # which writes many in the time of a few
_TOGETHER = 1  # stretches that are asked about at once: a processor gains nothing from more
_TOGETHER_ON_GPU = 4
ROUNDS = 3  # at least; more only while there is time
_WORTH = 0.25  # of what questions of the first round gave, which those of another must give for it not to be the last
_FIRST, _FEWEST = 12, 4  # questions about the first stretch, and about any, where time is short
_SHORTEST = 4  # words of a sentence
_LONGEST = 400  # characters of a sentence that are shown
_GAPS = 8  # of a stretch at most
_TEMPERATURE = 0.8
_DOUBT = -0.7  # mean log-probability of an answer's tokens below which it is not believed
_RARE = 0.25  # share of the stretches that a word which tells them apart is in at most
_KINDS = 3  # of requests, in turn: for a question about a sentence, one like the task's own, one about a whole stretch
_OF_STRETCH = 2
_ASIDES = 4  # questions for which there is one about something else
_CUE, _TEXT_TOKENS = (12, 20), 40  # tokens of a text that are shown, and that follow

_OPENINGS = (
    *("Who", "When", "What", "Which", "Where", "How many", "What is the name of", "In which", "Why", "How", "What was"),
    *("What did", "What kind of", "In what year", "What does", "Who was", "How much", "What is", "What are"),
    *("Which of", "By whom", "What happened", "Whose", "How long"),
)
_ASKED = (
    'Write one question that this sentence of the documents answers in a few words: "{}"\n\nWhoever gets the question '
    "does not see the sentence, so name what it is about. {}Write the question only."
)
_OF_ALL = (
    "Write one question that the documents above answer in a few words: about who does something, why, how, or what "
    "comes of it. {}\n\nWhoever gets the question does not see them next to it, so name what it is about. {}Write the "
    "question only."
)
_FOR = "The question is one for this task: {}"
_ALIKE = "Questions look like these: {}\n\n"
_MARKS = ("?", "？", "؟", ";", "\u037e")  # of questions; the last two are Greek
_GO_ON = "Continue the documents where they read: {}"


def make_practice(
    model: LoadedModel,
    layout: ChatLayout,
    sheet: Sheet,
    *,
    seed: int = 0,
    until: float | None = None,
    latest: float | None = None,
    least: int = 0,
    documents: Collection[str] = (),
    tell: Callable[[float], None] = lambda share: None,
    draft: Draft | None = None,
    keep: Callable[[Draft], None] = lambda draft: None,
) -> Practice:
    """Exercises about a sheet's documents: round after round `until` then (of `time.monotonic`), or as they give much.

    While there are fewer than `least` questions, it goes on until the `latest`. Without a time there are a few rounds,
    the same every time. `documents` are the ids of those that it is about, if not all. After each stretch there is a
    draft to `keep`, and from a `draft` it goes on.

    Raises `RequestError` if the sheet has no texts.
    """
    stretches = _stretches(_told(sheet, documents))
    exam = Exam(model, layout, sheet.task, resident=sheet.resident, form=sheet.manifest.form)
    maker = _Maker(exam, stretches, seed, draft)
    while len(maker.gave) < ROUNDS or (until is not None and maker.gave[-1] > _WORTH * maker.gave[0]):
        while maker.done < len(stretches):
            ends = until if len(maker.found) >= least else latest
            most = None if ends is None else _affordable(maker, ends, len(stretches) - maker.done)
            if most == 0:
                logger.info("time is up for practice after %d of %d stretches", maker.done, len(stretches))
                return maker.practice(practice_of(sheet, documents))
            maker.take(stretches[maker.done : maker.done + maker.together], len(maker.gave), most)
            maker.done = min(len(stretches), maker.done + maker.together)
            keep(maker.draft())
            tell(_share(maker.began, ends, len(maker.gave) + maker.done / len(stretches)))
        maker.end_round()
        logger.info("practice: %d questions after round %d", len(maker.found), len(maker.gave))
    return maker.practice(practice_of(sheet, documents))


class Tried(NamedTuple):
    """Some exercises about the longest stretch, what they say of practice, and of practice's end when time is up.

    questions
        of the exercises; the others are texts.
    each_round
        questions that a round tries.
    tried, seconds
        questions that the model wrote here, and what they took.
    rest
        seconds that texts and asides took on top of these, which come when the time for questions is up.
    """

    exercises: list[Exercise]
    questions: int
    each_round: int
    tried: int
    seconds: float
    rest: float


def try_out(model: LoadedModel, layout: ChatLayout, sheet: Sheet) -> Tried:
    """What practice will be like, from a few questions. Raises as `make_practice`."""
    stretches = _stretches(_told(sheet))
    exam = Exam(model, layout, sheet.task, resident=sheet.resident, form=sheet.manifest.form)
    maker = _Maker(exam, stretches, 0)
    longest = max(stretches, key=lambda stretch: len(stretch.text))
    maker.take([longest], 0, _FIRST)
    seconds = time.monotonic() - maker.began
    made = maker.practice(practice_of(sheet))
    sentences = sum(_says(sentence) for stretch in stretches for sentence in SENTENCE.split(stretch.text))
    exercises, rest = [*made.questions, *made.texts], made.seconds - seconds
    return Tried(exercises, len(made.questions), maker.at_once * sentences, made.tried, seconds, rest)


def _stretches(documents: Sequence[Document]) -> list[Passage]:
    """Documents in stretches; neighbours that fit one stand in it together: each costs a reading and a batch."""
    joined: list[Passage] = []
    for passage in cut_into_passages(documents, _STRETCH):
        if joined and len(joined[-1].text) + len(GAP) + len(passage.text) <= _STRETCH:
            joined[-1] = Passage(joined[-1].text + GAP + passage.text)
        else:
            joined.append(passage)
    return joined


def in_form(question: str, examples: Sequence[str]) -> str:
    """A question without its mark, or in small letters, if all the `examples` are; some scripts have no others."""
    if examples and not any(each.rstrip().endswith(_MARKS) for each in examples):
        question = question.rstrip("?？ ")
    if "".join(examples).islower():
        question = question.lower()
    return question


def _says(sentence: str) -> bool:
    """Whether there is something to be asked about a sentence."""
    return len(sentence.split()) >= _SHORTEST


def _share(began: float, until: float | None, rounds: float) -> float:
    """How much of practice is done after so many rounds, 0 to 1."""
    if until is None:
        return rounds / ROUNDS
    return min(1.0, (time.monotonic() - began) / max(1.0, until - began))


def _affordable(maker: _Maker, until: float, stretches: int) -> int:
    """How many questions about each of so many stretches there is time for: as long as one takes so far."""
    now = time.monotonic()
    if now > until:
        return 0
    if not maker.tried:
        return _FIRST
    each = (now - maker.began) / maker.tried
    return max(_FEWEST, int((until - now) / each / stretches))


def _told(sheet: Sheet, documents: Collection[str] = ()) -> list[Document]:
    if not sheet.texts:
        raise RequestError(
            "The sheet was saved without its documents' texts, and there is nothing to study; build it again and save "
            "it with them."
        )
    return [document for document in sheet.documents if not documents or document.id in documents]


class _Asked(NamedTuple):
    """A question, its right answer if that is known, and the number of its stretch among those asked about."""

    question: str
    right: str
    stretch: int


class _Maker:
    """Makes exercises of one stretch after the other, again and again: never the same question twice."""

    def __init__(self, exam: Exam, stretches: Sequence[Passage], seed: int, draft: Draft | None = None) -> None:
        self._exam, self._stretches, self._seed = exam, stretches, seed
        on_gpu = exam.backbone.device.type == "cuda"
        self.at_once, self.together = (_AT_ONCE_ON_GPU, _TOGETHER_ON_GPU) if on_gpu else (_AT_ONCE, _TOGETHER)
        self._random = random.Random(seed)
        self._guide, self._nothing = exam.guide, exam.read(torch.cat([exam.documents(""), exam.guide]))
        self._rare = rare_words(stretches, _RARE)
        self._examples = [question for question, _ in exam.task.examples]
        self._alike = _ALIKE.format(" / ".join(self._examples[:3])) if self._examples else ""
        self._for = _FOR.format(exam.task.description)
        self._taken = {" ".join(words(question)) for question in self._examples}
        self.found: list[Exercise] = []
        self.tried, self.began = 0, time.monotonic()
        self.left_out: Counter[str] = Counter()
        self.gave: list[float] = []  # questions by each that was tried, in each round that is finished
        self.done, self._counts = 0, (0, 0)  # stretches of this round; questions found and tried before it
        if draft is not None:
            self._random.setstate(draft.chance)
            self._taken = set(draft.taken)
            self.found, self.tried, self.left_out = list(draft.questions), draft.tried, draft.left_out.copy()
            self.gave, self.done, self._counts = list(draft.gave), draft.stretches, draft.counts
            self.began -= draft.seconds

    def draft(self) -> Draft:
        """How far it is."""
        seconds, chance = time.monotonic() - self.began, self._random.getstate()
        taken = sorted(self._taken)
        return Draft(self.found, self.tried, self.left_out, seconds, taken, self.gave, self._counts, self.done, chance)

    def end_round(self) -> None:
        """All stretches were asked about once more."""
        found, tried = self._counts
        self.gave.append((len(self.found) - found) / max(1, self.tried - tried))
        self.done, self._counts = 0, (len(self.found), self.tried)

    def take(self, stretches: Sequence[Passage], turn: int, most: int | None = None) -> None:
        """Ask some questions about each sentence of stretches, at most so many of each, and in the first round gaps."""
        exam = self._exam
        read = [exam.read_apart(exam.documents(stretch.text)) for stretch in stretches]
        asked = [_Asked(question, "", number) for number, question in self._asked(stretches, read, turn, most)]
        for number, stretch in enumerate(stretches) if turn == 0 else ():
            left = list(gaps(stretch, self._rare))
            self._random.shuffle(left)
            few = _GAPS if most is None else min(_GAPS, most)
            asked += [_Asked(gap.question, gap.answer, number) for gap in left[:few]]
        fresh = []
        for each in asked:
            said = " ".join(words(each.question))
            if said not in self._taken:
                self._taken.add(said)
                fresh.append(each)
        self.left_out["asked before"] += len(asked) - len(fresh)
        if fresh:
            self.found += self._answered(stretches, fresh, [exam.read_apart(self._guide, each) for each in read])

    def _asked(
        self, stretches: Sequence[Passage], read: Sequence[Apart], turn: int, most: int | None
    ) -> Iterator[tuple[int, str]]:
        """Questions about stretches that may be asked without them, each with the number of its stretch."""
        about: list[tuple[int, str, int]] = []  # stretch, how a question begins, and its kind
        begun: list[Tensor] = []
        for number, stretch in enumerate(stretches):
            for place, (sentence, opening) in enumerate(self._about(stretch, turn, most)):
                about.append((number, opening, place % _KINDS))
                begun.append(self._begun(sentence, opening, place % _KINDS))
        seed = self._seed + self.tried
        self.tried += len(begun)
        written = self._exam.written(
            [read[number] for number, *_ in about],
            begun,
            stop=("?", "？", "\n"),
            most=_QUESTION_TOKENS,
            temperature=_TEMPERATURE,
            seed=seed,
        )
        for (number, opening, kind), text in zip(about, written, strict=True):
            question = f"{opening} {text}?" if text else ""
            if kind:
                question = in_form(question, self._examples)
            if is_apt(question, stretches[number], self._rare):
                yield number, question
            else:
                self.left_out["not apt"] += 1

    def _about(self, stretch: Passage, turn: int, most: int | None) -> list[tuple[str, str]]:
        """Sentences of a stretch that are asked about, with how a question begins; at most so many."""
        every = [
            (sentence, opening)
            for sentence in SENTENCE.split(stretch.text)
            if _says(sentence)
            for opening in self._openings(sentence, turn)
        ]
        return every if most is None or most >= len(every) else self._random.sample(every, most)

    def _begun(self, sentence: str, opening: str, kind: int) -> Tensor:
        """The tokens (T,) of a request for a question of a kind, about a sentence or all, and of its beginning."""
        if kind == _OF_STRETCH:
            text = _OF_ALL.format(self._for, self._alike)
        else:
            text = _ASKED.format(sentence.strip()[:_LONGEST], self._alike if kind else "")
        turns = self._exam.layout.question([{"role": "user", "content": text}], self._exam.task, False)
        return self._exam.led(turns, opening)

    def _openings(self, sentence: str, turn: int) -> list[str]:
        """Those of a round for a sentence: others each time, until it has had them all."""
        order = list(_OPENINGS)
        random.Random(f"{self._seed}/{sentence}").shuffle(order)
        first = turn * self.at_once
        return [order[(first + number) % len(order)] for number in range(self.at_once)]

    def _answered(self, stretches: Sequence[Passage], asked: Sequence[_Asked], read: Sequence[Apart]) -> list[Exercise]:
        """Those of the questions that may serve, with what the stretch answers; gaps have their right answer."""
        exam = self._exam
        turns = [exam.turn(each.question) for each in asked]
        answers = exam.answers(
            [read[each.stretch] for each in asked], turns, [{"logprobs": 0}] * len(turns), _ANSWER_TOKENS
        )
        self.left_out["unended"] += answers.count(None)  # where the window has no room
        serving = [
            (each, turn, answer)
            for each, turn, answer in zip(asked, turns, answers, strict=True)
            if answer is not None and self._serves(each, answer, stretches[each.stretch])
        ]
        closed = exam.written(self._nothing, [turn for _, turn, _ in serving], most=_ANSWER_TOKENS)
        rows: list[list[Row]] = [[] for _ in stretches]
        for (each, turn, answer), known in zip(serving, closed, strict=True):
            if words(answer.text) == words(known):
                self.left_out["known"] += 1
                continue
            rows[each.stretch].append(Row.of(each.question, turn, answer))
        found = [taught(exam.backbone, read[number].prefix, own, _DOUBT) for number, own in enumerate(rows)]
        self.left_out["doubted"] += sum(map(len, rows)) - sum(map(len, found))
        return [exercise for own in found for exercise in own]

    def _serves(self, asked: _Asked, answer: Answer, stretch: Passage) -> bool:
        """Whether a stretch has answered so that something can be learnt from it."""
        if answer.finish_reason != "stop":
            why = "unended"
        elif not is_told(asked.question, answer.text, stretch):
            why = "not told"
        elif asked.right and not agree(asked.question, asked.right, answer.text):
            why = "wrong"
        else:
            return True
        self.left_out[why] += 1
        return False

    def practice(self, of: str) -> Practice:
        """All that was made, texts, and questions about other things."""
        texts, left_out = self._texts(), +self.left_out
        beside = asides(self._exam, self._nothing, len(self.found) // _ASIDES, seed=self._seed)
        return Practice(self.found, texts, self.tried, left_out, of, time.monotonic() - self.began, beside)

    def _texts(self) -> list[Exercise]:
        """As many texts to go on with as there are questions, but where a stretch is too short for one."""
        told = [(stretch.text, *self._exam.layout.encoder.left(stretch.text)) for stretch in self._stretches]
        texts = [self._text(*told[number % len(told)]) for number in range(len(self.found))]
        return [text for text in texts if text is not None]

    def _text(self, text: str, ids: Tensor, spans: Tensor) -> Exercise | None:
        """A place of a text, of which each token (T,) has a span (T, 2), to go on from."""
        shown = min(self._random.randint(*_CUE), len(ids) // 2)
        begin = self._random.randint(0, max(0, len(ids) - shown - _TEXT_TOKENS))
        target = ids[begin + shown : begin + shown + _TEXT_TOKENS].clone()  # files take no memory that is shared
        if len(target) < _TEXT_TOKENS // 4:
            return None
        cue = text[int(spans[begin, 0]) : int(spans[begin + shown - 1, 1])].strip()
        asked = self._exam.turn(_GO_ON.format(cue))
        return Exercise(torch.cat([asked, target]), len(asked), target[:, None], torch.ones(len(target), 1))
