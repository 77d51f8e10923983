"""The server on Ray Serve: the app of `cribsheet serve` in every replica, behind one address.

A front (`front.py`) reads which sheet is asked for and hands the request to a replica, if it can to one that has the
sheet open; the replica runs the very app that a single server runs, over an engine that batches whatever arrives. A
replica may be several processes that divide its model (`divide.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Mapping
from typing import Any

from ray import serve
from starlette.types import Message

from cribsheet.engine.pool import LoadedModel
from cribsheet.llm import CompressedKnowledgeLLM
from cribsheet.model.divided import Leader
from cribsheet.ray.divide import Team
from cribsheet.ray.front import Front
from cribsheet.ray.settings import Serving
from cribsheet.server.app import create_app
from cribsheet.server.auth import Keyring
from cribsheet.server.settings import ServerSettings
from cribsheet.server.sheets import Served
from cribsheet.server.telemetry.logs import log_to_stderr
from cribsheet.sheet.file import read_manifest
from cribsheet.sheet.manifest import Manifest
from cribsheet.sheet.registry import resolve


def application(serving: Serving) -> serve.Application:
    """What `serve.run` takes, or `serve run cribsheet.ray:application` with the fields of `Serving` as arguments."""
    limits = ServerSettings(**serving.settings)
    scale: dict[str, Any] = {"num_replicas": serving.replicas}
    if serving.most_replicas is not None:
        bounds = {"min_replicas": serving.replicas, "max_replicas": max(serving.replicas, serving.most_replicas)}
        scale = {"autoscaling_config": {**bounds, "target_ongoing_requests": serving.answers_per_replica}}
    if serving.processes > 1:
        bundle = {name: need for name, need in (("CPU", serving.cpus), ("GPU", serving.gpus)) if need}
        scale |= {"placement_group_bundles": [bundle] * serving.processes, "placement_group_strategy": "PACK"}
    quiet = {"enable_access_log": False, "log_level": "WARNING"}
    replica = serve.deployment(Replica).options(
        name="replicas",
        max_ongoing_requests=2 * limits.max_answers,  # the app itself refuses what is too much, in its own words
        graceful_shutdown_timeout_s=serving.drain_seconds,
        ray_actor_options={"num_cpus": serving.cpus, "num_gpus": serving.gpus},
        logging_config=quiet,
        **scale,
    )
    front = serve.deployment(Front).options(
        name="front",
        max_ongoing_requests=100_000,
        graceful_shutdown_timeout_s=serving.drain_seconds,
        ray_actor_options={"num_cpus": 0},
        logging_config=quiet,
    )
    application: serve.Application = front.bind(replica.bind(serving), serving)
    return application


# Ray looks for the class itself, not for its name
application.__annotations__["serving"] = Serving


class OpenSheets:
    """The sheets of a replica: all are known by their manifests, those asked last are open."""

    def __init__(
        self, places: Mapping[str, str], options: Mapping[str, str], most: int, leader: Leader | None = None
    ) -> None:
        self._places, self._options, self._leader = places, options, leader
        self._manifests = {name: read_manifest(resolve(place)) for name, place in places.items()}
        self._models: dict[int, LoadedModel] = {}  # they stay when their sheets go

        async def opened(name: str) -> CompressedKnowledgeLLM:
            return await asyncio.get_running_loop().run_in_executor(None, self._open, name)

        self._opened = serve.multiplexed(max_num_models_per_replica=most)(opened)

    @property
    def manifests(self) -> Mapping[str, Manifest]:
        """What each of them was made with."""
        return self._manifests

    async def find(self, name: str) -> Served | None:
        """A sheet, opened if it is not; one that is let go meanwhile ends with its last answer."""
        return Served(name, await self._opened(name)) if name in self._manifests else None

    def close(self) -> None:
        """Nothing to do: the process ends."""

    def _open(self, name: str) -> CompressedKnowledgeLLM:
        kb = CompressedKnowledgeLLM.load(self._places[name], **self._model_of(name))
        _ = kb.prefix  # on the device before the first question
        model = LoadedModel.get(kb.backbone)
        self._models[id(model)] = model
        return kb

    def _model_of(self, name: str) -> dict[str, Any]:
        """What `CompressedKnowledgeLLM.load` is told of the model: options, or the one that processes divide."""
        if self._leader is None:
            return dict(self._options)
        made = self._manifests[name].fingerprint
        options = dict(self._options)
        name = options.pop("model", made.model)
        return {"model": self._leader.load(name, **{"revision": made.revision, **options})}


class Replica:
    """The app of `cribsheet serve` over one engine."""

    def __init__(self, serving: Serving) -> None:
        log_to_stderr()
        self._team = None
        if serving.processes > 1:
            needs = {"cpus": serving.cpus, "gpus": serving.gpus}
            self._team = Team(serving.processes, **needs, lost=_end)
        leader = self._team.leader if self._team else None
        sheets = OpenSheets(serving.places(), serving.model_options, serving.open_sheets, leader)
        keys = Keyring.of(serving.keys) if serving.keys else None
        self._app = create_app(sheets, keys=keys, settings=ServerSettings(**serving.settings))

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[list[Message]]:
        """What the app sends for a request, as it sends it."""
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        requests: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        never = asyncio.Event()

        async def receive() -> Message:
            if not requests:
                await never.wait()
            return requests.pop()

        async def send(message: Message) -> None:
            sent.put_nowait(dict(message))

        async def work() -> None:
            try:
                await self._app({**scope, "app": self._app, "extensions": {}, "state": {}}, receive, send)
            finally:
                sent.put_nowait(None)

        working = asyncio.create_task(work())
        try:
            while (message := await sent.get()) is not None:
                yield [message]
        finally:  # also when the caller leaves, which frees the engine
            working.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await working

    def check_health(self) -> None:
        """Asked by Ray, which replaces a replica that raises."""
        if self._team is not None:
            self._team.check()

    async def metrics(self) -> str:
        """What this replica counts."""
        text: str = self._app.state.metrics.render()
        return text


def _end() -> None:
    """End this replica at once: a divided model is lost, and others answer what was not begun."""
    os._exit(1)
