"""A model that is asked many questions at once: what checks sheets, and what they practise on, comes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cribsheet.asking.answer import Answer
from cribsheet.asking.prepared import Prepared
from cribsheet.asking.session import Session
from cribsheet.asking.streams import AnswerStream
from cribsheet.attention.prefix import Prefix
from cribsheet.compress.loop import nothing_read
from cribsheet.corpus.task import Task
from cribsheet.engine.pool import LoadedModel
from cribsheet.engine.request import Suffix
from cribsheet.engine.sampling import SamplingParams
from cribsheet.model.backbone import Backbone
from cribsheet.prompt.template import ChatLayout
from cribsheet.retrieval.passages import GAP
from cribsheet.retrieval.placing import Told

_AT_ONCE = 256  # questions that are handed to the engine together; its queue holds more
_ROOM = 0.5  # share of a GPU's free memory that what stands before questions may take; buffers grow by doubling
_QUESTION_TOKENS, _ANSWER_TOKENS = 32, 32
_REQUEST = (
    "Ask a question about a detail in the text above, such as a name, a number, a date or a place. Name what the "
    "question is about, so that it can be understood without the text."
)
_SHORTLY = "Answer with a few words."

Way = Literal["user", "request"]  # whether a question is written in the user's place, or on request


@dataclass(frozen=True, slots=True, eq=False)
class Apart:
    """Tokens that were read alone, from the window's first position on: a prefix, or what stands ahead of a question.

    The `suffix` is all of them in each layer, also where the prefix of a sliding window has only their end.
    """

    prefix: Prefix
    suffix: Suffix

    @property
    def tokens(self) -> int:
        """How many."""
        return self.prefix.tokens

    def placed(self, start: int) -> Suffix:
        """Their keys and values where they were read."""
        assert start == 0
        return self.suffix

    @property
    def nbytes(self) -> int:
        """Of the suffix."""
        return sum(half.nbytes for pair in self.suffix for half in pair)


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
        prefix = self._nothing
        for part in parts:
            prefix, _ = self._read_on(prefix, part)
        return prefix

    def read_apart(self, part: Tensor, before: Apart | None = None) -> Apart:
        """Tokens (T,) plainly read, behind others or as the first."""
        before = before or Apart(self._nothing, [])
        prefix, read = self._read_on(before.prefix, part)
        if not before.suffix or not read:
            return Apart(prefix, before.suffix or read)
        both = zip(before.suffix, read, strict=True)
        return Apart(prefix, [(torch.cat([k, keys], 1), torch.cat([v, values], 1)) for (k, v), (keys, values) in both])

    def _read_on(self, prefix: Prefix, part: Tensor) -> tuple[Prefix, Suffix]:
        """A prefix with tokens (T,) behind it, and these alone."""
        if not len(part):
            return prefix, []
        read = self.backbone.read(prefix.layers, prefix.tokens, part, part[:0])
        new = [(each.chunk_keys, each.chunk_values) for each in read]
        layers = [layer.followed_by(*each) for layer, each in zip(prefix.layers, new, strict=True)]
        return Prefix(layers, prefix.tokens + len(part)), new

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
            text = _led(text, "Question:")
        return self.led(text, opening)

    def led(self, text: str, opening: str) -> Tensor:
        """Tokens (T,) of what follows the documents, and of the beginning of what is to be written after it."""
        return self.layout.encoder.after(_led(text, opening))

    def written(
        self,
        before: Prefix | Sequence[Apart],
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
        answers = self.answers(before, asked, [{**settings, "seed": seed + n} for n in range(len(asked))], most)
        return [
            "" if each is None or (stop and each.finish_reason != "stop") else each.text.strip() for each in answers
        ]

    def answers(
        self,
        before: Prefix | Sequence[Apart],
        asked: Sequence[Tensor],
        settings: Sequence[Mapping[str, Any]],
        most: int,
    ) -> list[Answer | None]:
        """Answers to tokens (T,) over one prefix, or each behind its own, with its settings.

        None where the window has no room for one.
        """
        found: list[Answer | None] = []
        prefix, ahead = (before, [None] * len(asked)) if isinstance(before, Prefix) else (self._nothing, before)
        self.loaded.enter(self)
        try:
            every = list(zip(asked, settings, ahead, strict=True))
            at_once = self._at_once(ahead)
            for first in range(0, len(every), at_once):
                streams = [self._stream(prefix, *each, most) for each in every[first : first + at_once]]
                self.loaded.engine.submit(*(stream.request(prefix) for stream in streams if stream))
                found += [_read(stream) if stream else None for stream in streams]
        finally:
            self.loaded.leave(self)
        return found

    def _at_once(self, ahead: Sequence[Apart | None]) -> int:
        """How many questions may be asked together: as many as a GPU has room for what is before each of them."""
        device = self.backbone.device
        if device.type != "cuda" or not any(ahead):
            return _AT_ONCE
        free = (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
        return max(1, min(_AT_ONCE, int(_ROOM * free / max(2 * each.nbytes for each in ahead if each))))

    def _stream(
        self, prefix: Prefix, ids: Tensor, settings: Mapping[str, Any], ahead: Apart | None, most: int
    ) -> AnswerStream | None:
        """A question for the engine, or none where the window leaves no room for an answer."""
        before = prefix.tokens + (ahead.tokens if ahead else 0)
        left = min(most, self.backbone.window - before - len(ids))
        if left < 1:
            return None
        params = SamplingParams(**settings, max_tokens=left)
        return AnswerStream(Prepared(Told(ids), prefix.tokens, params, ends=self.layout.stop, recalled=ahead))


def _led(text: str, opening: str) -> str:
    return f"{text}{'' if text[-1:].isspace() else ' '}{opening}"


def _read(stream: AnswerStream) -> Answer:
    """An answer, once it is there; an interrupt ends it."""
    with stream:
        for _ in stream:
            pass
    return stream.answer
