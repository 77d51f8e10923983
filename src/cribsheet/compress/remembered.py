"""Work that is half done, in a file to go on from: replaced whole, and refused if a bit of it has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from cribsheet.errors import SheetError
from cribsheet.sheet.atomic import writing
from cribsheet.sheet.tensors import TensorFile, digest_with


def remember(path: Path, what: str, told: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Write texts by name, of which one has the name of its kind, and tensors.

    Raises `SheetError` if `what` cannot be written, and leaves what was there.
    """
    metadata = dict(told)
    metadata["sha256"] = digest_with(metadata, tensors)
    with writing(path, what) as unfinished:
        save_file(dict(tensors), unfinished, metadata=metadata)


def remembered(
    path: Path, what: str, kind: str, digest: str | None = None
) -> tuple[dict[str, str], dict[str, Tensor]] | None:
    """Texts, that of its `kind` among them, and tensors; none if there is no such file.

    Raises `SheetError` if it is damaged, or if that text is another than the `digest`, if one is given.
    """
    if not path.exists():
        return None
    if not path.is_file():
        raise _another(path, what)
    try:
        file = TensorFile(path)
        told, tensors = dict(file.metadata), file.read(file.entries)
        file.close()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise damaged(path, what, error) from error
    if kind not in told:
        raise _another(path, what)
    if digest is not None and told.get(kind) != digest:
        raise SheetError(
            f"{what} {str(path)!r} belongs to another {kind} (of other documents, task, model or settings); delete it, "
            f"or {kind} with the settings that it was made with."
        )
    if told.get("sha256") != digest_with(told, tensors):
        raise damaged(path, what, "it was changed after it was written")
    return told, tensors


def damaged(path: Path, what: str, why: object) -> SheetError:
    """The error for a file that is none to go on from."""
    return SheetError(f"{what} {str(path)!r} is damaged ({why}); delete it.")


def _another(path: Path, what: str) -> SheetError:
    """The error for a file of other use, which nobody should delete because of it."""
    return SheetError(f"{what} {str(path)!r} is another kind of file; name another, or one that does not exist yet.")


def identity_digest(identity: Mapping[str, Any]) -> str:
    """What tells two works apart, from all that decides their results, as JSON can hold it."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
