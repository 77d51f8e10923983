"""`CompressedKnowledgeLLM`: a local model and a prebuilt sheet, asked again and again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, overload

import torch

from cribsheet.asking import evidence
from cribsheet.asking.answer import Answer, Conversation, Source
from cribsheet.asking.llama_cpp.llm import LlamaCpp, in_engine
from cribsheet.asking.modes import answers_later, answers_of, begin, begin_later
from cribsheet.asking.prepared import Prepared
from cribsheet.asking.session import Session
from cribsheet.asking.sources import LIMIT
from cribsheet.asking.streams import AnswerStream, AsyncAnswerStream
from cribsheet.attention.prefix import Prefix
from cribsheet.build import build_sheet
from cribsheet.compress.progress import Listener, shown
from cribsheet.corpus.documents import read_documents
from cribsheet.corpus.task import Task
from cribsheet.engine.pool import LoadedModel
from cribsheet.errors import BudgetError, CribsheetError, RequestError, SheetError, integration
from cribsheet.living import edits
from cribsheet.living.combine import combine
from cribsheet.model.backbone import Backbone
from cribsheet.plan.options import BuildKeywords, BuildOptions
from cribsheet.prompt.turns import Question
from cribsheet.recall.desk import Desk
from cribsheet.retrieval.dense import DenseRetriever
from cribsheet.retrieval.retriever import BM25Retriever
from cribsheet.sheet import file
from cribsheet.sheet.registry import resolve
from cribsheet.sheet.sheet import Sheet
from cribsheet.structured.tools import Toolbox
from cribsheet.study.forecast import StudyForecast, forecast_study
from cribsheet.study.study import Study, StudyOptions, check, study

if TYPE_CHECKING:
    from langchain_core.tools import BaseTool
    from langchain_cribsheet import ChatCribsheet, ChatCribsheetLlamaCpp
    from langchain_cribsheet import CribsheetRetriever as ChainRetriever
    from llama_index.llms.cribsheet import CompressedKnowledgeQueryEngine, CribsheetLlamaCppLLM, CribsheetLLM
    from llama_index.llms.cribsheet import CribsheetRetriever as IndexRetriever

    from cribsheet.asking.options import (
        AskOptions,
        ChatModelOptions,
        ExtendOptions,
        IndexLLMOptions,
        IndexRetrieverOptions,
        LlamaCppOptions,
        QueryEngineOptions,
        ReplaceOptions,
        RetrieverOptions,
        ToolOptions,
    )

logger = logging.getLogger(__name__)

_LANGCHAIN = "langchain_cribsheet", "langchain-cribsheet"  # module and distribution
_LLAMA_INDEX = "llama_index.llms.cribsheet", "llama-index-llms-cribsheet"


class CompressedKnowledgeLLM:
    """A local model that answers from a sheet: no retrieval, no re-reading.

    Make one with `build` (from documents) or `load` (from a file). Safe to use from many threads and tasks at once:
    questions over the same sheet are answered as one batch.
    """

    def __init__(self, model: Backbone | LoadedModel, sheet: Sheet) -> None:
        """Attach `sheet` to a loaded model. Raises `MismatchError` if it was made with another one."""
        self.session = Session.open(model, sheet)

    @classmethod
    def build(
        cls,
        documents: Any,
        task: Task | str | Mapping[str, Any] | Path | None = None,
        *,
        model: str | Path | Backbone | LoadedModel = "pocket",
        model_options: Mapping[str, Any] | None = None,
        progress: Listener = None,
        checkpoint: str | Path | None = None,
        archive_folder: str | Path | None = None,
        study: float | None = None,
        study_steps: int | None = None,
        **options: Unpack[BuildKeywords],
    ) -> Self:
        """Condense documents for a task and return the model that answers from them.

        `documents` is whatever `read_documents` takes: folders, files, texts, any framework's documents. `model` is a
        folder, a hub id, `"pocket"`, or a loaded `Backbone`; `model_options` (`device`, `dtype`, `revision`, ...) go to
        `Backbone.load`; `progress=True` shows a bar; `checkpoint` is a file from which a killed build goes on;
        `archive_folder` is where an archive lies until `save`, in place of where the checkpoint or temporary files are.
        `study` minutes, or `study_steps` of training, the sheet then studies; where it cannot, because the model writes
        too few questions that may serve, a warning says so, and the sheet is as it was built.
        `options` are the fields of `BuildOptions`: `rate=`, `budget=` or `retain=`, `scorer`, `guide`, ...
        """
        how = BuildOptions.of(options)  # refused before a model is loaded
        studies = study is not None or study_steps is not None
        if studies and (how.check or how.retain is not None):
            raise BudgetError(
                "A check asks the sheet as it is built, and a study changes it; leave check= and retain= out, or "
                "study= and study_steps=."
            )
        corpus, purpose = read_documents(documents), Task.of(task)
        given = dict(model_options or {})
        with shown(progress) as told, (loaded := LoadedModel.get(model, **given)).backbone.unchanging():
            if studies:
                check(study, study_steps, loaded.backbone)
            sheet = build_sheet(
                loaded.backbone,
                corpus,
                purpose,
                progress=told,
                checkpoint=checkpoint,
                archive_folder=archive_folder,
                **options,
            )
            kb = cls(loaded, sheet)
        if studies:
            kb._study_built(study, study_steps, checkpoint)
        return kb

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
        sheet = path if isinstance(path, Sheet) else file.load(resolve(path))
        made = sheet.manifest.fingerprint
        if model is None:
            model, revision = made.model, revision or made.revision
        return cls(LoadedModel.get(model, device=device, dtype=dtype, revision=revision, **model_options), sheet)

    def save(self, path: str | Path, *, texts: bool = True, archive: bool = True) -> Path:
        """Write the sheet to one file, whole or not at all; `texts=False` leaves the documents' texts out.

        Its archive goes to a second file, `path` and `.archive`, unless `archive=False` leaves it out.
        """
        return file.save(self.sheet, path, texts=texts, archive=archive)

    def extend(self, documents: Any, **how: Unpack[ExtendOptions]) -> Self:
        """Add documents to an independent sheet (`living/edits.py`); later questions are answered from them too."""
        return self._become(edits.extend(self.backbone, self.sheet, documents, check=False, **how))

    def replace(self, document_id: str, document: Any, **how: Unpack[ReplaceOptions]) -> Self:
        """Put another text in the place of a document of an independent sheet."""
        return self._become(edits.replace(self.backbone, self.sheet, document_id, document, check=False, **how))

    def remove(self, *document_ids: str) -> Self:
        """Take documents out of an independent sheet, without a trace."""
        return self._become(edits.remove(self.backbone, self.sheet, *document_ids, check=False))

    def merge(self, other: Sheet | CompressedKnowledgeLLM) -> Self:
        """Take over the documents of another independent sheet of the same model and task."""
        theirs = other.sheet if isinstance(other, CompressedKnowledgeLLM) else other
        return self._become(edits.merge(self.backbone, self.sheet, theirs, check=False))

    def study(self, **how: Unpack[StudyOptions]) -> Study:
        """Practise on the documents for `minutes=` or `steps=`, and answer from a better sheet of the same size.

        Raises as `study/study.py` says, and `SheetError` if documents came or went meanwhile: that is not undone. If
        nothing was learnt, the sheet stays as it was.
        """
        session = self.session
        sheet, came = study(session, **how)
        if came.learnt and self.session is not session:
            raise SheetError("The sheet was changed while it studied; it stays as that left it, so study it again.")
        if came.learnt:
            self._become(sheet)
        return came

    def _study_built(self, minutes: float | None, steps: int | None, checkpoint: str | Path | None) -> None:
        """Study what was just built, beside whose checkpoint it is remembered how far that is."""
        resume = None if checkpoint is None else Path(f"{checkpoint}.study")
        try:
            self.study(minutes=minutes, steps=steps, resume=resume)
        except (CribsheetError, MemoryError, torch.OutOfMemoryError) as error:  # a build's hours are not lost for it
            logger.warning("The sheet is as it was built: %s", error)

    def forecast_study(self, *, minutes: float | None = None, steps: int | None = None) -> StudyForecast:
        """What `study` would take, from a few questions and exercises that are tried; the sheet stays as it is."""
        return forecast_study(self.session, minutes=minutes, steps=steps)

    def combine(
        self, *others: Sheet | CompressedKnowledgeLLM, task: Task | str | None = None
    ) -> CompressedKnowledgeLLM:
        """A new model that answers from this and other sheets at once (`living/combine.py`); all stay as they are."""
        sheets = [each.sheet if isinstance(each, CompressedKnowledgeLLM) else each for each in (self, *others)]
        return CompressedKnowledgeLLM(self.session.loaded, combine(self.backbone, sheets, task))

    def question_tokens(self, question: Question) -> torch.Tensor:
        """Token ids (T,) of a question as they follow the sheet, the template's included."""
        return self.session.render(question).ids

    def _become(self, sheet: Sheet) -> Self:
        """Answer from another sheet of the same terms from now on; answers that are running end on the old one."""
        self.session = self.session.over(sheet)
        return self

    def close(self) -> None:
        """Cancel this sheet's running answers and let go of its keys and values; safe to call twice.

        The model's engine ends with the last open sheet on it. Questions asked afterwards raise `EngineError`.
        """
        self.session.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Refused: a loaded model does not go to another process."""
        raise SheetError(
            "An open CompressedKnowledgeLLM cannot be pickled; save the sheet, and load its file where it is needed."
        )

    def __repr__(self) -> str:
        """One line."""
        return f"<CompressedKnowledgeLLM over {self.sheet.summary}{', closed' if self.session.running.closed else ''}>"

    def _repr_html_(self) -> str:
        """The sheet's size, rate and documents, for notebooks."""
        return self.sheet._repr_html_()

    def __enter__(self) -> Self:
        """The model with its sheet."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        self.close()

    @property
    def backbone(self) -> Backbone:
        """The model underneath."""
        return self.session.backbone

    @property
    def sheet(self) -> Sheet:
        """What it answers from."""
        return self.session.sheet

    @property
    def prefix(self) -> Prefix:
        """The sheet on the model's device and in its dtype; made on first use and shared by all questions."""
        return self.session.prefix

    @property
    def bm25(self) -> BM25Retriever:
        """The built-in retriever over the sheet's own documents; indexed on first use."""
        return self.session.bm25

    @property
    def dense(self) -> DenseRetriever:
        """The same by an embedding model (`retrieval/dense.py`); its passages are placed on first use."""
        return self.session.dense

    @property
    def desk(self) -> Desk:
        """What lies on the device of the sheet's archive (`recall/desk.py`). Raises `RequestError` without one."""
        return self.session.desk

    @property
    def room(self) -> int:
        """Tokens of the model's window that the sheet leaves for question and answer."""
        return self.session.room

    def count_tokens(self, question: Question, tools: Sequence[Any] | None = None) -> int:
        """Tokens that a question or conversation takes of `room`, the template's included."""
        return len(self.session.render(question, Toolbox.of(tools)).ids)

    def ask(self, question: Question | Prepared, **sampling: Unpack[AskOptions]) -> Answer:
        """Answer a question, or the last turn of a conversation. `sampling` is that of `SamplingParams`.

        A conversation holds turns in OpenAI's shape (`prompt/turns.py`). `json_schema=`, `regex=` or `choices=` give
        the answer a form, which it completes within `max_tokens` unless a `stop` string cuts it. `tools=` (OpenAI's
        form) may be called: by the model's own choice, or by `tool_choice=` "any" or a name surely; calls are in the
        answer's `tool_calls`. `timeout=` is in seconds. The answer's `sources` say what it looked at, unless
        `evidence=False`. Raises `RequestError` for a question that does not fit the window, or settings out of range,
        and `EngineError` when time is up.

        `retriever=` tells passages as further documents: `"bm25"` or `"dense"` for those of the sheet, or what
        `as_retriever` takes. `mode=` is "hybrid", "retrieval", "auto", "recall" or "sheet" (`asking/modes.py`);
        `passage_tokens=` and `top_k=` bound the passages, and `sure=` is what `auto` asks of a draft. "recall" fetches
        the passages from the sheet's archive, and nothing of them is read again; its `retriever=` may be "sheet" too,
        what the question looks at, and with `no_archive="sheet"` the sheet answers alone where there is no archive, or
        it cannot be read (else `RequestError` or `SheetError`). The answer's `mode` and `passages` say what was used.
        """
        return answers_of(begin(self.session, [self.prepare(question, **sampling)]))[0]

    def stream(self, question: Question | Prepared, **sampling: Unpack[AskOptions]) -> AnswerStream:
        """As `ask`, but the text as it is written: iterate for pieces of text, then read `.answer`.

        Leaving the `with` block, or `close()`, stops the work within one token.
        """
        return begin(self.session, [self.prepare(question, **sampling)])[0]

    def prepare(self, question: Question | Prepared, **sampling: Unpack[AskOptions]) -> Prepared:
        """A question checked, in tokens, and with its form compiled, to be asked once by any of the forms of `ask`.

        It is work for the processor: async code does it in a thread, so that its event loop goes on. Passages are
        searched when it is asked. Raises as `ask`.
        """
        if not isinstance(question, Prepared):
            return self.session.prepare(question, sampling)[0]
        if sampling:
            raise RequestError(f"The question is prepared, so {', '.join(sorted(sampling))} can no longer be set.")
        return question

    def ask_many(self, question: Question, n: int, **sampling: Unpack[AskOptions]) -> list[Answer]:
        """`n` answers to one question, sampled side by side; with a seed they are the same every time."""
        return answers_of(begin(self.session, self.session.prepare(question, sampling, n)))

    def conversation(self) -> Conversation:
        """A conversation that remembers its turns."""
        return Conversation(self.ask)

    async def aask(self, question: Question | Prepared, **sampling: Unpack[AskOptions]) -> Answer:
        """`ask` without blocking the event loop; cancelling the task stops the work within one token."""
        return (await answers_later([self.astream(await asyncio.to_thread(self.prepare, question, **sampling))]))[0]

    async def aask_many(self, question: Question, n: int, **sampling: Unpack[AskOptions]) -> list[Answer]:
        """`ask_many` without blocking the event loop."""
        asked = await asyncio.to_thread(self.session.prepare, question, sampling, n)
        return await answers_later(begin_later(self.session, asked, None))

    def astream(
        self,
        question: Question | Prepared,
        *,
        loop: asyncio.AbstractEventLoop | None = None,
        **sampling: Unpack[AskOptions],
    ) -> AsyncAnswerStream:
        """`stream` for `async for` and `async with`; must be called inside a running event loop.

        The first question puts the sheet on the device in a thread of its own; what goes wrong is raised by the stream.
        With `loop`, the one where it will be read, any other thread may call it, and does all of the preparing.
        """
        return begin_later(self.session, [self.prepare(question, **sampling)], loop)[0]

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
        return begin_later(self.session, self.session.prepare(question, sampling, n), loop)

    def sources(self, question: Question, answer: Answer | str, *, limit: int = LIMIT) -> list[Source]:
        """Which documents the answer looks at most, and where in them (see `asking/evidence.py` for what that means).

        Reads question and answer again: for answers from elsewhere, and for more documents than an answer carries.
        Passages that an `Answer` was told are sources too, beside the `limit` documents.
        """
        return evidence.sources(self.session, question, answer, limit=limit)

    def passages(
        self, question: Question, answer: Answer | str = "", *, limit: int = 4, characters: int = 1500
    ) -> list[Source]:
        """Which passages of about `characters` the answer looks at most; a short document is one passage.

        Without an answer, what the question looks at. Raises `RequestError` for a question that does not fit the
        window, and for a `limit` or `characters` below 1. Passages that were told are not among them.
        """
        return evidence.passages(self.session, question, answer, limit=limit, characters=characters)

    def in_llama_cpp(self, gguf: str | Path, **how: Unpack[LlamaCppOptions]) -> LlamaCpp:
        """llama.cpp with this sheet, answering by a GGUF of the same model (`asking/llama_cpp/llm.py`)."""
        return LlamaCpp(self.sheet, gguf, tokenizer=self.backbone.tokenizer, **how)

    @overload
    def as_chat_model(
        self, *, engine: Literal["llama.cpp"], gguf: str | Path, **settings: Any
    ) -> ChatCribsheetLlamaCpp: ...

    @overload
    def as_chat_model(self, **settings: Unpack[ChatModelOptions]) -> ChatCribsheet: ...

    def as_chat_model(self, *, engine: str | None = None, gguf: str | Path | None = None, **settings: Any) -> Any:
        """A LangChain chat model that answers from this sheet (`langchain_cribsheet.ChatCribsheet`).

        With `engine="llama.cpp"` and a GGUF, llama.cpp answers (`langchain_cribsheet.ChatCribsheetLlamaCpp`).
        """
        frame = integration(*_LANGCHAIN)
        if engine is None and gguf is None:
            return frame.ChatCribsheet(knowledge=self, **settings)
        return frame.ChatCribsheetLlamaCpp(**in_engine(self, engine, gguf, settings))

    def as_retriever(self, **settings: Unpack[RetrieverOptions]) -> ChainRetriever:
        """A LangChain retriever of the places that the sheet looks at (`langchain_cribsheet.CribsheetRetriever`).

        It reads each question once to see where the sheet looks. Where this sheet answers, take `content="marker"`, a
        line for each place; the passages themselves, by default, are for evaluators, rerankers and other models.
        """
        made: ChainRetriever = integration(*_LANGCHAIN).CribsheetRetriever(knowledge=self, **settings)
        return made

    def as_tool(self, name: str, description: str, **settings: Unpack[ToolOptions]) -> BaseTool:
        """A LangChain tool that answers questions from this sheet, for another model's agent."""
        return self.as_chat_model(**settings).as_tool(name=name, description=description)

    @overload
    def as_llama_index_llm(
        self, *, engine: Literal["llama.cpp"], gguf: str | Path, **settings: Any
    ) -> CribsheetLlamaCppLLM: ...

    @overload
    def as_llama_index_llm(self, **settings: Unpack[IndexLLMOptions]) -> CribsheetLLM: ...

    def as_llama_index_llm(self, *, engine: str | None = None, gguf: str | Path | None = None, **settings: Any) -> Any:
        """A LlamaIndex LLM that answers from this sheet (`llama_index.llms.cribsheet.CribsheetLLM`).

        With `engine="llama.cpp"` and a GGUF, llama.cpp answers (`llama_index.llms.cribsheet.CribsheetLlamaCppLLM`).
        """
        index = integration(*_LLAMA_INDEX)
        if engine is None and gguf is None:
            return index.CribsheetLLM(knowledge=self, **settings)
        return index.CribsheetLlamaCppLLM(**in_engine(self, engine, gguf, settings))

    def as_query_engine(self, **settings: Unpack[QueryEngineOptions]) -> CompressedKnowledgeQueryEngine:
        """A LlamaIndex query engine over this sheet, where `index.as_query_engine()` was."""
        engine: type[CompressedKnowledgeQueryEngine] = integration(*_LLAMA_INDEX).CompressedKnowledgeQueryEngine
        return engine.from_args(knowledge=self, **settings)

    def as_index_retriever(self, **settings: Unpack[IndexRetrieverOptions]) -> IndexRetriever:
        """A LlamaIndex retriever of the passages that the sheet looks at, where `index.as_retriever()` was."""
        made: IndexRetriever = integration(*_LLAMA_INDEX).CribsheetRetriever(self, **settings)
        return made
