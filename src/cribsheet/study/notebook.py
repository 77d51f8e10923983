"""How far a study is, in files that are replaced whole or not at all: what it practises on, and what is learnt."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cribsheet.compress.remembered import identity_digest, remember, remembered
from cribsheet.study.exercises import Draft, Exercise, Practice
from cribsheet.study.trainer import State

_LEARNT, _PRACTICE, _DRAFT = "The notebook", "The practice", "The unfinished practice"
_PARTS = ("shifts", "moments", "best")


class Notebook:
    """Remembers what a study has learnt, at `path`; `identity` is what decides the result."""

    def __init__(self, path: str | Path, identity: Mapping[str, Any]) -> None:
        self.path, self._digest = Path(path), identity_digest(identity)

    def state(self, like: Sequence[Tensor]) -> State | None:
        """How far it was, in tensors on the device of those that are learnt; none if it had not begun.

        Raises `SheetError` for a damaged file or one of another study.
        """
        if (found := remembered(self.path, _LEARNT, "study", self._digest)) is None:
            return None
        metadata, tensors = found
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
        remember(self.path, _LEARNT, {"study": self._digest, "told": json.dumps(told)}, tensors)

    def remove(self) -> None:
        """The study is finished."""
        self.path.unlink(missing_ok=True)


def read_practice(path: Path) -> Practice | None:
    """What was made to practise on, or none if there is no such file. Raises `SheetError` for a damaged one."""
    if (found := remembered(path, _PRACTICE, "practice")) is None:
        return None
    told, tensors = json.loads(found[0]["practice"]), found[1]
    rows = [_exercise(tensors, number, *pair) for number, pair in enumerate(told["exercises"])]
    asides = len(rows) - told.get("asides", 0)
    return Practice(
        rows[: told["questions"]],
        rows[told["questions"] : asides],
        told["tried"],
        Counter(told["left_out"]),
        told["of"],
        told["seconds"],
        rows[asides:],
    )


def write_practice(path: Path, practice: Practice) -> None:
    """Remember what to practise on. Raises `SheetError` if it cannot be written, and leaves what was there."""
    rows = [*practice.questions, *practice.texts, *practice.asides]
    told = {
        "exercises": _told(rows),
        "questions": len(practice.questions),
        "asides": len(practice.asides),
        "tried": practice.tried,
        "left_out": practice.left_out,
        "of": practice.of,
        "seconds": practice.seconds,
    }
    remember(path, _PRACTICE, {"practice": json.dumps(told, ensure_ascii=False)}, _tensors(rows))


def read_draft(path: Path, of: str) -> Draft | None:
    """What there is of a practice that was begun, or none.

    Raises `SheetError` for a damaged file, or one of another practice than `of`.
    """
    if (found := remembered(path, _DRAFT, "practice", of)) is None:
        return None
    told, tensors = json.loads(found[0]["told"]), found[1]
    rows = [_exercise(tensors, number, *each) for number, each in enumerate(told.pop("exercises"))]
    version, numbers, rest = told.pop("chance")
    told |= {"left_out": Counter(told["left_out"]), "counts": tuple(told["counts"])}
    return Draft(rows, chance=(version, tuple(numbers), rest), **told)


def write_draft(path: Path, draft: Draft, of: str) -> None:
    """Remember how far a practice is. Raises `SheetError` if it cannot be written, and leaves what was there."""
    told = {name: getattr(draft, name) for name in Draft.__slots__ if name != "questions"}
    told["exercises"] = _told(draft.questions)
    remember(path, _DRAFT, {"practice": of, "told": json.dumps(told, ensure_ascii=False)}, _tensors(draft.questions))


def _told(rows: Sequence[Exercise]) -> list[tuple[int, str, str]]:
    return [(row.asked, row.question, row.answer) for row in rows]


def _tensors(rows: Sequence[Exercise]) -> dict[str, Tensor]:
    return {
        f"{number}.{part}": getattr(row, part).contiguous()
        for number, row in enumerate(rows)
        for part in ("ids", "tops", "weights")
    }


def _exercise(tensors: Mapping[str, Tensor], number: int, asked: int, question: str, answer: str) -> Exercise:
    ids, tops, weights = (tensors[f"{number}.{part}"] for part in ("ids", "tops", "weights"))
    return Exercise(ids, asked, tops, weights, question, answer)
