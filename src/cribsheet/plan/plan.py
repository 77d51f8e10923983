"""What a build will read and keep: whatever can be refused is refused here, before any work starts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

from torch import Tensor

from cribsheet.compress.loop import Reading
from cribsheet.compress.profile import weights_of
from cribsheet.compress.scoring import Scorer, make_scorer
from cribsheet.corpus.documents import Document
from cribsheet.corpus.task import Task
from cribsheet.errors import BudgetError
from cribsheet.model.backbone import Backbone
from cribsheet.plan.options import BuildOptions
from cribsheet.plan.window import check_whole, chunk_that_fits, most_tokens
from cribsheet.prompt.chunks import TokenizedCorpus
from cribsheet.prompt.template import ChatLayout
from cribsheet.vocabulary import Allocation, StorageDtype

logger = logging.getLogger(__name__)

_SPREAD_TO = 48  # rate beyond which there is no place for a little of everything (decision 20)
_RESIDENT_SHARE = 0.25  # a guide that takes more of the budget than this does not stay in "auto"


@dataclass(frozen=True, slots=True)
class Plan:
    """A build before it starts; nothing that can be refused is left to refuse.

    `budget` is in tokens and includes those of the `resident` guide (T,), which is empty when the guide is dropped.
    `form` is what that guide says in place of the task's examples, or empty. `dtype` is what the sheet is stored in.
    """

    layout: ChatLayout
    task: Task
    corpus: TokenizedCorpus
    preamble: str
    budget: int
    resident: Tensor
    scorer_name: str
    reading: Reading
    dtype: StorageDtype
    cut_from: int | None = None  # the budget of the reading that the sheet is cut from, if that is a larger one
    form: str = ""
    archive: StorageDtype | None = None  # the type in which all that is read is kept beside the sheet, if it is

    @property
    def rate(self) -> float:
        """How many times shorter the sheet will be; below 1 where everything is kept and the guide comes on top."""
        return len(self.corpus) / self.budget


@dataclass(frozen=True, slots=True)
class _GuideTokens:
    """What a scorer reads after each chunk, `scored` (T,) and `repeat` (R,), and what stays: `resident`, as `form`."""

    scored: Tensor
    repeat: Tensor
    resident: Tensor
    form: str

    @property
    def tokens(self) -> int:
        """How many are read after each chunk, besides its repetition."""
        return len(self.scored) + len(self.repeat)


def plan(
    backbone: Backbone,
    layout: ChatLayout,
    documents: Sequence[Document],
    task: Task,
    options: BuildOptions,
    *,
    budget_of: Callable[[int], int] | None = None,
) -> Plan:
    """How to build a sheet of these documents; `budget_of` a corpus of so many tokens is that of the options.

    Raises `BudgetError`, `TemplateError` or `DocumentError` for what cannot be built.
    """
    name, scorer = make_scorer(options.chosen_scorer)
    allocation = options.chosen_allocation
    preamble = layout.preamble(task.instruction)
    corpus = TokenizedCorpus.build(documents, preamble, layout.encoder)
    budget = (budget_of or options.tokens)(len(corpus))
    guide = _guide(layout, task, options, scorer, budget, len(corpus))
    shown, resident = task.shown(guide.form), guide.resident
    layout.verify(preamble, corpus.text, layout.guide(shown).resident if len(resident) else "", shown)
    if options.keeps_all:
        budget += len(resident)
    keep = budget - len(resident)
    fixed = corpus.preamble_tokens if allocation == "uniform" else _pinned(scorer, "adaptive", corpus.preamble_tokens)
    if keep <= fixed and keep < len(corpus):
        raise _too_small(budget, fixed, len(resident), len(corpus))
    twice = scorer.reads.repetition
    if keep >= len(corpus):
        check_whole(backbone, keep, len(resident))
        chunk = chunk_that_fits(backbone, len(corpus), 0, 0, options.chunk_tokens, twice=False)
    else:
        chunk = chunk_that_fits(backbone, len(corpus), keep, guide.tokens, options.chunk_tokens, twice=twice)
    reading = Reading(
        scorer=scorer,
        guide=guide.scored,
        repeat=guide.repeat,
        budget=keep,
        chunk_tokens=chunk,
        preamble_tokens=corpus.preamble_tokens,
        pinned=_pinned(scorer, allocation, corpus.preamble_tokens),
        allocation=allocation,
        spread=len(corpus) <= keep * _SPREAD_TO,
        weigh=cache(partial(weights_of, backbone, layout, keep / len(corpus))),
        correction=options.correction,
        most=most_tokens(backbone, keep, len(resident), guide.tokens + chunk * (2 if twice else 1)),
        seed=options.seed,
    )
    dtype, archive = options.storage(backbone), options.archive_dtype
    return Plan(
        layout, task, corpus, preamble, budget, resident, name, reading, dtype, form=guide.form, archive=archive
    )


def warn_without_task(task: Task, options: BuildOptions) -> None:
    """Log a warning if a scorer that looks at the task has none to look at."""
    if task == Task.of(None) and make_scorer(options.chosen_scorer)[1].reads.task:
        logger.warning(
            "no task was given, so what questions that nobody described need is kept only as far as a repetition of "
            "the documents tells; say what will be asked, with task=, best with examples"
        )


def _guide(
    layout: ChatLayout, task: Task, options: BuildOptions, scorer: Scorer, budget: int, corpus_tokens: int
) -> _GuideTokens:
    """What is read after each chunk, nothing where the scorer reads none, and what stays of it."""
    guide, form, encode = layout.guide(task), task.form, layout.encoder.after
    opening = encode(guide.resident, continues=True)
    in_form = encode(layout.guide(task.shown(form)).resident, continues=True) if form else opening
    scored = repeat = opening[:0]
    if scorer.reads.repetition:
        repeat = encode(layout.repeat(task, "guide" if scorer.reads.task else "documents"))
    if scorer.reads.task:
        scored = opening if scorer.reads.repetition else encode(guide.scored)  # with a repetition the talk goes on
    resident = _kept_guide(options, opening, in_form, budget, corpus_tokens)
    return _GuideTokens(scored, repeat, resident, form if resident is in_form else "")


def _kept_guide(options: BuildOptions, whole: Tensor, in_form: Tensor, budget: int, corpus_tokens: int) -> Tensor:
    """What stays in the sheet (T,): the guide with its examples, with their form instead, or nothing."""
    if options.guide != "auto":
        return {"resident": whole, "form": in_form, "dropped": whole[:0]}[options.guide]
    most = budget * _RESIDENT_SHARE if budget < corpus_tokens or options.keeps_all else 0
    return next((guide for guide in (whole, in_form) if len(guide) <= most), whole[:0])


def _too_small(budget: int, fixed: int, guide_tokens: int, corpus_tokens: int) -> BudgetError:
    """A budget that holds not even what every sheet has, with the ways out that there are."""
    least = fixed + 1 + guide_tokens
    ways = [f"a budget of at least {least}", "a lower rate"] if least <= corpus_tokens else ["rate=1, which keeps all"]
    ways += ["a shorter task", "guide='dropped'"] if guide_tokens else []
    taken = f"{fixed} and the resident guide {guide_tokens}" if guide_tokens else f"{fixed}"
    *first, last = ways
    listed = f"{', '.join(first)}{',' * (len(first) > 1)} or {last}" if first else last
    return BudgetError(f"The budget is {budget} tokens, but the template's preamble takes {taken}; pass {listed}.")


def _pinned(scorer: Scorer, allocation: Allocation, preamble_tokens: int) -> int:
    """How many tokens of the template's preamble stay in every head of the model, whatever their scores.

    The first one is where attention rests. Where heads share a budget, each further one costs all of them a token.
    """
    if not scorer.pins_preamble:
        return 0
    return preamble_tokens if allocation == "uniform" else min(1, preamble_tokens)
