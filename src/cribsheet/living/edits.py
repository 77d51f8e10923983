"""A corpus that changes: documents come into an independent sheet, are replaced, and leave it, at their own cost.

Each function returns a new sheet and leaves the one given as it was. What stays is not touched: its keys and values
are the same bits. The guide, if it is resident, is read anew, as it has seen all documents. So the result is the sheet
that a build with these documents would have made, and nothing of a removed document is left in it.

`check=False` is for callers who know that the sheet fits the model: the fingerprint can take longer than a change.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cribsheet.compress.progress import Listener
from cribsheet.compress.scoring import Scorer
from cribsheet.corpus.documents import Document, read_documents
from cribsheet.engine.pool import LoadedModel
from cribsheet.errors import DocumentError, SheetError
from cribsheet.living.archives import writable_folder
from cribsheet.living.independent import Terms, archive_of, changed, least_most, read_all, refuse_twice
from cribsheet.living.segments import Segment, assemble, cut, in_archive
from cribsheet.model.backbone import Backbone
from cribsheet.model.fingerprint import fingerprint
from cribsheet.sheet.manifest import Operation
from cribsheet.sheet.sheet import Sheet

_SAME = {
    "head": "preamble",
    "task": "task",
    "guide": "guide",
    "form": "guide",
    "dtype": "storage dtype",
    "document_rate": "document rate",
    "allocation": "allocation",
}


def extend(
    backbone: Backbone,
    sheet: Sheet,
    documents: Any,
    *,
    scorer: str | Scorer | None = None,
    progress: Listener = None,
    checkpoint: str | Path | None = None,
    check: bool = True,
) -> Sheet:
    """A sheet with more documents behind its own; reads these only.

    `documents` is whatever `read_documents` takes. A sheet that was built with a scorer of your own needs it again.
    Raises `SheetError` for a sequential sheet, `DocumentError` for ids that it has already, before any work.
    """
    edit = _Edit(backbone, sheet, scorer, check=check)
    new = read_documents(documents)
    if there := next((document.id for document in new if document.id in edit.ids), None):
        raise DocumentError(
            f"The sheet has a document {there!r} already; `replace` puts another text in its place, or give the new "
            "one another id."
        )
    return edit.done([*edit.segments, *edit.read(new, progress, checkpoint)], "extended", len(new))


def replace(
    backbone: Backbone,
    sheet: Sheet,
    document_id: str,
    document: Any,
    *,
    scorer: str | Scorer | None = None,
    progress: Listener = None,
    check: bool = True,
) -> Sheet:
    """A sheet with another text in the place, and under the id, of a document; reads the new one only.

    Raises as `extend`, and `DocumentError` for an unknown id or anything but one document.
    """
    edit = _Edit(backbone, sheet, scorer, check=check)
    place = edit.find(document_id)
    new = read_documents(document)
    if len(new) != 1:
        raise DocumentError(f"{document_id!r} was to be replaced by {len(new)} documents; give one")
    text = Document(text=new[0].text, id=document_id, metadata=new[0].metadata)
    (segment,) = edit.read([text], progress)
    return edit.done([*edit.segments[:place], segment, *edit.segments[place + 1 :]], "replaced", 1)


def remove(backbone: Backbone, sheet: Sheet, *document_ids: str, check: bool = True) -> Sheet:
    """A sheet without these documents; nothing is read but a resident guide.

    Raises `DocumentError` for an unknown id, and if no document would be left.
    """
    edit = _Edit(backbone, sheet, check=check)
    leaving = {edit.find(id_) for id_ in document_ids}
    staying = [segment for number, segment in enumerate(edit.segments) if number not in leaving]
    if not staying:
        raise DocumentError("No document would be left; a sheet needs at least one, so delete the file instead.")
    return edit.done(staying, "removed", len(leaving)) if leaving else sheet


def merge(backbone: Backbone, first: Sheet, second: Sheet, *, check: bool = True) -> Sheet:
    """One sheet with the documents of two, which have the same model, task and terms; reads only a resident guide.

    Raises `SheetError` naming what differs, and `DocumentError` for ids that both have.
    """
    mine, theirs = _Edit(backbone, first, check=check), _Edit(backbone, second, check=False)
    second.manifest.fingerprint.check(first.manifest.fingerprint)
    for field, what in _SAME.items():
        ours, other = getattr(first.manifest, field), getattr(second.manifest, field)
        if ours != other:
            raise SheetError(
                f"The sheets differ in their {what}: {ours!r} and {other!r}; build one of them again, or ask both with "
                "`combine`."
            )
    refuse_twice([*mine.ids, *theirs.ids])
    both = (first.manifest, second.manifest)
    history = [entry for each in both for entry in each.history]
    mine.manifest = first.manifest.model_copy(update={"history": history, "document_most": least_most(both)})
    mine.with_texts = mine.with_texts and theirs.with_texts
    return mine.done([*mine.segments, *theirs.segments], "merged", len(theirs.ids))


def backbone_of(sheet: Sheet, model: Any = None) -> Backbone:
    """The model that a sheet was made with, or the one given: loaded, a folder, or a name."""
    made = sheet.manifest.fingerprint
    if model is None:
        return LoadedModel.get(made.model, revision=made.revision).backbone
    return LoadedModel.get(model).backbone


class _Edit:
    """An independent sheet taken apart, and put together again."""

    def __init__(
        self, backbone: Backbone, sheet: Sheet, scorer: str | Scorer | None = None, *, check: bool = True
    ) -> None:
        self.backbone, self.manifest = backbone, sheet.manifest
        if self.manifest.mode != "independent":
            raise SheetError(
                "This sheet is sequential: each of its documents was read on top of those before it, and holds traces "
                "of them. Build it again with mode='independent' to change its documents."
            )
        self.began = time.perf_counter()
        self._scorer = scorer
        self.terms = Terms.of(backbone, self.manifest)
        if check:
            self.manifest.fingerprint.check(fingerprint(backbone, self.terms.layout))
        self.preamble, self.segments = cut(backbone, sheet)
        self.ids = [entry.id for entry in self.manifest.documents]
        self.with_texts = bool(sheet.texts)

    def find(self, document_id: str) -> int:
        """The number of the segment that is this document."""
        for number, segment in enumerate(self.segments):
            ids = [entry.id for entry in segment.documents]
            if document_id in ids:
                if len(ids) > 1:
                    raise SheetError(
                        f"The document {document_id!r} was read together with {len(ids) - 1} others, as a sequential "
                        "sheet; build that one again with mode='independent'."
                    )
                return number
        raise DocumentError(f"There is no document {document_id!r} in the sheet; `kb.sheet.documents` lists them.")

    def read(
        self, documents: Sequence[Document], progress: Listener, checkpoint: str | Path | None = None
    ) -> list[Segment]:
        """New documents on the terms of the sheet."""
        terms, kept = self.terms.with_scorer(self._scorer), self.preamble.archive
        plans = [terms.plan(self.backbone, document) for document in documents]
        folder = writable_folder(kept.archive) if kept else None
        archive = archive_of(self.backbone, kept.archive.dtype if kept else None, plans, 0, checkpoint, folder)
        new = read_all(
            self.backbone,
            terms,
            plans,
            self.manifest,
            self.preamble,
            archive=archive,
            checkpoint=checkpoint,
            progress=progress,
        )
        return new if archive is None else in_archive(new, archive, self.manifest)

    def done(self, segments: Sequence[Segment], operation: Operation, documents: int) -> Sheet:
        """The sheet of these segments."""
        made = changed(self.backbone, self.manifest, operation, documents, self.began)
        return assemble(self.backbone, made, self.preamble, segments, self.terms.guide, with_texts=self.with_texts)
