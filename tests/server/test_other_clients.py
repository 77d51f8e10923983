"""The frameworks' own OpenAI clients against a real server; LangChain's whole suite is in its integration's tests."""

from __future__ import annotations

import httpx
import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_openai import ChatOpenAI
from llama_index.core import PromptTemplate
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class Home(BaseModel):
    """Where somebody lives."""

    name: str
    city: str


def like(live, model="oslo", **options):
    common = {"api_base": f"{live.url}/v1", "api_key": "none", "max_retries": 0, "context_window": 4096}
    return OpenAILike(model=model, **common, **options)


def test_openai_like_chats_and_completes(live):
    llm = like(live, is_chat_model=True)
    asked = [ChatMessage(role="user", content="Where does Bob live?")]
    assert llm.chat(asked).message.content == "Bob lives in Oslo."
    assert "".join(part.delta for part in llm.stream_chat(asked)) == "Bob lives in Oslo."
    assert llm.complete("Where does Bob live?").text == "Bob lives in Oslo."
    assert like(live).complete("Where does Bob live?").text == "Bob lives in Oslo."  # by /v1/completions


def test_langchain_hears_that_a_question_does_not_fit(live):
    model = ChatOpenAI(base_url=f"{live.url}/v1", api_key="none", model="oslo", max_retries=0)
    with pytest.raises(ContextOverflowError, match="window"):
        model.invoke("word " * 5000)


async def test_openai_like_chats_without_blocking(live):
    asked = [ChatMessage(role="user", content="Where does Bob live?")]
    async with httpx.AsyncClient() as client:  # its own would outlive the test's event loop
        llm = like(live, is_chat_model=True, async_http_client=client)
        assert (await llm.achat(asked)).message.content == "Bob lives in Oslo."


@pytest.mark.parametrize("how", ["is_function_calling_model", "should_use_structured_outputs"])
def test_openai_like_gets_instances(live, how):
    llm = like(live, model="noise", is_chat_model=True, max_tokens=90, **{how: True})
    assert isinstance(llm.structured_predict(Home, PromptTemplate("Where does Bob live?")), Home)
