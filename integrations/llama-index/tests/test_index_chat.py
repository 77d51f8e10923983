"""The four chat engines, in their four forms, over a sheet."""

from __future__ import annotations

import asyncio

import pytest
from index_corpus import ANSWER, QUESTION
from llama_index.core.base.llms.types import CitationBlock, ImageBlock, TextBlock, ThinkingBlock
from llama_index.core.chat_engine import (
    CondensePlusContextChatEngine,
    CondenseQuestionChatEngine,
    ContextChatEngine,
    SimpleChatEngine,
)
from llama_index.core.llms import ChatMessage, MessageRole
from openai.types.chat import ChatCompletionMessageFunctionToolCall

from cribsheet.errors import RequestError

EARLIER = [
    ChatMessage(role=MessageRole.USER, content="Where does Bob Smith live?"),
    ChatMessage(role=MessageRole.ASSISTANT, content="Oslo"),
]


@pytest.fixture(params=["simple", "context", "condense_question", "condense_plus_context"])
def chat(request, kb, llm, engine):
    retriever = kb.as_index_retriever(similarity_top_k=1)
    return {
        "simple": lambda: SimpleChatEngine.from_defaults(llm=llm),
        "context": lambda: ContextChatEngine.from_defaults(retriever=retriever, llm=llm),
        "condense_question": lambda: CondenseQuestionChatEngine.from_defaults(query_engine=engine, llm=llm),
        "condense_plus_context": lambda: CondensePlusContextChatEngine.from_defaults(retriever=retriever, llm=llm),
    }[request.param]()


def ask(chat, form: str, question: str, **more) -> str:
    async def native() -> str:
        if form == "achat":
            return str(await chat.achat(question, **more))
        response = await chat.astream_chat(question, **more)
        return "".join([piece async for piece in response.async_response_gen()])

    if form == "chat":
        return str(chat.chat(question, **more))
    if form == "stream_chat":
        return "".join(chat.stream_chat(question, **more).response_gen)
    return asyncio.run(native())


@pytest.mark.parametrize("form", ["chat", "stream_chat", "achat", "astream_chat"])
def test_a_chat_engine_answers_and_remembers(chat, form):
    answer = ask(chat, form, QUESTION)
    if not isinstance(chat, CondensePlusContextChatEngine | ContextChatEngine):  # their prompts are long and foreign
        assert answer == ANSWER
    assert answer and [message.content for message in chat.chat_history] == [QUESTION, answer]
    assert ask(chat, form, "Where does Clara Berg live?")
    assert [message.role.value for message in chat.chat_history] == ["user", "assistant"] * 2


def test_an_earlier_conversation_is_taken_up(chat):
    assert ask(chat, "chat", QUESTION, chat_history=list(EARLIER))


WELCOME = ChatMessage(role=MessageRole.ASSISTANT, content="Hello! Ask me where people live.")
CALL = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}


def test_a_history_may_begin_with_the_assistant_s_turn(chat):
    assert ask(chat, "chat", QUESTION, chat_history=[WELCOME])
    assert ask(chat, "stream_chat", QUESTION, chat_history=[EARLIER[1], *EARLIER])


@pytest.mark.parametrize(
    "turn",
    [
        {"content": "Hello!"},
        {"blocks": [ThinkingBlock(content="Hm."), TextBlock(text="Hello!")]},
        {"blocks": [ThinkingBlock(content="Hm.")]},
        {"blocks": [CitationBlock(cited_content="x", source="s", title="t", additional_location_info={})]},
        {"content": None, "additional_kwargs": {"refusal": "I will not."}},
        {"content": None, "additional_kwargs": {"function_call": {"name": "look", "arguments": "{}"}}},
        {"content": None, "additional_kwargs": {"tool_calls": [CALL]}},
        {
            "content": None,
            "additional_kwargs": {"tool_calls": [ChatCompletionMessageFunctionToolCall.model_validate(CALL)]},
        },
        {"content": None, "additional_kwargs": {"tool_calls": [{"id": "c", "name": "look", "input": {}}]}},
    ],
)
def test_a_turn_of_any_provider_s_model_may_come_first(llm, turn):
    messages = [ChatMessage(role=MessageRole.ASSISTANT, **turn), ChatMessage(content=QUESTION)]
    assert llm.chat(messages).message.content == ANSWER
    assert llm.chat([ChatMessage(role=MessageRole.SYSTEM, content=""), *messages]).message.content


def test_a_picture_is_refused_whoever_sent_it(llm):
    for role in (MessageRole.ASSISTANT, MessageRole.USER):
        shown = ChatMessage(role=role, blocks=[ImageBlock(url="https://example.org/a.png")])
        with pytest.raises(RequestError, match="type 'image', but the model reads text only"):
            llm.chat([shown, ChatMessage(content=QUESTION)])


def test_the_flag_for_streaming_is_back_after_a_chat(engine, llm):
    chat = CondenseQuestionChatEngine.from_defaults(query_engine=engine, llm=llm)
    assert ask(chat, "stream_chat", QUESTION) == ANSWER
    assert str(engine.query(QUESTION)) == ANSWER
