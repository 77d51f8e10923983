"""Real servers on loopback, each in a thread of this process, over tiny real models."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
import openai
import uvicorn

from cribsheet import CompressedKnowledgeLLM
from cribsheet.server import ServerSettings, Shelf, create_app
from cribsheet.server.auth import Keyring
from cribsheet.server.connections import serving as bounded
from cribsheet.testing import echo_backbone, tiny_backbone

STAFF = [
    {"id": "alice", "text": "Alice Moreno lives in Lisbon and works for Nordwind Labs. " * 4},
    {"id": "bob", "text": "Bob Smith lives in Oslo and works for Karst Foods. " * 4},
]


@dataclass
class Live:
    """A running server."""

    url: str
    app: object
    stop: object
    clients: list = field(default_factory=list)

    def openai(self, key="none", **options):
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)
        self.clients.append(client)
        return client

    def aopenai(self, key="none"):
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def http(self, **options):
        client = httpx.Client(base_url=self.url, timeout=60, **options)
        self.clients.append(client)
        return client

    def post(self, path="/v1/chat/completions", **body):
        with httpx.Client(base_url=self.url, timeout=60) as client:
            return client.post(path, json=body)


@contextlib.contextmanager
def running(app) -> Iterator[Live]:
    """The app behind real uvicorn until the block ends."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=512)
    server = uvicorn.Server(bounded(app, timeout_graceful_shutdown=2))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
    thread.start()

    def stop():
        server.should_exit = True

    live = Live(f"http://127.0.0.1:{listening.getsockname()[1]}", app, stop)
    try:
        yield live
    finally:
        for client in live.clients:
            client.close()
        stop()
        thread.join(30)
        assert not thread.is_alive()


@contextlib.contextmanager
def serving(sheets, keys=None, **settings) -> Iterator[Live]:
    """A server over open sheets."""
    ring = Keyring.of(keys) if keys else None
    with running(create_app(Shelf(sheets), keys=ring, settings=ServerSettings(**settings))) as live:
        yield live


def says(answer: str) -> CompressedKnowledgeLLM:
    """A sheet whose model always answers so."""
    return CompressedKnowledgeLLM.build(
        STAFF, "Where do people live?", model=echo_backbone(answer), rate=2, scorer="random"
    )


def random_sheet(seed: int = 0) -> CompressedKnowledgeLLM:
    """A sheet whose model writes noise to the end."""
    return CompressedKnowledgeLLM.build(
        STAFF, "Where do people live?", model=tiny_backbone(seed=seed, eos_token_id=None), rate=2, scorer="recent"
    )
