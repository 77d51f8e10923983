"""LangChain's standard suites, whole, on a real small model over a real sheet.

The model is fitted to the suites' prompts (`fitted/fit.py`): they test a protocol, not knowledge. Nothing is expected
to fail; only images, audio and PDF files are left out.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.retrievers import BaseRetriever
from langchain_cribsheet import ChatCribsheet, CribsheetRetriever
from langchain_tests.integration_tests import ChatModelIntegrationTests, RetrieversIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests


class _Common:
    @pytest.fixture(autouse=True)
    def _where(self, here: Any) -> None:
        """Paths below are relative to the folder of the fitted model."""

    @property
    def chat_model_class(self) -> type[ChatCribsheet]:
        return ChatCribsheet

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"sheet": "people.sheet", "model": "fitted"}

    @property
    def model_override_value(self) -> str:
        return "./fitted"

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def supported_usage_metadata_details(self) -> Any:
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}


class TestUnit(_Common, ChatModelUnitTests):
    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        values = {"sheet": "people.sheet", "model": "fitted"}
        return {f"CRIBSHEET_{name.upper()}": value for name, value in values.items()}, {}, values


@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")  # by the test of recorded traffic
class TestIntegration(_Common, ChatModelIntegrationTests):
    @property
    def enable_vcr_tests(self) -> bool:
        return True  # there is no traffic to record, so the test just streams

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        model = ChatCribsheet(sheet="people.sheet", model="fitted")
        if not stream:
            return model.invoke("Who?")
        whole: AIMessageChunk | None = None
        for chunk in model.stream("Who?"):
            assert isinstance(chunk, AIMessageChunk)
            whole = chunk if whole is None else whole + chunk  # type: ignore[assignment]
        assert whole is not None
        return whole


class TestRetriever(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def _where(self, here: Any) -> None:
        os.environ.pop("CRIBSHEET_SHEET", None)

    @property
    def retriever_constructor(self) -> type[BaseRetriever]:
        return CribsheetRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"sheet": "people.sheet", "model": "fitted", "k": 2}

    @property
    def retriever_query_example(self) -> str:
        return "Who lives in Lisbon?"

    @property
    def num_results_arg_name(self) -> str:
        return "k"


def test_documents_of_the_retriever_are_the_real_ones(here: Any) -> None:
    found = CribsheetRetriever(sheet="people.sheet", model="fitted", k=1).invoke("Who?")
    assert len(found) == 1 and isinstance(found[0], Document) and "lives in" in found[0].page_content
