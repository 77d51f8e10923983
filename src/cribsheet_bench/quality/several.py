"""Sheets of one corpus at several rates, with what they have in common read once.

What is read of the first chunk depends on the guide and not on the budget. The sheets are those of `build_sheet`, bit
for bit.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, Unpack

from torch import Tensor

from cribsheet.attention.cache import ReadingLayer
from cribsheet.attention.prefix import LayerPrefix
from cribsheet.compress.loop import read_through
from cribsheet.corpus.documents import Document
from cribsheet.corpus.task import Task
from cribsheet.errors import BudgetError
from cribsheet.forecast import kept_bytes
from cribsheet.model.backbone import Backbone
from cribsheet.plan.assemble import archive_writer, finish
from cribsheet.plan.options import BuildKeywords, BuildOptions
from cribsheet.plan.plan import plan
from cribsheet.prompt.chunks import TokenizedCorpus
from cribsheet.prompt.template import ChatLayout
from cribsheet.sheet.sheet import Sheet
from cribsheet.vocabulary import StorageDtype


class _ReadsOnce(Backbone):
    """A model that looks up what it read of a first chunk: that depends on chunk and guide alone."""

    def __init__(self, backbone: Backbone, known: dict[Any, list[ReadingLayer]]) -> None:
        vars(self).update(vars(backbone))
        self._known = known

    def read(
        self,
        prefix: Sequence[LayerPrefix],
        start: int,
        chunk: Tensor,
        guide: Tensor,
        step: Callable[[], None] | None = None,
    ) -> list[ReadingLayer]:
        if start:
            return super().read(prefix, start, chunk, guide, step)
        key = tuple(chunk.tolist()), tuple(guide.tolist())
        if key not in self._known:
            self._known[key] = super().read(prefix, start, chunk, guide, step)
        return self._known[key]


class Sheets:
    """The sheets of one corpus; as long as it lives, it keeps what was read."""

    def __init__(self, backbone: Backbone, documents: Sequence[Document]) -> None:
        self._backbone, self._documents = backbone, documents
        self._layout = ChatLayout(backbone.tokenizer)
        self._found: dict[Any, list[ReadingLayer]] = {}

    def fitted(self, task: Task, rate: float, *, dtype: StorageDtype, **how: Any) -> Sheet:
        """A sheet with as many tokens as fit the bytes of a sheet of 16-bit numbers at that rate, or hardly fewer.

        `how` are the keyword arguments of `build`.
        """
        preamble = self._layout.preamble(task.instruction)
        whole = len(TokenizedCorpus.build(self._documents, preamble, self._layout.encoder))
        most = kept_bytes(self._backbone, int(whole / rate), "float16")
        budget = bisect_right(range(whole + 1), most, key=lambda size: kept_bytes(self._backbone, size, dtype)) - 1
        while budget > 0:
            sheet = self.build(task, budget=budget, dtype=dtype, **how)
            over = sheet.nbytes - most
            if over <= 0:
                return sheet
            budget -= max(1, int(over / sheet.nbytes * budget))
        raise BudgetError(f"No token fits the {most} bytes of a 16-bit sheet at {rate:g}x.")

    def whole(self, task: Task) -> Sheet:
        """Everything, with the guide on top of it: the prompt of full context."""
        return self.build(task, rate=1, scorer="recent", guide="resident")

    def guide(self, task: Task) -> Tensor:
        """Token ids (T,) of the guide where it stays in the prompt."""
        return self._layout.encoder.after(self._layout.guide(task).resident, continues=True)

    def build(self, task: Task, **options: Unpack[BuildKeywords]) -> Sheet:
        """The sheet that `build_sheet` makes with these options, sequentially."""
        planned = plan(self._backbone, self._layout, self._documents, task, BuildOptions(**options))
        began = time.perf_counter()
        archive = archive_writer(self._backbone, planned, None, None)
        once = _ReadsOnce(self._backbone, self._found)
        state = read_through(once, planned.corpus, planned.reading, archive=archive)
        return finish(self._backbone, planned, state, began, archive)
