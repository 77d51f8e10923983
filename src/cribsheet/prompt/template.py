"""Where the sheet ends and the question begins: the exact cut through what a chat template renders.

The documents stand inside the first user turn, because that is the one place that every template has:

    preamble  what the template writes before the documents, with the task's instruction
    corpus    the documents
    guide     task line and examples, as turns of the same conversation (when it is resident)
    question  the user's text and what the template writes after it, up to the answer

Cuts are found by rendering marker words, which nothing else in the conversation holds, and are verified by rendering
the real text: a template that rewrites what stands left of the question (some fold newlines or move the system text) is
refused, never silently approximated.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

from jinja2 import TemplateError as JinjaError

from cribsheet.corpus.formats.record import mending_of, surrogate_in
from cribsheet.corpus.task import Task
from cribsheet.errors import TemplateError
from cribsheet.prompt.encoder import Encoder

Message = Mapping[str, Any]

_MARKER = "CribsheetMarker"
_MARKERS = re.compile(rf"{_MARKER.lower()}(\d+)x")
_GAP = "\n\n"
_REPEAT = "Repeat the documents."
_GREETING = "Hello."  # the user's turn that comes before an answer to nothing: a bot's welcome, the rest of a long talk

# For models that come without a chat template (base models).
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}Answer: {{ message.content }}\n\n"
    "{% else %}{{ message.content }}\n\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)


@dataclass(frozen=True, slots=True)
class GuideTexts:
    """The text after the corpus whose attention decides what is kept.

    `scored` is what is read after each chunk. `resident` is the exact left part of a conversation that continues
    after it, for sheets that keep the guide.
    """

    scored: str
    resident: str


class ChatLayout:
    """One tokenizer's chat template and the cuts through it.

    `options` are passed to the template (`enable_thinking`, for one); `system` is an optional system text that
    becomes part of the sheet.
    """

    def __init__(self, tokenizer: Any, *, system: str = "", options: Mapping[str, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        self.encoder = Encoder(tokenizer)
        self.system = _system_text(system)
        try:
            self.options: dict[str, Any] = json.loads(json.dumps(dict(options or {}), ensure_ascii=False).encode())
        except (TypeError, ValueError) as error:
            raise TemplateError(f"The template options {options!r} do not fit into a sheet: {error}") from error
        self.plain = not getattr(tokenizer, "chat_template", None)
        self.template: str = PLAIN_TEMPLATE if self.plain else tokenizer.get_chat_template()

    @property
    def digest(self) -> str:
        """What the rendering depends on, besides the texts."""
        parts = [self.template, self.system, repr(sorted(self.options.items()))]
        return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]

    @property
    def stop(self) -> tuple[str, ...]:
        """Stop strings that the layout itself needs: a base model does not know when its answer is over.

        Such a model may also begin with a blank line, which is neither the answer's end nor a part of it.
        """
        return (_GAP,) if self.plain else ()

    def preamble(self, instruction: str) -> str:
        """What stands before the first document. Raises `TemplateError` if no exact cut exists."""
        return self._cut([_user(self._marker([], instruction))], instruction)[0]

    def guide(self, task: Task) -> GuideTexts:
        """Task line and examples as they stand after the documents."""
        resident = self._before_next(self._guide_turns(task), task.instruction)
        if task.few_shot:
            return GuideTexts(scored=resident, resident=resident)
        # A bare task line ends where the model would start to plan its answer: the end of the user's turn.
        return GuideTexts(scored=self._cut([_user(_task_line(task))], task.instruction)[1], resident=resident)

    def repeat(self, task: Task, after: Literal["documents", "guide"]) -> str:
        """The turn that asks to repeat the documents, ready for the answer: they are then read as the assistant's.

        In the user's turn a model has no reason to repeat anything, and looks elsewhere.
        """
        turns = self._guide_turns(task) if after == "guide" else []
        left = self._before_next(turns, task.instruction)
        return self._cut([*turns, _user(_REPEAT)], task.instruction)[1][len(left) :]

    def _before_next(self, turns: Sequence[Message], instruction: str) -> str:
        """What turns render to after the documents, up to the text of the user's next turn.

        Tokenizers join a space to the word that follows it, so it goes with that text.
        """
        question = self._marker(turns, instruction)
        return self._cut([*turns, _user(question)], instruction)[1].split(question)[0].rstrip(" ")

    def question(self, turns: Sequence[Message], task: Task, resident: bool) -> str:
        """The rendered text after the sheet for a conversation of `turns` (role and content), ready for the answer.

        One that begins with the assistant's turn gets a greeting of the user before it, for documents and guide end
        inside of the user's. Raises `TemplateError` when the template would change what is already in the sheet.
        """
        turns = [{**turn, "content": str(turn["content"]).strip()} for turn in turns]
        if turns and turns[0]["role"] == "assistant":
            turns = [_user(_GREETING), *turns]
        opening = self._guide_turns(task) if resident else []
        after = self._cut([*opening, *turns], task.instruction)[1]
        left = self.guide(task).resident if resident else ""
        if not after.startswith(left):
            raise TemplateError(_rewrites("the task and examples", left, after))
        return after[len(left) :]

    def verify(self, preamble: str, corpus: str, guide: str, task: Task) -> None:
        """Render the real documents and refuse a template that changes anything left of the question."""
        guided = self._guide_turns(task) if guide else []
        question = self._marker(guided, task.instruction)
        turns = [*guided, _user(question)]
        later = [*turns, {"role": "assistant", "content": "Yes."}, _user("And then?")]
        expected = preamble + corpus + _GAP + guide
        for conversation in (turns, later):
            rendered = self._render(_merged(conversation, task.instruction, corpus))
            after = rendered.removeprefix(expected)
            if after == rendered or not after.lstrip(" ").startswith(question):
                raise TemplateError(_rewrites("the documents", expected, rendered))

    def _guide_turns(self, task: Task) -> list[Message]:
        line = _task_line(task)
        if not task.few_shot:
            return [_user(line)]
        turns: list[Message] = []
        for number, (question, answer) in enumerate(task.examples):
            turns.append(_user(f"{line}{_GAP}{question}" if number == 0 else question))
            turns.append({"role": "assistant", "content": answer})
        return turns

    def _cut(self, turns: Sequence[Message], instruction: str) -> tuple[str, str]:
        """(text before the corpus, text after the gap that follows it) of a rendered conversation."""
        corpus = self._marker(turns, instruction)
        rendered = self._render(_merged(turns, instruction, corpus))
        preamble, marker, after = rendered.partition(corpus)
        if not marker or corpus in after or not after.startswith(_GAP):
            raise TemplateError(_rewrites("the first user turn", f"…{corpus}{_GAP}…", rendered))
        return preamble, after[len(_GAP) :]

    def _marker(self, turns: Sequence[Message], *texts: str) -> str:
        """A word that stands nowhere else in a conversation: in no turn or text, nor in what the layout is made of."""
        told = json.dumps([self.template, self.system, self.options, list(turns), texts], default=str).lower()
        taken = set(_MARKERS.findall(told))  # in one pass, for a question may hold thousands of them
        return next(f"{_MARKER}{number}x" for number in map(str, count()) if number not in taken)

    def _render(self, messages: list[dict[str, Any]]) -> str:
        if self.system:
            messages = [{"role": "system", "content": self.system}, *messages]
        messages = [{**message, "content": self.encoder.defuse(message["content"])} for message in messages]
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=True,
                **self.options,
            )
        except (JinjaError, TypeError, ValueError) as error:
            raise TemplateError(f"The chat template cannot render this conversation: {error}") from error
        return text


def _system_text(system: object) -> str:
    if not isinstance(system, str):
        raise TemplateError(f"The system text is {system!r}, which is no text; put it in quotes.")
    if found := surrogate_in(system):
        raise TemplateError(f"The system text holds {found}, which no encoding can store; {mending_of(found)}.")
    return system.strip()


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _task_line(task: Task) -> str:
    """What the user's turn says of the task."""
    return f"Task: {task.line}"


def _merged(turns: Sequence[Message], instruction: str, corpus: str) -> list[dict[str, Any]]:
    """The conversation with instruction and corpus in its first user turn; neighbours of one role are joined.

    Joining serves templates that insist on alternating roles; system turns that come after the sheet join the user
    turn that follows.
    """
    opening = f"{instruction}{_GAP}{corpus}" if instruction else corpus
    messages: list[dict[str, Any]] = [{"role": "user", "content": opening}]
    for turn in turns:
        role = "user" if turn["role"] == "system" else turn["role"]
        if role == messages[-1]["role"] and role in ("user", "assistant"):
            messages[-1]["content"] += _GAP + turn["content"]
        else:
            messages.append({**turn, "role": role})
    return messages


def _rewrites(what: str, expected: str, rendered: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(expected, rendered, strict=False)) if a != b), 0)
    return (
        f"The chat template rewrites {what}: expected {expected[at : at + 40]!r} but it renders "
        f"{rendered[at : at + 40]!r}. A sheet must be the exact left part of every prompt; pass a template that "
        "inserts contents as they are (`chat_template=` of the tokenizer), or leave out the system text."
    )
