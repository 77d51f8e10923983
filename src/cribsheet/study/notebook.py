"""How far a study is, in files that are replaced whole or not at all: what it practises on, and what is learnt."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from cribsheet.errors import SheetError
from cribsheet.sheet.atomic import writing
from cribsheet.sheet.tensors import TensorFile, digest_with
from cribsheet.study.exercises import Exercise, Practice
from cribsheet.study.trainer import State

_PARTS = ("shifts", "moments", "best")


class Notebook:
    """Remembers what a study has learnt, at `path`; `identity` is what decides the result."""

    def __init__(self, path: str | Path, identity: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()

    def state(self, like: Sequence[Tensor]) -> State | None:
        """How far it was, in tensors on the device of those that are learnt; none if it had not begun.

        Raises `SheetError` for a damaged file or one of another study.
        """
        read = _read(self.path, "study")
        if read is None:
            return None
        told, tensors = read
        if told["study"] != self._digest:
            raise SheetError(
                f"{str(self.path)!r} belongs to another study (of another sheet, or with other settings); delete it, "
                "or study with the settings that it was made with."
            )
        device = like[0].device
        sizes = {"shifts": len(like), "moments": 2 * len(like), "best": len(like)}
        shifts, moments, best = ([tensors[f"{part}.{n}"].to(device) for n in range(sizes[part])] for part in _PARTS)
        curve = [(int(step), float(divergence)) for step, divergence in told["curve"]]
        return State(shifts, moments, best, told["step"], told["best_step"], told["seconds"], curve)

    def write_state(self, state: State) -> None:
        """Remember how far it is."""
        tensors = {
            f"{part}.{number}": tensor.detach().cpu().contiguous()
            for part in _PARTS
            for number, tensor in enumerate(getattr(state, part))
        }
        told = {"step": state.step, "best_step": state.best_step, "seconds": state.seconds, "curve": state.curve}
        _write(self.path, {"study": self._digest, **told}, tensors)

    def remove(self) -> None:
        """The study is finished."""
        self.path.unlink(missing_ok=True)


def read_practice(path: Path) -> Practice | None:
    """What was made to practise on, or none if there is no such file. Raises `SheetError` for a damaged one."""
    read = _read(path, "exercises")
    if read is None:
        return None
    told, tensors = read
    rows = [_exercise(tensors, number, *pair) for number, pair in enumerate(told["exercises"])]
    return Practice(
        rows[: told["questions"]],
        rows[told["questions"] :],
        told["tried"],
        Counter(told["left_out"]),
        told["of"],
        told["seconds"],
    )


def write_practice(path: Path, practice: Practice) -> None:
    """Remember what to practise on. Raises `SheetError` if it cannot be written, and leaves what was there."""
    rows = [*practice.questions, *practice.texts]
    tensors = {
        f"{number}.{part}": getattr(row, part).contiguous()
        for number, row in enumerate(rows)
        for part in ("ids", "tops", "weights")
    }
    told = {
        "exercises": [(row.asked, row.question, row.answer) for row in rows],
        "questions": len(practice.questions),
        "tried": practice.tried,
        "left_out": practice.left_out,
        "of": practice.of,
        "seconds": practice.seconds,
    }
    _write(path, told, tensors)


def _write(path: Path, told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    metadata = {"told": json.dumps(told, ensure_ascii=False)}
    metadata["sha256"] = digest_with(metadata, tensors)
    with writing(path, "What a study remembers") as unfinished:
        save_file(dict(tensors), unfinished, metadata=metadata)


def _read(path: Path, must: str) -> tuple[dict[str, Any], Mapping[str, Tensor]] | None:
    """What is told, which `must` be among it, and tensors; none if there is no such file."""
    if not path.exists():
        return None
    try:
        file = TensorFile(path)
        metadata, tensors = dict(file.metadata), file.read(file.entries)
        file.close()
        told: dict[str, Any] = json.loads(metadata["told"])
        told[must]
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise SheetError(f"{str(path)!r} is damaged ({error}); delete it, and the study begins anew.") from error
    if metadata.get("sha256") != digest_with(metadata, tensors):
        raise SheetError(f"{str(path)!r} was changed after it was written; delete it, and the study begins anew.")
    return told, tensors


def _exercise(tensors: Mapping[str, Tensor], number: int, asked: int, question: str, answer: str) -> Exercise:
    ids, tops, weights = (tensors[f"{number}.{part}"] for part in ("ids", "tops", "weights"))
    return Exercise(ids, asked, tops, weights, question, answer)
