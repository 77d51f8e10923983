"""Sheets behind OpenAI's HTTP API: `cribsheet serve`, or `create_app` for an ASGI server of your own.

A request's way: `middleware.py` (id, size, time limits, log line) → `routes.py` and `auth.py` (whose key) →
`protocol.py` (what is asked) → `service.py` and `limits.py` (whether there is room) → `parameters.py` (as settings of
the library) → `generation.py` (its answers while they are written) → `replies.py` and `streaming.py` (what goes back).
Needs the extra: `pip install 'cribsheet[server]'`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cribsheet.server.app import create_app
    from cribsheet.server.settings import ServerSettings
    from cribsheet.server.sheets import Shelf

__all__ = ["ServerSettings", "Shelf", "create_app"]
_HOMES = {"ServerSettings": "settings", "Shelf": "sheets", "create_app": "app"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cribsheet.server' has no attribute {name!r}")
    from cribsheet.errors import integration

    integration("fastapi", "cribsheet[server]")
    return getattr(integration(f"cribsheet.server.{_HOMES[name]}", "cribsheet[server]"), name)
