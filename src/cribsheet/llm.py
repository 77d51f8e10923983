"""`CompressedKnowledgeLLM`: a local model and a prebuilt sheet, asked again and again."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import torch

from cribsheet import storage
from cribsheet.answer import Answer, Source
from cribsheet.answering import Event, Request
from cribsheet.backbone import Backbone
from cribsheet.build import build_sheet
from cribsheet.documents import read_documents
from cribsheet.errors import EngineError, RequestError
from cribsheet.evidence import attention_per_origin, find_sources
from cribsheet.fingerprint import fingerprint
from cribsheet.grammar import Constraint, Grammar
from cribsheet.grammar_tokens import GrammarTokens
from cribsheet.handover import integration
from cribsheet.loaded import LoadedModel
from cribsheet.prefix import Prefix
from cribsheet.registry import resolve
from cribsheet.sampling import SamplingParams
from cribsheet.sheet import Sheet
from cribsheet.streams import AnswerStream, AsyncAnswerStream, Stream
from cribsheet.task import Task
from cribsheet.template import ChatLayout, Message
from cribsheet.tools import Toolbox
from cribsheet.turns import Question, as_turns

_FORMS = {"json_schema": Grammar.json_schema, "regex": Grammar.regex, "choices": Grammar.choices}
_TOOLS = ("tools", "tool_choice")
_SETTINGS = {*SamplingParams.__dataclass_fields__, *_FORMS, *_TOOLS, "timeout"}


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
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
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
        """Open a sheet, with the model that made it or the one given; both must be the same weights.

        `path` is a file, any URL that fsspec opens, or `REGISTRY#NAME@VERSION` (see `registry.py`).
        """
        sheet = storage.load(resolve(path))
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

    def count_tokens(self, question: Question, tools: Sequence[Any] | None = None) -> int:
        """Tokens that a question or conversation takes of `room`, the template's included."""
        return len(self._question_ids(question, Toolbox.of(tools)))

    def ask(self, question: Question, **sampling: Any) -> Answer:
        """Answer a question, or the last turn of a conversation. `sampling` is that of `SamplingParams`.

        A conversation holds turns in OpenAI's shape (`turns.py`). `json_schema=`, `regex=` or `choices=` give the
        answer a form, which it completes within `max_tokens`. `tools=` (OpenAI's form) may be called: by the model's
        own choice, or by `tool_choice=` "any" or a name surely; calls are in the answer's `tool_calls`. `timeout=` is
        in seconds. Raises `RequestError` for a question that does not fit the window, or settings out of range, and
        `EngineError` when time is up.
        """
        with self.stream(question, **sampling) as stream:
            for _ in stream:
                pass
            return stream.answer

    def stream(self, question: Question, **sampling: Any) -> AnswerStream:
        """As `ask`, but the text as it is written: iterate for pieces of text, then read `.answer`.

        Leaving the `with` block, or `close()`, stops the work within one token.
        """
        stream = AnswerStream(*self._ask_request(question, sampling))
        self._submit(stream)
        return stream

    def ask_many(self, question: Question, n: int, **sampling: Any) -> list[Answer]:
        """`n` answers to one question, sampled side by side; with a seed they are the same every time."""
        if n < 1:
            raise RequestError(f"n is {n}; ask for at least 1 answer.")
        streams = [AnswerStream(*self._ask_request(question, sampling)) for _ in range(n)]
        for choice, stream in enumerate(streams):
            stream.request.choice = choice
        self._submit(*streams)
        for stream in streams:
            for _ in stream:
                pass
        return [stream.answer for stream in streams]

    def chat(self, messages: Sequence[Message], **sampling: Any) -> Answer:
        """Answer a conversation of `{"role": "user", "content": ...}` and other turns over the same prefix."""
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

    def astream(
        self, question: Question, *, loop: asyncio.AbstractEventLoop | None = None, **sampling: Any
    ) -> AsyncAnswerStream:
        """`stream` for `async for` and `async with`; must be called inside a running event loop.

        The first question puts the sheet on the device, which happens in a thread of its own; what goes wrong then is
        raised by the stream. With `loop`, the one where it will be read, it may be called from any other thread, which
        then does all of the preparing.
        """
        stream = AsyncAnswerStream(*self._ask_request(question, sampling), loop or asyncio.get_running_loop())
        if loop is not None or self._prefix is not None:
            self._submit(stream)
        else:
            asyncio.get_running_loop().run_in_executor(None, self._submit_later, stream)
        return stream

    def sources(self, question: Question, answer: Answer | str, *, limit: int = 3) -> list[Source]:
        """Which documents the answer looked at most, and where in them (see `evidence.py` for what that means)."""
        asked = self._question_ids(question)
        answered = self._layout.encoder.plain(str(answer)) if str(answer) else asked[-1:]
        mass = attention_per_origin(self.backbone, self.prefix, self.sheet, asked, answered)
        return find_sources(self.sheet, mass, limit)

    def as_chat_model(self, **settings: Any) -> Any:
        """A LangChain chat model that answers from this sheet (`langchain_cribsheet.ChatCribsheet`)."""
        return integration("langchain_cribsheet", "langchain-cribsheet").ChatCribsheet(knowledge=self, **settings)

    def as_retriever(self, **settings: Any) -> Any:
        """A LangChain retriever of the documents that the sheet looks at (`langchain_cribsheet.CribsheetRetriever`)."""
        return integration("langchain_cribsheet", "langchain-cribsheet").CribsheetRetriever(knowledge=self, **settings)

    def as_tool(self, name: str, description: str, **settings: Any) -> Any:
        """A LangChain tool that answers questions from this sheet, for another model's agent."""
        return self.as_chat_model(**settings).as_tool(name=name, description=description)

    def as_llama_index_llm(self, **settings: Any) -> Any:
        """A LlamaIndex LLM that answers from this sheet (`llama_index.llms.cribsheet.CribsheetLLM`)."""
        return _llama_index().CribsheetLLM(knowledge=self, **settings)

    def as_query_engine(self, **settings: Any) -> Any:
        """A LlamaIndex query engine over this sheet, where `index.as_query_engine()` was."""
        return _llama_index().CompressedKnowledgeQueryEngine.from_args(knowledge=self, **settings)

    def as_index_retriever(self, **settings: Any) -> Any:
        """A LlamaIndex retriever of the passages that the sheet looks at, where `index.as_retriever()` was."""
        return _llama_index().CribsheetRetriever(self, **settings)

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

    def _submit(self, *streams: Stream) -> None:
        """Hand questions to the engine, over the sheet."""
        prefix = self.prefix
        for stream in streams:
            stream.request.prefix = prefix
        with self._lock:
            if self._closed:
                raise EngineError("This sheet is closed; load it again to ask more questions.")
            self._streams.update(streams)
        self._loaded.engine.submit(*(stream.request for stream in streams))

    def _submit_later(self, stream: Stream) -> None:
        try:
            self._submit(stream)
        except Exception as error:
            stream.request.sink(error)

    def _ask_request(self, question: Question, sampling: Mapping[str, Any]) -> tuple[Request, Toolbox | None]:
        unknown = set(sampling) - _SETTINGS
        if unknown:
            known = ", ".join(sorted(_SETTINGS))
            raise RequestError(f"Unknown sampling settings {', '.join(sorted(unknown))}; use {known}.")
        toolbox = Toolbox.of(sampling.get("tools"), sampling.get("tool_choice"))
        timeout = sampling.get("timeout")
        if timeout is not None and not timeout > 0:
            raise RequestError(f"timeout is {timeout}; give seconds above 0, or none.")
        given = {name: value for name, value in with_form(sampling, toolbox).items() if value is not None}
        ids = self._question_ids(question, toolbox)
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
        constraint = self._constraint(params)
        request = Request(
            unplaced, ids, params, sink=_unset, ends=self._layout.stop, constraint=constraint, timeout=timeout
        )
        return request, toolbox

    def _constraint(self, params: SamplingParams) -> Constraint | None:
        if params.grammar is None:
            return None
        backbone = self.backbone
        tokens = GrammarTokens.of(backbone.tokenizer, backbone.eos_ids, backbone.config.vocab_size)
        return Constraint(params.grammar, tokens, params.max_tokens)

    def _question_ids(self, question: Question, toolbox: Toolbox | None = None) -> torch.Tensor:
        text = self._layout.question(as_turns(question, toolbox), self._task, self.sheet.resident)
        return self._layout.encoder.after(text)


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


def with_form(sampling: Mapping[str, Any], toolbox: Toolbox | None = None) -> dict[str, Any]:
    """Sampling settings with `json_schema`, `regex`, `choices` or a forced call turned into the grammar they mean."""
    wanted = {name: sampling[name] for name in (*_FORMS, "grammar") if sampling.get(name) is not None}
    if toolbox and toolbox.forced:
        wanted["tool_choice"] = toolbox.schema
    if len(wanted) > 1:
        raise RequestError(f"An answer has one form, but {' and '.join(wanted)} were given; pass one of them.")
    rest = {name: value for name, value in sampling.items() if name not in (*_FORMS, *_TOOLS, "timeout")}
    for name, value in wanted.items():
        rest["grammar"] = value if name == "grammar" else _FORMS.get(name, Grammar.json_schema)(value)
    return rest


def _llama_index() -> ModuleType:
    return integration("llama_index.llms.cribsheet", "llama-index-llms-cribsheet")


def _unset(event: Event) -> None:
    raise RequestError(f"nobody listens to {event!r}")
