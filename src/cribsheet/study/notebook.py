"""How far a study is, in two files: what it practises on, and what is learnt; each is replaced whole or not at all."""

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
from cribsheet.study.practice import Exercise, Practice
from cribsheet.study.trainer import State

_PARTS = ("shifts", "moments", "best")


class Notebook:
    """Remembers a study at `path`, and beside it what it practises on; `identity` is what decides the result."""

    def __init__(self, path: str | Path, identity: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.exercises = self.path.with_name(f"{self.path.name}.practice")
        self._digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()

    def practice(self) -> Practice | None:
        """What was made to practise on, or none yet. Raises `SheetError` for a damaged file or one of another study."""
        read = self._read(self.exercises)
        if read is None:
            return None
        metadata, tensors = read
        told = json.loads(metadata["told"])
        rows = [_exercise(tensors, number, *pair) for number, pair in enumerate(told["exercises"])]
        return Practice(rows[: told["questions"]], rows[told["questions"] :], told["tried"], Counter(told["left_out"]))

    def write_practice(self, practice: Practice) -> None:
        """Remember what to practise on."""
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
        }
        self._write(self.exercises, tensors, {"told": json.dumps(told, ensure_ascii=False)})

    def state(self, like: Sequence[Tensor]) -> State | None:
        """How far it was, in tensors on the device of those that are learnt; none if it had not begun."""
        read = self._read(self.path)
        if read is None:
            return None
        metadata, tensors = read
        told, device = json.loads(metadata["told"]), like[0].device
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
        self._write(self.path, tensors, {"told": json.dumps(told)})

    def remove(self) -> None:
        """The study is finished."""
        self.path.unlink(missing_ok=True)
        self.exercises.unlink(missing_ok=True)

    def _write(self, path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
        metadata["study"] = self._digest
        metadata["sha256"] = digest_with(metadata, tensors)
        with writing(path, "What a study remembers") as unfinished:
            save_file(dict(tensors), unfinished, metadata=metadata)

    def _read(self, path: Path) -> tuple[Mapping[str, str], Mapping[str, Tensor]] | None:
        if not path.exists():
            return None
        try:
            file = TensorFile(path)
            metadata, tensors = dict(file.metadata), file.read(file.entries)
            file.close()
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise SheetError(f"{str(path)!r} is damaged ({error}); delete it, and the study begins anew.") from error
        if metadata.get("study") != self._digest:
            raise SheetError(
                f"{str(path)!r} belongs to another study (of another sheet, or with other settings); delete it, or "
                "study with the settings that it was made with."
            )
        if metadata.get("sha256") != digest_with(metadata, tensors):
            raise SheetError(f"{str(path)!r} was changed after it was written; delete it, and the study begins anew.")
        return metadata, tensors


def _exercise(tensors: Mapping[str, Tensor], number: int, asked: int, question: str, answer: str) -> Exercise:
    ids, tops, weights = (tensors[f"{number}.{part}"] for part in ("ids", "tops", "weights"))
    return Exercise(ids, asked, tops, weights, question, answer)
