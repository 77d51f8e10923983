"""`CribsheetLlamaCppLLM`: a LlamaIndex LLM that answers from a sheet in llama.cpp.

Everything is taken from `cribsheet.asking.llama_cpp`; this file only speaks LlamaIndex. What an answer looked at is not
known there, so `raw["sources"]` is empty, and nothing calls tools.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseGen,
    LLMMetadata,
)
from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.llms.cribsheet.messages import (
    as_chat_response,
    as_completion,
    as_conversation,
    partial_chat_response,
    partial_completion,
    responses,
)

from cribsheet import RequestError, SamplingParams, SheetError
from cribsheet.asking.llama_cpp.llm import OPTIONS, SAMPLED, LlamaCpp


class CribsheetLlamaCppLLM(CustomLLM):
    """An LLM over a sheet in llama.cpp: `kb.as_llama_index_llm(engine="llama.cpp", gguf="model.gguf")`.

    sheet, gguf
        paths of the sheet, built with `for_engines=True`, and of a GGUF of the model that made it. llama.cpp is started
        with the first question.
    model
        folder or hub id of the model's tokenizer; without it, where the sheet says. No weights are loaded from there.
    slots, room, threads, gpu_layers
        as `LlamaCpp` has them.
    served
        an open `LlamaCpp` instead of all these.

    All others are settings of an answer as in `SamplingParams`, and can also be given with each call. Unknown settings
    are errors.
    """

    model_config = ConfigDict(protected_namespaces=())

    sheet: str | None = Field(default=None, description="Path of the sheet.")
    gguf: str | None = Field(default=None, description="Path of a GGUF of the model that made the sheet.")
    model: str | None = Field(default=None, description="Folder or hub id of the model's tokenizer.")
    slots: int = Field(default=1, description="Questions that are answered at a time.")
    room: int = Field(default=2048, description="Positions for question and answer.")
    threads: int | None = None
    gpu_layers: int = 0

    temperature: float | None = Field(default=None, description="Greedy unless above 0.")
    max_tokens: int | None = Field(default=None, description="Longest answer in tokens.")
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    stop: list[str] | None = None
    timeout: float | None = Field(default=None, description="Seconds that an answer may take.")

    _served: LlamaCpp | None = PrivateAttr(default=None)
    _opening: Any = PrivateAttr(default_factory=threading.Lock)

    def __init__(
        self,
        sheet: str | PathLike[str] | None = None,
        gguf: str | PathLike[str] | None = None,
        *,
        served: LlamaCpp | None = None,
        **settings: Any,
    ) -> None:
        """Remember what to answer from. Raises `SheetError` without it, `RequestError` for unknown settings."""
        known = set(type(self).model_fields) - {"messages_to_prompt", "completion_to_prompt"}
        if unknown := sorted(set(settings) - known):
            name = type(self).__name__
            raise RequestError(f"{name} does not know {', '.join(unknown)}; use {', '.join(sorted(known))}.")
        if served is None and (sheet is None or gguf is None):
            raise SheetError("Give sheet= and gguf=, the paths of a sheet and of a GGUF of its model.")
        paths = {"sheet": sheet and fspath(sheet), "gguf": gguf and fspath(gguf)}
        super().__init__(**{**paths, **settings})
        SamplingParams(**self._given(SAMPLED))  # out of range is told now rather than with the first question
        self._served = served

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex keeps it."""
        return "CribsheetLlamaCppLLM"

    @property
    def llama(self) -> LlamaCpp:
        """llama.cpp with the sheet, started now if it was not yet."""
        with self._opening:
            if self._served is None:
                how: Any = {name: getattr(self, name) for name in OPTIONS}
                self._served = LlamaCpp(str(self.sheet), str(self.gguf), tokenizer=self.model, **how)
            return self._served

    @property
    def metadata(self) -> LLMMetadata:
        """What is left of the model's window beside the sheet."""
        longest = self.max_tokens or SamplingParams().max_tokens
        room = self.llama.room
        return LLMMetadata(
            context_window=room,
            num_output=min(longest, room // 2),
            is_chat_model=True,
            is_function_calling_model=False,
            model_name=self.model or self.llama.sheet.manifest.fingerprint.model,
        )

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation."""
        return as_chat_response(self.llama.ask(as_conversation(messages), **self._settings(kwargs)), self._facts())

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """`chat` as it is written; closing the generator stops the work."""
        stream = self.llama.stream(as_conversation(messages), **self._settings(kwargs))
        return responses(
            stream, partial_chat_response, lambda answer, delta: as_chat_response(answer, self._facts(), delta)
        )

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a question."""
        return as_completion(self.llama.ask(prompt, **self._settings(kwargs)), self._facts())

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """`complete` as it is written."""
        stream = self.llama.stream(prompt, **self._settings(kwargs))
        return responses(stream, partial_completion, lambda answer, delta: as_completion(answer, self._facts(), delta))

    def _settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of one answer: the fields', then the call's."""
        return {**self._given((*SAMPLED, "timeout")), **given}

    def _given(self, names: Sequence[str]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _facts(self) -> dict[str, Any]:
        """What every response tells of the sheet."""
        sheet = self.llama.sheet
        return {
            "model": self.model or sheet.manifest.fingerprint.model,
            "engine": "llama.cpp",
            "sheet": sheet.manifest.digest,
            "kept_tokens": sheet.tokens,
            "corpus_tokens": sheet.manifest.corpus_tokens,
        }
