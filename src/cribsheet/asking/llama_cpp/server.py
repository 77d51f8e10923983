"""llama.cpp's own server in this process, by the extra `llama-cpp`: slots that hold a sheet, and completions on them.

It listens on this machine only, for whoever has its key, which nobody else gets.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import secrets
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cribsheet.errors import EngineError, integration

_HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How llama.cpp runs: `slots` questions at a time, each with so many positions, and what it is given to run on.

    `threads` is its own choice by default; `gpu_layers` are 0 unless its build has a GPU.
    """

    slots: int = 1
    positions: int = 4096
    threads: int | None = None
    gpu_layers: int = 0


class LlamaServer:
    """A GGUF in llama.cpp's server. Raises `IntegrationError` without the extra, `EngineError` for what it cannot load.

    `folder` is where states lie that slots are restored from. Ask it for something before it is closed: it may wait for
    ever for the end of a loop that had not yet begun.
    """

    def __init__(self, gguf: Path, folder: Path, options: ServerOptions) -> None:
        library: Any = integration("xllamacpp", "'cribsheet[llama-cpp]'")
        self._key, self._links = secrets.token_urlsafe(24), set[socket.socket]()
        try:
            self._server: Any = library.Server(_parameters(library, gguf, folder, options, self._key))
        except RuntimeError as error:
            raise EngineError(
                f"llama.cpp cannot load {str(gguf)!r} for {options.slots} slots of {options.positions} positions: "
                f"{error} What it wrote to stderr says more; give another GGUF, or less room."
            ) from error
        self._port = urlsplit(self._server.listening_address).port
        self.free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(options.slots):
            self.free.put(slot)

    def restore(self, slot: int, state: str) -> int:
        """Fill a slot from a file of the folder: how many tokens it then holds. Raises `EngineError` if it cannot."""
        with self._asked(f"/slots/{slot}?action=restore", {"filename": state}) as reply:
            restored: int = json.loads(reply.read())["n_restored"]
        return restored

    @contextlib.contextmanager
    def complete(self, slot: int, prompt: list[int], settings: Mapping[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
        """What the server says of a completion, piece by piece; leaving the block stops it."""
        told = {**settings, "prompt": prompt, "id_slot": slot, "cache_prompt": True, "stream": True}
        with self._asked("/completion", {**told, "timings_per_token": True}) as reply:
            yield _pieces(reply)

    def close(self) -> None:
        """Cut what it still answers, end it and let go of its memory; safe to call twice."""
        for link in list(self._links):  # it would wait for somebody to read the rest
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
        self._server = None

    @contextlib.contextmanager
    def _asked(self, path: str, body: Mapping[str, Any]) -> Iterator[http.client.HTTPResponse]:
        """The reply to a request. Raises `EngineError` with the server's words if it refuses, and if it is gone."""
        if self._server is None:
            raise EngineError("This llama.cpp was closed; open the sheet in it again.")
        link, line = http.client.HTTPConnection(_HOST, self._port), None
        try:
            link.connect()
            line = link.sock
            self._links.add(line)
            head = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
            link.request("POST", path, json.dumps(body), head)
            reply = link.getresponse()
            if reply.status != http.client.OK:
                raise EngineError(f"llama.cpp refused ({reply.status}): {_message(reply.read())}")
            yield reply
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"llama.cpp was closed or has ended ({error!r}); open the sheet in it again.") from error
        finally:
            if line is not None:
                self._links.discard(line)
            link.close()


def _parameters(library: Any, gguf: Path, folder: Path, options: ServerOptions, key: str) -> Any:
    """What the server is started with: one cache in float16 for all slots, flash attention, and nothing kept aside."""
    given = library.CommonParams()
    given.model.path = str(gguf)
    given.n_ctx, given.n_parallel, given.kv_unified = options.slots * options.positions, options.slots, True
    given.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    given.slot_save_path, given.endpoint_slots = f"{folder}/", True
    given.port, given.api_keys = 0, [key]
    given.n_gpu_layers, given.fit_params, given.warmup = options.gpu_layers, False, False
    given.cache_ram_mib = 0
    given.verbosity = 1  # its errors, on stderr: they say more than what it raises
    if options.threads is not None:
        given.cpuparams.n_threads = given.cpuparams_batch.n_threads = options.threads
    return given


def _pieces(reply: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The events of a reply. Raises `EngineError` with the server's words if it fails on the way."""
    for line in reply:
        if line.startswith(b"data: "):
            said = json.loads(line.removeprefix(b"data: "))
            if "error" in said:
                raise EngineError(f"llama.cpp failed: {said['error'].get('message', said['error'])}")
            yield said


def _message(body: bytes) -> str:
    """The server's words for what went wrong."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:200]
