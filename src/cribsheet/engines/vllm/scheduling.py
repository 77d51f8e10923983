"""What vLLM's scheduler is told of requests: which sheet one begins with, and what of it is to be loaded where.

A prompt that begins with a sheet's ids is answered from it; naming it as well, in `kv_transfer_params`, makes sure of
it: where sheet or ids are not there, the request fails instead of being answered from ids that mean nothing.
Nothing here imports vLLM; `request` is its `vllm.v1.request.Request`.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

from cribsheet.engines.vllm.file import ExportedSheet
from cribsheet.errors import RequestError

_LOGGER = logging.getLogger(__name__)
KEY = "cribsheet"
"""Under which a request's `kv_transfer_params` name a sheet."""

_BEGINNING = 16  # ids by which a sheet is known


class Load(NamedTuple):
    """What a worker writes: a sheet's tokens from the first on, into blocks."""

    sheet: str
    first: int
    blocks: tuple[int, ...]


class Scheduling:
    """Requests between their arrival and their first step; `sheets` by name, and how many tokens a block has."""

    def __init__(self, sheets: Mapping[str, ExportedSheet], block: int) -> None:
        self._sheets, self._block = dict(sheets), block
        self._beginnings = {sheet.ids[:_BEGINNING]: name for name, sheet in sheets.items()}
        self._refused: set[str] = set()  # ids of requests
        self._cached: dict[str, int] = {}  # tokens of a request that vLLM's own cache has
        self._loads: list[Load] = []
        self._failed: list[int] = []

    def arrived(self, request: Any) -> None:
        """Look at a new request. One that cannot be answered fails, and shares no block with others until then."""
        try:
            self._named(request)
        except RequestError as error:
            _LOGGER.error("The request %s fails: %s", request.request_id, error)
            self._refused.add(request.request_id)
            # vLLM may compute some of it as if the ids were text, and must not find that again for others.
            request.cache_salt = f"cribsheet-{uuid.uuid4()}"
            request.block_hashes.clear()
            request.update_block_hashes()
            request.skip_reading_prefix_cache = False  # which would keep it from failing
            if request.num_tokens == 1:  # of which nothing could be loaded, and only what is loaded can fail
                request.append_output_token_ids(0)

    def matched(self, request: Any, cached: int) -> int:
        """Tokens that are to be loaded behind those that vLLM's own cache has."""
        if request.request_id in self._refused:
            return int(max(0, request.num_tokens - 1 - cached))  # to be told that they could not be loaded
        name = self._begun(request)
        if name is None:
            return 0
        self._cached[request.request_id] = cached
        return max(0, self._sheets[name].tokens - cached)

    def allocated(self, request: Any, blocks: list[int], tokens: int) -> None:
        """So many tokens are to be loaded into some of the blocks (all that the request has)."""
        if request.request_id in self._refused:
            self._failed.extend(blocks[:1] if tokens else ())
            return
        name, first = self._begun(request), self._cached.pop(request.request_id, 0)
        if name is None or not tokens:
            return
        place = first // self._block
        if first % self._block or first + tokens != self._sheets[name].tokens:
            _LOGGER.error(
                "The request %s fails: vLLM wants %d tokens of the sheet %r from %d on, not all that are left; start "
                "it without what cuts prefixes elsewhere than between blocks.",
                *(request.request_id, tokens, name, first),
            )
            self._failed.append(blocks[place])
            return
        self._loads.append(Load(name, first, tuple(blocks[place : place + tokens // self._block])))

    def take(self) -> tuple[list[Load], list[int]]:
        """What is to be loaded in this step, and the blocks of requests that fail in it; both are then forgotten."""
        taken = self._loads, self._failed
        self._loads, self._failed = [], []
        return taken

    def finished(self, request: Any) -> None:
        """Nothing of it is remembered any longer."""
        self._refused.discard(request.request_id)
        self._cached.pop(request.request_id, None)

    def _begun(self, request: Any) -> str | None:
        """The sheet whose ids a prompt begins with."""
        return self._beginnings.get(tuple((request.prompt_token_ids or ())[:_BEGINNING]))

    def _named(self, request: Any) -> None:
        """Raise `RequestError` for a request that means a sheet, by its name or its ids, and cannot have it."""
        told = request.kv_transfer_params
        if told is not None and not isinstance(told, Mapping):
            request.kv_transfer_params = None  # vLLM asks it for what is its own, and would end
            raise RequestError(f"Its kv_transfer_params are {told!r}; use {{{KEY!r}: NAME}}.")
        begun, named = self._begun(request), (told or {}).get(KEY)
        name = begun if named is None else named
        if name is None:
            return
        if not isinstance(name, str) or name not in self._sheets:
            raise RequestError(f"There is no sheet {name!r} here; there are {', '.join(self._sheets)}.")
        sheet, ids = self._sheets[name], request.prompt_token_ids or []
        if tuple(ids[: sheet.tokens]) != sheet.ids:
            raise RequestError(
                f"The prompt does not begin with the {sheet.tokens} ids of the sheet {name!r} (digest {sheet.digest}); "
                "make it from that very sheet."
            )
        if len(ids) == sheet.tokens:
            raise RequestError(f"Nothing follows the sheet {name!r} in the prompt; put a question behind it.")
        for what, given in (
            ("log-probabilities of the prompt, which a sheet has not", request.skip_reading_prefix_cache),
            ("a LoRA adapter, and the sheet is of the model without one", request.lora_request is not None),
            ("a session to which input is added", request.resumable),
        ):
            if given:
                raise RequestError(f"It asks the sheet {name!r} for {what}; ask without.")
