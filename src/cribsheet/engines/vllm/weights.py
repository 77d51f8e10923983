"""Whether a model's files hold the weights that made a sheet: the values that its fingerprint has, looked up there."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from cribsheet.engines.same_model import agree
from cribsheet.model.fingerprint import Fingerprint, probe_places

_HEAD = "lm_head.weight"  # which files may have where it is tied to the embeddings
_INDEX = "model.safetensors.index.json"


def differing_weight(model: str, revision: str | None, made: Fingerprint) -> tuple[str, float, float] | None:
    """A value that is not the sheet's: name of the weight, the sheet's value and the file's; nothing if all agree.

    `model` is a folder, or a hub id whose files are in the cache. Raises `FileNotFoundError` where they are not.
    """
    homes = _homes(model, revision)
    names = sorted(homes)
    with contextlib.ExitStack() as opened:
        files = {path: opened.enter_context(safe_open(path, "pt")) for path in set(homes.values())}
        slices = {name: files[homes[name]].get_slice(name) for name in names}
        without = [each for each in names if each != _HEAD]
        differing = [list(_differing(slices, held, made)) for held in (names, without)]
    return min(differing, key=len)[0] if all(differing) else None


def _differing(slices: Mapping[str, Any], names: list[str], made: Fingerprint) -> Iterator[tuple[str, float, float]]:
    """Values that are not the sheet's, if the model's weights have these names, in this order."""
    shapes = [tuple(slices[name].get_shape()) for name in names]
    for (number, place), ours in zip(probe_places(shapes), made.weights_probe, strict=False):
        name, shape = names[number], shapes[number]
        row, column = divmod(place, math.prod(shape[1:]))
        theirs = float(slices[name][row : row + 1].flatten()[column])
        if not agree(ours, theirs):
            yield name, ours, theirs


def _homes(model: str, revision: str | None) -> dict[str, Path]:
    """The file of each weight, by its name. Raises `FileNotFoundError` where there is none."""
    index = _file(model, revision, _INDEX)
    if index is not None:
        told = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {each: _file(model, revision, each) for each in set(told.values())}
        if all(files.values()):
            return {name: path for name, held in told.items() if (path := files[held]) is not None}
    whole = _file(model, revision, "model.safetensors")
    if whole is None:
        raise FileNotFoundError(model)
    with safe_open(whole, "pt") as file:
        return dict.fromkeys(file.keys(), whole)


def _file(model: str, revision: str | None, name: str) -> Path | None:
    """A file of a model, in its folder or in the hub's cache."""
    if Path(model).is_dir():
        return Path(model) / name if (Path(model) / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    held = try_to_load_from_cache(model, name, revision=revision)
    return Path(held) if isinstance(held, str) else None
