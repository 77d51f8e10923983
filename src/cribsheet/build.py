"""From documents and a task to a sheet: plan, condense, assemble."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from cribsheet import __version__
from cribsheet.attention.prefix import LayerPrefix, turned_back
from cribsheet.compress.checkpoint import Checkpoint
from cribsheet.compress.loop import Kept, Reading, State, as_prefix, compress, kept_tokens, nothing_kept
from cribsheet.compress.profile import profile_of
from cribsheet.compress.progress import Listener, shown
from cribsheet.compress.scoring import Scorer, make_scorer
from cribsheet.compress.scoring.view import Guide
from cribsheet.corpus.documents import Document
from cribsheet.corpus.formats.record import METADATA_DEPTH
from cribsheet.corpus.task import Task
from cribsheet.errors import BudgetError
from cribsheet.model.backbone import Backbone
from cribsheet.model.fingerprint import fingerprint
from cribsheet.prompt.chunks import TokenizedCorpus
from cribsheet.prompt.template import ChatLayout
from cribsheet.sheet.layers import StoredLayer
from cribsheet.sheet.manifest import SEEDS, DocumentEntry, Manifest, format_of
from cribsheet.sheet.sheet import Sheet
from cribsheet.vocabulary import ABSENT, Allocation, BuildMode, Correction, GuideMode, StorageDtype

if TYPE_CHECKING:
    from cribsheet.living.independent import Reader

logger = logging.getLogger(__name__)

DEFAULT_RATE, DEFAULT_DTYPE = 4.0, "int4"  # where nothing was said of either (decisions/0024)
DEFAULT_SCORER = "recall"  # whatever the allocation, so that one can be compared with the other
_CHUNK_CPU, _CHUNK_ACCELERATOR = 2048, 8192  # tokens at which matrix products run near their best
QUESTION_SHARE = 0.25  # of the window that no head fills
_SPREAD_TO = 48  # rate beyond which there is no place for a little of everything (decision 20)
_RESIDENT_SHARE = 0.25  # a guide that takes more of the budget than this does not stay in "auto"


@dataclass(frozen=True, slots=True)
class Plan:
    """A build before it starts; nothing that can be refused is left to refuse.

    `budget` is in tokens and includes those of the `resident` guide (T,), which is empty when the guide is dropped.
    `form` is what that guide says in place of the task's examples, or empty.
    """

    layout: ChatLayout
    task: Task
    corpus: TokenizedCorpus
    head: str
    budget: int
    resident: Tensor
    scorer_name: str
    reading: Reading
    cut_from: int | None = None  # the budget of the reading that the sheet is cut from, if that is a larger one
    form: str = ""

    @property
    def rate(self) -> float:
        """How many times shorter the sheet will be; below 1 where everything is kept and the guide comes on top."""
        return len(self.corpus) / self.budget

    def manifest(self, backbone: Backbone, dtype: StorageDtype, seconds: float) -> Manifest:
        """What the finished sheet says of itself."""
        corpus = self.corpus
        documents = list_documents(corpus)
        return Manifest(
            format=format_of(dtype),
            cribsheet=__version__,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            fingerprint=fingerprint(backbone, self.layout),
            system=self.layout.system,
            template_options=self.layout.options,
            head=self.head,
            task=self.task.to_dict(),
            guide="resident" if len(self.resident) else "dropped",
            guide_tokens=len(self.resident),
            corpus_digest=corpus_digest(documents),
            corpus_tokens=len(corpus),
            head_tokens=corpus.head_tokens,
            documents=documents,
            scorer=self.scorer_name,
            seed=self.reading.seed,
            budget=self.budget,
            chunk_tokens=self.reading.chunk_tokens,
            dtype=dtype,
            allocation=self.reading.allocation,
            correction=self.reading.on(self.corpus).correction,
            build=circumstances(backbone, seconds),
            cut_from=self.cut_from,
            form=self.form,
        )

    def identity(self, backbone: Backbone) -> dict[str, Any]:
        """Everything that decides what is kept, for checkpoints."""
        made = self.manifest(backbone, "float32", 0.0).model_dump(exclude={"created", "build", "dtype"})
        return {**made, "dtype": str(backbone.dtype)}


@contextlib.contextmanager
def _memory_told() -> Iterator[None]:
    """Torch and Python say in many ways that memory ran out; callers hear it in one, with the way out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not known:
            raise
        raise BudgetError(
            f"Memory ran out while the corpus was read ({' '.join(str(error).split())[:200]}); lower chunk_tokens or "
            "the budget, or build on a larger machine. With a checkpoint, the build goes on where it was."
        ) from error


@_memory_told()
def build_sheet(
    backbone: Backbone,
    documents: Sequence[Document],
    task: Task,
    *,
    rate: float | None = None,
    budget: int | None = None,
    scorer: str | Scorer | None = None,
    guide: GuideMode = "auto",
    chunk_tokens: int | None = None,
    system: str = "",
    template_options: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    seed: int = 0,
    progress: Listener = None,
    checkpoint: str | Path | None = None,
    mode: BuildMode = "sequential",
    allocation: Allocation | None = None,
    correction: Correction = "none",
    read: Reader | None = None,
    retain: float | None = None,
    check: bool = False,
) -> Sheet:
    """Condense `documents` for `task` into a sheet of `budget` tokens per layer and head, or `rate` times shorter.

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
    progress
        `True` shows a bar. A function is called as `progress(tokens_read, tokens)` before the first and after each
        chunk, and now and then within one that takes long.
    checkpoint
        a file that remembers each finished chunk; if it exists, the build goes on from there.
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
    read
        who reads the documents of an independent sheet, if not this process: see `independent.Reader`.
    retain
        instead of a rate or budget: the share, above 0 and at most 1, of what full context answers that the sheet must
        answer too. The model writes probes, and the highest rate that retains so much is chosen
        (`retention/retention.py`).
    check
        ask the finished sheet such probes; what it retains stands in `manifest.retention`, and is warned of if it is
        little. With eight examples or more, every fourth is held back as a probe.

    Raises `BudgetError`, `TemplateError` or `DocumentError` before any work starts. A general task, which is what
    stands for none, is warned of.
    """
    layout = ChatLayout(backbone.tokenizer, system=system, options=template_options)
    scorer, allocation = resolve_defaults(scorer, allocation, mode)
    budgets = Budgets(rate, budget, guide, chunk_tokens, allocation, correction)
    budgets.check_mode(mode)
    warn_without_task(task, scorer)
    if retain is None and mode == "sequential":
        dtype = budgets.stored_as(dtype)
    checker = None
    if retain is not None or check:
        from cribsheet.retention.retention import build_retaining, checked, make_checker  # it is made of what is here

        checker = make_checker(backbone, layout, documents, task, budgets, mode, retain, scorer=scorer, seed=seed)
        task = checker.task
    if mode == "independent":
        from cribsheet.living.independent import build_independent  # it is made of what is here

        sheet = build_independent(
            backbone,
            layout,
            documents,
            task,
            budgets,
            scorer=scorer,
            dtype=storage_dtype(dtype, backbone),
            seed=seed,
            progress=progress,
            checkpoint=checkpoint,
            read=read,
        )
    elif checker is not None and retain is not None:
        return build_retaining(checker, dtype=dtype, progress=progress, checkpoint=checkpoint)
    else:
        planned = plan(backbone, layout, documents, task, budgets, scorer=scorer, seed=seed)
        sheet = carry_out(backbone, planned, dtype=dtype, progress=progress, checkpoint=checkpoint)
    return sheet if checker is None else checked(checker, sheet, dtype=dtype)


def carry_out(
    backbone: Backbone,
    planned: Plan,
    *,
    dtype: str | None = None,
    progress: Listener = None,
    checkpoint: str | Path | None = None,
) -> Sheet:
    """The sheet that a plan is for; arguments as in `build_sheet`."""
    stored_as = storage_dtype(dtype, backbone)
    began = time.perf_counter()
    state = read_through(backbone, planned, progress=progress, checkpoint=checkpoint)
    return finish(backbone, planned, state, stored_as, began)


def read_through(
    backbone: Backbone, planned: Plan, *, progress: Listener = None, checkpoint: str | Path | None = None
) -> State:
    """All that a plan keeps of its corpus, the guide left out."""
    saved = Checkpoint(checkpoint, planned.identity(backbone)) if checkpoint is not None else None
    start = saved.load(backbone.device, backbone.num_layers, len(planned.corpus)) if saved else None
    state = start or State(0, nothing_kept(backbone))
    with shown(progress) as told:
        tell = None if told is None else lambda read: told(read, len(planned.corpus))
        if tell is not None:
            tell(state.done)
        for state in compress(backbone, planned.corpus, planned.reading, start, tell):
            if saved:
                saved.save(state)
            if tell is not None:
                tell(state.done)
    return state


def finish(backbone: Backbone, planned: Plan, state: State, stored_as: StorageDtype, began: float) -> Sheet:
    """The sheet of what was kept, begun at a time of `time.perf_counter`."""
    layers, indices = assemble(backbone, state.kept, planned.resident)
    if stored_as == "int4":
        length = indices.shape[-1]
        layers = [turned_back(layer, length, turn) for layer, turn in zip(layers, backbone.inv_freqs, strict=True)]
    stored = [StoredLayer.of(layer, stored_as) for layer in layers]
    manifest = planned.manifest(backbone, stored_as, time.perf_counter() - began)
    manifest.build.update(_storage_loss(stored, layers))
    texts = [document.text for document in planned.corpus.documents]
    return Sheet(stored, indices, kept_origins(planned.corpus, indices), manifest, texts)


def resolve_defaults(
    scorer: str | Scorer | None, allocation: Allocation | None, mode: BuildMode = "sequential"
) -> tuple[str | Scorer, Allocation]:
    """Scorer and allocation where one or both were left open; published methods are as they were published."""
    if allocation is None:
        shared: Allocation = "adaptive" if mode == "independent" else "profiled"
        allocation = shared if scorer is None or scorer == DEFAULT_SCORER else "uniform"
    return DEFAULT_SCORER if scorer is None else scorer, allocation


def warn_without_task(task: Task, scorer: str | Scorer) -> None:
    """Log a warning if a scorer that looks at the task has none to look at."""
    if task == Task.of(None) and make_scorer(scorer)[1].guide not in ("nothing", "repeat"):
        logger.warning(
            "no task was given, so what questions that nobody described need is kept only as far as a repetition of "
            "the documents tells; say what will be asked, with task=, best with examples"
        )


@dataclass(frozen=True, slots=True)
class Budgets:
    """What a caller asks for: `rate` or `budget`, what to do with the guide, and how much to read at once."""

    rate: float | None = None
    budget: int | None = None
    guide: GuideMode = "auto"
    chunk_tokens: int | None = None
    allocation: Allocation = "uniform"
    correction: Correction = "none"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("guide", self.guide, GuideMode),
            ("allocation", self.allocation, Allocation),
            ("correction", self.correction, Correction),
        ):
            if value not in get_args(known):
                raise BudgetError(f"{name} is {value!r}; use {', '.join(get_args(known))}.")

    def stored_as(self, dtype: str | None) -> str | None:
        """The storage type that was asked for, or the default where nothing was said of the size either."""
        return DEFAULT_DTYPE if dtype is None and self.rate is None and self.budget is None else dtype

    def tokens(self, corpus_tokens: int) -> int:
        """The budget in tokens. Raises `BudgetError` if it does not fit the corpus."""
        rate, budget = self.rate, self.budget
        for name, value in (("budget", budget), ("chunk_tokens", self.chunk_tokens)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise BudgetError(f"{name} is {value!r}; pass a whole number of tokens.")
        if rate is not None and budget is not None:
            raise BudgetError(f"Both rate {rate:g} and budget {budget} were given; pass one of them.")
        if budget is None:
            rate = DEFAULT_RATE if rate is None else rate
            if not 1 <= rate < float("inf"):
                raise BudgetError(f"The rate is {rate:g}; pass at least 1 (16 means sixteen times shorter).")
            budget = int(corpus_tokens / rate)
        if not 0 < budget <= corpus_tokens:
            other = "a rate" if rate is None else "a lower rate"
            raise BudgetError(
                f"The budget is {budget} tokens but the corpus has {corpus_tokens}; pass a budget between 1 and "
                f"{corpus_tokens}, or {other}."
            )
        return budget

    def check_mode(self, mode: str) -> None:
        """Raise `BudgetError` for an unknown mode, or for what an independent sheet cannot have."""
        if mode not in get_args(BuildMode):
            raise BudgetError(f"mode is {mode!r}; use {', '.join(get_args(BuildMode))}.")
        if mode == "independent" and self.allocation == "profiled":
            raise BudgetError(
                "The heads of an independent sheet cannot share by the model's profile; use allocation='adaptive'."
            )
        if mode == "independent" and self.correction != "none":
            raise BudgetError(
                "An independent sheet cannot be corrected, as its documents are read apart, whatever stands beside "
                "them; use correction='none'."
            )

    @property
    def is_all(self) -> bool:
        """Whether everything is to be kept: the ceiling of the same prompt, so the guide costs no document a token."""
        return self.rate == 1 and self.budget is None

    def kept_guide(self, whole: Tensor, in_form: Tensor, budget: int, corpus_tokens: int) -> Tensor:
        """What stays in the sheet (T,): the guide with its examples, with their form instead, or nothing."""
        if self.guide != "auto":
            return {"resident": whole, "form": in_form, "dropped": whole[:0]}[self.guide]
        most = budget * _RESIDENT_SHARE if budget < corpus_tokens or self.is_all else 0
        return next((guide for guide in (whole, in_form) if len(guide) <= most), whole[:0])


def plan(
    backbone: Backbone,
    layout: ChatLayout,
    documents: Sequence[Document],
    task: Task,
    budgets: Budgets,
    *,
    scorer: str | Scorer,
    seed: int = 0,
) -> Plan:
    """Everything that can be refused is refused here, before any work starts."""
    if isinstance(seed, bool) or not isinstance(seed, int) or seed not in SEEDS:
        raise BudgetError(f"seed is {seed!r}; pass a whole number from -2^63 to 2^64 - 1.")
    name, chosen = make_scorer(scorer)
    if budgets.correction != "none" and chosen.guide in ("nothing", "repeat"):
        raise BudgetError(f"The scorer {name!r} reads no task by which to correct; use another, or correction='none'.")
    head, guide = layout.head(task.instruction), layout.guide(task)
    corpus = TokenizedCorpus.build(documents, head, layout.encoder)
    budget = budgets.tokens(len(corpus))
    encode = layout.encoder.after
    scored, opening = encode(guide.scored), encode(guide.resident, continues=True)
    form = task.form
    in_form = encode(layout.guide(task.shown(form)).resident, continues=True) if form else opening
    repeat = encode(layout.repeat(task, "guide" if chosen.guide == "task and repeat" else "documents"))
    if chosen.guide == "task and repeat":
        scored = opening  # the conversation goes on
    resident = budgets.kept_guide(opening, in_form, budget, len(corpus))
    form = form if resident is in_form else ""
    shown = task.shown(form)
    layout.verify(head, corpus.text, layout.guide(shown).resident if len(resident) else "", shown)
    if budgets.is_all:
        budget += len(resident)
    keep = budget - len(resident)
    fixed = corpus.head_tokens if budgets.allocation == "uniform" else _pinned(chosen, "adaptive", corpus.head_tokens)
    if keep <= fixed and keep < len(corpus):
        raise _too_small(budget, fixed, len(resident), len(corpus))
    after_chunk = {
        "task": len(scored),
        "repeat": len(repeat),
        "task and repeat": len(scored) + len(repeat),
        "nothing": 0,
    }[chosen.guide]
    if keep >= len(corpus):
        _check_whole(backbone, keep, len(resident))
        chunk = _chunk_tokens(backbone, len(corpus), 0, 0, budgets.chunk_tokens, "nothing")
    else:
        chunk = _chunk_tokens(backbone, len(corpus), keep, after_chunk, budgets.chunk_tokens, chosen.guide)
    reading = Reading(
        scorer=chosen,
        guide=scored,
        repeat=repeat,
        budget=keep,
        chunk_tokens=chunk,
        head=corpus.head_tokens,
        pinned=_pinned(chosen, budgets.allocation, corpus.head_tokens),
        allocation=budgets.allocation,
        spread=len(corpus) <= keep * _SPREAD_TO,
        weigh=cache(partial(_weights, backbone, layout, keep / len(corpus))),
        correction=budgets.correction,
        most=_most_tokens(backbone, keep, len(resident), after_chunk + chunk * _times_read(chosen.guide)),
        seed=seed,
    )
    return Plan(layout, task, corpus, head, budget, resident, name, reading, form=form)


def _too_small(budget: int, fixed: int, guide_tokens: int, corpus_tokens: int) -> BudgetError:
    """A budget that holds not even what every sheet has, with the ways out that there are."""
    least = fixed + 1 + guide_tokens
    ways = [f"a budget of at least {least}", "a lower rate"] if least <= corpus_tokens else ["rate=1, which keeps all"]
    ways += ["a shorter task", "guide='dropped'"] if guide_tokens else []
    guide = f" and the resident guide {guide_tokens}" if guide_tokens else ""
    *first, last = ways
    listed = f"{', '.join(first)}{',' * (len(first) > 1)} or {last}" if first else last
    return BudgetError(f"The budget is {budget} tokens, but the template's head takes {fixed}{guide}; pass {listed}.")


def _weights(backbone: Backbone, layout: ChatLayout, share: float) -> list[float]:
    """What each head keeps of a budget that is a share of the corpus, by the model's profile; alike if it has none."""
    profile = profile_of(backbone, layout)
    return [1.0] * len(backbone.full) * backbone.kv_heads if profile is None else profile.weights(share)


def _pinned(scorer: Scorer, allocation: Allocation, head_tokens: int) -> int:
    """How many tokens of the template's head stay in every head of the model, whatever their scores.

    The first one is where attention rests. Where heads share a budget, each further one costs all of them a token.
    """
    if not scorer.pins_head:
        return 0
    return head_tokens if allocation == "uniform" else min(1, head_tokens)


def assemble(backbone: Backbone, kept: Sequence[Kept], resident: Tensor) -> tuple[list[LayerPrefix], Tensor]:
    """The final prefix, with the resident guide (T,) read on top.

    Also the indices (F, K, P + T) of what the F layers keep that see everything, as in `Sheet`.
    """
    layers = as_prefix(backbone, kept)
    size = kept_tokens(backbone, kept)
    full = [kept[number].indices for number in backbone.full]
    indices = torch.stack([F.pad(layer, (size - layer.shape[1], 0), value=ABSENT) for layer in full]).cpu()
    if len(resident):
        read = backbone.read(layers, kept_tokens(backbone, kept), resident, resident[:0])
        layers = [old.followed_by(new.chunk_keys, new.chunk_values) for old, new in zip(layers, read, strict=True)]
        indices = torch.cat([indices, indices.new_full((*indices.shape[:2], len(resident)), -1)], 2)
    return layers, indices.to(torch.int32)


def _check_whole(backbone: Backbone, corpus_tokens: int, guide_tokens: int) -> None:
    """Raise `BudgetError` unless a corpus that is kept as it is leaves room for a question in the window."""
    if corpus_tokens + guide_tokens >= backbone.window:
        guide = f" and the guide {guide_tokens}" if guide_tokens else ""
        raise BudgetError(
            f"Nothing would be condensed, but the corpus takes {corpus_tokens} tokens{guide} of the model's window of "
            f"{backbone.window}, which leaves no room for a question; pass a higher rate or fewer documents."
        )


def _chunk_tokens(
    backbone: Backbone, corpus_tokens: int, keep: int, guide_tokens: int, wanted: int | None, guide: Guide
) -> int:
    """How many tokens to read at once, so that kept tokens, chunk and guide fit the window."""
    room = (backbone.window - keep - guide_tokens) // _times_read(guide)
    beside = (
        f"The budget of {keep} tokens leaves"
        if not guide_tokens
        else (f"The budget of {keep} and the guide of {guide_tokens} tokens leave")
    )
    if room < 1:
        raise BudgetError(
            f"{beside} no room for a chunk in the model's window of {backbone.window}; lower the budget, which a "
            f"higher rate does{' too, or shorten the task' if guide_tokens else ''}."
        )
    if wanted is None:
        return min(usual_chunk(backbone), room, corpus_tokens)
    chunk = corpus_tokens if wanted == 0 else min(wanted, corpus_tokens)
    if not 0 < chunk <= room:
        raise BudgetError(
            f"A chunk of {chunk} tokens does not fit: the model's window is {backbone.window}. {beside} {room} for a "
            f"chunk, as it is read{' twice' if _times_read(guide) > 1 else ''}; pass chunk_tokens between 1 and {room}."
        )
    return chunk


def _most_tokens(backbone: Backbone, keep: int, resident: int, read: int) -> int:
    """The most tokens that one head may keep: besides them a chunk is `read`, and later questions want some room."""
    return max(keep, min(backbone.window - read, int(backbone.window * (1 - QUESTION_SHARE)) - resident))


def _times_read(guide: Guide) -> int:
    """How often a chunk stands in what is read at once."""
    return 2 if guide.endswith("repeat") else 1


def usual_chunk(backbone: Backbone) -> int:
    """How many tokens are read at once where they fit."""
    return _CHUNK_CPU if backbone.device.type == "cpu" else _CHUNK_ACCELERATOR


def storage_dtype(dtype: str | None, backbone: Backbone) -> StorageDtype:
    """The type that a sheet is stored in, the model's own if none is named. Raises `BudgetError` for others."""
    wanted = dtype or str(backbone.dtype).removeprefix("torch.")
    for known in get_args(StorageDtype):
        if wanted == known:
            return known  # type: ignore[no-any-return]
    raise BudgetError(f"There is no storage dtype {wanted!r}; use {', '.join(get_args(StorageDtype))}.")


def _storage_loss(stored: Sequence[StoredLayer], layers: Sequence[LayerPrefix]) -> dict[str, float]:
    """Relative L2 error of all keys and values by the storage type, the worst layer counting."""
    losses = [mine.loss(layer) for mine, layer in zip(stored, layers, strict=True)]
    return {"key_loss": round(max(k for k, _ in losses), 6), "value_loss": round(max(v for _, v in losses), 6)}


def circumstances(backbone: Backbone, seconds: float) -> dict[str, Any]:
    """How a sheet came about, for people."""
    return {
        "seconds": round(seconds, 3),
        "device": str(backbone.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "window": backbone.window,
    }


def kept_origins(corpus: TokenizedCorpus, indices: Tensor) -> Tensor:
    """`Sheet.origins` for these kept indices: rows (U, 4) of index, document, first and last-plus-one character."""
    used = torch.unique(indices)
    used = used[used >= 0].long()
    return torch.cat([used[:, None].to(torch.int32), corpus.origins[used]], 1)


def list_documents(corpus: TokenizedCorpus) -> list[DocumentEntry]:
    """The documents as a manifest lists them."""
    inside = corpus.origins[:, 0]
    tokens = torch.bincount(inside[inside >= 0].long(), minlength=len(corpus.documents)).tolist()
    return [
        DocumentEntry(
            id=document.id,
            characters=len(document.text),
            tokens=count,
            metadata=_jsonable(document.metadata),
            digest=_digest(document),
        )
        for document, count in zip(corpus.documents, tokens, strict=True)
    ]


def _jsonable(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as JSON can hold it; whatever else a framework puts there is kept as its text."""
    return {str(key): _plain(value) for key, value in metadata.items()}


def _plain(value: Any, depth: int = 0) -> Any:
    if value is None or isinstance(value, (str, int, float)):
        return value
    if depth < METADATA_DEPTH and isinstance(value, Mapping):
        return {str(key): _plain(inner, depth + 1) for key, inner in value.items()}
    if depth < METADATA_DEPTH and isinstance(value, (list, tuple)):
        return [_plain(inner, depth + 1) for inner in value]
    return str(value)


def corpus_digest(documents: Sequence[DocumentEntry]) -> str:
    """What tells two corpora apart: a digest of the digests of all documents."""
    return hashlib.sha256("".join(entry.digest for entry in documents).encode()).hexdigest()[:16]


def _digest(document: Document) -> str:
    digest = hashlib.sha256()
    for part in (document.id, document.text):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()[:16]
