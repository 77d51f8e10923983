"""`ChatCribsheet`: a LangChain chat model that answers from a sheet.

Everything is taken from `CompressedKnowledgeLLM`; this file only speaks LangChain. Concurrent calls, from threads or
tasks, meet in the engine and are answered as one batch.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.language_models.model_profile import ModelProfile
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, SystemMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import get_config_list
from langchain_core.tools import BaseTool, StructuredTool
from pydantic import ConfigDict, Field, PrivateAttr, SecretStr, model_validator

from cribsheet import CompressedKnowledgeLLM, RequestError, Retrieval, Tool, __version__, as_retriever
from cribsheet.structured.grammar import Grammar
from cribsheet.structured.tools import Toolbox
from cribsheet.vocabulary import Mode, NoArchive
from langchain_cribsheet.call import Call
from langchain_cribsheet.knowledge import Knowledge
from langchain_cribsheet.messages import as_conversation
from langchain_cribsheet.schemas import as_openai_tool
from langchain_cribsheet.serialisation import register
from langchain_cribsheet.structured import structured

_BATCH = 64  # answers that the engine writes at once
_SAMPLING = ("temperature", "max_tokens", "top_p", "top_k", "seed", "frequency_penalty", "presence_penalty", "stop")
_PASSAGES = ("retriever", "mode", "passage_tokens", "sure", "no_archive")
_PROCESS = uuid.uuid4().hex  # tells objects of this process from those of another that have the same address


class ChatCribsheet(BaseChatModel):
    """A chat model that answers from a sheet: `ChatCribsheet(sheet="staff.sheet")`, or `kb.as_chat_model()`.

    sheet
        path of the sheet; without it, the environment's `CRIBSHEET_SHEET`.
    model
        folder or hub id of the model that made the sheet; without it `CRIBSHEET_MODEL`, or where the sheet says.
    model_options
        for `Backbone.load`: `device`, `dtype`, `device_map`, `quantization_config`, ...
    knowledge
        an open `CompressedKnowledgeLLM` instead of a path.

    retriever, mode, passage_tokens, sure, no_archive
        tell passages after the sheet, or recall them, as in `CompressedKnowledgeLLM.ask`: `retriever` is "bm25" or
        "dense" for the sheet's own documents, "sheet" to recall what that looks at, or any retriever or runnable, and
        `top_k` then counts passages. In a chain that has a retriever already nothing is retrieved again, and a warning
        says so; in the mode "recall" the markers of a `CribsheetRetriever` say what is recalled.
    evidence
        whether answers tell what they looked at (`source_documents`); they do unless it is false.

    All others are settings of an answer as in `SamplingParams`, and can also be given with each call. Weights are
    loaded with the first question, once per process. `max_retries` and `api_key` are taken because chains pass them;
    there is nothing to retry and nobody to ask for a key. Unknown arguments are errors.
    """

    model_config = ConfigDict(extra="forbid")

    sheet: str | None = Field(default_factory=lambda: os.environ.get("CRIBSHEET_SHEET"))
    model: str | None = Field(default_factory=lambda: os.environ.get("CRIBSHEET_MODEL"))
    model_options: dict[str, Any] = Field(default_factory=dict)
    knowledge: Any = Field(default=None, exclude=True, repr=False)

    temperature: float | None = None
    max_tokens: int | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    stop: list[str] | None = None
    timeout: float | None = None
    retriever: Any = Field(default=None, repr=False)
    mode: Mode | None = None
    passage_tokens: int | None = None
    sure: float | None = None
    no_archive: NoArchive | None = None
    evidence: bool | None = None
    streaming: bool = False
    max_retries: int | None = None
    api_key: SecretStr | None = Field(default=None, exclude=True, repr=False)

    _made_profile: Any = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _set_knowledge(self) -> ChatCribsheet:
        if isinstance(self.knowledge, CompressedKnowledgeLLM):
            if self.sheet and "sheet" in self.model_fields_set:
                raise ValueError(f"Both knowledge= and sheet={self.sheet!r} were given; pass one of them.")
            self.__dict__["sheet"] = None
        known = Knowledge.given(self.knowledge, self.sheet, self.model, self.model_options)
        self.__dict__["knowledge"] = known
        return self

    @model_validator(mode="after")
    def _check_retrieval(self) -> ChatCribsheet:
        found, _ = Retrieval.taken_from({name: getattr(self, name) for name in (*_PASSAGES, "top_k")})
        if found is not None and not isinstance(found.retriever, str):
            as_retriever(found.retriever)
        return self

    @model_validator(mode="after")
    def _set_cribsheet_version(self) -> ChatCribsheet:
        self._add_version("cribsheet", __version__)
        return self

    # ---- what it is

    @property
    def _llm_type(self) -> str:
        return "chat-cribsheet"

    @property
    def llm(self) -> CompressedKnowledgeLLM:
        """The model with its sheet, loaded now if it was not yet."""
        return self._open(self._known())

    def _open(self, known: Knowledge) -> CompressedKnowledgeLLM:
        llm = known.llm
        if known is self.knowledge and self._made_profile is not None:
            self._made_profile.update(_sizes(llm))
        return llm

    async def _aopen(self, known: Knowledge) -> CompressedKnowledgeLLM:
        """`_open`, where loading does not hold up the event loop."""
        return self._open(known) if known.is_open else await asyncio.to_thread(self._open, known)

    def _known(self, sheet: str | None = None, model: str | None = None) -> Knowledge:
        """The knowledge to answer from: this object's, or another sheet or model for one call."""
        own: Knowledge | None = self.knowledge
        if own and not sheet and not self.sheet and not model:
            return own  # around an open one
        if own and not sheet and model == own.manifest.fingerprint.model:
            return own
        find = own.instead if own else Knowledge.of
        return find(sheet or self.sheet, model or self.model, self.model_options)

    def _model_name(self, model: str | None = None) -> str:
        return model or self.model or self._known().manifest.fingerprint.model

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        """What an answer depends on: for tracing, and for the cache key that tells two sheets apart."""
        given = {name: getattr(self, name) for name in (*_SAMPLING, *_PASSAGES)}
        if self.retriever is not None and not isinstance(self.retriever, str):
            given["retriever"] = f"{type(self.retriever).__qualname__} {_PROCESS} {id(self.retriever)}"
        sampling = {name: value for name, value in given.items() if value is not None}
        known = self.knowledge
        digest = known.manifest.digest if known else None
        return {"model": self.model, "sheet": self.sheet, "digest": digest, **sampling}

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """LangChain's cache key; its own holds paths only, and another sheet may lie there tomorrow."""
        said = super()._get_llm_string(stop, **kwargs)
        known = self._known(kwargs.get("sheet"), kwargs.get("model"))
        identity = f"{known.manifest.digest} {sorted(self._identifying_params.items(), key=str)}"
        return f"{said}---{hashlib.sha256(identity.encode()).hexdigest()}"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = "cribsheet"
        if "ls_model_name" not in params and self.knowledge is not None:
            params["ls_model_name"] = self._model_name()
        return params

    def _resolve_model_profile(self) -> ModelProfile:
        profile = ModelProfile(
            text_inputs=True,
            text_outputs=True,
            image_inputs=False,
            audio_inputs=False,
            tool_calling=True,
            tool_choice=True,
            structured_output=True,
            reasoning_output=False,
            temperature=True,
            open_weights=True,
        )
        known = self.knowledge
        llm = known.llm if isinstance(known, Knowledge) and known.is_open else known  # called before `_set_knowledge`
        if isinstance(llm, CompressedKnowledgeLLM):
            profile.update(_sizes(llm))
        self._made_profile = profile  # its sizes are known once the model is loaded
        return profile

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """It is: its fields are paths and settings."""
        return True

    def to_json(self) -> Any:
        """LangChain's serialised form; one around an open sheet has none, for it has no path, nor has a retriever."""
        is_plain = self.sheet and isinstance(self.retriever, str | None)
        return super().to_json() if is_plain else self.to_json_not_implemented()

    # ---- counting

    def get_token_ids(self, text: str) -> list[int]:
        """Token ids of a text by the model's own tokenizer."""
        ids: list[int] = self.llm.backbone.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Tokens that messages and tools take beside the sheet, as its template renders them; 0 for no messages.

        Messages that end with the model's own, or with a system text, count as they do when another question follows.
        """
        count, told = self.llm.count_tokens, [as_openai_tool(tool) for tool in tools or ()]
        if not messages:
            return 0
        if isinstance(messages[-1], AIMessage | SystemMessage):
            return count(as_conversation([*messages, HumanMessage("?")]), told) - count("?")
        return count(as_conversation(messages), told)

    # ---- answering

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = self._call(messages, stop, kwargs)
        return call.result(call.ask(self._open(call.known)))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = self._call(messages, stop, kwargs)
        return call.result(await call.aask(await self._aopen(call.known)))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        call = self._call(messages, stop, kwargs).streamed()
        with self._open(call.known).stream(call.asked, **call.settings) as stream:
            for text in stream:
                chunk = ChatGenerationChunk(message=AIMessageChunk(content=text))
                if run_manager:
                    run_manager.on_llm_new_token(text, chunk=chunk)
                yield chunk
        yield call.last_chunk(stream.answer)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        call = self._call(messages, stop, kwargs).streamed()
        llm = await self._aopen(call.known)
        async with llm.astream(await call.prepared(llm)) as stream:
            async for text in stream:
                chunk = ChatGenerationChunk(message=AIMessageChunk(content=text))
                if run_manager:
                    await run_manager.on_llm_new_token(text, chunk=chunk)
                yield chunk
        yield call.last_chunk(stream.answer)

    def _call(self, messages: list[BaseMessage], stop: list[str] | None, given: Mapping[str, Any]) -> Call:
        """One call: the fields' settings, then the call's own."""
        settings: dict[str, Any] = {name: getattr(self, name) for name in (*_SAMPLING, *_PASSAGES, "evidence")}
        settings |= given
        settings["stop"] = stop if stop is not None else settings["stop"]
        settings["timeout"] = settings.get("timeout", self.timeout)
        sheet, model = settings.pop("sheet", None), settings.pop("model", None)
        return Call.of(messages, self._known(sheet, model), model or self.model, settings)

    # ---- composing

    def batch(self, inputs: Any, config: Any = None, **kwargs: Any) -> Any:
        """As in LangChain, with as many calls at once as the engine batches, unless `max_concurrency` says less."""
        return super().batch(inputs, _wide(config, inputs), **kwargs)

    async def abatch(self, inputs: Any, config: Any = None, **kwargs: Any) -> Any:
        """As `batch`."""
        return await super().abatch(inputs, _wide(config, inputs), **kwargs)

    def batch_as_completed(self, inputs: Any, config: Any = None, **kwargs: Any) -> Any:
        """As `batch`, each answer with its number as soon as it is there."""
        return super().batch_as_completed(inputs, _wide(config, inputs), **kwargs)

    def abatch_as_completed(self, inputs: Any, config: Any = None, **kwargs: Any) -> Any:
        """As `batch_as_completed`."""
        return super().abatch_as_completed(inputs, _wide(config, inputs), **kwargs)

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: Any = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """A model that may call `tools`; `tool_choice` is "auto", "none", "any", "required", true, or a tool's name.

        A forced call is complete and fits the tool's schema, unless a `stop` string cuts it;
        `parallel_tool_calls=False` keeps only the first. Raises `RequestError` for a choice that is none, and for a
        forced tool whose schema no grammar can enforce.
        """
        converted = [as_openai_tool(tool) for tool in tools]
        toolbox = Toolbox.of(list({Tool.of(tool).name: tool for tool in converted}.values()), tool_choice)
        if toolbox and toolbox.forced:
            Grammar.json_schema(toolbox.schema)
        chosen = {} if tool_choice is None else {"tool_choice": tool_choice}
        return self.bind(tools=converted, **chosen, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        method: str = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """A model whose answers are instances of `schema` (Pydantic) or dicts (TypedDict, JSON schema).

        `method` is "json_schema" (the answer is bound by the schema), "function_calling" (a forced call) or "json_mode"
        (any JSON object). Answers are complete unless a `stop` string cuts them, or refused before they begin; what a
        class checks beyond its schema is raised. `strict=False` also allows keys that the schema does not name.
        """
        return structured(self, schema, method=method, include_raw=include_raw, strict=strict, **kwargs)

    def as_tool(  # type: ignore[override]
        self, args_schema: None = None, *, name: str | None = None, description: str | None = None
    ) -> BaseTool:
        """A tool that answers a question from the sheet, for another model's agent; its argument is `question`."""
        if args_schema is not None:
            raise RequestError("The tool's only argument is the question, so args_schema cannot be given.")

        def ask(question: str) -> str:
            return self.invoke(question).text

        async def aask(question: str) -> str:
            return (await self.ainvoke(question)).text

        told = description or f"Answers questions from documents. {self._known().manifest.task['description']}"
        return StructuredTool.from_function(ask, aask, name=name or "ask_documents", description=told)


def _sizes(llm: CompressedKnowledgeLLM) -> ModelProfile:
    """The parts of a profile that are only known with the model: the sheet's share of the window is taken."""
    return ModelProfile(max_input_tokens=llm.room, max_output_tokens=llm.room, name=llm.backbone.name)


def _wide(config: Any, inputs: Sequence[Any]) -> list[RunnableConfig]:
    """A config for each input, with the engine's width as the default of `max_concurrency`."""
    configs = get_config_list(config, len(inputs))
    return [{**each, "max_concurrency": each.get("max_concurrency") or _BATCH} for each in configs]


register(*ChatCribsheet.lc_id())
