"""Keys: who may ask which sheets.

A key file is TOML, a table for each key, named as logs and limits name it:

    [alice]
    key = "a long random text"        # or sha256 = "...", so that the file holds no key
    sheets = ["staff", "handbook"]    # left out: all
"""

from __future__ import annotations

import hashlib
import hmac
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.requests import HTTPConnection

from cribsheet.errors import RequestError
from cribsheet.server.errors import Refusal
from cribsheet.server.telemetry.record import record_of

_SHORTEST = 16  # characters
NO_KEY = "This server needs one of its API keys, as one header 'Authorization: Bearer KEY'."


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks; `sheets` are those that may be asked, none for all."""

    name: str
    sheets: frozenset[str] | None = None

    def may_ask(self, sheet: str) -> bool:
        """Whether a sheet exists for this caller."""
        return self.sheets is None or sheet in self.sheets


class Keyring:
    """The keys of a server, as digests."""

    def __init__(self, keys: Mapping[str, tuple[bytes, Caller]]) -> None:
        self._keys = dict(keys)

    @classmethod
    def read(cls, path: str | Path) -> Keyring:
        """The keys in a file. Raises `RequestError` for a file that is no key file."""
        try:
            table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RequestError(f"The key file {str(path)!r} cannot be read: {error}") from error
        return cls.of(table)

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Keyring:
        """The keys of a table as in a key file."""
        if not table:
            raise RequestError("The key file names no key; write a table for each, or serve without keys.")
        keys = {name: (_digest_of(name, entry), Caller(name, _sheets_of(name, entry))) for name, entry in table.items()}
        if len({digest for digest, _ in keys.values()}) < len(keys):
            raise RequestError("Two tables of the key file hold the same key; give each its own.")
        return cls(keys)

    @property
    def callers(self) -> list[Caller]:
        """Everybody with a key."""
        return [caller for _, caller in self._keys.values()]

    def holder(self, headers: Iterable[tuple[bytes, bytes]]) -> Caller | None:
        """Whose key the `Authorization` header holds; nobody's if there are two, of which each reader takes another."""
        given = [value for name, value in headers if name.lower() == b"authorization"]
        scheme, _, key = given[0].decode("latin-1").partition(" ") if len(given) == 1 else ("", "", "")
        return self.caller(key.strip()) if scheme.lower() == "bearer" else None

    def caller(self, key: str) -> Caller | None:
        """Whose key it is; takes the same time for every wrong key."""
        given = hashlib.sha256(key.encode(errors="replace")).digest()
        found: Caller | None = None
        for digest, caller in self._keys.values():  # all of them, also after one that fits
            found = caller if hmac.compare_digest(digest, given) else found
        return found


def caller_of(request: HTTPConnection) -> Caller:
    """Who asks: the holder of a key, or whoever is at an address where there are no keys. Raises `Refusal`."""
    keys: Keyring | None = request.app.state.keys
    if keys is None:
        return Caller(request.client.host if request.client else "")
    caller = keys.holder(request.headers.raw)
    if caller is None:
        raise Refusal(401, NO_KEY)
    record_of(request).caller = caller.name
    return caller


def _digest_of(name: str, entry: Any) -> bytes:
    known = {"key", "sha256", "sheets"}
    if not isinstance(entry, Mapping) or set(entry) - known or ("key" in entry) == ("sha256" in entry):
        raise RequestError(f"The key {name!r} needs either key or sha256, and may have sheets; nothing else.")
    if "key" in entry:
        if not isinstance(entry["key"], str) or len(entry["key"]) < _SHORTEST:
            raise RequestError(f"The key {name!r} is no text of at least {_SHORTEST} characters; make it longer.")
        return hashlib.sha256(entry["key"].encode()).digest()
    try:
        digest = bytes.fromhex(entry["sha256"])
    except (TypeError, ValueError):
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise RequestError(f"The sha256 of key {name!r} is not 64 hexadecimal digits.")
    return digest


def _sheets_of(name: str, entry: Mapping[str, Any]) -> frozenset[str] | None:
    sheets = entry.get("sheets")
    if sheets is None:
        return None
    if not isinstance(sheets, list) or not all(isinstance(each, str) for each in sheets):
        raise RequestError(f"The sheets of key {name!r} are {sheets!r}; give a list of names.")
    return frozenset(sheets)
