"""`ChatCribsheetLlamaCpp`: a LangChain chat model that answers from a sheet in llama.cpp.

Everything is taken from `cribsheet.asking.llama_cpp`; this file only speaks LangChain. What an answer looked at is not
known there, so its `sources` are empty, and nothing calls tools.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from pydantic import ConfigDict, Field, PrivateAttr, model_validator

from cribsheet import RequestError
from cribsheet.asking.llama_cpp.llm import OPTIONS, SAMPLED, LlamaCpp
from langchain_cribsheet.messages import as_conversation, as_message, facts_of, last_chunk
from langchain_cribsheet.structured import structured

_FOR_LANGCHAIN = ("ls_structured_output_format", "strict")  # nothing for the model in them


class ChatCribsheetLlamaCpp(BaseChatModel):
    """A chat model over a sheet in llama.cpp: `kb.as_chat_model(engine="llama.cpp", gguf="model.gguf")`.

    sheet, gguf
        paths of the sheet, built with `for_engines=True`, and of a GGUF of the model that made it. llama.cpp is started
        with the first question.
    model
        folder or hub id of the model's tokenizer; without it, where the sheet says. No weights are loaded from there.
    slots, room, threads, gpu_layers
        as `LlamaCpp` has them.
    served
        an open `LlamaCpp` instead of all these.

    All others are settings of an answer as in `SamplingParams`, and can also be given with each call. Unknown arguments
    are errors.
    """

    model_config = ConfigDict(extra="forbid")

    sheet: str | None = None
    gguf: str | None = None
    model: str | None = None
    slots: int = 1
    room: int = 2048
    threads: int | None = None
    gpu_layers: int = 0
    served: Any = Field(default=None, exclude=True, repr=False)

    temperature: float | None = None
    max_tokens: int | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    stop: list[str] | None = None
    timeout: float | None = None

    _opening: Any = PrivateAttr(default_factory=threading.Lock)

    @model_validator(mode="after")
    def _check_served(self) -> ChatCribsheetLlamaCpp:
        named = [name for name in ("sheet", "gguf") if getattr(self, name) is not None]
        if self.served is not None and named:
            raise ValueError(f"Both served= and {named[0]}= were given; pass one of them.")
        if self.served is None and len(named) < 2:
            raise ValueError("Give sheet= and gguf=, the paths of a sheet and of a GGUF of its model.")
        return self

    @property
    def llama(self) -> LlamaCpp:
        """llama.cpp with the sheet, started now if it was not yet."""
        with self._opening:
            if self.served is None:
                how: Any = {name: getattr(self, name) for name in OPTIONS}
                self.served = LlamaCpp(str(self.sheet), str(self.gguf), tokenizer=self.model, **how)
            opened: LlamaCpp = self.served
            return opened

    @property
    def _llm_type(self) -> str:
        return "chat-cribsheet-llama-cpp"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        """What an answer depends on, for tracing and caches."""
        opened = self.served.sheet.manifest.digest if self.served is not None else None
        sampling = {name: getattr(self, name) for name in SAMPLED if getattr(self, name) is not None}
        gguf = str(self.served.gguf) if self.served is not None else self.gguf
        return {"sheet": self.sheet, "gguf": gguf, "digest": opened, **sampling}

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """LangChain's cache key; its own may hold paths only, and another sheet may lie there tomorrow."""
        opened = self.llama  # first: what is told of it is told then
        return f"{super()._get_llm_string(stop, **kwargs)}---{opened.sheet.manifest.digest} {opened.gguf}"

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        answer = self.llama.ask(as_conversation(messages), **self._settings(stop, kwargs))
        return ChatResult(generations=[ChatGeneration(message=as_message(answer, self._facts()))])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        with self.llama.stream(as_conversation(messages), **self._settings(stop, kwargs)) as stream:
            for text in stream:
                chunk = ChatGenerationChunk(message=AIMessageChunk(content=text))
                if run_manager:
                    run_manager.on_llm_new_token(text, chunk=chunk)
                yield chunk
        yield ChatGenerationChunk(message=last_chunk(stream.answer, self._facts()))

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        include_raw: bool = False,
        method: str = "json_schema",
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """An answer that fits a schema, bound by llama.cpp while it is written. Raises `RequestError` for tools."""
        if method == "function_calling":
            raise RequestError("llama.cpp over a sheet calls no tools; use method='json_schema'.")
        return structured(self, schema, method=method, include_raw=include_raw, strict=strict, **kwargs)

    def _settings(self, stop: list[str] | None, given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of one answer: the fields', then the call's."""
        own = {name: getattr(self, name) for name in (*SAMPLED, "timeout")}
        asked = {name: value for name, value in given.items() if name not in _FOR_LANGCHAIN and value is not None}
        return own | asked | ({} if stop is None else {"stop": stop})

    def _facts(self) -> dict[str, Any]:
        sheet = self.llama.sheet
        return {**facts_of(sheet, sheet.manifest.fingerprint.model), "engine": "llama.cpp"}
