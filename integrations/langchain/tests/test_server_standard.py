"""LangChain's standard suite with `ChatOpenAI` against `cribsheet serve`: an OpenAI client takes a sheet for a model.

The model is the one that is fitted to the suite's prompts (`fitted/fit.py`). Counting tokens needs OpenAI's own
tokenizers, which ChatOpenAI downloads, so no test here counts.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

from cribsheet.server import Shelf, create_app


@pytest.fixture(scope="module")
def url(place: Path) -> Iterator[str]:
    """A server with the sheet under two names."""
    sheets = [f"{name}={place / 'people.sheet'}" for name in ("people", "others")]
    app = create_app(Shelf.open(sheets, model=place / "fitted"))
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=2))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    server.should_exit = True
    thread.join(30)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")  # openai-python's own
@pytest.mark.filterwarnings("ignore:Received a Pydantic BaseModel V1 schema:UserWarning")
class TestChatOpenAI(ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def _where(self, url: str) -> None:
        type(self)._url = url

    @property
    def chat_model_class(self) -> type[ChatOpenAI]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        # each test has an event loop of its own, and a connection that is kept alive would belong to the last one's
        client = httpx.AsyncClient(limits=httpx.Limits(max_keepalive_connections=0))
        where = {"base_url": self._url, "api_key": "none", "max_retries": 0, "http_async_client": client}
        return {"model": "people", "stream_usage": True, **where}

    @property
    def model_override_value(self) -> str:
        return "others"

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return False
