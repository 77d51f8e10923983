"""An interrupted build goes on from its last finished chunk, and ends with the same sheet, bit for bit.

A checkpoint is one safetensors file beside the sheet, replaced whole after each chunk and removed when the sheet is
written. It remembers everything that decides the result; a checkpoint of any other build is refused, and so is one of
which a bit has changed: it would become another sheet.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cribsheet.compress.kept import Kept, State
from cribsheet.compress.remembered import damaged, identity_digest, remember, remembered

_WHAT = "The checkpoint"
_PARTS = ("keys", "values", "indices", "scores")


class Checkpoint:
    """The state of one build at `path`. `identity` is everything that decides the result, as JSON can hold it."""

    def __init__(self, path: str | Path, identity: Mapping[str, Any]) -> None:
        self.path, self._digest = Path(path), identity_digest(identity)
        self.archive = ""  # the digest of what stood in the archive when the state that was loaded was saved

    def save(self, state: State, archive: str = "") -> None:
        """Remember what is kept so far, and the digest of what stands in an archive.

        Raises `SheetError` if it cannot be written, and leaves what was there.
        """
        tensors = {
            f"{number}.{part}": getattr(layer, part).detach().cpu().contiguous()
            for number, layer in enumerate(state.kept)
            for part in _PARTS
        }
        told = {"build": self._digest, "done": str(state.done), "archive": archive}
        remember(self.path, _WHAT, told, tensors)

    def load(self, device: torch.device, layers: int, tokens: int) -> State | None:
        """The state of so many layers that was saved last, or none if there is no checkpoint.

        Raises `SheetError` if the file is damaged, or belongs to another build than this of so many `tokens`.
        """
        if (found := remembered(self.path, _WHAT, "build", self._digest)) is None:
            return None
        told, held = found
        try:
            state = _state(int(told["done"]), held, device, layers, tokens)
        except (ValueError, KeyError) as error:
            raise damaged(self.path, _WHAT, error) from error
        self.archive = told.get("archive", "")
        return state

    def remove(self) -> None:
        """The build is finished."""
        self.path.unlink(missing_ok=True)


def _state(done: int, held: Mapping[str, Tensor], device: torch.device, layers: int, tokens: int) -> State:
    if not 0 < done <= tokens or len(held) != layers * len(_PARTS):
        raise ValueError(f"{done} of {tokens} tokens were read into {len(held)} tensors")
    parts = ([held[f"{number}.{part}"].to(device) for part in _PARTS] for number in range(layers))
    return State(done, [Kept(keys, values, indices, scores) for keys, values, indices, scores in parts])
