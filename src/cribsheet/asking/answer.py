"""What comes back for a question, and conversations of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any, Literal, Unpack

from cribsheet.engine.request import FinishReason
from cribsheet.engine.sampling import TokenLogprob
from cribsheet.retrieval.retriever import Passage
from cribsheet.sheet.html import table
from cribsheet.structured.tools import ToolCall

if TYPE_CHECKING:
    from cribsheet.asking.options import AskOptions
    from cribsheet.prompt.template import Message

_TEXT = 60  # characters of an answer's text in a line
_SNIPPET = 160  # characters of a source in a table


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one answer; `cached_tokens` of the prompt are the sheet's or recalled, and were not read again.

    Both count positions of the model's window, of which a sheet may take more than it keeps tokens (`Sheet.length`).
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        """Prompt and answer."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Source:
    """A stretch of a document that an answer looked at; `weight` is its share of that attention, 0 to 1.

    One that was `retrieved` is a passage that was told, whole; where its retriever does not say where in the document
    it stands, and the sheet does not know either, `start` and `stop` count its own characters; its `metadata` are those
    that were retrieved with it. All others are of the sheet, the most attended place of a document, whose metadata
    stand in `sheet.manifest.documents`.
    """

    document_id: str
    start: int
    stop: int
    weight: float
    text: str
    retrieved: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer and how it came about; `str()` gives its text, without the calls of tools that are in `tool_calls`.

    `first_token_seconds` and `seconds` run from the moment of asking to the first text and to the end. `sources` are
    the documents that question and answer looked at most in the sheet, and every passage that was told, by weight.
    `mode` is how it was found: from the sheet, which it is too where "hybrid" found nothing to tell and "recall"
    nothing to fetch, from `passages` that were retrieved, from both, or from sheet and `passages` that were recalled as
    they had been read; `certainty`, 0 to 1, is how certain mode "auto" is that they add nothing.
    """

    text: str
    finish_reason: FinishReason | Literal["tool_calls"]
    usage: Usage
    seconds: float
    first_token_seconds: float
    logprobs: tuple[TokenLogprob, ...] | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    sources: tuple[Source, ...] = ()
    mode: Literal["sheet", "retrieval", "hybrid", "recall"] = "sheet"
    passages: tuple[Passage, ...] = ()
    certainty: float | None = None

    def __str__(self) -> str:
        """The text."""
        return self.text

    def __repr__(self) -> str:
        """The beginning of the text, why it ended, and how many sources it has."""
        text = self.text if len(self.text) <= _TEXT else self.text[: _TEXT - 1] + "…"
        sources = f"{len(self.sources)} source{'s' * (len(self.sources) != 1)}"
        calls = f", calls {', '.join(call.name for call in self.tool_calls)}" if self.tool_calls else ""
        ended = f"{self.finish_reason}, {self.usage.completion_tokens} tokens, {self.mode}, {sources}{calls}"
        return f"<Answer {text!r} ({ended})>"

    def _repr_html_(self) -> str:
        """The text, and the sources with the place in each that was looked at most, for notebooks."""
        text = f'<p style="white-space: pre-wrap">{escape(self.text)}</p>'
        rows = [
            (f"{source.weight:.0%}", escape(source.document_id), _place(source), escape(_snippet(source.text)))
            for source in self.sources
        ]
        return text + table(("attention", "document", "place", "text"), rows) if rows else text


def _place(source: Source) -> str:
    return f"{source.start:,}–{source.stop:,}{', retrieved' if source.retrieved else ''}"


def _snippet(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SNIPPET else line[: _SNIPPET - 1] + "…"


class Conversation:
    """Turns over one sheet; only the turns are remembered, the sheet is never written to."""

    def __init__(self, ask: Callable[..., Answer]) -> None:
        """`ask` answers the last of several turns: `CompressedKnowledgeLLM.ask`."""
        self._ask = ask
        self.messages: list[Message] = []

    def ask(self, question: str, **sampling: Unpack[AskOptions]) -> Answer:
        """Ask the next question; it and its answer are remembered once the answer is complete."""
        asked: Message = {"role": "user", "content": question}
        answer = self._ask([*self.messages, asked], **sampling)
        said: Message = {"role": "assistant", "content": answer.text}
        self.messages += [asked, {**said, "tool_calls": answer.tool_calls} if answer.tool_calls else said]
        return answer
