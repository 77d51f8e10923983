"""Whether a model's files hold the weights that made a sheet: the values that its fingerprint has, looked up there."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

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
    differing = [list(_differing(homes, held, made)) for held in (names, [each for each in names if each != _HEAD])]
    return min(differing, key=len)[0] if all(differing) else None


def _differing(homes: dict[str, Path], names: list[str], made: Fingerprint) -> Iterator[tuple[str, float, float]]:
    """Values that are not the sheet's, if the model's weights have these names, in this order."""
    shapes = []
    for name in names:
        with safe_open(homes[name], "pt") as file:
            shapes.append(tuple(file.get_slice(name).get_shape()))
    for (number, place), ours in zip(probe_places(shapes), made.weights_probe, strict=False):
        name, shape = names[number], shapes[number]
        with safe_open(homes[name], "pt") as file:
            row, column = divmod(place, math.prod(shape[1:]))
            theirs = float(file.get_slice(name)[row : row + 1].flatten()[column])
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
