"""An interrupted build goes on from its last finished chunk, and ends with the same sheet, bit for bit.

A checkpoint is one safetensors file beside the sheet, replaced whole after each chunk and removed when the sheet is
written. It remembers everything that decides the result; a checkpoint of any other build is refused, and so is one of
which a bit has changed: it would become another sheet.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cribsheet.compress.kept import Kept, State
from cribsheet.errors import SheetError
from cribsheet.sheet.atomic import writing
from cribsheet.sheet.tensors import TensorFile, digest_with

_PARTS = ("keys", "values", "indices", "scores")


class Checkpoint:
    """The state of one build at `path`. `identity` is everything that decides the result, as JSON can hold it."""

    def __init__(self, path: str | Path, identity: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.archive = ""  # the digest of what stood in the archive when the state that was loaded was saved
        self._digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()

    def save(self, state: State, archive: str = "") -> None:
        """Remember what is kept so far, and the digest of what stands in an archive.

        Raises `SheetError` if it cannot be written, and leaves what was there.
        """
        tensors = {
            f"{number}.{part}": getattr(layer, part).detach().cpu().contiguous()
            for number, layer in enumerate(state.kept)
            for part in _PARTS
        }
        metadata = {"build": self._digest, "done": str(state.done), "archive": archive}
        metadata["sha256"] = digest_with(metadata, tensors)
        with writing(self.path, "The checkpoint") as unfinished:
            save_file(tensors, unfinished, metadata=metadata)

    def load(self, device: torch.device, layers: int, tokens: int) -> State | None:
        """The state of so many layers that was saved last, or none if there is no checkpoint.

        Raises `SheetError` if the file is damaged, or belongs to another build than this of so many `tokens`.
        """
        if not self.path.exists():
            return None
        try:
            return self._state(TensorFile(self.path), device, layers, tokens)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            if isinstance(error, SheetError):
                raise
            raise SheetError(f"The checkpoint {str(self.path)!r} is damaged ({error}); delete it.") from error

    def _state(self, file: TensorFile, device: torch.device, layers: int, tokens: int) -> State:
        if file.metadata.get("build") != self._digest:
            raise SheetError(
                f"The checkpoint {str(self.path)!r} belongs to another build (other documents, task, model or "
                "settings); delete it, or build with the settings that it was made with."
            )
        held = file.read(file.entries)
        file.close()
        if file.metadata.get("sha256") != digest_with(file.metadata, held):
            raise ValueError("it was changed after it was written")
        if not 0 < int(file.metadata["done"]) <= tokens or len(held) != layers * len(_PARTS):
            raise ValueError(f"{file.metadata['done']} of {tokens} tokens were read into {len(held)} tensors")
        self.archive = file.metadata.get("archive", "")
        kept = [Kept(*(held[f"{number}.{part}"].to(device) for part in _PARTS)) for number in range(layers)]
        return State(int(file.metadata["done"]), kept)

    def remove(self) -> None:
        """The build is finished."""
        self.path.unlink(missing_ok=True)
