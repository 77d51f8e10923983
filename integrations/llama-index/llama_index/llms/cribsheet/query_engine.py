"""`CompressedKnowledgeQueryEngine`: LlamaIndex's query engine, answering from a sheet.

It is a `RetrieverQueryEngine`, which chat engines, routers and benchmarks look for. Without a retriever the sheet
answers first, and what the answer looked at becomes its source nodes. With one, what was retrieved is told after the
sheet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.response.schema import RESPONSE_TYPE, PydanticResponse, Response
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.llms.llm import LLM
from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.core.settings import Settings
from llama_index.llms.cribsheet.base import CribsheetLLM
from llama_index.llms.cribsheet.retriever import AnsweredQuery, CribsheetRetriever
from llama_index.llms.cribsheet.synthesizer import CribsheetSynthesizer

from cribsheet import CompressedKnowledgeLLM, RequestError

_OF_SYNTHESIZER = (
    "response_mode",
    "streaming",
    "output_cls",
    "text_qa_template",
    "simple_template",
    "context_tokens",
)


_OF_CORE = ("mode", "passage_tokens", "sure", "no_archive")


@dataclass(frozen=True, slots=True)
class Searched:
    """What a LlamaIndex retriever finds, after postprocessors, for the core to ask for when it wants to."""

    retriever: BaseRetriever
    postprocessors: Sequence[BaseNodePostprocessor]

    @classmethod
    def of(cls, retriever: Any, postprocessors: Sequence[BaseNodePostprocessor] | None) -> Any:
        """The retriever; one of LlamaIndex's with its postprocessors."""
        return cls(retriever, postprocessors or ()) if isinstance(retriever, BaseRetriever) else retriever

    def retrieve(self, query: str) -> list[NodeWithScore]:
        """Nodes for a query."""
        nodes = self.retriever.retrieve(query)
        for each in self.postprocessors:
            nodes = each.postprocess_nodes(nodes, query_bundle=QueryBundle(query))
        return nodes

    async def aretrieve(self, query: str) -> list[NodeWithScore]:
        """`retrieve` for async code."""
        nodes = await self.retriever.aretrieve(query)
        for each in self.postprocessors:
            nodes = await each.apostprocess_nodes(nodes, query_bundle=QueryBundle(query))
        return nodes


class CompressedKnowledgeQueryEngine(RetrieverQueryEngine):
    """Answers queries from a sheet; made by `kb.as_query_engine()`, or `from_args`.

    retriever
        where passages beside the sheet come from (`index.as_retriever()`); none by default. They are retrieved first,
        and told as many as the window holds.
    mode, passage_tokens, sure, no_archive
        leave it to the core instead when and how much is retrieved ("hybrid", "auto", "retrieval", "recall": see
        `CompressedKnowledgeLLM.ask`), from `retriever`, which may be of any kind then, or from the sheet's own
        documents. What was told becomes source nodes, in a stream when it has ended.
    similarity_top_k
        how many documents of the sheet become source nodes: those that the answer looked at most, or for a stream,
        which has to begin with them, the question. Reading that off costs about as much as reading the question; 0
        for none.
    node_postprocessors
        for what the retriever found, or without one, for the sheet's source nodes.

    All else is the synthesizer's: `streaming`, `response_mode`, `output_cls`, prompts (`CribsheetSynthesizer`).
    """

    _response_synthesizer: CribsheetSynthesizer

    def __init__(
        self,
        retriever: BaseRetriever | None,
        response_synthesizer: BaseSynthesizer,
        node_postprocessors: list[BaseNodePostprocessor] | None = None,
        callback_manager: CallbackManager | None = None,
        *,
        similarity_top_k: int = 3,
    ) -> None:
        """Raises `RequestError` for another synthesizer than ours: theirs answer nothing where nothing was found."""
        if not isinstance(response_synthesizer, CribsheetSynthesizer):
            kind = type(response_synthesizer).__name__
            raise RequestError(f"response_synthesizer is a {kind}; give a CribsheetSynthesizer, or leave it out.")
        self._top_k = similarity_top_k
        self._sheet = CribsheetRetriever(
            response_synthesizer.llm.knowledge, similarity_top_k=similarity_top_k, callback_manager=callback_manager
        )
        self._is_hybrid = retriever is not None
        super().__init__(retriever or self._sheet, response_synthesizer, node_postprocessors, callback_manager)

    @classmethod
    def from_args(  # type: ignore[override]
        cls,
        retriever: Any = None,
        llm: LLM | None = None,
        response_synthesizer: BaseSynthesizer | None = None,
        node_postprocessors: list[BaseNodePostprocessor] | None = None,
        callback_manager: CallbackManager | None = None,
        *,
        knowledge: CompressedKnowledgeLLM | None = None,
        similarity_top_k: int = 3,
        **settings: Any,
    ) -> Self:
        """An engine over `knowledge`, or over a `CribsheetLLM`: `llm`, or else `Settings.llm`.

        `settings` are the synthesizer's, and with `knowledge` also those of `CribsheetLLM` (`max_tokens`, ...). Raises
        `RequestError` for what neither knows.
        """
        callback_manager = callback_manager or Settings.callback_manager
        own = {name: settings.pop(name) for name in _OF_SYNTHESIZER if name in settings}
        if response_synthesizer is None:
            by_core = {name: settings.pop(name) for name in _OF_CORE if settings.get(name) is not None}
            if by_core or not isinstance(retriever, BaseRetriever | None):
                by_core["retriever"] = Searched.of(retriever, node_postprocessors)
                retriever = None
            if own.get("text_qa_template") is not None and retriever is None:
                raise RequestError(
                    "text_qa_template is for retrieved passages, but there is no retriever; give simple_template=, or "
                    "retriever=."
                )
            if knowledge is not None:
                llm = CribsheetLLM(knowledge=knowledge, callback_manager=callback_manager, **settings)
                settings = {}
            llm, own = _without_structure(llm or Settings.llm, own)
            if by_core:
                llm = llm.with_passages(**by_core)
            response_synthesizer = CribsheetSynthesizer(llm, callback_manager=callback_manager, **own)
            own = {}
        if unused := sorted({**own, **settings}):
            raise RequestError(
                f"{', '.join(unused)} would go unused; give it to the LLM or synthesizer that was passed."
            )
        return cls(
            retriever, response_synthesizer, node_postprocessors, callback_manager, similarity_top_k=similarity_top_k
        )

    def with_retriever(self, retriever: BaseRetriever) -> Self:
        """The same engine with another retriever."""
        return type(self)(
            retriever,
            self._response_synthesizer,
            self._node_postprocessors,
            self.callback_manager,
            similarity_top_k=self._top_k,
        )

    def _query(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        with self.callback_manager.event(
            CBEventType.QUERY, payload={EventPayload.QUERY_STR: query_bundle.query_str}
        ) as event:
            nodes = self.retrieve(query_bundle) if self._retrieves_first else []
            response = self._response_synthesizer.synthesize(query_bundle, nodes)
            if self._looks:
                looked_at = self._sheet.retrieve(_answered(query_bundle, response))
                if not self._is_hybrid:
                    looked_at = self._apply_node_postprocessors(looked_at, query_bundle)
                _add_sources(response, looked_at)
            event.on_end(payload={EventPayload.RESPONSE: response})
        return response

    async def _aquery(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        with self.callback_manager.event(
            CBEventType.QUERY, payload={EventPayload.QUERY_STR: query_bundle.query_str}
        ) as event:
            nodes = await self.aretrieve(query_bundle) if self._retrieves_first else []
            response = await self._response_synthesizer.asynthesize(query_bundle, nodes)
            if self._looks:
                looked_at = await self._sheet.aretrieve(_answered(query_bundle, response))
                if not self._is_hybrid:
                    looked_at = await self._async_apply_node_postprocessors(looked_at, query_bundle)
                _add_sources(response, looked_at)
            event.on_end(payload={EventPayload.RESPONSE: response})
        return response

    @property
    def _looks(self) -> bool:
        """Whether the answer looks at the sheet."""
        return self._response_synthesizer.calls and self._response_synthesizer.llm.mode != "retrieval"

    @property
    def _retrieves_first(self) -> bool:
        """Whether there is anything to retrieve before the answer; the sheet's own sources are known best after it."""
        return self._is_hybrid or not self._response_synthesizer.calls


def _without_structure(llm: LLM, settings: dict[str, Any]) -> tuple[CribsheetLLM, dict[str, Any]]:
    """The LLM inside of `llm.as_structured_llm(...)`, with its class as the synthesizer's."""
    if isinstance(llm, StructuredLLM):
        settings = {"output_cls": llm.output_cls, **settings}
        llm = llm.llm
    if not isinstance(llm, CribsheetLLM):
        raise RequestError(f"The LLM is a {type(llm).__name__}, which has no sheet; give a CribsheetLLM.")
    return llm, settings


def _answered(query: QueryBundle, response: RESPONSE_TYPE) -> QueryBundle:
    answer = str(response) if isinstance(response, (Response, PydanticResponse)) and response.response else ""
    return AnsweredQuery(query.query_str, answer=answer)


def _add_sources(response: RESPONSE_TYPE, nodes: list[NodeWithScore]) -> None:
    known = {each.node_id for each in response.source_nodes}
    new = [each for each in nodes if each.node_id not in known]
    response.source_nodes += new
    response.metadata = {**{each.node_id: each.metadata for each in new}, **(response.metadata or {})}
