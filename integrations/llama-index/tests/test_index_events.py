"""Whoever listens hears everything: callbacks, token counts, and the dispatcher's events and spans."""

from __future__ import annotations

import asyncio

import pytest
from index_corpus import ANSWER, QUESTION
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler, TokenCountingHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from pydantic import BaseModel, Field


class Listener(BaseEventHandler):
    """Remembers events."""

    events: list = Field(default_factory=list)

    def handle(self, event, **kwargs):
        self.events.append(event)

    @property
    def names(self) -> list[str]:
        return [event.class_name() for event in self.events]


@pytest.fixture
def listener():
    dispatcher = get_dispatcher()
    made = Listener()
    dispatcher.add_event_handler(made)
    yield made
    dispatcher.event_handlers.remove(made)


def test_a_query_tells_its_story(engine, listener):
    engine.query(QUESTION)
    story = [
        "QueryStartEvent",
        "SynthesizeStartEvent",
        "LLMChatStartEvent",
        "LLMChatEndEvent",
        "SynthesizeEndEvent",
        "RetrievalStartEvent",
        "RetrievalEndEvent",
        "QueryEndEvent",
    ]
    assert listener.names == story
    listener.events.clear()
    asyncio.run(engine.aquery(QUESTION))
    assert listener.names == story


def test_streams_tell_of_their_progress_and_end(llm, listener):
    pieces = list(llm.stream_complete(QUESTION))
    assert listener.names == [
        "LLMCompletionStartEvent",
        *["LLMCompletionInProgressEvent"] * len(pieces),
        "LLMCompletionEndEvent",
    ]
    assert listener.events[-1].response.text == ANSWER


def test_events_carry_usage_and_no_tensors(kb, llm, listener):
    llm.complete(QUESTION)
    list(llm.stream_complete(QUESTION))
    asyncio.run(llm.acomplete(QUESTION))
    ends = [event for event in listener.events if event.class_name() == "LLMCompletionEndEvent"]
    assert [event.response.raw["usage"]["prompt_tokens_details"]["cached_tokens"] for event in ends] == [
        kb.sheet.tokens
    ] * 3
    for event in listener.events:
        event.model_dump_json()


def test_structured_answers_tell_of_themselves(kb, listener):
    class City(BaseModel):
        name: str

    from llama_index.core.prompts import PromptTemplate

    kb.as_llama_index_llm(max_tokens=24).structured_predict(City, PromptTemplate(QUESTION))
    assert listener.names[0] == "LLMStructuredPredictStartEvent"
    assert listener.names[-1] == "LLMStructuredPredictEndEvent"
    assert any(isinstance(event, LLMChatEndEvent) for event in listener.events)


def test_every_step_is_a_span(engine):
    dispatcher, handler = get_dispatcher(), SimpleSpanHandler()
    dispatcher.add_span_handler(handler)
    try:
        engine.query(QUESTION)
    finally:
        dispatcher.span_handlers.remove(handler)
    names = {span.id_.rsplit("-", 5)[0] for span in handler.completed_spans}
    assert {
        "CompressedKnowledgeQueryEngine.query",
        "CompressedKnowledgeQueryEngine._query",
        "CribsheetSynthesizer.synthesize",
        "CribsheetLLM.chat",
        "CribsheetRetriever.retrieve",
    } <= names


def test_callbacks_hear_of_a_query(kb):
    handler = LlamaDebugHandler(print_trace_on_end=False)
    kb.as_query_engine(max_tokens=4, callback_manager=CallbackManager([handler])).query(QUESTION)
    ended = {kind: len(handler.get_event_pairs(kind)) for kind in CBEventType}
    assert {kind for kind, number in ended.items() if number} == {
        CBEventType.QUERY,
        CBEventType.SYNTHESIZE,
        CBEventType.TEMPLATING,
        CBEventType.LLM,
        CBEventType.RETRIEVE,
    }


def test_the_global_callback_manager_is_used(kb, settings):
    handler = LlamaDebugHandler(print_trace_on_end=False)
    settings.callback_manager = CallbackManager([handler])
    kb.as_query_engine(max_tokens=4).query(QUESTION)
    assert handler.get_event_pairs(CBEventType.LLM)


def test_tokens_are_counted_as_the_model_counts_them(kb, llm):
    counter = TokenCountingHandler(tokenizer=llm.tokenize)
    counted = kb.as_query_engine(max_tokens=12, callback_manager=CallbackManager([counter]))
    usage = counted.query(QUESTION).metadata["cribsheet"]["usage"]
    assert counter.prompt_llm_token_count == usage["prompt_tokens"]
    assert counter.completion_llm_token_count == usage["completion_tokens"]
    counter.reset_counts()
    streaming = kb.as_query_engine(max_tokens=12, streaming=True, callback_manager=CallbackManager([counter]))
    str(streaming.query(QUESTION))
    assert counter.total_llm_token_count == usage["total_tokens"]


def test_an_error_is_told_too(llm, listener):
    with pytest.raises(ValueError, match="question is empty"):
        llm.complete(" ")
    assert "SpanDropEvent" in listener.names or "ExceptionEvent" in listener.names
