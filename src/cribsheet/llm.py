"""`CompressedKnowledgeLLM`: a local model and a prebuilt sheet, asked again and again."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar, Unpack

import torch

from cribsheet.asking.answer import Answer, Source
from cribsheet.asking.evidence import LIMIT, find_passages, find_sources, looked_at, of_sheet
from cribsheet.asking.modes import SETTINGS, Asking, Retrieval, begin, begin_later
from cribsheet.asking.streams import AnswerStream, AsyncAnswerStream, Stream
from cribsheet.attention.prefix import Prefix
from cribsheet.build import build_sheet
from cribsheet.compress.loop import nothing_read
from cribsheet.compress.progress import Listener, shown
from cribsheet.corpus.documents import read_documents
from cribsheet.corpus.task import Task
from cribsheet.engine.pool import LoadedModel
from cribsheet.engine.request import Event, Request, tell
from cribsheet.engine.sampling import SamplingParams
from cribsheet.errors import EngineError, RequestError, SheetError, WindowError, integration
from cribsheet.living import edits as living
from cribsheet.living.combine import combine
from cribsheet.living.segments import sheet_layers
from cribsheet.model.backbone import Backbone
from cribsheet.model.fingerprint import fingerprint
from cribsheet.prompt.encoder import LONG
from cribsheet.prompt.template import ChatLayout, Message
from cribsheet.prompt.turns import Question, as_turns
from cribsheet.retrieval.dense import DenseRetriever
from cribsheet.retrieval.passages import known_of
from cribsheet.retrieval.placing import Told, after_sheet, beside_documents, instead_of_documents
from cribsheet.retrieval.quoted import Known
from cribsheet.retrieval.retriever import BM25Retriever, Passage
from cribsheet.sheet import file as storage
from cribsheet.sheet.registry import resolve
from cribsheet.sheet.sheet import Sheet
from cribsheet.structured.grammar import Constraint, Grammar
from cribsheet.structured.grammar_tokens import GrammarTokens
from cribsheet.structured.tools import Toolbox

if TYPE_CHECKING:
    from langchain_core.tools import BaseTool
    from langchain_cribsheet import ChatCribsheet
    from langchain_cribsheet import CribsheetRetriever as ChainRetriever
    from llama_index.llms.cribsheet import CompressedKnowledgeQueryEngine, CribsheetLLM
    from llama_index.llms.cribsheet import CribsheetRetriever as IndexRetriever

    from cribsheet.asking.options import (
        AskOptions,
        BuildOptions,
        ChatModelOptions,
        IndexLLMOptions,
        IndexRetrieverOptions,
        QueryEngineOptions,
        RetrieverOptions,
        ToolOptions,
    )
    from cribsheet.compress.scoring import Scorer

BuiltIn = TypeVar("BuiltIn", BM25Retriever, DenseRetriever)

_FORMS = {"json_schema": Grammar.json_schema, "regex": Grammar.regex, "choices": Grammar.choices}
_TOOLS = ("tools", "tool_choice")
_SAMPLED = {each.name for each in fields(SamplingParams) if each.init}
_SETTINGS = _SAMPLED | {*_FORMS, *_TOOLS, *SETTINGS, "timeout", "evidence"}


class Prepared(NamedTuple):
    """A question that only needs to be asked; see `CompressedKnowledgeLLM.prepare`."""

    request: Request
    toolbox: Toolbox | None
    search: Asking | None = None


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
        self._bare: Prefix | None = None
        self._unguided: Prefix | None = None
        self._retrievers: dict[type, tuple[Sheet, Any]] = {}
        self._known: tuple[Sheet, Known] | None = None
        self._lock, self._indexing, self._closed = threading.Lock(), threading.Lock(), False
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        made = sheet.manifest
        self._layout = ChatLayout(self.backbone.tokenizer, system=made.system, options=made.template_options)
        made.fingerprint.check(fingerprint(self.backbone, self._layout))
        list(sheet.layers)  # read now: who writes to the file later changes nothing that is answered
        self._task = sheet.shown_task
        self._loaded.enter(self)

    @classmethod
    def build(
        cls,
        documents: Any,
        task: Task | str | Mapping[str, Any] | Path | None = None,
        *,
        model: str | Path | Backbone | LoadedModel = "pocket",
        model_options: Mapping[str, Any] | None = None,
        progress: Listener = None,
        **options: Unpack[BuildOptions],
    ) -> Self:
        """Condense documents for a task and return the model that answers from them.

        `documents` is whatever `read_documents` takes: folders, files, texts, any framework's documents. `model` is a
        folder, a hub id, `"pocket"`, or a loaded `Backbone`; `model_options` (`device`, `dtype`, `revision`, ...) go to
        `Backbone.load`; `progress=True` shows a bar. All other options are those of `build_sheet`: `rate=`, `budget=`
        or `retain=`, `check`, `scorer`, `guide`, `chunk_tokens`, `system`, `dtype`, `seed`, ...
        """
        read = read_documents(documents)
        purpose = Task.of(task)
        with shown(progress) as told:
            loaded = LoadedModel.get(model, **dict(model_options or {}))
            return cls(loaded, build_sheet(loaded.backbone, read, purpose, progress=told, **options))

    @classmethod
    def load(
        cls,
        path: str | Path | Sheet,
        *,
        model: str | Path | Backbone | LoadedModel | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        **model_options: Any,
    ) -> Self:
        """Open a sheet, with the model that made it or the one given; both must be the same weights.

        `path` is a file, any URL that fsspec opens, or `REGISTRY#NAME@VERSION` (see `sheet/registry.py`); or a sheet
        that is open already, such as one of a `SheetCache`. All other arguments are those of `Backbone.load`.
        """
        sheet = path if isinstance(path, Sheet) else storage.load(resolve(path))
        made = sheet.manifest.fingerprint
        if model is None:
            model, revision = made.model, revision or made.revision
        return cls(LoadedModel.get(model, device=device, dtype=dtype, revision=revision, **model_options), sheet)

    def save(self, path: str | Path, *, texts: bool = True) -> Path:
        """Write the sheet to one file, whole or not at all; `texts=False` leaves the documents' texts out."""
        return storage.save(self.sheet, path, texts=texts)

    def extend(
        self,
        documents: Any,
        *,
        scorer: str | Scorer | None = None,
        progress: Listener = None,
        checkpoint: str | Path | None = None,
    ) -> Self:
        """Add documents to an independent sheet (`living/edits.py`); later questions are answered from them too."""
        how: dict[str, Any] = {"scorer": scorer, "progress": progress, "checkpoint": checkpoint}
        return self._become(living.extend(self.backbone, self.sheet, documents, check=False, **how))

    def replace(
        self, document_id: str, document: Any, *, scorer: str | Scorer | None = None, progress: Listener = None
    ) -> Self:
        """Put another text in the place of a document of an independent sheet."""
        how: dict[str, Any] = {"scorer": scorer, "progress": progress}
        return self._become(living.replace(self.backbone, self.sheet, document_id, document, check=False, **how))

    def remove(self, *document_ids: str) -> Self:
        """Take documents out of an independent sheet, without a trace."""
        return self._become(living.remove(self.backbone, self.sheet, *document_ids, check=False))

    def merge(self, other: Sheet | CompressedKnowledgeLLM) -> Self:
        """Take over the documents of another independent sheet of the same model and task."""
        theirs = other.sheet if isinstance(other, CompressedKnowledgeLLM) else other
        return self._become(living.merge(self.backbone, self.sheet, theirs, check=False))

    def combine(
        self, *others: Sheet | CompressedKnowledgeLLM, task: Task | str | None = None
    ) -> CompressedKnowledgeLLM:
        """A new model that answers from this and other sheets at once (`living/combine.py`); all stay as they are."""
        sheets = [each.sheet if isinstance(each, CompressedKnowledgeLLM) else each for each in (self, *others)]
        return CompressedKnowledgeLLM(self._loaded, combine(self.backbone, sheets, task))

    def question_tokens(self, question: Question) -> torch.Tensor:
        """Token ids (T,) of a question as they follow the sheet, the template's included."""
        return self._question_ids(question)

    def _become(self, sheet: Sheet) -> Self:
        """Answer from another sheet of the same terms from now on; answers that are running end on the old one."""
        with self._lock:
            self.sheet, self._prefix, self._unguided, self._retrievers, self._known = sheet, None, None, {}, None
        return self

    def close(self) -> None:
        """Cancel this sheet's running answers and let go of its keys and values; safe to call twice.

        The model's engine ends with the last open sheet on it. Questions asked afterwards raise `EngineError`.
        """
        with self._lock:
            self._closed, self._retrievers, self._known = True, {}, None
            self._prefix = self._bare = self._unguided = None
            streams = list(self._streams)
        for stream in streams:
            stream.cancel()
        self._loaded.leave(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Refused: a loaded model does not go to another process."""
        raise SheetError(
            "An open CompressedKnowledgeLLM cannot be pickled; save the sheet, and load its file where it is needed."
        )

    def __repr__(self) -> str:
        """One line."""
        return f"<CompressedKnowledgeLLM over {self.sheet.summary}{', closed' if self._closed else ''}>"

    def _repr_html_(self) -> str:
        """The sheet's size, rate and documents, for notebooks."""
        return self.sheet._repr_html_()

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
        return self.backbone.window - self.sheet.length

    def count_tokens(self, question: Question, tools: Sequence[Any] | None = None) -> int:
        """Tokens that a question or conversation takes of `room`, the template's included."""
        return len(self._question_ids(question, Toolbox.of(tools)))

    def ask(self, question: Question, **sampling: Unpack[AskOptions]) -> Answer:
        """Answer a question, or the last turn of a conversation. `sampling` is that of `SamplingParams`.

        A conversation holds turns in OpenAI's shape (`prompt/turns.py`). `json_schema=`, `regex=` or `choices=` give
        the answer a form, which it completes within `max_tokens` unless a `stop` string cuts it. `tools=` (OpenAI's
        form) may be called: by the model's own choice, or by `tool_choice=` "any" or a name surely; calls are in the
        answer's `tool_calls`. `timeout=` is in seconds. The answer's `sources` say what it looked at, unless
        `evidence=False`. Raises `RequestError` for a question that does not fit the window, or settings out of range,
        and `EngineError` when time is up.

        `retriever=` tells passages as further documents: `"bm25"` or `"dense"` for those of the sheet, or what
        `as_retriever` takes. `mode=` is "hybrid", "retrieval", "auto" or "sheet" (`asking/modes.py`);
        `passage_tokens=` and `top_k=` bound the passages, and `sure=` is what `auto` asks of a draft. The answer's
        `mode` and `passages` say what was used.
        """
        with self.stream(question, **sampling) as stream:
            for _ in stream:
                pass
            return stream.answer

    def stream(self, question: Question | Prepared, **sampling: Unpack[AskOptions]) -> AnswerStream:
        """As `ask`, but the text as it is written: iterate for pieces of text, then read `.answer`.

        Leaving the `with` block, or `close()`, stops the work within one token.
        """
        request, toolbox, search = self.prepare(question, **sampling)
        stream = AnswerStream(request, toolbox)
        self._begin([stream], search)
        return stream

    def prepare(self, question: Question | Prepared, **sampling: Unpack[AskOptions]) -> Prepared:
        """A question checked, in tokens, and with its form compiled, to be asked once by any of the forms of `ask`.

        It is work for the processor: async code does it in a thread, so that its event loop goes on. Passages are
        searched when it is asked. Raises as `ask`.
        """
        if not isinstance(question, Prepared):
            return self._ask_requests(question, 1, sampling)[0]
        if sampling:
            raise RequestError(f"The question is prepared, so {', '.join(sorted(sampling))} can no longer be set.")
        if question.request.sink is not _unset:
            raise RequestError("This prepared question was asked already; prepare it again.")
        return question

    def ask_many(self, question: Question, n: int, **sampling: Unpack[AskOptions]) -> list[Answer]:
        """`n` answers to one question, sampled side by side; with a seed they are the same every time."""
        asked = self._ask_requests(question, n, sampling)
        streams = [AnswerStream(request, toolbox) for request, toolbox, _ in asked]
        self._begin(streams, asked[0].search)
        try:
            for stream in streams:
                for _ in stream:
                    pass
        finally:  # one that fails, or an interrupt, ends the others too
            for stream in streams:
                stream.close()
        return [stream.answer for stream in streams]

    def chat(self, messages: Sequence[Message], **sampling: Unpack[AskOptions]) -> Answer:
        """Answer a conversation of `{"role": "user", "content": ...}` and other turns over the same prefix."""
        return self.ask(messages, **sampling)

    async def achat(self, messages: Sequence[Message], **sampling: Unpack[AskOptions]) -> Answer:
        """`chat` without blocking the event loop, as `aask`."""
        return await self.aask(messages, **sampling)

    def conversation(self) -> Conversation:
        """A conversation that remembers its turns."""
        return Conversation(self)

    async def aask(self, question: Question | Prepared, **sampling: Unpack[AskOptions]) -> Answer:
        """`ask` without blocking the event loop; cancelling the task stops the work within one token."""
        stream = self.astream(await asyncio.to_thread(self.prepare, question, **sampling))
        async for _ in stream:
            pass
        return stream.answer

    async def aask_many(self, question: Question, n: int, **sampling: Unpack[AskOptions]) -> list[Answer]:
        """`ask_many` without blocking the event loop."""
        streams = self._astreams(await asyncio.to_thread(self._ask_requests, question, n, sampling), None)
        try:
            for stream in streams:
                async for _ in stream:
                    pass
        finally:
            for stream in streams:
                await stream.aclose()
        return [stream.answer for stream in streams]

    def astream(
        self,
        question: Question | Prepared,
        *,
        loop: asyncio.AbstractEventLoop | None = None,
        **sampling: Unpack[AskOptions],
    ) -> AsyncAnswerStream:
        """`stream` for `async for` and `async with`; must be called inside a running event loop.

        The first question puts the sheet on the device, which happens in a thread of its own; what goes wrong then is
        raised by the stream. With `loop`, the one where it will be read, it may be called from any other thread, which
        then does all of the preparing.
        """
        return self._astreams([self.prepare(question, **sampling)], loop)[0]

    def astream_many(
        self,
        question: Question,
        n: int,
        *,
        loop: asyncio.AbstractEventLoop | None = None,
        **sampling: Unpack[AskOptions],
    ) -> list[AsyncAnswerStream]:
        """The answers of `ask_many` while they are written, each a stream as of `astream`; passages are searched once.

        Whoever stops reading closes all of them.
        """
        return self._astreams(self._ask_requests(question, n, sampling), loop)

    def _astreams(self, asked: Sequence[Prepared], loop: asyncio.AbstractEventLoop | None) -> list[AsyncAnswerStream]:
        """Streams of one question, begun."""
        reading, search = loop or asyncio.get_running_loop(), asked[0].search
        streams = [AsyncAnswerStream(request, toolbox, reading) for request, toolbox, _ in asked]
        if search is not None:
            if loop:  # it is called from a thread that may be busy for a while; the event loop has few of them
                search = search.looked_at(self)
            beginning = begin_later(self, streams, search)
            work = asyncio.run_coroutine_threadsafe(beginning, loop) if loop else asyncio.create_task(beginning)
            for stream in streams:
                stream.work = work
        elif loop is not None or self._prefix is not None:
            self._submit(*streams)
        else:
            reading.run_in_executor(None, self._submit_later, streams)
        return streams

    def sources(self, question: Question, answer: Answer | str, *, limit: int = LIMIT) -> list[Source]:
        """Which documents the answer looks at most, and where in them (see `asking/evidence.py` for what that means).

        Reads question and answer again: for answers from elsewhere, and for more documents than an answer carries.
        Passages that an `Answer` was told are sources too, beside the `limit` documents.
        """
        told = answer.passages if isinstance(answer, Answer) else ()
        sheet, looked, asked = self._looked_at(question, answer)
        return list(find_sources(sheet, looked, limit, passages=told, places=asked.places))

    def passages(
        self, question: Question, answer: Answer | str = "", *, limit: int = 4, characters: int = 1500
    ) -> list[Source]:
        """Which passages of about `characters` the answer looks at most; a short document is one passage.

        Without an answer, what the question looks at. Raises `RequestError` for a question that does not fit the
        window, and for a `limit` or `characters` below 1. Passages that were told are not among them.
        """
        for name, value in (("limit", limit), ("characters", characters)):
            if value < 1:
                raise RequestError(f"{name} is {value}; give at least 1.")
        if isinstance(answer, Answer) and answer.mode == "retrieval":
            return []
        sheet, looked, asked = self._looked_at(question, answer)
        return find_passages(sheet, of_sheet(sheet, looked, asked.places), limit, characters)

    def _looked_at(self, question: Question, answer: Answer | str) -> tuple[Sheet, torch.Tensor, Told]:
        """The sheet, what question and answer look at in it and in passages (M, K, p + N), and the question."""
        passages = answer.passages if isinstance(answer, Answer) else ()
        alone = isinstance(answer, Answer) and answer.mode == "retrieval"
        self._check_long(question, None, 0)
        asked = self._told(question, passages=passages, alone=alone)
        answered = self._layout.encoder.plain(str(answer)) if str(answer) else asked.ids[-1:]
        sheet, prefix = self._placed(() if alone else passages)
        prefix = self._nothing() if alone else prefix
        self._check_room(len(asked.ids) + len(answered) - 1, prefix.tokens)
        return sheet, looked_at(self.backbone, prefix, asked, answered), asked

    def as_chat_model(self, **settings: Unpack[ChatModelOptions]) -> ChatCribsheet:
        """A LangChain chat model that answers from this sheet (`langchain_cribsheet.ChatCribsheet`)."""
        made: ChatCribsheet = _langchain().ChatCribsheet(knowledge=self, **settings)
        return made

    def as_retriever(self, **settings: Unpack[RetrieverOptions]) -> ChainRetriever:
        """A LangChain retriever of the places that the sheet looks at (`langchain_cribsheet.CribsheetRetriever`).

        It reads each question once to see where the sheet looks. With `content="marker"` a chain's model then reads a
        line for each place; by default the passages themselves, though it knows them: a question costs what retrieval
        would cost, and that look on top. So take markers where this sheet answers, and texts for what needs to see
        them: evaluators, rerankers, other models.
        """
        made: ChainRetriever = _langchain().CribsheetRetriever(knowledge=self, **settings)
        return made

    def as_tool(self, name: str, description: str, **settings: Unpack[ToolOptions]) -> BaseTool:
        """A LangChain tool that answers questions from this sheet, for another model's agent."""
        return self.as_chat_model(**settings).as_tool(name=name, description=description)

    def as_llama_index_llm(self, **settings: Unpack[IndexLLMOptions]) -> CribsheetLLM:
        """A LlamaIndex LLM that answers from this sheet (`llama_index.llms.cribsheet.CribsheetLLM`)."""
        made: CribsheetLLM = _llama_index().CribsheetLLM(knowledge=self, **settings)
        return made

    def as_query_engine(self, **settings: Unpack[QueryEngineOptions]) -> CompressedKnowledgeQueryEngine:
        """A LlamaIndex query engine over this sheet, where `index.as_query_engine()` was."""
        engine: type[CompressedKnowledgeQueryEngine] = _llama_index().CompressedKnowledgeQueryEngine
        return engine.from_args(knowledge=self, **settings)

    def as_index_retriever(self, **settings: Unpack[IndexRetrieverOptions]) -> IndexRetriever:
        """A LlamaIndex retriever of the passages that the sheet looks at, where `index.as_retriever()` was."""
        made: IndexRetriever = _llama_index().CribsheetRetriever(self, **settings)
        return made

    @property
    def prefix(self) -> Prefix:
        """The sheet on the model's device and in its dtype; made on first use and shared by all questions."""
        return self._placed()[1]

    def _placed(self, passages: Sequence[Passage] = ()) -> tuple[Sheet, Prefix]:
        """The sheet and its prefix: up to the resident guide where passages are told, one for all such questions."""
        with self._lock:
            if self._closed:
                raise EngineError("This sheet is closed; load it again to ask more questions.")
            if self._prefix is None:
                self._prefix = Prefix(sheet_layers(self.backbone, self.sheet), self.sheet.length)
            if not (guide := self._guide_after(passages)):
                return self.sheet, self._prefix
            if self._unguided is None:
                self._unguided = self._prefix.without_last(guide)
            return self.sheet, self._unguided

    @property
    def _tells_in_turn(self) -> bool:
        """Whether passages stand in the question's turn, behind the guide, because it cannot be taken off.

        Layers with sliding windows hold what stands before the question; that is the guide, and not what it hides.
        """
        return self.sheet.resident and any(window is not None for window in self.backbone.windows)

    def _guide_after(self, passages: Sequence[Passage]) -> int:
        """Tokens of the resident guide if it stands behind passages, so that it is read with the question; else 0."""
        return self.sheet.manifest.guide_tokens if passages and not self._tells_in_turn else 0

    @property
    def bm25(self) -> BM25Retriever:
        """The built-in retriever over the sheet's own documents; indexed on first use."""
        return self._retriever(BM25Retriever)

    @property
    def dense(self) -> DenseRetriever:
        """The same by an embedding model (`retrieval/dense.py`); its passages are placed on first use."""
        return self._retriever(DenseRetriever)

    @property
    def known(self) -> Known:
        """The sheet's texts, to be looked in for what a question quotes; made on first use, once for a sheet."""
        with self._indexing:
            sheet, made = self.sheet, self._known
            if made is None or made[0] is not sheet:
                made = self._known = sheet, known_of(sheet.texts)
            return made[1]

    def _retriever(self, kind: type[BuiltIn]) -> BuiltIn:
        with self._indexing:  # not the other lock: whoever only asks need not wait for an index
            sheet, known = self.sheet, self._retrievers
            if kind not in known or known[kind][0] is not sheet:
                known[kind] = sheet, kind(sheet.documents)
            retriever: BuiltIn = known[kind][1]
            return retriever

    def _begin(self, streams: Sequence[Stream], search: Asking | None) -> None:
        if search is None:
            self._submit(*streams)
        else:
            begin(self, streams, search)

    def _submit(self, *streams: Stream) -> None:
        """Hand one question's streams to the engine, over the sheet unless they bring a prefix of their own."""
        first = streams[0]
        alone = bool(first.request.prefix.layers)
        sheet, prefix = self._placed(() if alone else first.passages)
        for stream in streams:
            if not alone:
                stream.request.prefix = prefix
            stream.trace = partial(find_sources, sheet, passages=stream.passages, places=stream.request.told)
        with self._lock:
            if self._closed:
                raise EngineError("This sheet is closed; load it again to ask more questions.")
            self._streams.update(streams)
        self._loaded.engine.submit(*(stream.request for stream in streams))

    def _submit_later(self, streams: Sequence[Stream]) -> None:
        try:
            self._submit(*streams)
        except Exception as error:
            for stream in streams:
                tell(stream.request, error)

    def _check_long(self, question: Question, toolbox: Toolbox | None, before: int) -> None:
        """Refuse what cannot fit behind so many tokens by far, before all of it is read."""
        turns = as_turns(question, toolbox)
        if sum(len(str(turn["content"])) for turn in turns) > LONG:
            text, room = self._layout.question(turns, self._task, self.sheet.resident), self.backbone.window - before
            if self._layout.encoder.exceeds(text, room):
                self._check_room(room + 1, before, least="at least ")

    def _check_room(self, tokens: int, before: int, least: str = "") -> int:
        """What a question of so many tokens, after the sheet or what else stands `before` it, leaves of the window.

        At least 1, or it is refused.
        """
        left = self.backbone.window - before - tokens
        if left < 1:
            raise WindowError(
                f"The question takes {least}{tokens} tokens, but the model's window of {self.backbone.window} leaves "
                f"{self.room} for question and answer beside the sheet of {self.sheet.length}; ask a shorter question "
                "or raise the rate."
            )
        return left

    def _nothing(self) -> Prefix:
        """A prefix of no tokens, for questions that bring their own documents; one for all of them, to be a batch."""
        with self._lock:
            if self._bare is None:
                self._bare = Prefix(nothing_read(self.backbone), 0)
            return self._bare

    def _ask_request(
        self, question: Question, sampling: Mapping[str, Any], passages: Sequence[Passage] = (), *, alone: bool = False
    ) -> Prepared:
        """A request over the sheet, on which `_submit` places it, or over passages `alone`."""
        unknown = set(sampling) - _SETTINGS
        if unknown:
            known = ", ".join(sorted(_SETTINGS))
            raise RequestError(f"Unknown sampling settings {', '.join(sorted(unknown))}; use {known}.")
        toolbox = Toolbox.of(sampling.get("tools"), sampling.get("tool_choice"))
        timeout = sampling.get("timeout")
        if timeout is not None and not (isinstance(timeout, (int, float)) and timeout > 0):
            raise RequestError(f"timeout is {timeout!r}; give seconds above 0, or none.")
        given = {name: value for name, value in with_form(sampling, toolbox).items() if value is not None}
        prefix = self._nothing() if alone else Prefix((), self.sheet.length - self._guide_after(passages))
        self._check_long(question, toolbox, prefix.tokens)
        asked = self._told(question, toolbox, passages, alone=alone)
        left = self._check_room(len(asked.ids), prefix.tokens)
        params = SamplingParams(**given)
        if params.max_tokens > left:
            params = SamplingParams(**{**given, "max_tokens": left})
        constraint = self._constraint(params)
        ends = () if constraint else self._layout.stop  # a form knows its own end
        request = Request(
            prefix,
            asked.ids,
            params,
            sink=_unset,
            ends=ends,
            constraint=constraint,
            timeout=timeout,
            evidence=sampling.get("evidence") is None or bool(sampling["evidence"]),
            told=asked.places,
            lead=asked.lead,
        )
        return Prepared(request, toolbox)

    def _ask_requests(self, question: Question, n: int, sampling: Mapping[str, Any]) -> list[Prepared]:
        if not isinstance(n, int) or n < 1:
            raise RequestError(f"n is {n!r}; ask for at least 1 answer.")
        retrieval, rest = Retrieval.taken_from(sampling)
        search = Asking(question, retrieval, rest) if retrieval else None
        first = self._ask_request(question, rest)._replace(search=search)
        return [first, *(first._replace(request=first.request.again(choice)) for choice in range(1, n))]

    def _constraint(self, params: SamplingParams) -> Constraint | None:
        if params.grammar is None:
            return None
        backbone = self.backbone
        tokens = GrammarTokens.of(backbone.tokenizer, backbone.eos_ids, backbone.config.vocab_size)
        return Constraint(params.grammar, tokens, params.max_tokens)

    def _question_ids(self, question: Question, toolbox: Toolbox | None = None) -> torch.Tensor:
        return self._told(question, toolbox).ids

    def _told(
        self,
        question: Question,
        toolbox: Toolbox | None = None,
        passages: Sequence[Passage] = (),
        *,
        alone: bool = False,
    ) -> Told:
        """A question in tokens, with passages beside the sheet's documents, or `alone` where those would stand."""
        turns = as_turns(question, toolbox)
        if passages and not alone and not self._tells_in_turn:
            return beside_documents(self._layout, self._task, self.sheet, turns, passages)
        if alone:
            return instead_of_documents(self._layout, self._task, self.sheet, turns, passages)
        return after_sheet(self._layout, self._task, self.sheet.resident, turns, passages)


class Conversation:
    """Turns over one sheet; only the turns are remembered, the sheet is never written to."""

    def __init__(self, llm: CompressedKnowledgeLLM) -> None:
        self._llm = llm
        self.messages: list[Message] = []

    def ask(self, question: str, **sampling: Unpack[AskOptions]) -> Answer:
        """Ask the next question; it and its answer are remembered once the answer is complete."""
        asked: Message = {"role": "user", "content": question}
        answer = self._llm.chat([*self.messages, asked], **sampling)
        said: Message = {"role": "assistant", "content": answer.text}
        self.messages += [asked, {**said, "tool_calls": answer.tool_calls} if answer.tool_calls else said]
        return answer


def with_form(sampling: Mapping[str, Any], toolbox: Toolbox | None = None) -> dict[str, Any]:
    """Sampling settings with `json_schema`, `regex`, `choices` or a forced call turned into the grammar they mean."""
    wanted = {name: sampling[name] for name in (*_FORMS, "grammar") if sampling.get(name) is not None}
    if toolbox and toolbox.forced:
        wanted["tool_choice"] = toolbox.schema
    elif toolbox and "json_schema" in wanted:
        Grammar.json_schema(wanted["json_schema"])  # trouble in it should be told of it, not of what it becomes
        wanted["json_schema"] = toolbox.beside(wanted["json_schema"])
    if len(wanted) > 1:
        raise RequestError(f"An answer has one form, but {' and '.join(wanted)} were given; pass one of them.")
    rest = {name: value for name, value in sampling.items() if name not in (*_FORMS, *_TOOLS, "timeout", "evidence")}
    for name, value in wanted.items():
        rest["grammar"] = value if name == "grammar" else _FORMS.get(name, Grammar.json_schema)(value)
    return rest


def _langchain() -> ModuleType:
    return integration("langchain_cribsheet", "langchain-cribsheet")


def _llama_index() -> ModuleType:
    return integration("llama_index.llms.cribsheet", "llama-index-llms-cribsheet")


def _unset(event: Event) -> None:
    raise RequestError(f"nobody listens to {event!r}")
