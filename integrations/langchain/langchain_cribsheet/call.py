"""One call of the chat model: what LangChain hands over, as a question and its settings, and the way back."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from cribsheet import Answer, CompressedKnowledgeLLM, RequestError
from cribsheet.asking.prepared import Prepared
from langchain_cribsheet.knowledge import Knowledge
from langchain_cribsheet.messages import as_conversation, as_message, facts_of, last_chunk

_FOR_LANGCHAIN = ("ls_structured_output_format", "strict")  # nothing for the model in them


@dataclass(frozen=True, slots=True)
class Call:
    """What is asked, of which knowledge, with which settings of `CompressedKnowledgeLLM.ask`.

    `count` answers are wanted; `one_tool` keeps only the first call of a tool in each.
    """

    asked: list[dict[str, Any]]
    known: Knowledge
    model: str | None
    settings: dict[str, Any]
    count: int = 1
    one_tool: bool = False

    @classmethod
    def of(cls, messages: Sequence[BaseMessage], known: Knowledge, model: str | None, given: Mapping[str, Any]) -> Call:
        """A call from LangChain's messages and OpenAI's settings; those that are none are as if not given."""
        settings = {name: value for name, value in given.items() if name not in _FOR_LANGCHAIN and value is not None}
        count, form = settings.pop("n", 1), settings.pop("response_format", None)
        one_tool = settings.pop("parallel_tool_calls", True) is False
        if form is not None:
            settings["json_schema"] = schema_of(form)
        top, logprobs = settings.pop("top_logprobs", 0), settings.pop("logprobs", False)
        if top or logprobs:
            settings["logprobs"] = top
        return cls(as_conversation(messages), known, model, settings, count, one_tool)

    async def prepared(self, llm: CompressedKnowledgeLLM) -> Prepared:
        """The question ready to be asked; the work for it holds up no event loop."""
        return await asyncio.to_thread(llm.prepare, self.asked, **self.settings)

    def ask(self, llm: CompressedKnowledgeLLM) -> list[Answer]:
        """The answers."""
        if self.count != 1:
            return llm.ask_many(self.asked, self.count, **self.settings)
        return [llm.ask(self.asked, **self.settings)]

    async def aask(self, llm: CompressedKnowledgeLLM) -> list[Answer]:
        """`ask`; cancelling it stops the work."""
        if self.count != 1:
            return await llm.aask_many(self.asked, self.count, **self.settings)
        return [await llm.aask(self.asked, **self.settings)]

    def streamed(self) -> Call:
        """Itself. Raises `RequestError` if several answers are wanted, for a stream writes one."""
        if self.count != 1:
            raise RequestError(f"n is {self.count}, but a stream writes 1 answer; use `generate` for several.")
        return self

    def result(self, answers: Sequence[Answer]) -> ChatResult:
        """What LangChain's `_generate` returns."""
        facts = facts_of(self.known.llm.sheet, self._name)
        messages = [as_message(self._cut(answer), facts) for answer in answers]
        made = [ChatGeneration(message=each, generation_info=dict(each.response_metadata)) for each in messages]
        return ChatResult(generations=made, llm_output={"model_name": self._name})

    def last_chunk(self, answer: Answer) -> ChatGenerationChunk:
        """What ends LangChain's `_stream`."""
        return ChatGenerationChunk(message=last_chunk(self._cut(answer), facts_of(self.known.llm.sheet, self._name)))

    @property
    def _name(self) -> str:
        return self.model or self.known.manifest.fingerprint.model

    def _cut(self, answer: Answer) -> Answer:
        return replace(answer, tool_calls=answer.tool_calls[:1]) if self.one_tool else answer


def schema_of(form: Any) -> Any:
    """The JSON schema of OpenAI's `response_format`; any JSON object for its JSON mode, nothing for text."""
    kind = form.get("type") if isinstance(form, Mapping) else None
    if kind == "json_schema" and isinstance(form.get("json_schema"), Mapping):
        return form["json_schema"].get("schema", form["json_schema"])
    if kind == "json_object":
        return {"type": "object"}
    if kind == "text":
        return None
    raise RequestError(f"response_format is {form!r}; use the type 'json_schema', 'json_object' or 'text'.")
