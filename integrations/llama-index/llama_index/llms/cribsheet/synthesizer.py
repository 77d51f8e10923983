"""`CribsheetSynthesizer`: an answer from the sheet, with whatever was retrieved told after it in the same call."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, ChatResponseAsyncGen, ChatResponseGen
from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.instrumentation.events.synthesis import SynthesizeEndEvent, SynthesizeStartEvent
from llama_index.core.prompts import BasePromptTemplate, PromptTemplate, PromptType
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.response_synthesizers import BaseSynthesizer, ResponseMode
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, QueryType
from llama_index.core.types import RESPONSE_TEXT_TYPE
from llama_index.llms.cribsheet.base import CribsheetLLM
from llama_index.llms.cribsheet.forms import of_class
from llama_index.llms.cribsheet.messages import as_conversation
from llama_index.llms.cribsheet.retriever import SheetNode, told_node
from llama_index_instrumentation import get_dispatcher

from cribsheet import RequestError

logger = logging.getLogger(__name__)
dispatcher = get_dispatcher(__name__)

TEXT_QA = PromptTemplate("Passages:\n\n{context_str}\n\n{query_str}", prompt_type=PromptType.QUESTION_ANSWER)
SIMPLE = PromptTemplate("{query_str}", prompt_type=PromptType.SIMPLE_INPUT)
_JOINT = "\n\n"
_JOINT_TOKENS = 2  # at most, between passages

# In one call: all retrieved chunks, none of them (`generation`), or no call at all.
MODES = (
    ResponseMode.COMPACT,
    ResponseMode.SIMPLE_SUMMARIZE,
    ResponseMode.GENERATION,
    ResponseMode.NO_TEXT,
    ResponseMode.CONTEXT_ONLY,
)
_WITHOUT_CALL = (ResponseMode.NO_TEXT, ResponseMode.CONTEXT_ONLY)


class CribsheetSynthesizer(BaseSynthesizer):
    """Answers from the sheet in one call, whether or not anything was retrieved.

    text_qa_template, simple_template
        the prompts with retrieved passages (`context_str`, `query_str`) and without (`query_str`).
    context_tokens
        at most so many tokens of retrieved passages; never more than question and answer leave of the window. What
        does not fit is cut at its end or left out, the last first, with a warning.
    output_cls
        the answer is an instance of this class; streamed, it is its JSON.

    Nodes that the sheet has read (`SheetNode`) are sources and are not told to the model again. `metadata` of a
    response holds each source node's metadata by its id, and what is known of the call under "cribsheet"; a streamed
    response's is complete when the stream has ended.
    """

    _llm: CribsheetLLM

    def __init__(
        self,
        llm: CribsheetLLM,
        *,
        callback_manager: CallbackManager | None = None,
        response_mode: ResponseMode | str = ResponseMode.COMPACT,
        streaming: bool = False,
        output_cls: type[BaseModel] | None = None,
        text_qa_template: BasePromptTemplate | None = None,
        simple_template: BasePromptTemplate | None = None,
        context_tokens: int | None = None,
    ) -> None:
        if response_mode not in MODES:
            raise RequestError(
                f"The response mode is {str(getattr(response_mode, 'value', response_mode))!r}, but a sheet answers in "
                f"one call; use one of {', '.join(mode.value for mode in MODES)}."
            )
        if context_tokens is not None and context_tokens < 1:
            raise RequestError(f"context_tokens is {context_tokens}; allow at least 1, or leave it out.")
        super().__init__(llm=llm, callback_manager=callback_manager, streaming=streaming, output_cls=output_cls)
        self._mode = ResponseMode(response_mode)
        self._text_qa_template = text_qa_template or TEXT_QA
        self._simple_template = simple_template or SIMPLE
        self._context_tokens = context_tokens

    @property
    def llm(self) -> CribsheetLLM:
        """What answers."""
        return self._llm

    def _get_prompts(self) -> PromptDictType:
        return {"text_qa_template": self._text_qa_template, "simple_template": self._simple_template}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        self._text_qa_template = prompts.get("text_qa_template", self._text_qa_template)
        self._simple_template = prompts.get("simple_template", self._simple_template)

    # ---- from nodes to a response

    def synthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """Answer with the nodes; without any, from the sheet alone."""
        query = QueryBundle(query) if isinstance(query, str) else query
        with self._reported(query) as report:
            sources, texts = self._told(query.query_str, nodes, response_kwargs)
            facts: dict[str, Any] = {}
            text = self._respond(query.query_str, texts, facts, response_kwargs)
            return report(self._response(text, [*sources, *(additional_source_nodes or ())], facts))

    async def asynthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """`synthesize` without blocking the event loop."""
        query = QueryBundle(query) if isinstance(query, str) else query
        with self._reported(query) as report:
            sources, texts = self._told(query.query_str, nodes, response_kwargs)
            facts: dict[str, Any] = {}
            text = await self._arespond(query.query_str, texts, facts, response_kwargs)
            return report(self._response(text, [*sources, *(additional_source_nodes or ())], facts))

    @contextmanager
    def _reported(self, query: QueryBundle) -> Iterator[Callable[[RESPONSE_TYPE], RESPONSE_TYPE]]:
        """The events of a synthesis; what is yielded takes the response for them, and returns it."""
        made: list[RESPONSE_TYPE] = []

        def report(response: RESPONSE_TYPE) -> RESPONSE_TYPE:
            made.append(response)
            return response

        dispatcher.event(SynthesizeStartEvent(query=query))
        with self._callback_manager.event(
            CBEventType.SYNTHESIZE, payload={EventPayload.QUERY_STR: query.query_str}
        ) as event:
            yield report
            event.on_end(payload={EventPayload.RESPONSE: made[0]})
        dispatcher.event(SynthesizeEndEvent(query=query, response=made[0]))

    def _response(self, text: RESPONSE_TEXT_TYPE, sources: list[NodeWithScore], facts: dict[str, Any]) -> RESPONSE_TYPE:
        def add_told() -> None:
            nodes = self._told_by_itself(facts)
            response.source_nodes[:0] = nodes
            response.metadata = {**{each.node_id: each.metadata for each in nodes}, **(response.metadata or {})}

        is_stream = isinstance(text, Generator | AsyncGenerator)
        if isinstance(text, Generator):
            text = _ending(text, add_told)
        elif isinstance(text, AsyncGenerator):
            text = _aending(text, add_told)
        response = self._prepare_response_output(text, sources)
        assert response.metadata is not None
        response.metadata["cribsheet"] = facts
        if not is_stream:
            add_told()
        return response

    def _told_by_itself(self, facts: Mapping[str, Any]) -> list[NodeWithScore]:
        """Passages that the LLM's own retriever found, as nodes."""
        told = [each for each in facts.get("sources", ()) if each["retrieved"]]
        if not told:
            return []
        nodes = list(map(told_node, told))
        return [NodeWithScore(node=node, score=each["weight"]) for node, each in zip(nodes, told, strict=True)]

    # ---- from texts to an answer

    def get_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> RESPONSE_TEXT_TYPE:
        """The answer to a query with some texts, or with none."""
        texts = self._fit(query_str, text_chunks, response_kwargs)
        return self._respond(query_str, texts, {}, response_kwargs)

    async def aget_response(
        self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        """`get_response` without blocking the event loop."""
        texts = self._fit(query_str, text_chunks, response_kwargs)
        return await self._arespond(query_str, texts, {}, response_kwargs)

    def _respond(
        self, query: str, texts: Sequence[str], facts: dict[str, Any], more: Mapping[str, Any]
    ) -> RESPONSE_TEXT_TYPE:
        if not self.calls:
            return self._uncalled(texts)
        messages = self._messages(query, texts, more)
        settings = self._settings(texts)
        if self._streaming:
            return _deltas(self._llm.stream_chat(messages, **settings), facts)
        return self._parsed(self._llm.chat(messages, **settings), facts)

    async def _arespond(
        self, query: str, texts: Sequence[str], facts: dict[str, Any], more: Mapping[str, Any]
    ) -> RESPONSE_TEXT_TYPE:
        if not self.calls:
            return self._uncalled(texts)
        messages = self._messages(query, texts, more)
        settings = self._settings(texts)
        if self._streaming:
            return _adeltas(await self._llm.astream_chat(messages, **settings), facts)
        return self._parsed(await self._llm.achat(messages, **settings), facts)

    @property
    def calls(self) -> bool:
        """Whether the model is asked at all."""
        return self._mode not in _WITHOUT_CALL

    def _uncalled(self, texts: Sequence[str]) -> str:
        return _JOINT.join(texts) if self._mode == ResponseMode.CONTEXT_ONLY else ""

    def _settings(self, texts: Sequence[str]) -> dict[str, Any]:
        """Settings of the call: its form, and that nothing is retrieved where something was."""
        form = {} if self._output_cls is None else {"json_schema": of_class(self._output_cls)}
        if not texts or not self._llm.retrieves:
            return form
        logger.warning(
            "passages were given, so nothing is retrieved again: the query engine and the LLM both have a retriever; "
            "leave out one of them"
        )
        return {**form, "mode": "sheet"}

    def _parsed(self, response: ChatResponse, facts: dict[str, Any]) -> str | BaseModel:
        facts.update(response.raw or {})
        text = response.message.content or ""
        return self._llm._parse_output(text) if self._output_cls is None else self._output_cls.model_validate_json(text)

    def _messages(self, query: str, texts: Sequence[str], more: Mapping[str, Any]) -> list[ChatMessage]:
        template, given = self._simple_template, {"query_str": query, **more}
        if texts:
            template, given = self._text_qa_template, {"context_str": _JOINT.join(texts), **given}
        self._llm._log_template_data(template, **given)
        return self._llm._get_messages(template, **given)

    # ---- what is told of the nodes

    def _told(
        self, query: str, nodes: Sequence[NodeWithScore], more: Mapping[str, Any]
    ) -> tuple[list[NodeWithScore], list[str]]:
        """(nodes that are sources of the answer, texts that the model is told)"""
        if not self.calls:
            return list(nodes), _contents(nodes)
        if self._mode == ResponseMode.GENERATION:
            return list(nodes), []
        new = [each for each in nodes if not isinstance(each.node, SheetNode) and _content(each).strip()]
        read = [each for each in nodes if isinstance(each.node, SheetNode)]
        texts = self._fit(query, _contents(new), more)
        return new[: len(texts)] + read, texts

    def _fit(self, query: str, texts: Sequence[str], more: Mapping[str, Any]) -> list[str]:
        """The first texts, as many as there is room for; the last of them may be cut."""
        if not texts or not self.calls:
            return list(texts)
        room = self._llm.metadata
        alone = self._llm.knowledge.count_tokens(as_conversation(self._messages(query, ["."], more)))
        left = room.context_window - room.num_output - alone
        left = left if self._context_tokens is None else min(left, self._context_tokens)
        fitting: list[str] = []
        for text in texts:
            cut, tokens = self._cut(text, left - _JOINT_TOKENS)
            if cut:
                fitting.append(cut)
            if cut != text:
                logger.warning(
                    "retrieved passages do not fit: %d of %d are told, the last of them cut; raise context_tokens, "
                    "lower max_tokens, or retrieve less",
                    len(fitting),
                    len(texts),
                )
                break
            left -= tokens + _JOINT_TOKENS
        return fitting

    def _cut(self, text: str, tokens: int) -> tuple[str, int]:
        """At most so many tokens of a text, and how many it has."""
        encoded = self._llm.knowledge.backbone.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ends = [stop for _, stop in encoded["offset_mapping"]]
        return (text, len(ends)) if len(ends) <= tokens else (text[: ends[tokens - 1]] if tokens > 0 else "", tokens)


def _contents(nodes: Sequence[NodeWithScore]) -> list[str]:
    return [_content(each) for each in nodes]


def _content(node: NodeWithScore) -> str:
    return node.node.get_content(metadata_mode=MetadataMode.LLM)


def _ending(texts: Generator[str, None, None], then: Callable[[], None]) -> Generator[str, None, None]:
    yield from texts
    then()


async def _aending(texts: AsyncGenerator[str, None], then: Callable[[], None]) -> AsyncGenerator[str, None]:
    async for text in texts:
        yield text
    then()


def _deltas(responses: ChatResponseGen, facts: dict[str, Any]) -> Generator[str, None, None]:
    for response in responses:
        if response.delta:
            yield response.delta
        facts.update(response.raw or {})


async def _adeltas(responses: ChatResponseAsyncGen, facts: dict[str, Any]) -> AsyncGenerator[str, None]:
    async for response in responses:
        if response.delta:
            yield response.delta
        facts.update(response.raw or {})
