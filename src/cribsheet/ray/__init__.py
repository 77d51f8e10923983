"""More machines: builds as Ray tasks, and replicas of the server on Ray Serve.

`build.py`: one task for each corpus or, for independent sheets, for each document; killed workers are followed by
others that go on where they were. `serve.py`: the app of `cribsheet serve` in every replica, behind one address, as
`settings.py` says; `front.py`: where all requests pass; `divide.py`: replicas of several processes each.
Needs the extra: `pip install 'cribsheet[ray]'`; nothing else in cribsheet imports Ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cribsheet.ray.build import Workers, build_each, build_independent
    from cribsheet.ray.serve import application
    from cribsheet.ray.session import cluster
    from cribsheet.ray.settings import Serving

__all__ = ["Serving", "Workers", "application", "build_each", "build_independent", "cluster"]
_HOMES = {
    "Serving": "settings",
    "Workers": "build",
    "application": "serve",
    "build_each": "build",
    "build_independent": "build",
    "cluster": "session",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cribsheet.ray' has no attribute {name!r}")
    from cribsheet.errors import integration

    integration("ray", "cribsheet[ray]")
    return getattr(integration(f"cribsheet.ray.{_HOMES[name]}", "cribsheet[ray]"), name)
