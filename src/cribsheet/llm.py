"""`CompressedKnowledgeLLM`: a local model and a prebuilt sheet, asked again and again."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import torch

from cribsheet import storage
from cribsheet.answer import Answer, Source, Usage
from cribsheet.answering import Delta, Event, Finished, Request, own_copy
from cribsheet.backbone import Backbone
from cribsheet.build import build_sheet
from cribsheet.documents import read_documents
from cribsheet.engine import Engine
from cribsheet.errors import EngineError, ModelError, RequestError
from cribsheet.evidence import attention_per_origin, find_sources
from cribsheet.fingerprint import fingerprint
from cribsheet.grammar import Constraint, Grammar, GrammarTokens
from cribsheet.prefix import Prefix
from cribsheet.sampling import SamplingParams, TokenLogprob
from cribsheet.sheet import Sheet
from cribsheet.task import Task
from cribsheet.template import ChatLayout, Message

Question = str | Sequence[Message]

_FORMS = {"json_schema": Grammar.json_schema, "regex": Grammar.regex, "choices": Grammar.choices}
_SETTINGS = {*SamplingParams.__dataclass_fields__, *_FORMS}


class LoadedModel:
    """A backbone with its engine; one per model, revision, device and dtype, shared by every sheet on it."""

    _alive: ClassVar[weakref.WeakValueDictionary[tuple[str, ...], LoadedModel]] = weakref.WeakValueDictionary()
    _lock: ClassVar[threading.RLock] = threading.RLock()

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.engine = Engine(backbone)
        self.users: weakref.WeakSet[CompressedKnowledgeLLM] = weakref.WeakSet()
        backbone.loaded = weakref.ref(self)

    @classmethod
    def get(cls, model: str | Path | Backbone | LoadedModel, **options: Any) -> LoadedModel:
        """The loaded model of that name, loading it at most once while anybody uses it.

        An option of none is an option not given. Raises `ModelError` for options to a model that is loaded already.
        """
        given = {name: value for name, value in options.items() if value is not None}
        if isinstance(model, (LoadedModel, Backbone)):
            if given:
                raise ModelError(
                    f"The model is loaded already, so {', '.join(sorted(given))} can no longer be set; give them to "
                    "Backbone.load, or pass the model's folder or name."
                )
            return model if isinstance(model, LoadedModel) else cls._of(model)
        with cls._lock:
            loaded = cls._alive.get(_key(model, given))
            if loaded is None:
                loaded = cls._alive[_key(model, given)] = cls(Backbone.load(model, **given))
                exact = {**given, "revision": loaded.backbone.revision}  # as a sheet asks for it
                cls._alive.setdefault(_key(model, exact), loaded)
            return loaded

    @classmethod
    def _of(cls, backbone: Backbone) -> LoadedModel:
        with cls._lock:
            return (backbone.loaded and backbone.loaded()) or cls(backbone)

    def enter(self, user: CompressedKnowledgeLLM) -> None:
        """Somebody uses the model; an engine that was closed for want of users is made anew."""
        with self._lock:
            self.users.add(user)
            if self.engine.closed:
                self.engine = Engine(self.backbone)

    def leave(self, user: CompressedKnowledgeLLM) -> None:
        """Somebody is done; the last one closes the engine."""
        with self._lock:
            self.users.discard(user)
            if not self.users:
                self.engine.close()


def _key(model: str | Path, options: Mapping[str, Any]) -> tuple[str, ...]:
    """What two requests for the same model have in common, however they are written."""
    place = Path(model).expanduser()
    name = str(place.resolve()) if place.is_dir() else str(model)
    said = {name: str(value).removeprefix("torch.") for name, value in options.items() if value is not None}
    return name, repr(sorted(said.items()))


class CompressedKnowledgeLLM:
    """A local model that answers from a sheet: no retrieval, no re-reading.

    Make one with `build` (from documents) or `load` (from a file). Safe to use from many threads and tasks at once:
    questions over the same sheet are answered as one batch.
    """

    def __init__(self, model: Backbone | LoadedModel, sheet: Sheet) -> None:
        """Attach `sheet` to a loaded model. Raises `MismatchError` if it was made with another one."""
        self._loaded = LoadedModel.get(model)
        self.sheet = sheet
        self._prefix: Prefix | None = None
        self._lock, self._closed = threading.Lock(), False
        self._streams: weakref.WeakSet[_Stream] = weakref.WeakSet()
        made = sheet.manifest
        self._layout = ChatLayout(self.backbone.tokenizer, system=made.system, options=made.template_options)
        made.fingerprint.check(fingerprint(self.backbone, self._layout))
        self._task = sheet.task
        self._loaded.enter(self)

    @classmethod
    def build(
        cls,
        documents: Any,
        task: Task | str | Mapping[str, Any] | Path | None = None,
        *,
        model: str | Path | Backbone | LoadedModel = "pocket",
        model_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Self:
        """Condense documents for a task and return the model that answers from them.

        `documents` is whatever `read_documents` takes: folders, files, texts, any framework's documents. `model` is a
        folder, a hub id, `"pocket"`, or a loaded `Backbone`; `model_options` (`device`, `dtype`, `revision`, ...) go to
        `Backbone.load`. All other options are those of `build_sheet`: `rate=` or `budget=`, `scorer`, `guide`,
        `chunk_tokens`, `system`, `dtype`, `seed`, `progress`.
        """
        read = read_documents(documents)
        purpose = Task.of(task)
        loaded = LoadedModel.get(model, **dict(model_options or {}))
        return cls(loaded, build_sheet(loaded.backbone, read, purpose, **options))

    @classmethod
    def load(
        cls, path: str | Path, *, model: str | Path | Backbone | LoadedModel | None = None, **model_options: Any
    ) -> Self:
        """Open a sheet file, with the model that made it or the one given; both must be the same weights."""
        sheet = storage.load(path)
        made = sheet.manifest.fingerprint
        if model is None:
            model = made.model
            model_options.setdefault("revision", made.revision)
        return cls(LoadedModel.get(model, **model_options), sheet)

    def save(self, path: str | Path, *, texts: bool = True) -> Path:
        """Write the sheet to one file, whole or not at all; `texts=False` leaves the documents' texts out."""
        return storage.save(self.sheet, path, texts=texts)

    def close(self) -> None:
        """Cancel this sheet's running answers and let go of its keys and values; safe to call twice.

        The model's engine ends with the last open sheet on it. Questions asked afterwards raise `EngineError`.
        """
        with self._lock:
            self._closed, self._prefix = True, None
            streams = list(self._streams)
        for stream in streams:
            stream.cancel()
        self._loaded.leave(self)

    def __enter__(self) -> Self:
        """The model with its sheet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    @property
    def backbone(self) -> Backbone:
        """The model underneath."""
        return self._loaded.backbone

    @property
    def room(self) -> int:
        """Tokens of the model's window that the sheet leaves for question and answer."""
        return self.backbone.window - self.sheet.tokens

    def ask(self, question: Question, **sampling: Any) -> Answer:
        """Answer a question, or the last turn of a conversation. `sampling` is that of `SamplingParams`.

        `json_schema=`, `regex=` or `choices=` give the answer a form, which it completes within `max_tokens`. Raises
        `RequestError` for a question that does not fit the window, or settings out of range.
        """
        with self.stream(question, **sampling) as stream:
            for _ in stream:
                pass
            return stream.answer

    def stream(self, question: Question, **sampling: Any) -> AnswerStream:
        """As `ask`, but the text as it is written: iterate for pieces of text, then read `.answer`.

        Leaving the `with` block, or `close()`, stops the work within one token.
        """
        stream = AnswerStream(self._ask_request(question, sampling))
        self._submit(stream)
        return stream

    def ask_many(self, question: Question, n: int, **sampling: Any) -> list[Answer]:
        """`n` answers to one question, sampled side by side; with a seed they are the same every time."""
        if n < 1:
            raise RequestError(f"n is {n}; ask for at least 1 answer.")
        streams = [AnswerStream(self._ask_request(question, sampling)) for _ in range(n)]
        for choice, stream in enumerate(streams):
            stream.request.choice = choice
        self._submit(*streams)
        for stream in streams:
            for _ in stream:
                pass
        return [stream.answer for stream in streams]

    def chat(self, messages: Sequence[Message], **sampling: Any) -> Answer:
        """Answer a conversation of `{"role": "user" | "assistant", "content": ...}` turns over the same prefix."""
        return self.ask(messages, **sampling)

    def conversation(self) -> Conversation:
        """A conversation that remembers its turns."""
        return Conversation(self)

    async def aask(self, question: Question, **sampling: Any) -> Answer:
        """`ask` without blocking the event loop; cancelling the task stops the work within one token."""
        stream = self.astream(question, **sampling)
        async for _ in stream:
            pass
        return stream.answer

    def astream(self, question: Question, **sampling: Any) -> AsyncAnswerStream:
        """`stream` for `async for` and `async with`; must be called inside a running event loop.

        The first question puts the sheet on the device, which happens in a thread of its own; what goes wrong then is
        raised by the stream.
        """
        loop = asyncio.get_running_loop()
        stream = AsyncAnswerStream(self._ask_request(question, sampling), loop)
        if self._prefix is not None:
            self._submit(stream)
        else:
            loop.run_in_executor(None, self._submit_later, stream)
        return stream

    def sources(self, question: Question, answer: Answer | str, *, limit: int = 3) -> list[Source]:
        """Which documents the answer looked at most, and where in them (see `evidence.py` for what that means)."""
        asked = self._question_ids(question)
        answered = self._layout.encoder.plain(str(answer)) if str(answer) else asked[-1:]
        mass = attention_per_origin(self.backbone, self.prefix, self.sheet, asked, answered)
        return find_sources(self.sheet, mass, limit)

    @property
    def prefix(self) -> Prefix:
        """The sheet on the model's device and in its dtype; made on first use and shared by all questions."""
        with self._lock:
            if self._closed:
                raise EngineError("This sheet is closed; load it again to ask more questions.")
            if self._prefix is None:
                device, dtype = self.backbone.device, self.backbone.dtype
                layers = [layer.restored(device, dtype) for layer in self.sheet.layers]
                self._prefix = Prefix(layers, self.sheet.tokens)
            return self._prefix

    def _submit(self, *streams: _Stream) -> None:
        """Hand questions to the engine, over the sheet."""
        prefix = self.prefix
        for stream in streams:
            stream.request.prefix = prefix
        with self._lock:
            if self._closed:
                raise EngineError("This sheet is closed; load it again to ask more questions.")
            self._streams.update(streams)
        self._loaded.engine.submit(*(stream.request for stream in streams))

    def _submit_later(self, stream: _Stream) -> None:
        try:
            self._submit(stream)
        except Exception as error:
            stream.request.sink(error)

    def _ask_request(self, question: Question, sampling: Mapping[str, Any]) -> Request:
        unknown = set(sampling) - _SETTINGS
        if unknown:
            known = ", ".join(sorted(_SETTINGS))
            raise RequestError(f"Unknown sampling settings {', '.join(sorted(unknown))}; use {known}.")
        given = {name: value for name, value in with_form(sampling).items() if value is not None}
        ids = self._question_ids(question)
        left = self.room - len(ids)
        if left < 1:
            raise RequestError(
                f"The question takes {len(ids)} tokens, but the model's window of {self.backbone.window} leaves "
                f"{self.room} beside the sheet of {self.sheet.tokens}; ask a shorter question or raise the rate."
            )
        params = SamplingParams(**given)
        if params.max_tokens > left:
            params = SamplingParams(**{**given, "max_tokens": left})
        unplaced = Prefix((), self.sheet.tokens)
        return Request(unplaced, ids, params, sink=_unset, ends=self._layout.stop, constraint=self._constraint(params))

    def _constraint(self, params: SamplingParams) -> Constraint | None:
        if params.grammar is None:
            return None
        backbone = self.backbone
        tokens = GrammarTokens.of(backbone.tokenizer, backbone.eos_ids, backbone.config.vocab_size)
        return Constraint(params.grammar, tokens, params.max_tokens)

    def _question_ids(self, question: Question) -> torch.Tensor:
        turns = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
        for turn in turns:
            given = isinstance(turn, Mapping) and isinstance(turn.get("role"), str)
            if not given or not isinstance(turn.get("content"), str):
                raise RequestError(f"A turn is {turn!r}; give a mapping with the texts 'role' and 'content'.")
        if not turns or not turns[-1]["content"].strip():
            raise RequestError("The question is empty; ask something.")
        if turns[-1]["role"] == "assistant":
            raise RequestError("The last turn is the assistant's, so there is nothing to answer; end with a question.")
        text = self._layout.question(turns, self._task, self.sheet.resident)
        return self._layout.encoder.after(text)


class _Stream:
    """What a caller holds while an answer is written; shared by the sync and async forms."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._began = time.perf_counter()
        self._first = 0.0
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._answer: Answer | None = None

    @property
    def answer(self) -> Answer:
        """The whole answer, once the stream has ended."""
        if self._answer is None:
            raise RequestError("The answer is not finished; read the stream to its end first.")
        return self._answer

    def cancel(self) -> None:
        """Stop within one token; the stream then ends with finish reason "cancelled"."""
        self.request.cancel()

    def __del__(self) -> None:
        """A stream that nobody holds any more stops the work too."""
        if self._answer is None:
            self.cancel()

    def _take(self, event: Event) -> str | None:
        """The text of an event, or none when the answer is complete; errors are raised here."""
        if isinstance(event, BaseException):
            self._answer = self._finish(Finished("cancelled", 0))
            raise own_copy(event)
        if isinstance(event, Finished):
            self._answer = self._finish(event)
            return None
        self._first = self._first or time.perf_counter() - self._began
        self._texts.append(event.text)
        self._logprobs.extend(event.logprobs)
        return event.text

    def _finish(self, end: Finished) -> Answer:
        cached, asked = self.request.prefix.tokens, len(self.request.question)
        seconds = time.perf_counter() - self._began
        return Answer(
            text="".join(self._texts),
            finish_reason=end.reason,
            usage=Usage(cached + asked, cached, end.completion_tokens),
            seconds=seconds,
            first_token_seconds=self._first or seconds,
            logprobs=None if self.request.params.logprobs is None else tuple(self._logprobs),
        )


class AnswerStream(_Stream):
    """Iterate for pieces of text as they are written; `.answer` is complete afterwards."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        request.sink = self._events.put

    def __iter__(self) -> Iterator[str]:
        """Pieces of text; never empty ones."""
        return self

    def __next__(self) -> str:
        """The next piece of text, waiting for it; several readers share the pieces and all see the end."""
        while self._answer is None:
            event = self._events.get()
            if not isinstance(event, Delta):
                self._events.put(event)
            text = self._take(event)
            if text:
                return text
        raise StopIteration

    def close(self) -> None:
        """Stop the work if it still runs; safe to call twice and from any thread."""
        if self._answer is None:
            self.cancel()

    def __enter__(self) -> Self:
        """The stream itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the work if it still runs."""
        self.close()


class AsyncAnswerStream(_Stream):
    """`AnswerStream` for `async for`."""

    def __init__(self, request: Request, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(request)
        self._events = events = asyncio.Queue[Event]()
        request.sink = lambda event: _hand_over(loop, events, event)

    def __aiter__(self) -> AsyncIterator[str]:
        """Pieces of text; never empty ones."""
        return self

    async def __anext__(self) -> str:
        """The next piece of text."""
        while self._answer is None:
            try:
                event = await self._events.get()
            except asyncio.CancelledError:
                self.cancel()
                raise
            if not isinstance(event, Delta):
                self._events.put_nowait(event)
            text = self._take(event)
            if text:
                return text
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Stop the work if it still runs."""
        if self._answer is None:
            self.cancel()

    async def __aenter__(self) -> Self:
        """The stream itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the work if it still runs."""
        await self.aclose()


class Conversation:
    """Turns over one sheet; only the turns are remembered, the sheet is never written to."""

    def __init__(self, llm: CompressedKnowledgeLLM) -> None:
        self._llm = llm
        self.messages: list[Message] = []

    def ask(self, question: str, **sampling: Any) -> Answer:
        """Ask the next question; it and its answer are remembered once the answer is complete."""
        asked: Message = {"role": "user", "content": question}
        answer = self._llm.chat([*self.messages, asked], **sampling)
        self.messages += [asked, {"role": "assistant", "content": answer.text}]
        return answer


def with_form(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling settings with `json_schema`, `regex` or `choices` turned into the grammar that they stand for."""
    wanted = {name: sampling[name] for name in (*_FORMS, "grammar") if sampling.get(name) is not None}
    if len(wanted) > 1:
        raise RequestError(f"An answer has one form, but {' and '.join(wanted)} were given; pass one of them.")
    rest = {name: value for name, value in sampling.items() if name not in _FORMS}
    for name, value in wanted.items():
        rest["grammar"] = value if name == "grammar" else _FORMS[name](value)
    return rest


def _hand_over(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(events.put_nowait, event)


def _unset(event: Event) -> None:
    raise RequestError(f"nobody listens to {event!r}")
