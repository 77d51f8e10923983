"""`CribsheetLLM`: a LlamaIndex LLM that answers from a sheet.

Everything is taken from `CompressedKnowledgeLLM`; this file only speaks LlamaIndex. Concurrent calls, from threads or
tasks, meet in the engine and are answered as one batch.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike, fspath
from typing import Any, Self

from llama_index.core.base.base_selector import MultiSelection, SingleSelection
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    ToolCallBlock,
)
from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr, field_serializer
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.tools.types import BaseTool
from llama_index.llms.cribsheet.forms import current, of_class
from llama_index.llms.cribsheet.messages import (
    aresponses,
    arguments,
    as_chat_response,
    as_completion,
    as_conversation,
    partial_chat_response,
    partial_completion,
    responses,
)
from llama_index.llms.cribsheet.structured import SchemaBoundLLM

from cribsheet import (
    Answer,
    AsyncAnswerStream,
    CompressedKnowledgeLLM,
    MismatchError,
    RequestError,
    Retrieval,
    SamplingParams,
    SheetError,
    as_retriever,
)

_SAMPLING = ("temperature", "max_tokens", "top_p", "top_k", "seed", "frequency_penalty", "presence_penalty", "stop")
_PASSAGES = ("retriever", "mode", "passage_tokens", "sure", "no_archive")


class CribsheetLLM(SchemaBoundLLM):
    """An LLM that answers from a sheet: `CribsheetLLM("staff.sheet")`, or `kb.as_llama_index_llm()`.

    sheet
        path of the sheet; it and the weights are loaded with the first question.
    knowledge
        an open `CompressedKnowledgeLLM` instead; with `sheet` beside it, the path where it is saved.
    model, model_options
        folder or hub id of the model, and options for `Backbone.load`; without them, what the sheet says.
    digest
        the sheet must be this one (`Manifest.digest`); known as soon as it is open.

    retriever, mode, passage_tokens, sure, no_archive
        tell passages after the sheet, or recall them, as in `CompressedKnowledgeLLM.ask`: `retriever` is "bm25" or
        "dense" for the sheet's own documents, "sheet" to recall what that looks at, or any retriever; `top_k` then
        counts passages.
    evidence
        whether responses tell what the answer looked at, in `raw["sources"]`; they do unless it is false.

    All others are settings of an answer as in `SamplingParams`, and can also be given with each call. Unknown
    settings are errors.
    """

    model_config = ConfigDict(protected_namespaces=())

    sheet: str | None = Field(default=None, description="Path of the sheet.")
    model: str | None = Field(default=None, description="Folder or hub id of the model that made the sheet.")
    model_options: dict[str, Any] = Field(default_factory=dict, description="Options for loading the model.")
    digest: str | None = Field(default=None, description="What tells the sheet from others.")

    temperature: float | None = Field(default=None, description="Greedy unless above 0.")
    max_tokens: int | None = Field(default=None, description="Longest answer in tokens.")
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    stop: list[str] | None = None
    timeout: float | None = Field(default=None, description="Seconds that an answer may take.")
    retriever: Any = Field(
        default=None, description="What finds passages; bm25 or dense for the sheet's own documents."
    )
    mode: str | None = Field(default=None, description="sheet, retrieval, hybrid, auto or recall.")
    passage_tokens: int | None = Field(default=None, description="Most tokens of passages.")
    sure: float | None = Field(default=None, description="How certain a draft must be in mode auto.")
    no_archive: str | None = Field(default=None, description="What recall does without an archive: error or sheet.")
    evidence: bool | None = Field(default=None, description="Whether responses tell what was looked at.")

    _opened: CompressedKnowledgeLLM | None = PrivateAttr(default=None)
    _opening: Any = PrivateAttr(default_factory=threading.Lock)

    def __init__(
        self,
        sheet: str | PathLike[str] | None = None,
        *,
        knowledge: CompressedKnowledgeLLM | None = None,
        **settings: Any,
    ) -> None:
        """Remember what to answer from. Raises `SheetError` without a sheet, `RequestError` for unknown settings."""
        known = set(type(self).model_fields) - {"messages_to_prompt"}  # messages are rendered by the sheet's template
        unknown = sorted(set(settings) - known)
        if unknown:
            raise RequestError(f"CribsheetLLM does not know {', '.join(unknown)}; use {', '.join(sorted(known))}.")
        if sheet is None and knowledge is None:
            raise SheetError("No sheet was given; pass the path of one, or knowledge= with an open one.")
        super().__init__(**{"sheet": None if sheet is None else fspath(sheet), **settings})
        retrieval, sampling = Retrieval.taken_from(self._given((*_SAMPLING, *_PASSAGES)))
        SamplingParams(**sampling)  # out of range is told now rather than with the first question
        if retrieval is not None and not isinstance(retrieval.retriever, str):
            as_retriever(retrieval.retriever)
        if knowledge is not None:
            self._adopt(knowledge)

    # ---- what it is

    @field_serializer("retriever")
    def _plain(self, retriever: Any) -> str | None:
        return retriever if isinstance(retriever, str) else None

    @property
    def retrieves(self) -> bool:
        """Whether it tells passages of its own."""
        return Retrieval.taken_from(self._given((*_PASSAGES, "top_k")))[0] is not None

    def with_passages(self, **settings: Any) -> Self:
        """The same LLM on the same sheet, with other settings of retrieval."""
        made = self.model_copy(update={name: value for name, value in settings.items() if value is not None})
        retrieval, _ = Retrieval.taken_from(made._given((*_PASSAGES, "top_k")))
        if retrieval is not None and not isinstance(retrieval.retriever, str):
            as_retriever(retrieval.retriever)
        return made

    @classmethod
    def class_name(cls) -> str:
        """The name in serialised forms."""
        return "CribsheetLLM"

    @property
    def knowledge(self) -> CompressedKnowledgeLLM:
        """The model with its sheet, loaded now if it was not yet."""
        with self._opening:
            if self._opened is None:
                assert self.sheet is not None
                self._adopt(CompressedKnowledgeLLM.load(self.sheet, model=self.model, **self.model_options))
            assert self._opened is not None
            return self._opened

    def _adopt(self, knowledge: CompressedKnowledgeLLM) -> None:
        found = knowledge.sheet.manifest.digest
        if self.digest not in (None, found):
            raise MismatchError(
                f"The sheet {self.sheet or 'that was given'} has the digest {found}, but {self.digest} is wanted; give "
                "that sheet, or leave out digest=."
            )
        self._opened, self.digest = knowledge, found

    async def _aopen(self) -> CompressedKnowledgeLLM:
        """`knowledge`; loading does not hold up the event loop."""
        if self._opened is not None:
            return self._opened
        return await asyncio.to_thread(lambda: self.knowledge)

    @property
    def metadata(self) -> LLMMetadata:
        """What is left of the model's window beside the sheet, and what the model can do."""
        knowledge = self.knowledge
        longest = self.max_tokens or SamplingParams().max_tokens
        return LLMMetadata(
            context_window=knowledge.room,
            num_output=min(longest, knowledge.room // 2),
            is_chat_model=True,
            is_function_calling_model=True,
            model_name=self.model or knowledge.sheet.manifest.fingerprint.model,
        )

    def to_payload(self) -> dict[str, Any]:
        """What events tell of this LLM; a sheet that is not open yet is not opened for them."""
        told = self.metadata.model_dump() if self._opened else {"model_name": self.model}
        return {"class_name": self.class_name(), "sheet": self.sheet, "digest": self.digest, **told}

    def tokenize(self, text: str) -> list[int]:
        """Token ids by the model's own tokenizer: for `TokenCountingHandler(tokenizer=)` and `Settings.tokenizer`."""
        ids: list[int] = self.knowledge.backbone.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def __reduce__(self) -> tuple[Callable[..., Self], tuple[dict[str, Any]]]:
        """Pickled as its `to_dict`: the sheet's path, not its content."""
        if self.sheet is None:
            raise SheetError(
                "This LLM holds a sheet in memory; save it, and pass its path: kb.as_llama_index_llm(sheet=path)."
            )
        if not isinstance(self.retriever, str | None):
            raise RequestError(
                f"This LLM holds a retriever of type {type(self.retriever).__name__}, which stays in this process; "
                "give the copy its own."
            )
        return type(self).from_dict, (self.to_dict(),)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """A copy on the same model and sheet."""
        return self.__copy__()

    # ---- answering

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation; tools are in `kwargs` as `_prepare_chat_with_tools` puts them there."""
        asked, settings, reply = self._chatted(messages, kwargs)
        return reply(self.knowledge.ask(asked, **settings))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """`chat` without blocking the event loop; cancelling the task stops the work within one token."""
        asked, settings, reply = self._chatted(messages, kwargs)
        return reply(await (await self._aopen()).aask(asked, **settings))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """`chat` as it is written; closing the generator stops the work. The last one has calls and usage."""
        asked, settings, reply = self._chatted(messages, kwargs)
        return responses(self.knowledge.stream(asked, **settings), partial_chat_response, reply)

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """`stream_chat` for `async for`."""
        asked, settings, reply = self._chatted(messages, kwargs)
        return aresponses(await self._astream(asked, settings), partial_chat_response, reply)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a question."""
        asked, settings, reply = self._prompted(prompt, formatted, kwargs)
        return reply(self.knowledge.ask(asked, **settings))

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """`complete` without blocking the event loop."""
        asked, settings, reply = self._prompted(prompt, formatted, kwargs)
        return reply(await (await self._aopen()).aask(asked, **settings))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """`complete` as it is written."""
        asked, settings, reply = self._prompted(prompt, formatted, kwargs)
        return responses(self.knowledge.stream(asked, **settings), partial_completion, reply)

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """`stream_complete` for `async for`."""
        asked, settings, reply = self._prompted(prompt, formatted, kwargs)
        return aresponses(await self._astream(asked, settings), partial_completion, reply)

    async def _astream(self, asked: str | list[dict[str, Any]], settings: Mapping[str, Any]) -> AsyncAnswerStream:
        """The stream of an answer; neither loading nor preparing holds up the event loop."""
        knowledge = await self._aopen()
        return knowledge.astream(await asyncio.to_thread(knowledge.prepare, asked, **settings))

    def _chatted(
        self, messages: Sequence[ChatMessage], given: Mapping[str, Any]
    ) -> tuple[list[dict[str, Any]], dict[str, Any], Callable[..., ChatResponse]]:
        """The conversation to answer, the settings, and what makes a response of the answer."""
        settings = self._settings(given)
        several = settings.pop("parallel_tool_calls", True)

        def reply(answer: Answer, delta: str | None = None) -> ChatResponse:
            if not several:
                answer = replace(answer, tool_calls=answer.tool_calls[:1])
            return as_chat_response(answer, self._facts(), delta)

        return as_conversation(messages), settings, reply

    def _prompted(
        self, prompt: str, formatted: bool, given: Mapping[str, Any]
    ) -> tuple[str, dict[str, Any], Callable[..., CompletionResponse]]:
        """As `_chatted`, for a completion."""
        if given.get("tools"):
            raise RequestError("tools= was given, but a completion has no place for calls; use chat.")

        def reply(answer: Answer, delta: str | None = None) -> CompletionResponse:
            return as_completion(answer, self._facts(), delta)

        if not formatted and self.completion_to_prompt is not None:
            prompt = self.completion_to_prompt(prompt)
        return prompt, self._settings(given), reply

    def _settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of one answer: the fields', the form that a prompt's parser reads, then the call's."""
        form = {"json_schema": current()} if current() else {}
        own = self._given((*_SAMPLING, *_PASSAGES, "timeout", "evidence"))
        return {**own, **form, **{k: v for k, v in given.items() if v is not None}}

    def _given(self, names: Sequence[str]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _facts(self) -> dict[str, Any]:
        """What every response tells of the sheet."""
        made = self.knowledge.sheet.manifest
        return {
            "model": self.model or made.fingerprint.model,
            "sheet": made.digest,
            "kept_tokens": self.knowledge.sheet.tokens,
            "corpus_tokens": made.corpus_tokens,
        }

    # ---- tools

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Arguments of `chat`. A call that is required, or whose tool is named, is forced by a grammar."""
        messages = list(chat_history or [])
        if user_msg is not None:
            messages.append(ChatMessage(content=user_msg) if isinstance(user_msg, str) else user_msg)
        return {
            "messages": messages,
            "tools": [_described(tool, messages) for tool in tools] or None,
            "tool_choice": tool_choice or ("required" if tool_required else None),
            "parallel_tool_calls": allow_parallel_tool_calls,
            **kwargs,
        }

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The calls in a response. Raises `ValueError` if there are none and that is an error."""
        blocks = [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]
        if not blocks and error_on_no_tool_call:
            raise ValueError(f"The model called no tool; it answered {response.message.content!r}.")
        return [
            ToolSelection(tool_id=block.tool_call_id or "", tool_name=block.tool_name, tool_kwargs=arguments(block))
            for block in blocks
        ]


def _described(tool: BaseTool, messages: Sequence[ChatMessage]) -> dict[str, Any]:
    """A tool in OpenAI's form; one that takes a selection takes only what there is to select."""
    described, schema = tool.metadata.to_openai_tool(skip_length_check=True), tool.metadata.fn_schema
    if schema in (SingleSelection, MultiSelection):
        described["function"]["parameters"] = of_class(schema, messages)
    elif schema is not None and "$ref" in (own := schema.model_json_schema()):  # it holds itself, and no more is kept
        described["function"]["parameters"] = own
    return described
