"""Independent sheets: every document is read alone behind the shared preamble and condensed by the same rate.

What is kept of a document depends on nothing but that document and the terms of the sheet, so a document can be added
or taken away later at the cost of that document, and the result is what a build without it would have been.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from cribsheet.compress.progress import Listener, shown
from cribsheet.compress.scoring import Scorer, make_scorer
from cribsheet.corpus.documents import Document
from cribsheet.corpus.task import Task
from cribsheet.errors import BudgetError, DocumentError, SheetError
from cribsheet.living.archives import origins_of, runs_of
from cribsheet.living.segments import (
    Segment,
    assemble,
    check_fits,
    cut,
    read_preamble,
    read_segment,
    write_preamble,
)
from cribsheet.model.backbone import Backbone
from cribsheet.model.fingerprint import SAID_SINCE
from cribsheet.plan.assemble import archive_layout
from cribsheet.plan.describe import circumstances, describe, list_documents
from cribsheet.plan.options import DEFAULT_RATE, BuildOptions
from cribsheet.plan.plan import Plan, plan
from cribsheet.plan.window import QUESTION_SHARE, usual_chunk
from cribsheet.prompt.chunks import TokenizedCorpus
from cribsheet.prompt.template import ChatLayout
from cribsheet.sheet import file
from cribsheet.sheet.archive.writer import ArchiveWriter, unfinished_archive
from cribsheet.sheet.manifest import Change, Manifest, Operation
from cribsheet.sheet.sheet import Sheet, with_archive
from cribsheet.vocabulary import Allocation, StorageDtype

# Tokens that are kept of any document, or all of a shorter one: none vanishes. Heads that share may have fewer each.
LEAST: dict[Allocation, int] = {"uniform": 4, "adaptive": 1}
_WIDEST = 1e9  # a rate at which every document keeps the least
_NOT_TERMS: Any = {
    **dict.fromkeys(("created", "build", "history", "documents", "segments", "budget", "guide", "guide_tokens"), True),
    **dict.fromkeys(("corpus_digest", "corpus_tokens", "retention", "archive"), True),
    "fingerprint": SAID_SINCE,
}


@dataclass(frozen=True)
class Terms:
    """What all documents of a sheet have in common; `rate` is by how much each of them is condensed.

    `chunk_tokens` is how much of a document is read at once; none: by device and window. If the `allocation` is
    adaptive, no head keeps more of a document than `most` times its share; none: all of it.
    """

    layout: ChatLayout
    task: Task
    rate: float
    scorer: str | Scorer
    chunk_tokens: int | None
    dtype: StorageDtype
    seed: int
    resident: bool
    form: str
    allocation: Allocation = "uniform"
    most: float | None = None

    @classmethod
    def of(cls, backbone: Backbone, manifest: Manifest) -> Terms:
        """The terms that a sheet was built on."""
        return cls(
            layout=ChatLayout(backbone.tokenizer, system=manifest.system, options=manifest.template_options),
            task=Task.from_dict(manifest.task),
            rate=manifest.document_rate or DEFAULT_RATE,
            scorer=manifest.scorer,
            chunk_tokens=manifest.chunk_tokens,
            dtype=manifest.dtype,
            seed=manifest.seed,
            resident=manifest.guide == "resident",
            form=manifest.form,
            allocation=manifest.allocation,
            most=manifest.document_most,
        )

    def with_scorer(self, scorer: str | Scorer | None) -> Terms:
        """The same terms, with a scorer of your own, which a sheet knows by its name only."""
        if scorer is None:
            return self
        name, _ = make_scorer(scorer)
        if name != self.scorer:
            raise SheetError(f"This sheet was built with the scorer {self.scorer!r}, not {name!r}; pass that one.")
        return replace(self, scorer=scorer)

    @cached_property
    def preamble(self) -> Tensor:
        """Tokens (T,) before the first document, whatever that is."""
        corpus = self._tokenized(Document(text="x", id="x"))
        return corpus.ids[: corpus.preamble_tokens]

    @cached_property
    def guide(self) -> Tensor:
        """Tokens (T,) of the resident guide; none if it is dropped."""
        shown = self.task.shown(self.form)
        guide = self.layout.encoder.after(self.layout.guide(shown).resident, continues=True)
        return guide if self.resident else guide[:0]

    def length(self, document: Document) -> int:
        """Tokens of a document, the gap after it included."""
        corpus = self._tokenized(document)
        return len(corpus) - corpus.preamble_tokens

    def plan(self, backbone: Backbone, document: Document) -> Plan:
        """How to read one document; whatever can be refused is refused here."""
        usual = usual_chunk(backbone)
        chunk = None if self.chunk_tokens == usual else self.chunk_tokens
        options = BuildOptions(
            rate=self.rate,
            scorer=self.scorer,
            guide="dropped",
            chunk_tokens=chunk,
            dtype=self.dtype,
            seed=self.seed,
            mode="independent",
            allocation=self.allocation,
        )
        planned = plan(backbone, self.layout, [document], self.task, options, budget_of=self._budget)
        if self.most is None:
            return planned
        length = len(planned.corpus) - planned.corpus.preamble_tokens
        most = planned.corpus.preamble_tokens + most_kept(length, self.rate, self.most)
        return replace(planned, reading=replace(planned.reading, most=min(planned.reading.most, most)))

    def _budget(self, tokens: int) -> int:
        """What is kept of one document and the preamble before it, which is not its own, of so many tokens together."""
        preamble = len(self.preamble)
        return preamble + share(tokens - preamble, self.rate, self.allocation)

    def _tokenized(self, document: Document) -> TokenizedCorpus:
        return TokenizedCorpus.build([document], self.layout.preamble(self.task.instruction), self.layout.encoder)


# Reads documents on the terms of a sheet, somewhere else perhaps: segments in the order of their plans.
SegmentReader = Callable[[Terms, Manifest, Sequence[Plan]], Iterable[Segment]]


def share(tokens: int, rate: float, allocation: Allocation) -> int:
    """How many tokens are kept of a document of so many."""
    return min(tokens, max(LEAST[allocation], int(tokens / rate)))


def most_kept(tokens: int, rate: float, most: float | None) -> int:
    """How many tokens of a document of so many any head may keep: `most` times its share, or all."""
    return tokens if most is None else min(tokens, int(share(tokens, rate, "adaptive") * most))


def least_most(manifests: Sequence[Manifest]) -> float | None:
    """The `document_most` of several sheets that become one: the least that any of them has."""
    return min((each.document_most for each in manifests if each.document_most is not None), default=None)


def build_independent(
    backbone: Backbone,
    layout: ChatLayout,
    documents: Sequence[Document],
    task: Task,
    options: BuildOptions,
    *,
    read: SegmentReader | None = None,
    archive_folder: str | Path | None = None,
    checkpoint: str | Path | None = None,
    progress: Listener = None,
) -> Sheet:
    """`build_sheet(mode="independent")`: `rate` is that of each document; preamble and resident guide come on top.

    A `budget` is the most that the whole sheet may have. Raises as `build_sheet`, and `DocumentError` for two
    documents with one id.
    """
    began = time.perf_counter()
    terms, plans = plan_each(backbone, layout, documents, task, options)
    usual = usual_chunk(backbone)
    base = describe(plans[0], backbone, 0.0).model_copy(
        update={
            "mode": "independent",
            "document_rate": terms.rate,
            "document_most": terms.most,
            "chunk_tokens": usual if options.chunk_tokens is None else options.chunk_tokens,
            "head_tokens": len(terms.preamble),
            "form": terms.form,
        }
    )
    preamble = read_preamble(backbone, terms.preamble, terms.dtype)
    archive = archive_of(backbone, options.archive_dtype, plans, len(terms.preamble), checkpoint, archive_folder)
    segments = read_all(
        backbone, terms, plans, base, preamble, read=read, archive=archive, checkpoint=checkpoint, progress=progress
    )
    made = changed(backbone, base, "built", len(documents), began)
    sheet = assemble(backbone, made, preamble, segments, terms.guide)
    return with_archive(sheet, archive) if archive else sheet


def plan_each(
    backbone: Backbone, layout: ChatLayout, documents: Sequence[Document], task: Task, options: BuildOptions
) -> tuple[Terms, list[Plan]]:
    """The terms of an independent sheet, and how to read each of its documents; what can be refused is refused here."""
    refuse_twice([document.id for document in documents])
    if not documents:
        raise DocumentError("There are no documents; a sheet needs at least one.")

    def terms_at(rate: float) -> Terms:
        return Terms(
            layout=layout,
            task=task,
            rate=rate,
            scorer=options.chosen_scorer,
            chunk_tokens=options.chunk_tokens,
            dtype=options.storage(backbone),
            seed=options.seed,
            resident=options.guide != "dropped",
            form=task.form if options.guide == "form" else "",
            allocation=options.chosen_allocation,
        )

    terms = terms_at(_rate(terms_at, documents, options))
    terms = replace(terms, most=_most(backbone, terms, documents))
    plans = [terms.plan(backbone, document) for document in documents]
    corpus = plans[0].corpus
    shown = task.shown(terms.form)
    layout.verify(plans[0].preamble, corpus.text, layout.guide(shown).resident if terms.resident else "", shown)
    check_fits(backbone, kept_of(terms, plans))
    return terms, plans


def kept_of(terms: Terms, plans: Sequence[Plan]) -> int:
    """Tokens that are kept per layer and head, preamble and guide included."""
    of_documents = sum(each.reading.budget - each.corpus.preamble_tokens for each in plans)
    return of_documents + len(terms.preamble) + len(terms.guide)


def read_all(
    backbone: Backbone,
    terms: Terms,
    plans: Sequence[Plan],
    base: Manifest,
    preamble: Segment,
    *,
    read: SegmentReader | None = None,
    archive: ArchiveWriter | None = None,
    checkpoint: str | Path | None = None,
    progress: Listener = None,
) -> list[Segment]:
    """Read documents one by one, or as `read` does, with progress in tokens; all that is read goes to an `archive`.

    A checkpoint is a sheet of the documents read so far; it is written whenever a chunk's worth was read.
    """
    lengths = [len(each.corpus) - each.corpus.preamble_tokens for each in plans]
    finished, digest = _resumed(backbone, base, plans, Path(checkpoint)) if checkpoint is not None else ([], "")
    done, saved = sum(lengths[: len(finished)]), 0
    total, preamble_tokens = sum(lengths), len(terms.preamble)
    bare = replace(preamble, archive=None)  # a checkpoint has no archive, so that none is missed in it
    if archive is not None:
        _begin(backbone, terms, archive, archive.layout.tokens - total, done, digest)
    with shown(progress) as told:

        def tell(tokens: int) -> None:
            if told is not None:
                told(tokens, total)

        def within(tokens: int) -> None:
            tell(done + max(0, tokens - preamble_tokens))

        tell(done)
        left = plans[len(finished) :]
        alone = (read_segment(backbone, each, within if told else None, archive) for each in left)
        segments = read(terms, base, left) if read else alone
        for length, segment in zip(lengths[len(finished) :], segments, strict=True):
            finished.append(segment)
            done, saved = done + length, saved + length
            enough = saved >= usual_chunk(backbone) or done == total
            if checkpoint is not None and enough:
                so_far = base.model_copy(update={"build": {"archive": archive.digest}}) if archive else base
                file.save(assemble(backbone, so_far, bare, finished, terms.guide[:0]), checkpoint)
                saved = 0
            tell(done)
    return finished


def archive_of(
    backbone: Backbone,
    dtype: StorageDtype | None,
    plans: Sequence[Plan],
    preamble: int = 0,
    checkpoint: str | Path | None = None,
    folder: str | Path | None = None,
) -> ArchiveWriter | None:
    """What writes all that is read of these plans, behind a preamble of so many tokens; none without a type."""
    if dtype is None:
        return None
    path = unfinished_archive(checkpoint, folder) if checkpoint is not None else None
    layout = archive_layout(backbone, dtype, runs_of(plans, preamble))
    return ArchiveWriter(layout, origins_of(plans, preamble), path, folder)


def _begin(backbone: Backbone, terms: Terms, archive: ArchiveWriter, preamble: int, done: int, digest: str) -> None:
    """Begin an archive with the preamble, if it has one, or go on behind `done` tokens of documents."""
    if done:
        archive.resume(preamble + done, digest)
        return
    archive.begin()
    if preamble:
        write_preamble(backbone, terms.preamble, archive)


def changed(backbone: Backbone, manifest: Manifest, operation: Operation, documents: int, began: float) -> Manifest:
    """A manifest with one more entry in its history; nothing is left of how earlier builds went, or were checked."""
    entry = Change(operation=operation, at=datetime.now(UTC).isoformat(timespec="seconds"), documents=documents)
    facts = circumstances(backbone, time.perf_counter() - began)
    return manifest.model_copy(
        update={"build": facts, "history": [*manifest.history, entry], "cut_from": None, "retention": None}
    )


def refuse_twice(ids: Sequence[str]) -> None:
    """Raise `DocumentError` if two documents have one id."""
    seen: set[str] = set()
    for id_ in ids:
        if id_ in seen:
            raise DocumentError(f"two documents have the id {id_!r}; give each an id of its own")
        seen.add(id_)


def _rate(terms_at: Callable[[float], Terms], documents: Sequence[Document], options: BuildOptions) -> float:
    """The rate of each document: as asked for, or the lowest at which the whole keeps to a budget."""
    if options.budget is None:
        return float(DEFAULT_RATE if options.rate is None else options.rate)
    lengths = [terms_at(1.0).length(document) for document in documents]
    fixed = len(terms_at(2.0).preamble) + len(terms_at(2.0).guide)
    budget = options.tokens(len(terms_at(1.0).preamble) + sum(lengths))

    def whole(rate: float) -> int:
        return fixed + sum(share(length, rate, options.chosen_allocation) for length in lengths)

    low, high = 1.0, _WIDEST
    if whole(high) > budget:
        guided = bool(len(terms_at(2.0).guide))
        raise BudgetError(
            f"The budget is {budget} tokens, but preamble{' and guide take' if guided else ' takes'} {fixed} and "
            f"{len(documents)} documents at least {whole(high) - fixed}; pass a budget of at least {whole(high)}"
            + (", a shorter task, or guide='dropped'." if guided else ", or fewer documents.")
        )
    while high / low > 1.0001:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if whole(middle) <= budget else (middle, high)
    return round(high, 4) if whole(round(high, 4)) <= budget else high


def _most(backbone: Backbone, terms: Terms, documents: Sequence[Document]) -> float | None:
    """How many times its share of a document a head may keep: as often as leaves room in the window; none: all of it.

    A sheet is as long as the head that keeps most.
    """
    if terms.allocation == "uniform":
        return None
    lengths = [terms.length(document) for document in documents]
    room = int(backbone.window * (1 - QUESTION_SHARE)) - len(terms.preamble) - len(terms.guide)

    def fits(most: float | None) -> bool:
        return sum(most_kept(length, terms.rate, most) for length in lengths) <= room

    if fits(None):
        return None
    low, high = 1.0, terms.rate
    while high - low > 0.005:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return round(low, 2) if fits(round(low, 2)) else low


def _resumed(backbone: Backbone, base: Manifest, plans: Sequence[Plan], path: Path) -> tuple[list[Segment], str]:
    """What a checkpoint holds, or nothing, and the digest of what then stood in an archive.

    Raises `SheetError` if it is damaged or of another build.
    """
    if not path.exists():
        return [], ""
    file.verify(path)  # one changed bit would become another sheet
    partial = file.load(path)
    found = partial.manifest.documents
    wanted = [entry for each in plans[: len(found)] for entry in list_documents(each.corpus)]
    if _terms_of(partial.manifest) != _terms_of(base) or found != wanted:
        raise SheetError(
            f"The checkpoint {str(path)!r} belongs to another build (other documents, task, model or settings); "
            "delete it, or build with the settings that it was made with."
        )
    return cut(backbone, partial)[1], str(partial.manifest.build.get("archive", ""))


def _terms_of(manifest: Manifest) -> dict[str, object]:
    return manifest.model_dump(exclude=_NOT_TERMS)
