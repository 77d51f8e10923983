"""Structured answers: instances of a Pydantic class, bound by its JSON schema while they are written."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Mapping
from typing import Any, TypeAlias

from llama_index.core.base.llms.types import ChatMessage, ChatResponse
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.instrumentation.events.llm import LLMStructuredPredictEndEvent, LLMStructuredPredictStartEvent
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.program.utils import FlexibleModel, process_streaming_objects
from llama_index.core.prompts import BasePromptTemplate, PromptTemplate
from llama_index.core.types import Model, PydanticProgramMode
from llama_index.llms.cribsheet.forms import asked_for, of_class, unread
from llama_index_instrumentation import get_dispatcher

dispatcher = get_dispatcher(__name__)

_OF_PROGRAMS = ("tool_required", "tool_choice", "allow_parallel_tool_calls")  # the schema binds the answer anyway
Objects: TypeAlias = Model | list[Model] | FlexibleModel | list[FlexibleModel]


class SchemaBoundLLM(FunctionCallingLLM):
    """An LLM whose `chat` takes `json_schema=`, so that structured answers are whole and fit their class's schema.

    What the class checks beyond its schema is raised, and so is an answer that one of the caller's `stop` strings cut.
    Another `pydantic_program_mode` than the default goes LlamaIndex's own ways.
    """

    def predict(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        """The answer to a prompt; what its parser cannot read is asked for again, in the form that it can."""
        answer: str = super().predict(prompt, **prompt_args)
        if form := unread(prompt, prompt_args, answer):
            with asked_for(form):
                answer = super().predict(prompt, **prompt_args)
        return answer

    async def apredict(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        """`predict` without blocking the event loop."""
        answer: str = await super().apredict(prompt, **prompt_args)
        if form := unread(prompt, prompt_args, answer):
            with asked_for(form):
                answer = await super().apredict(prompt, **prompt_args)
        return answer

    def structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """An instance of `output_cls`. Raises what its own validators raise, beyond what a schema can say."""
        if self.pydantic_program_mode != PydanticProgramMode.DEFAULT:
            made: Model = super().structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)
            return made
        _begin(output_cls, prompt, prompt_args)
        messages, settings = self._bound(output_cls, prompt, llm_kwargs, prompt_args)
        return _end(output_cls, self.chat(messages, **settings))

    async def astructured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """`structured_predict` without blocking the event loop."""
        if self.pydantic_program_mode != PydanticProgramMode.DEFAULT:
            made: Model = await super().astructured_predict(output_cls, prompt, llm_kwargs, **prompt_args)
            return made
        _begin(output_cls, prompt, prompt_args)
        messages, settings = self._bound(output_cls, prompt, llm_kwargs, prompt_args)
        return _end(output_cls, await self.achat(messages, **settings))

    def _structured_stream_call(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[Objects[Model], None, None]:
        if self.pydantic_program_mode != PydanticProgramMode.DEFAULT:
            yield from super()._structured_stream_call(output_cls, prompt, llm_kwargs, **prompt_args)
            return
        messages, settings = self._bound(output_cls, prompt, llm_kwargs, prompt_args)
        objects = None
        for response in self.stream_chat(messages, **settings):
            objects = self._objects(output_cls, response, objects)
            yield objects

    async def _structured_astream_call(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[Objects[Model], None]:
        if self.pydantic_program_mode != PydanticProgramMode.DEFAULT:
            return await super()._structured_astream_call(output_cls, prompt, llm_kwargs, **prompt_args)
        messages, settings = self._bound(output_cls, prompt, llm_kwargs, prompt_args)
        responses = await self.astream_chat(messages, **settings)

        async def gen() -> AsyncGenerator[Objects[Model], None]:
            objects = None
            async for response in responses:
                objects = self._objects(output_cls, response, objects)
                yield objects

        return gen()

    def _bound(
        self,
        output_cls: type[BaseModel],
        prompt: PromptTemplate,
        llm_kwargs: Mapping[str, Any] | None,
        prompt_args: Mapping[str, Any],
    ) -> tuple[list[ChatMessage], dict[str, Any]]:
        """Messages and settings of the call."""
        settings = {name: value for name, value in (llm_kwargs or {}).items() if name not in _OF_PROGRAMS}
        messages = self._get_messages(prompt, **prompt_args)
        return messages, {**settings, "json_schema": of_class(output_cls, messages)}

    def _objects(self, output_cls: type[Model], response: ChatResponse, before: Any) -> Any:
        """What can be made of the answer so far; the whole answer makes an `output_cls`."""
        known = None if before is None else [before]
        return process_streaming_objects(response, output_cls, cur_objects=known, flexible_mode=True, llm=self)


def _begin(output_cls: type[BaseModel], prompt: PromptTemplate, prompt_args: dict[str, Any]) -> None:
    dispatcher.event(LLMStructuredPredictStartEvent(output_cls=output_cls, template=prompt, template_args=prompt_args))


def _end(output_cls: type[Model], response: ChatResponse) -> Model:
    made = output_cls.model_validate_json(response.message.content or "")
    dispatcher.event(LLMStructuredPredictEndEvent(output=made))
    return made
