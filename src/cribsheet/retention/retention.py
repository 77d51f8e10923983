"""Retention: what a sheet still answers of what the model answers with everything before it, and the rate for it.

The model writes probes (`retention/probes.py`) and answers them with all documents in its context, plainly read, with
the guide as the sheet has it: that is the reference. Then the sheet is asked, as it is stored. For a share that is to
be retained one reading is enough: it is made at the largest budget of a ladder of rates, and every smaller sheet is
chosen again out of what it kept (`compress.cut`), so that a rung only costs its questions.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from cribsheet.attention.prefix import Prefix
from cribsheet.compress.kept import State
from cribsheet.compress.loop import cut, read_through
from cribsheet.compress.progress import Listener
from cribsheet.corpus.documents import Document
from cribsheet.corpus.task import Task
from cribsheet.errors import BudgetError, CribsheetError
from cribsheet.living.opened import opened
from cribsheet.model.backbone import Backbone
from cribsheet.plan.assemble import archive_writer, finish
from cribsheet.plan.describe import checkpoint_of
from cribsheet.plan.options import DEFAULT_RATE, BuildOptions
from cribsheet.plan.plan import Plan, plan
from cribsheet.plan.window import usual_chunk
from cribsheet.prompt.chunks import TokenizedCorpus
from cribsheet.prompt.template import ChatLayout
from cribsheet.retention.exam import Exam
from cribsheet.retention.probes import Probe, agree, held_back, make_probes
from cribsheet.sheet.archive.writer import ArchiveWriter
from cribsheet.sheet.manifest import Retention, Rung
from cribsheet.sheet.sheet import Sheet
from cribsheet.vocabulary import StorageDtype

logger = logging.getLogger(__name__)

LADDER = (2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)  # rates that are tried
BOUND = 0.9  # a check warns of a sheet that retains a smaller share
LEAST_PROBES = 8  # of fewer that count, a share says nothing
_CHANCE = 0.1  # a lower rate is advised if one that is no better would look so with less probability than this
_ROOM = 192  # tokens of the window that a probe and its answer take at most

_TROUBLE = (CribsheetError, MemoryError, torch.OutOfMemoryError)  # after which a sheet is still a sheet


@dataclass(frozen=True)
class Reference:
    """Probes with the answers against which a sheet's are held: of full context, or of the stretches alone."""

    kind: Literal["full context", "stretches"]
    probes: Sequence[Probe]
    answers: Sequence[str]

    @cached_property
    def counts(self) -> list[bool]:
        """Of each probe, whether it is answered here, and otherwise than closed book."""
        return [
            bool(answer) and not probe.known and not agree(probe.question, answer, probe.closed)
            for probe, answer in zip(self.probes, self.answers, strict=True)
        ]

    @cached_property
    def confirmed(self) -> list[bool]:
        """Of each probe, whether it is answered here as its stretch alone does."""
        pairs = zip(self.probes, self.answers, strict=True)
        return [agree(probe.question, answer, probe.answer) for probe, answer in pairs]


def reference(exam: Exam, probes: Sequence[Probe], documents: Sequence[Document]) -> Reference:
    """What the model answers with all documents before it, or if they outgrow its window, with the stretches alone."""
    prefix = full_context(exam, documents)
    if prefix is None:
        return Reference("stretches", probes, [probe.answer for probe in probes])
    return Reference("full context", probes, exam.over(prefix, [probe.question for probe in probes]))


def full_context(exam: Exam, documents: Sequence[Document]) -> Prefix | None:
    """All documents and the guide as the exam has it, plainly read; none if the window or the memory is too small."""
    backbone, guide = exam.backbone, exam.guide
    ids = TokenizedCorpus.build(documents, exam.opening, exam.layout.encoder).ids
    if len(ids) + len(guide) + _ROOM > backbone.window:
        return None
    try:
        return exam.read(*ids.split(usual_chunk(backbone)), guide)
    except (MemoryError, torch.OutOfMemoryError):
        return None


def retained(found: Reference, answers: Sequence[str]) -> list[bool | None]:
    """Of each probe, whether an answer agrees with that of the reference; None of those that do not count."""
    rows = zip(found.probes, found.answers, answers, found.counts, strict=True)
    return [agree(probe.question, wanted, answer) if counts else None for probe, wanted, answer, counts in rows]


def ask_sheet(exam: Exam, sheet: Sheet, probes: Sequence[Probe]) -> list[str]:
    """What a sheet answers, as it is stored."""
    return exam.over(opened(exam.backbone, sheet), [probe.question for probe in probes])


@dataclass
class Checker:
    """Asks sheets of one corpus the same probes; what full context answers is found once for each form of the guide.

    `task` is without the examples that are `held` back. `plan_at` gives the plan for any rate.
    """

    backbone: Backbone
    layout: ChatLayout
    documents: Sequence[Document]
    task: Task
    plan_at: Callable[[float], Plan]
    bound: float
    held: Sequence[tuple[str, str]] = ()
    seed: int = 0
    probes: list[Probe] = field(default_factory=list)
    rungs: list[Rung] = field(default_factory=list)
    why: str = ""
    _references: dict[tuple[int, ...], Reference] = field(default_factory=dict)
    _right: dict[int, list[bool | None]] = field(default_factory=dict)  # by budget, of each probe

    def exam(self, sheet: Sheet | Plan) -> Exam:
        """Questions in the form in which such a sheet is asked, with the guide that it has."""
        made = sheet.manifest if isinstance(sheet, Sheet) else sheet
        resident = sheet.resident if isinstance(sheet, Sheet) else len(sheet.resident) > 0
        return Exam(self.backbone, self.layout, self.task, resident=resident, form=made.form)

    def prepare(self, exam: Exam) -> bool:
        """Make probes and answer them; whether enough of them count. If not, `why` says it."""
        try:
            logger.info("probes: the model writes questions about stretches of the documents")
            self.probes = make_probes(exam, self.documents, seed=self.seed, held=self.held)
            if len(self.probes) >= LEAST_PROBES:
                logger.info("probes: %d questions, which full context answers now", len(self.probes))
                counted = sum(self.reference(exam).counts)
        except _TROUBLE as error:
            self.why = str(error)
            return False
        if len(self.probes) < LEAST_PROBES:
            self.why = f"the model wrote {len(self.probes)} questions that may serve, and {LEAST_PROBES} are needed"
        elif counted < LEAST_PROBES:
            self.why = (
                f"of {len(self.probes)} probes the {self.reference(exam).kind} answer {counted} otherwise than closed "
                f"book, and {LEAST_PROBES} are needed"
            )
        return not self.why

    def reference(self, exam: Exam) -> Reference:
        """The reference for sheets with a guide as the exam has it."""
        guide = tuple(exam.guide.tolist())
        if guide not in self._references:
            self._references[guide] = reference(exam, self.probes, self.documents)
        return self._references[guide]

    def rung(self, exam: Exam, sheet: Sheet, rate: float) -> Rung:
        """What a sheet retains."""
        right = retained(self.reference(exam), ask_sheet(exam, sheet, self.probes))
        self._right[sheet.manifest.budget] = right
        counted = [each for each in right if each is not None]
        found = Rung(rate=round(rate, 2), budget=sheet.manifest.budget, counted=len(counted), retained=sum(counted))
        logger.info("rate %g: %d of %d probes are retained", found.rate, found.retained, found.counted)
        return found

    def told(self, sheet: Sheet, exam: Exam, mine: Rung | None) -> Sheet:
        """The sheet with what was found in its manifest; what is bad about it is logged as a warning."""
        known = sum(probe.known for probe in self.probes)
        found = Retention(bound=self.bound, asked=len(self.probes), known=known, held_back=len(self.held), why=self.why)
        if self._references:
            answered = self.reference(exam)
            found.reference, found.confirmed = answered.kind, sum(answered.confirmed)
            found.counted = sum(answered.counts)
        if mine is not None:
            found.counted, found.retained = mine.counted, mine.retained
            found.rungs = [self._beside(rung, mine) for rung in sorted(self.rungs, key=lambda rung: rung.rate)]
        for remark in remarks(found, sheet.manifest.dtype):
            logger.warning("%s", remark)
        return replace(sheet, manifest=sheet.manifest.model_copy(update={"retention": found}))

    def _beside(self, rung: Rung, mine: Rung) -> Rung:
        """A rung with the probes by which it differs from that of the sheet."""
        pairs = Counter(zip(self._right[rung.budget], self._right[mine.budget], strict=True))
        return rung.model_copy(update={"gained": pairs[True, False], "lost": pairs[False, True]})

    def read(
        self,
        planned: Plan,
        progress: Listener = None,
        checkpoint: str | Path | None = None,
        archive: ArchiveWriter | None = None,
    ) -> State:
        """All that a plan keeps of its corpus, the guide left out; all that was read goes to an `archive`."""
        saved = checkpoint_of(planned, self.backbone, checkpoint)
        return read_through(
            self.backbone, planned.corpus, planned.reading, progress=progress, checkpoint=saved, archive=archive
        )

    def search(
        self,
        plans: Mapping[float, Plan],
        progress: Listener = None,
        checkpoint: str | Path | None = None,
        archive_folder: str | Path | None = None,
    ) -> Sheet:
        """The sheet of the highest of these rates, ascending, that retains enough; of the lowest if none does.

        Read at the lowest, and cut for the others; found by halving, as what a lower rate loses a higher one loses too.
        The archive is that of the reading, of which all of them are.
        """
        backbone, began = self.backbone, time.perf_counter()
        rates = list(plans)
        widest = plans[rates[0]]
        archive = archive_writer(backbone, widest, checkpoint, archive_folder)
        state = self.read(widest, progress, checkpoint, archive)

        def sheet_at(rate: float) -> Sheet:
            if rate == rates[0]:
                return finish(backbone, widest, state, began, archive)
            how = replace(plans[rate].reading, chunk_tokens=widest.reading.chunk_tokens)
            planned = replace(plans[rate], reading=how, cut_from=widest.budget)
            return finish(backbone, planned, cut(backbone, state, how), began, archive)

        best: Sheet | None = None
        low, high = 0, len(rates) - 1
        while low < high or best is None:
            middle = (low + high + 1) // 2
            sheet = sheet_at(rates[middle])
            found = self.rung(self.exam(sheet), sheet, rates[middle])
            self.rungs.append(found)
            if found.share >= self.bound:
                low, best = middle, sheet
            elif middle == 0:
                best = sheet
            else:
                high = middle - 1
        return best


def make_checker(
    backbone: Backbone, layout: ChatLayout, documents: Sequence[Document], task: Task, options: BuildOptions
) -> Checker:
    """What checks the sheets of a build, or finds the one that retains a share; nothing is read yet."""
    guided, held = held_back(task)
    archive = options.archive if options.retain is not None else False  # a check reads beside the sheet
    alone = replace(options, retain=None, check=False, dtype=options.storage(backbone), archive=archive)

    def plan_at(rate: float) -> Plan:
        return plan(backbone, layout, documents, guided, replace(alone, rate=rate, budget=None))

    bound = BOUND if options.retain is None else float(options.retain)
    return Checker(backbone, layout, documents, guided, plan_at, bound, held, options.seed)


def build_retaining(
    checker: Checker,
    *,
    progress: Listener,
    checkpoint: str | Path | None,
    archive_folder: str | Path | None = None,
) -> Sheet:
    """The sheet of the highest rate of the ladder that retains the share that the checker is bound to.

    Where nothing can be checked, that of the default rate. Raises as `build_sheet`.
    """
    plans = _possible(checker.plan_at)
    exam = checker.exam(plans[min(plans)])
    if not checker.prepare(exam):
        rate = min(plans, key=lambda rate: abs(rate - DEFAULT_RATE))
        checker.why += f"; so the rate is {rate:g}"
        began = time.perf_counter()
        archive = archive_writer(checker.backbone, plans[rate], checkpoint, archive_folder)
        state = checker.read(plans[rate], progress, checkpoint, archive)
        sheet = finish(checker.backbone, plans[rate], state, began, archive)
        return checker.told(sheet, exam, None)
    sheet = checker.search(plans, progress, checkpoint, archive_folder)
    mine = next(rung for rung in checker.rungs if rung.budget == sheet.manifest.budget)
    return checker.told(sheet, checker.exam(sheet), mine)


def checked(checker: Checker, sheet: Sheet) -> Sheet:
    """A sheet with what it retains in its manifest, and if that is less than the bound, what lower rates would.

    Those are read for once more, and cut from that reading; of a corrected or an independent sheet none are. Whatever
    goes wrong is told in the manifest, as the sheet is there.
    """
    exam, mine = checker.exam(sheet), None
    try:
        if checker.prepare(exam):
            mine = checker.rung(exam, sheet, sheet.rate)
            if mine.share < checker.bound and sheet.manifest.cuttable:
                lower = {rate: planned for rate, planned in _possible(checker.plan_at).items() if rate < sheet.rate}
                if lower:
                    logger.info("the corpus is read again at rate %g, to see what lower rates retain", min(lower))
                    checker.search(lower)
    except _TROUBLE as error:
        checker.why = checker.why or (str(error) if mine is None else "")
    return checker.told(sheet, exam, mine)


def remarks(found: Retention, dtype: StorageDtype) -> list[str]:
    """What a user must hear of a check of a sheet that is stored in a type, in sentences."""
    if found.why:
        return [f"not checked: {found.why}."]
    said = []
    if found.is_weak:
        said.append(
            f"the model may be too weak for this corpus: of {found.asked} probes the {found.reference} answers "
            f"{found.confirmed} as their stretches alone do, and {found.known} are answered closed book"
        )
    if found.share is not None and found.share < found.bound:
        said.append(
            f"of {found.counted} probes the sheet answers {found.retained} as the {found.reference} does"
            f"{_advice(found, dtype)}"
        )
    return said


def _advice(found: Retention, dtype: StorageDtype) -> str:
    """Which rate would do better than a sheet that retains too little, as it was asked: stored in the same type."""
    if not found.rungs:
        return ""
    share = found.share or 0.0
    better = [rung for rung in found.rungs if rung.share > share and rung.chance < _CHANCE]
    if not better:
        counts = ", ".join(f"{rung.retained} of {rung.counted} at {rung.rate:g}" for rung in found.rungs)
        return f"; no other rate that was tried is better by more than chance ({counts})"
    best = max(better, key=lambda rung: (rung.share >= found.bound, min(rung.share, found.bound), rung.rate))
    stored = f", dtype={dtype!r}" if dtype.startswith("int") else ""  # else a rate that is given ends the default
    return (
        f"; with rate={best.rate:g}{stored} it answers {best.retained} of {best.counted}, {best.gained} of them new "
        f"and {best.lost} lost (p = {best.chance:.2g})"
    )


def _possible(plan_at: Callable[[float], Plan]) -> dict[float, Plan]:
    """Plans for the rates of the ladder, ascending, at which the corpus can be read and something of it be kept.

    Raises what the last one raised if there is none.
    """
    plans: dict[float, Plan] = {}
    trouble: BudgetError | None = None
    for rate in LADDER:
        try:
            plans[rate] = plan_at(rate)
        except BudgetError as error:
            trouble = error
    if trouble and not plans:
        raise trouble
    return plans
