"""The task's score with a better guide: task, notes that the model wrote about the chunk, then the examples.

Notes are about one chunk, so tokens kept earlier hold on to the score of their own chunk; only the task and the
examples, which stay the same from chunk to chunk, could judge them again.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from cribsheet.compress.scoring.task_attention import TaskAttention, TaskPeak, carried_on
from cribsheet.compress.scoring.view import Guide, LayerView


class NotesAttention(TaskAttention):
    """`TaskAttention` whose rows are task, notes and examples (CacheNotes, EACL 2026)."""

    guide: ClassVar[Guide] = "notes"

    def score(self, view: LayerView) -> Tensor:
        """Scores (K, S)."""
        return carried_on(super().score(view), view)


class NotesPeak(TaskPeak):
    """`TaskPeak` whose rows are task, notes and examples."""

    guide: ClassVar[Guide] = "notes"

    def score(self, view: LayerView) -> Tensor:
        """Scores (K, S)."""
        return carried_on(super().score(view), view)
