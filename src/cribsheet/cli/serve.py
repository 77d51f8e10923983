"""`cribsheet serve`: sheets behind OpenAI's HTTP API."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cribsheet.cli.console import Terminated, misuse, note, quiet_libraries
from cribsheet.cli.options import MOST_OF_ONE, ModelOptions, flat, given, number, whole

if TYPE_CHECKING:
    from cribsheet.server.settings import ServerSettings

_LOCAL = ("localhost", "127.0.0.1", "[::1]")


@flat
def serve(
    sheets: Annotated[
        list[str], typer.Argument(metavar="SHEETS", help="Sheet files or URLs, each as PATH or NAME=PATH.")
    ],
    *,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", parser=whole(0, 65_535), help="The port; 0 takes a free one.")
    ] = 8000,
    model: ModelOptions,
    keys: Annotated[
        Path | None, typer.Option(metavar="FILE", help="API keys: a TOML table for each, with key and sheets.")
    ] = None,
    open_to_all: Annotated[bool, typer.Option("--open", help="Listen beyond this machine without keys.")] = False,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A name that requests may use for this server; repeatable.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", parser=whole(1), help="Longest answer if a request names none.")
    ] = 1024,
    max_answers: Annotated[
        int, typer.Option(metavar="N", parser=whole(1), help="Answers at once; more get 503.")
    ] = 256,
    max_answers_per_caller: Annotated[
        int, typer.Option(metavar="N", parser=whole(1), help="Answers at once for one key or address; more get 429.")
    ] = 64,
    requests_per_minute: Annotated[
        int | None,
        typer.Option(metavar="N", parser=whole(1), help="Questions a minute for one key or address; more get 429."),
    ] = None,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", parser=number(0, above=True), help="Longest time for an answer.")
    ] = 600.0,
    drain: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", parser=number(0, 86_400), help="How long running answers may go on after SIGTERM."
        ),
    ] = 30.0,
    retriever: Annotated[
        Literal["bm25", "dense"], typer.Option(help="What finds passages where a request asks for a mode with them.")
    ] = "bm25",
    engine: Annotated[
        Literal["cribsheet", "llama.cpp"], typer.Option(help="What answers; vLLM has a server of its own.")
    ] = "cribsheet",
    gguf: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --engine llama.cpp, a GGUF of the sheets' model.")
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(
            metavar="N", parser=whole(1), help="With --engine llama.cpp, answers of a sheet at a time.  [default: 4]"
        ),
    ] = None,
    hide_documents: Annotated[bool, typer.Option("--hide-documents", help="Do not show the documents' texts.")] = False,
    log_text: Annotated[bool, typer.Option("--log-text", help="Log questions and answers.")] = False,
    ray: Annotated[bool, typer.Option("--ray", help="Serve by replicas on a Ray cluster, here or elsewhere.")] = False,
    ray_address: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="The cluster; one on this machine by default.")
    ] = None,
    replicas: Annotated[
        str, typer.Option(metavar="N[-M]", help="With --ray, how many replicas; from N to M by how much is asked.")
    ] = "2",
    open_sheets: Annotated[
        int, typer.Option(metavar="N", parser=whole(1), help="With --ray, sheets that a replica holds open.")
    ] = 8,
    replica_processes: Annotated[
        int,
        typer.Option(
            metavar="N", parser=whole(1, MOST_OF_ONE), help="With --ray, processes that divide the model of a replica."
        ),
    ] = 1,
    replica_cpus: Annotated[
        float,
        typer.Option(
            metavar="N",
            parser=number(0, MOST_OF_ONE),
            help="With --ray, processors of a replica, or of each of its processes.",
        ),
    ] = 1,
    replica_gpus: Annotated[
        float,
        typer.Option(
            metavar="N",
            parser=number(0, MOST_OF_ONE),
            help="With --ray, accelerators of a replica, or of each of its processes.",
        ),
    ] = 0,
) -> None:
    """Serve sheets to OpenAI clients and, as a page, to people.

    Each sheet is a model of that API, by the name of its file. Logs go to stderr, a JSON object a line. It ends with
    Ctrl-C or SIGTERM, once running answers are complete.
    """
    if keys is None and not open_to_all and not _is_local(host):
        misuse(f"--host {host} is open to other machines: give --keys FILE, or --open to let everybody ask")
    if (engine == "llama.cpp") != (gguf is not None):
        misuse("--engine llama.cpp and --gguf FILE go together: give both or neither")
    if slots is not None and gguf is None:
        misuse("--slots is of llama.cpp; give --engine llama.cpp and --gguf FILE with it")
    from cribsheet.errors import integration

    for needed in ("fastapi", "uvicorn"):
        integration(needed, "cribsheet[server]")
    quiet_libraries()
    from cribsheet.retrieval.dense import require_dense
    from cribsheet.server import ServerSettings

    if retriever == "dense":
        require_dense()

    hosts = (
        (*_LOCAL, host.lower(), *(name.lower() for name in allow_host or ()))
        if keys is None and not open_to_all
        else ()
    )
    settings = ServerSettings(
        max_tokens=max_tokens,
        max_answers=max_answers,
        max_answers_per_caller=max_answers_per_caller,
        requests_per_minute=requests_per_minute,
        answer_seconds=timeout,
        show_documents=not hide_documents,
        log_text=log_text,
        retriever=retriever,
        hosts=hosts,
    )
    options = given(model) if engine == "cribsheet" else _of_llama_cpp(model, gguf, slots or 4, ray=ray)
    if ray:
        from cribsheet.cli.ray import serve_on_ray

        needs = {"processes": replica_processes, "cpus": replica_cpus, "gpus": replica_gpus}
        scale = {"open_sheets": open_sheets, "drain_seconds": drain, **needs}
        serve_on_ray(sheets, options, keys, settings, replicas, scale, host, port, ray_address)
    else:
        _run(sheets, options, keys, settings, host, port, drain)


def _of_llama_cpp(model: ModelOptions, gguf: Path | None, slots: int, *, ray: bool) -> dict[str, Any]:
    """How a sheet is opened in llama.cpp; refuses what only our own engine has."""
    ours = [name for name in ("device", "dtype", "revision") if getattr(model, name)] + ["ray"] * ray
    if ours:
        misuse(f"--{ours[0]} is of our own engine, and llama.cpp answers; leave one out")
    from cribsheet.asking.llama_cpp.served import ServedLlamaCpp

    return {"load": ServedLlamaCpp.load, "gguf": gguf, "slots": slots, "tokenizer": model.model}


def _run(
    sheets: list[str],
    options: dict[str, Any],
    keys: Path | None,
    settings: ServerSettings,
    host: str,
    port: int,
    drain: float,
) -> None:
    import uvicorn

    from cribsheet.server import Shelf, create_app
    from cribsheet.server.auth import Keyring
    from cribsheet.server.connections import serving
    from cribsheet.server.telemetry.logs import log_to_stderr

    ring = Keyring.read(keys) if keys else None
    with _bound(host, port) as listening, contextlib.closing(Shelf.open(sheets, **options)) as shelf:
        app = create_app(shelf, keys=ring, settings=settings)
        config = serving(app, host=host, port=port, timeout_graceful_shutdown=max(1, round(drain)))
        with _way_out(host, port):  # two that had bound it may be loading at once, and one listens first
            listening.listen(1024)
        address, bound = listening.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        note(f"cribsheet: {', '.join(shelf)} at http://{shown}:{bound}/ (page) and http://{shown}:{bound}/v1 (API)")
        log_to_stderr()
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        with contextlib.suppress(KeyboardInterrupt, Terminated):  # raised by uvicorn once everything is drained
            uvicorn.Server(config).run(sockets=[listening])


def _bound(host: str, port: int) -> socket.socket:
    """The socket of an address, taken before anything is loaded; clients are refused until it listens.

    Raises `OSError` with the way out where it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        with _way_out(host, port):
            taken.bind((host, port))
    except BaseException:
        taken.close()
        raise
    return taken


@contextlib.contextmanager
def _way_out(host: str, port: int) -> Iterator[None]:
    """Adds to an `OSError` of an address what else to give."""
    try:
        yield
    except OSError as error:
        told = f"{error.strerror} ({host}, port {port}); give another --port, 0 for a free one, or another --host."
        raise OSError(error.errno, told) from error


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
