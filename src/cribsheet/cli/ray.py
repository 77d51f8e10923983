"""`cribsheet serve --ray` and `cribsheet build --ray`: the same work on a Ray cluster."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import socket
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cribsheet.cli.console import Terminated, misuse, note
from cribsheet.errors import integration

if TYPE_CHECKING:
    from cribsheet.compress.progress import Progress
    from cribsheet.corpus.documents import Document
    from cribsheet.corpus.task import Task
    from cribsheet.plan.options import BuildKeywords
    from cribsheet.server.settings import ServerSettings
    from cribsheet.sheet.sheet import Sheet

_NAME = "cribsheet"


def serve_on_ray(
    sheets: list[str],
    model_options: Mapping[str, str],
    keys: Path | None,
    settings: ServerSettings,
    replicas: str,
    scale: Mapping[str, Any],
    host: str,
    port: int,
    address: str | None,
) -> None:
    """Serve until Ctrl-C or SIGTERM; then running answers end and the replicas with them."""
    bounds = re.fullmatch(r"([1-9]\d{0,4})(?:-([1-9]\d{0,4}))?", replicas)
    if bounds is None or (bounds[2] and int(bounds[2]) < int(bounds[1])):
        misuse(f"--replicas is {replicas!r}; give a number, or two as in 1-8")
    integration("ray.serve", "cribsheet[ray]")
    from cribsheet.ray import Serving, application, cluster
    from cribsheet.server.auth import Keyring

    if keys:
        Keyring.read(keys)
    serving = Serving(
        sheets=[_absolute(each) for each in sheets],
        model_options=dict(model_options),
        keys=tomllib.loads(keys.read_text(encoding="utf-8")) if keys else None,
        settings=dataclasses.asdict(settings),
        replicas=int(bounds[1]),
        most_replicas=int(bounds[2]) if bounds[2] else None,
        **scale,
    )
    names = ", ".join(serving.places())
    needed = round(serving.cpus * serving.processes * (serving.most_replicas or serving.replicas)) + 1
    with cluster(address, cpus=max(needed, os.cpu_count() or 1), show_logs=True):
        from ray import serve

        bound = port or _free_port(host)
        serve.start(http_options={"host": host, "port": bound})
        try:
            serve.run(application(serving), name=_NAME, route_prefix="/")
            note(f"cribsheet: {names} at http://{host}:{bound}/ (page) and http://{host}:{bound}/v1 (API)")
            _wait()
        finally:
            serve.delete(_NAME)
            if address is None:
                serve.shutdown()


def _wait() -> None:
    """Until somebody ends us."""
    try:
        while True:
            signal.pause()
    except (KeyboardInterrupt, Terminated):
        note("cribsheet: ending")


def _absolute(sheet: str) -> str:
    """A sheet's place as another process finds it."""
    from cribsheet.server.sheets import named
    from cribsheet.sheet.registry import is_url

    name, place = named(sheet)
    return f"{name}={place if is_url(place) else os.path.abspath(place)}"


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listening:
        port: int = listening.getsockname()[1]
    return port


def build_on_ray(
    documents: list[Document],
    task: Task,
    options: BuildKeywords,
    *,
    model: str,
    model_options: dict[str, Any],
    address: str | None,
    needs: tuple[float, float],
    progress: Progress | None,
    checkpoint: Path | None,
) -> Sheet:
    """One sheet, built by Ray tasks of so many processors and accelerators each."""
    integration("ray", "cribsheet[ray]")
    from cribsheet.ray import Workers, build_each, build_independent, cluster
    from cribsheet.ray.build import Corpus

    workers = Workers(cpus=needs[0], gpus=needs[1])
    how: dict[str, Any] = {"model": model, "model_options": model_options, "workers": workers, "progress": progress}
    with cluster(address):
        if options["mode"] == "independent":
            return build_independent(documents, task, checkpoint=checkpoint, **how, **options)
        place = checkpoint.absolute() if checkpoint else None
        ((_, sheet),) = build_each({"sheet": Corpus(documents, place)}, task, **how, **options)
        return sheet
