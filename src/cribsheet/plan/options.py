"""What a build may be told: one list of options, checked when it is made, that every way to build shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypedDict, get_args

from cribsheet.compress.scoring import Scorer, make_scorer
from cribsheet.errors import BudgetError
from cribsheet.model.backbone import Backbone
from cribsheet.prompt.template import ChatLayout
from cribsheet.vocabulary import SEEDS, Allocation, Correction, GuideKept, SheetKind, StorageDtype

DEFAULT_RATE = 4.0  # where nothing was said of the size
DEFAULT_DTYPE: StorageDtype = "int4"  # where nothing was said of either (decisions/0024)
ENGINE_BLOCK = 16  # tokens that other engines keep together
ENGINE_DTYPE: StorageDtype = "float16"  # of their caches
DEFAULT_SCORER = "recall"  # whatever the allocation, so that one can be compared with the other


class BuildKeywords(TypedDict, total=False):
    """The fields of `BuildOptions` as keyword arguments, so that editors complete them."""

    rate: float | None
    budget: int | None
    scorer: str | Scorer | None
    guide: GuideKept
    chunk_tokens: int | None
    system: str
    template_options: Mapping[str, Any] | None
    dtype: StorageDtype | None
    seed: int
    mode: SheetKind
    allocation: Allocation | None
    correction: Correction
    retain: float | None
    check: bool
    archive: bool | StorageDtype
    for_engines: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """How documents are condensed: to `budget` tokens per layer and head, or `rate` times shorter.

    scorer
        a name from `SCORERS`, or an object of your own with a `score` method; `"recall"` by default.
    guide
        `"resident"` keeps task and examples in the sheet, on top of the kept tokens and within the budget;
        `"form"` keeps a sentence on the form of the examples' answers in their place; `"dropped"` uses them for
        scoring only, as published; `"auto"` keeps the first of these that takes at most a quarter of the budget, or
        all of an independent sheet's, which comes on top.
        At rate 1 everything is kept, nothing is scored, and the guide comes on top.
    chunk_tokens
        how much is read at once; 0 is everything (the single-pass form); by default chosen from device and window.
    system, template_options
        a system text before everything, and options of the chat template (`enable_thinking`, for one).
    dtype
        storage type: float32, bfloat16, float16, int8 or int4; by default the model's own, or int4 where neither rate,
        budget nor share to retain was given (rate 4).
    seed
        for what is random in a build.
    mode
        `"sequential"`, as published: every document is read on top of what is kept of those before. `"independent"`:
        each document is read alone and condensed by `rate`, and may be replaced or removed later (`living/edits.py`).
    allocation
        `"profiled"`, the default with the default scorer: half of the budget goes to heads as questions make them look
        things up (`compress/profile.py`), half to those whose scores are higher, and the budget is the mean.
        `"adaptive"`: all of it to those whose scores are higher, the default of independent sheets.
        `"uniform"`, as published and the default with any other scorer: all heads keep equally many.
    correction
        `"refit"`: what is kept is made to stand for what was dropped (`compress/correction.py`), in a sequential sheet.
    retain
        instead of a rate or budget: the share, above 0 and at most 1, of what full context answers that the sheet must
        answer too. The model writes probes, and the highest rate that retains so much is chosen
        (`retention/retention.py`).
    check
        ask the finished sheet such probes; what it retains stands in `manifest.retention`, and is warned of if it is
        little. With eight examples or more, every fourth is held back as a probe.
    archive
        keep the keys and values of all tokens too, in a file beside the sheet from which stretches can be recalled:
        True is int4; or one of the storage types.
    for_engines
        a sheet that other engines can read too (`Sheet.export`): all heads keep equally many tokens, a multiple of 16,
        in float16 unless another type was asked for.

    Raises `BudgetError` for what makes no sense, alone or together.
    """

    rate: float | None = None
    budget: int | None = None
    scorer: str | Scorer | None = None
    guide: GuideKept = "auto"
    chunk_tokens: int | None = None
    system: str = ""
    template_options: Mapping[str, Any] | None = None
    dtype: StorageDtype | None = None
    seed: int = 0
    mode: SheetKind = "sequential"
    allocation: Allocation | None = None
    correction: Correction = "none"
    retain: float | None = None
    check: bool = False
    archive: bool | StorageDtype = False
    for_engines: bool = False

    def __post_init__(self) -> None:
        self._check_choices()
        if self.retain is not None:
            self._check_retain(self.retain)
        self._check_numbers()
        if self.for_engines:
            self._check_for_engines()
        self._check_scorer()

    @classmethod
    def of(cls, options: BuildKeywords) -> BuildOptions:
        """Those that a way to build was called with. Raises `TypeError` for names that are none, with all that are."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(options.keys() - known):
            raise TypeError(
                f"Unknown options of a build: {', '.join(unknown)}; use {', '.join(sorted(known))}, or what the "
                "function itself takes."
            )
        return cls(**options)

    @property
    def chosen_scorer(self) -> str | Scorer:
        """The one that was asked for, or the default."""
        return DEFAULT_SCORER if self.scorer is None else self.scorer

    @property
    def chosen_allocation(self) -> Allocation:
        """The one that was asked for, or that which suits the scorer; published methods are as they were published."""
        if self.allocation is not None:
            return self.allocation
        if self.for_engines:
            return "uniform"
        if self.chosen_scorer != DEFAULT_SCORER:
            return "uniform"
        return "adaptive" if self.mode == "independent" else "profiled"

    @property
    def keeps_all(self) -> bool:
        """Whether everything is to be kept: the ceiling of the same prompt, so the guide costs no document a token."""
        return self.rate == 1 and self.budget is None

    @property
    def archive_dtype(self) -> StorageDtype | None:
        """The type that an archive is stored in; none if there is to be none."""
        if isinstance(self.archive, bool):
            return DEFAULT_DTYPE if self.archive else None
        return self.archive

    def layout(self, backbone: Backbone) -> ChatLayout:
        """The model's chat template with the system text and the options for it."""
        return ChatLayout(backbone.tokenizer, system=self.system, options=self.template_options)

    def storage(self, backbone: Backbone) -> StorageDtype:
        """The type that keys and values are stored in. Raises `BudgetError` if it is the model's own and unknown."""
        if self.dtype is not None:
            return self.dtype
        if self.for_engines:
            return ENGINE_DTYPE
        if self.rate is None and self.budget is None and self.retain is None:
            return DEFAULT_DTYPE
        return _storage_dtype(str(backbone.dtype).removeprefix("torch."))

    def tokens(self, corpus_tokens: int) -> int:
        """The budget in tokens. Raises `BudgetError` if it does not fit the corpus."""
        rate, budget = self.rate, self.budget
        if budget is None:
            budget = int(corpus_tokens / (DEFAULT_RATE if rate is None else rate))
            if self.for_engines:
                budget -= budget % ENGINE_BLOCK
        if self.for_engines and not budget:
            raise BudgetError(
                f"The corpus of {corpus_tokens} tokens at this rate leaves less than the {ENGINE_BLOCK} tokens that a "
                "block of other engines has; pass a lower rate."
            )
        if not 0 < budget <= corpus_tokens:
            other = "a rate" if self.budget is not None else "a lower rate"
            raise BudgetError(
                f"The budget is {budget} tokens but the corpus has {corpus_tokens}; pass a budget between 1 and "
                f"{corpus_tokens}, or {other}."
            )
        return budget

    def _check_choices(self) -> None:
        """Refuse words that are none of those that an option may be, and two that exclude each other."""
        for name, value, known in (
            ("guide", self.guide, GuideKept),
            ("allocation", self.allocation, Allocation),
            ("correction", self.correction, Correction),
            ("mode", self.mode, SheetKind),
        ):
            if value not in get_args(known) and (name, value) != ("allocation", None):
                raise BudgetError(f"{name} is {value!r}; use {', '.join(get_args(known))}.")
        if self.dtype is not None:
            _storage_dtype(self.dtype)
        if not isinstance(self.archive, bool) and self.archive not in get_args(StorageDtype):
            raise BudgetError(
                f"archive is {self.archive!r}; use True (int4), False, or {', '.join(get_args(StorageDtype))}."
            )
        if self.scorer == "finch" and self.allocation not in (None, "uniform"):
            raise BudgetError(
                f"allocation is {self.allocation!r}, but scorer='finch' is as published: all heads of a layer keep "
                "the same tokens; leave the allocation out, or choose another scorer."
            )
        self._check_independent()

    def _check_independent(self) -> None:
        """Refuse what documents that are read apart cannot have."""
        if self.mode == "independent" and self.allocation == "profiled":
            raise BudgetError(
                "The heads of an independent sheet cannot share by the model's profile; use allocation='adaptive'."
            )
        if self.mode == "independent" and self.correction != "none":
            raise BudgetError(
                "An independent sheet cannot be corrected, as its documents are read apart, whatever stands beside "
                "them; use correction='none'."
            )

    def _check_for_engines(self) -> None:
        """Refuse what no other engine can read."""
        if self.budget is not None and self.budget % ENGINE_BLOCK:
            below = self.budget - self.budget % ENGINE_BLOCK
            raise BudgetError(
                f"The budget is {self.budget} tokens, but other engines keep tokens in blocks of {ENGINE_BLOCK}; with "
                f"for_engines=True pass {f'{below} or ' if below else ''}{below + ENGINE_BLOCK}."
            )
        wrong = {
            f"allocation={self.allocation!r}": self.allocation not in (None, "uniform"),
            f"mode={self.mode!r}": self.mode != "sequential",
            f"dtype={self.dtype!r}": self.dtype == "int4",
            f"retain={self.retain!r}": self.retain is not None,
            "rate=1": self.keeps_all,
        }
        if both := next((name for name, is_wrong in wrong.items() if is_wrong), None):
            raise BudgetError(
                f"{both} was given with for_engines=True, but other engines read sheets of one size, whose heads all "
                f"keep the same multiple of {ENGINE_BLOCK} tokens, rotated; leave one of the two out."
            )

    def _check_retain(self, retain: float) -> None:
        """Refuse a share to retain that makes no sense, alone or with the other options."""
        if isinstance(retain, bool) or not isinstance(retain, int | float) or not 0 < retain <= 1:
            raise BudgetError(
                f"retain is {retain!r}; pass a share above 0 and at most 1 (0.95: of twenty probes the sheet may lose "
                "one)."
            )
        for name, value in (("rate", self.rate), ("budget", self.budget)):
            if value is not None:
                raise BudgetError(f"Both retain {retain:g} and {name} {value:g} were given; pass one of them.")
        if self.mode == "independent":
            raise BudgetError(
                "retain cuts smaller sheets from one reading, but an independent sheet is condensed document by "
                "document; pass a rate, with check=True to hear what it retains, or mode='sequential'."
            )
        if self.correction != "none":
            raise BudgetError(
                "retain cuts smaller sheets from one reading, and a correction holds for one budget only; find the "
                "rate without correction, and pass it with correction and check=True."
            )

    def _check_numbers(self) -> None:
        """Refuse counts and seeds that are none, two sizes at once, and a rate that would make the sheet longer."""
        for name, value in (("budget", self.budget), ("chunk_tokens", self.chunk_tokens)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise BudgetError(f"{name} is {value!r}; pass a whole number of tokens.")
        if self.rate is not None and self.budget is not None:
            raise BudgetError(f"Both rate {self.rate:g} and budget {self.budget} were given; pass one of them.")
        if self.rate is not None and not 1 <= self.rate < float("inf"):
            raise BudgetError(f"The rate is {self.rate:g}; pass at least 1 (16 means sixteen times shorter).")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed not in SEEDS:
            raise BudgetError(f"seed is {self.seed!r}; pass a whole number from -2^63 to 2^64 - 1.")

    def _check_scorer(self) -> None:
        """Refuse an unknown scorer, and a correction by one that reads nothing to correct by."""
        name, scorer = make_scorer(self.chosen_scorer)
        if self.correction != "none" and not scorer.reads.task:
            raise BudgetError(
                f"The scorer {name!r} reads no task by which to correct; use another, or correction='none'."
            )


def _storage_dtype(name: str) -> StorageDtype:
    """The storage type of this name. Raises `BudgetError` if there is none."""
    for known in get_args(StorageDtype):
        if name == known:
            return known  # type: ignore[no-any-return]
    raise BudgetError(f"There is no storage dtype {name!r}; use {', '.join(get_args(StorageDtype))}.")
