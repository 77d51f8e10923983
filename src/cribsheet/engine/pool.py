"""Models in memory: each is loaded once, with one engine, however many sheets use it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from cribsheet.engine.engine import Engine
from cribsheet.errors import ModelError
from cribsheet.model.backbone import Backbone
from cribsheet.model.support import resolved


class LoadedModel:
    """A backbone with its engine; one per model, revision, device and dtype, shared by every sheet on it."""

    _alive: ClassVar[weakref.WeakValueDictionary[tuple[str, ...], LoadedModel]] = weakref.WeakValueDictionary()
    _of_backbone: ClassVar[weakref.WeakKeyDictionary[Backbone, weakref.ref[LoadedModel]]] = weakref.WeakKeyDictionary()
    _lock: ClassVar[threading.RLock] = threading.RLock()

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.engine = Engine(backbone)
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()
        self._of_backbone[backbone] = weakref.ref(self)

    @classmethod
    def get(cls, model: str | Path | Backbone | LoadedModel, **options: Any) -> LoadedModel:
        """The loaded model of that name, loading it at most once while anybody uses it.

        An option of none is an option not given. Raises `ModelError` for options to a model that is loaded already.
        """
        given = {name: value for name, value in options.items() if value is not None}
        if isinstance(model, (LoadedModel, Backbone)):
            if given:
                raise ModelError(
                    f"The model is loaded already, so {', '.join(sorted(given))} can no longer be set; give them to "
                    "Backbone.load, or pass the model's folder or name."
                )
            return model if isinstance(model, LoadedModel) else cls._of(model)
        with cls._lock:
            loaded = cls._alive.get(_key(model, given))
            if loaded is None:
                loaded = cls._alive[_key(model, given)] = cls(Backbone.load(model, **given))
                exact = {**given, "revision": loaded.backbone.revision}  # as a sheet asks for it
                typed = {"dtype": loaded.backbone.dtype}  # as somebody asks who wants the very type that was chosen
                for asked in (exact, {**given, **typed}, {**exact, **typed}):
                    cls._alive.setdefault(_key(model, asked), loaded)
            return loaded

    @classmethod
    def _of(cls, backbone: Backbone) -> LoadedModel:
        with cls._lock:
            known = cls._of_backbone.get(backbone)
            return (known and known()) or cls(backbone)

    def enter(self, user: object) -> None:
        """Somebody uses the model; an engine that was closed for want of users is made anew."""
        with self._lock:
            self.users.add(user)
            if self.engine.closed:
                self.engine = Engine(self.backbone)

    def leave(self, user: object) -> None:
        """Somebody is done; the last one closes the engine."""
        with self._lock:
            self.users.discard(user)
            if not self.users:
                self.engine.close()


def _key(model: str | Path, options: Mapping[str, Any]) -> tuple[str, ...]:
    """What two requests for the same model have in common, however they are written."""
    place = Path(model).expanduser()
    name = str(place.resolve()) if place.is_dir() else str(model)
    said = {name: str(value).removeprefix("torch.") for name, value in options.items() if value is not None}
    device, dtype = resolved(options.get("device"), options.get("dtype"))
    said |= {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    return name, repr(sorted(said.items()))
