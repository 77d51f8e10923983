"""An interrupted build goes on from its last finished chunk, and ends with the same sheet, bit for bit.

A checkpoint is one safetensors file beside the sheet, replaced whole after each chunk and removed when the sheet is
written. It remembers everything that decides the result; a checkpoint of any other build is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from cribsheet.compress import Kept, State
from cribsheet.errors import SheetError
from cribsheet.storage import replacing

_PARTS = ("keys", "values", "indices", "scores")


class Checkpoint:
    """The state of one build at `path`. `identity` is everything that decides the result, as JSON can hold it."""

    def __init__(self, path: str | Path, identity: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()

    def save(self, state: State) -> None:
        """Remember what is kept so far."""
        tensors = {
            f"{number}.{part}": getattr(layer, part).detach().cpu().contiguous()
            for number, layer in enumerate(state.kept)
            for part in _PARTS
        }
        with replacing(self.path) as unfinished:
            save_file(tensors, unfinished, metadata={"build": self._digest, "done": str(state.done)})

    def load(self, device: torch.device) -> State | None:
        """The state that was saved last, or none if there is no checkpoint.

        Raises `SheetError` if the file is damaged or belongs to another build.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as opened:
                metadata = opened.metadata() or {}
            tensors = load_file(self.path)
            if metadata.get("build") != self._digest:
                raise SheetError(
                    f"The checkpoint {str(self.path)!r} belongs to another build (other documents, task, model or "
                    "settings); delete it, or build with the settings that it was made with."
                )
            layers = len(tensors) // len(_PARTS)
            kept = [Kept(*(tensors[f"{n}.{part}"].to(device, copy=True) for part in _PARTS)) for n in range(layers)]
            return State(int(metadata["done"]), kept)
        except (SafetensorError, OSError, KeyError) as error:
            raise SheetError(f"The checkpoint {str(self.path)!r} is damaged ({error}); delete it.") from error

    def remove(self) -> None:
        """The build is finished."""
        self.path.unlink(missing_ok=True)
