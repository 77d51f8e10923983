"""Several sheets behind one question.

Combining puts what the sheets keep into one prefix, at positions of its own, under one preamble and one guide.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from cribsheet.corpus.task import Task
from cribsheet.errors import DocumentError, SheetError
from cribsheet.living.independent import changed, least_most
from cribsheet.living.segments import assemble, cut
from cribsheet.model.backbone import Backbone
from cribsheet.model.fingerprint import fingerprint
from cribsheet.prompt.template import ChatLayout
from cribsheet.sheet.sheet import Sheet
from cribsheet.vocabulary import Allocation


def combine(backbone: Backbone, sheets: Sequence[Sheet], task: Task | str | None = None) -> Sheet:
    """One sheet with everything that several sheets of one model keep; reads nothing but a resident guide.

    Sequential and independent sheets may be mixed. `task` is by default that of all sheets together. The result is an
    independent sheet; what came from a sequential one can only leave it as a whole. Raises `SheetError` if models,
    heads or storage types differ, and `DocumentError` for one id with two texts.
    """
    if not sheets:
        raise SheetError("No sheets were given; combine at least one.")
    began, first = time.perf_counter(), sheets[0].manifest
    layout = ChatLayout(backbone.tokenizer, system=first.system, options=first.template_options)
    loaded = fingerprint(backbone, layout)
    for sheet in sheets:
        sheet.manifest.fingerprint.check(loaded)
        for field, what in (("head", "instruction"), ("dtype", "storage type")):
            mine, other = getattr(first, field), getattr(sheet.manifest, field)
            if mine != other:
                raise SheetError(f"The sheets differ in their {what}: {mine!r} and {other!r}; build one of them again.")
    if any(sheet.manifest.correction != "none" for sheet in sheets):
        raise SheetError(
            "A corrected sheet stands for its corpus alone; build it with correction='none' to combine it."
        )
    _refuse_two_texts(sheets)
    purpose = _joined(sheets) if task is None else Task.of(task)
    parts = [cut(backbone, sheet) for sheet in sheets]
    # examples stay if any sheet shows some; their form does if it is all that any shows
    shown = any(sheet.resident and sheet.shown_task.few_shot for sheet in sheets)
    form = purpose.form if not shown and any(sheet.manifest.form for sheet in sheets) else ""
    guide = layout.encoder.after(layout.guide(purpose.shown(form)).resident, continues=True)
    if not any(sheet.resident for sheet in sheets):
        guide = guide[:0]
    rates = {sheet.manifest.document_rate for sheet in sheets}
    adaptive = any(sheet.manifest.allocation != "uniform" for sheet in sheets)
    allocation: Allocation = "adaptive" if adaptive else "uniform"
    manifest = first.model_copy(
        update={
            "task": purpose.to_dict(),
            "form": form,
            "document_rate": first.document_rate if len(rates) == 1 else None,
            "document_most": least_most([sheet.manifest for sheet in sheets]),
            "allocation": allocation,
            "history": [entry for sheet in sheets for entry in sheet.manifest.history],
        }
    )
    made = changed(backbone, manifest, "combined", sum(len(sheet.manifest.documents) for sheet in sheets), began)
    segments = [segment for _, own in parts for segment in own]
    return assemble(backbone, made, parts[0][0], segments, guide, with_texts=all(sheet.texts for sheet in sheets))


def _joined(sheets: Sequence[Sheet]) -> Task:
    tasks = list(dict.fromkeys(sheet.task for sheet in sheets))
    examples = tuple(dict.fromkeys(pair for task in tasks for pair in task.examples))
    return Task(" ".join(dict.fromkeys(task.description for task in tasks)), examples, tasks[0].instruction)


def _refuse_two_texts(sheets: Sequence[Sheet]) -> None:
    seen: dict[str, str] = {}
    for entry in (entry for sheet in sheets for entry in sheet.manifest.documents):
        if seen.setdefault(entry.id, entry.digest) != entry.digest:
            raise DocumentError(f"two sheets have different documents with the id {entry.id!r}; rename one and rebuild")
