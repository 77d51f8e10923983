"""From documents and a task to a sheet: plan, condense, assemble."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import torch
import transformers
from torch import Tensor

from cribsheet import __version__
from cribsheet.backbone import Backbone
from cribsheet.chunks import TokenizedCorpus
from cribsheet.compress import Kept, Progress, compress
from cribsheet.documents import Document
from cribsheet.errors import BudgetError
from cribsheet.fingerprint import fingerprint
from cribsheet.prefix import LayerPrefix
from cribsheet.scoring import Scorer, make_scorer
from cribsheet.sheet import DocumentEntry, Manifest, Sheet
from cribsheet.task import Task
from cribsheet.template import ChatLayout

logger = logging.getLogger(__name__)

GuideMode = Literal["auto", "resident", "dropped"]

DEFAULT_RATE = 8.0
DEFAULT_SCORER = "task-peak"
_REPEAT = "Repeat the documents."
_RESIDENT_SHARE = 0.25  # a guide that takes more of the budget than this is dropped in "auto"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Plan:
    """A build before it starts: every count is in tokens.

    `budget` includes `guide_tokens` when the guide is resident; `keep` is what is left for the corpus.
    """

    corpus: TokenizedCorpus
    head: str
    scored: Tensor
    resident: Tensor
    repeat: Tensor
    budget: int
    keep: int
    chunk_tokens: int
    scorer_name: str
    scorer: Scorer

    @property
    def guide_tokens(self) -> int:
        """Tokens of the guide that stay in the sheet."""
        return len(self.resident)

    @property
    def rate(self) -> float:
        """How many times shorter the sheet will be."""
        return len(self.corpus) / self.budget


def build_sheet(
    backbone: Backbone,
    documents: Sequence[Document],
    task: Task,
    *,
    rate: float | None = None,
    budget: int | None = None,
    scorer: str | Scorer = DEFAULT_SCORER,
    guide: GuideMode = "auto",
    chunk_tokens: int | None = None,
    system: str = "",
    template_options: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Sheet:
    """Condense `documents` for `task` into a sheet of `budget` tokens per layer and head, or `rate` times shorter.

    `chunk_tokens` is how much is read at once, 0 for everything (the single-pass form); by default it is chosen from
    the device. `guide="resident"` keeps task and examples in the sheet, on top of the kept tokens and within the
    budget; `"dropped"` uses them for scoring only, as published; `"auto"` keeps them if they take at most a quarter
    of the budget. `dtype` is the storage type, the model's own by default. `progress(read, total)` is called after each chunk.

    Raises `BudgetError`, `TemplateError` or `DocumentError` before any work starts.
    """
    layout = ChatLayout(backbone.tokenizer, system=system, options=template_options)
    planned = plan(
        backbone, layout, documents, task, rate=rate, budget=budget, scorer=scorer, guide=guide, chunk_tokens=chunk_tokens
    )
    storage = _storage_dtype(dtype, backbone)
    torch.manual_seed(seed)
    began = time.perf_counter()
    kept: list[Kept] = []
    for _, kept in compress(
        backbone,
        planned.corpus,
        planned.scored,
        planned.repeat,
        scorer=planned.scorer,
        budget=planned.keep,
        chunk_tokens=planned.chunk_tokens,
        progress=progress,
    ):
        pass
    layers, indices = assemble(backbone, kept, planned.resident, storage)
    seconds = time.perf_counter() - began
    corpus = planned.corpus
    manifest = Manifest(
        cribsheet=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        fingerprint=fingerprint(backbone, layout),
        system=layout.system,
        template_options=layout.options,
        head=planned.head,
        task=task.to_dict(),
        guide="resident" if planned.guide_tokens else "dropped",
        guide_tokens=planned.guide_tokens,
        corpus_digest=_corpus_digest(corpus.documents),
        corpus_tokens=len(corpus),
        head_tokens=corpus.head_tokens,
        documents=_entries(corpus),
        scorer=planned.scorer_name,
        seed=seed,
        budget=planned.budget,
        chunk_tokens=planned.chunk_tokens,
        dtype=str(storage).removeprefix("torch."),
        build={
            "seconds": round(seconds, 3),
            "device": str(backbone.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )
    texts = [document.text for document in corpus.documents]
    return Sheet(layers, indices, _origins(corpus, indices), manifest, texts)


def plan(
    backbone: Backbone,
    layout: ChatLayout,
    documents: Sequence[Document],
    task: Task,
    *,
    rate: float | None,
    budget: int | None,
    scorer: str | Scorer,
    guide: GuideMode,
    chunk_tokens: int | None,
) -> Plan:
    """Everything that can be refused is refused here."""
    if guide not in ("auto", "resident", "dropped"):
        raise BudgetError(f"guide is {guide!r}; use auto, resident or dropped.")
    name, chosen = make_scorer(scorer)
    encoder = layout.encoder
    head = layout.head(task.instruction)
    corpus = TokenizedCorpus.build(documents, head, encoder)
    guide_text = layout.guide(task)
    layout.verify(head, corpus.text, "", task)
    total = _budget(len(corpus), rate, budget)
    scored, resident = encoder.after(guide_text.scored), encoder.after(guide_text.resident)
    if guide == "dropped" or (guide == "auto" and not _fits_resident(len(resident), total, len(corpus))):
        resident = resident[:0]
    else:
        layout.verify(head, corpus.text, guide_text.resident, task)
    keep = total - len(resident)
    least = corpus.head_tokens + 1
    if keep < least:
        raise BudgetError(
            f"The budget is {total} tokens, but the template's head takes {corpus.head_tokens} and the resident guide "
            f"{len(resident)}; pass a budget of at least {least + len(resident)}, a lower rate, a shorter task, or "
            "guide='dropped'."
        )
    repeat = encoder.after(_REPEAT)
    after_chunk = {"task": len(scored), "repeat": len(repeat), "nothing": 0}[chosen.guide]
    chunk = _chunk_tokens(backbone, corpus, keep, after_chunk, chunk_tokens, doubled=chosen.guide == "repeat")
    return Plan(corpus, head, scored, resident, repeat, total, keep, chunk, name, chosen)


def assemble(
    backbone: Backbone, kept: Sequence[Kept], resident: Tensor, dtype: torch.dtype
) -> tuple[list[LayerPrefix], Tensor]:
    """Final keys and values on the CPU in `dtype`, with the resident guide (T,) read on top; indices (L, K, P + T)."""
    size = kept[0].keys.shape[1]
    positions = torch.arange(size, device=backbone.device)
    layers = [LayerPrefix(layer.at(positions, backbone.inv_freq), layer.values) for layer in kept]
    indices = torch.stack([layer.indices for layer in kept]).cpu()
    if len(resident):
        read = backbone.read(layers, size, resident, resident[:0])
        layers = [
            LayerPrefix(torch.cat([old.keys, new.chunk_keys], 1), torch.cat([old.values, new.chunk_values], 1))
            for old, new in zip(layers, read, strict=True)
        ]
        indices = torch.cat([indices, indices.new_full((*indices.shape[:2], len(resident)), -1)], 2)
    stored = [LayerPrefix(layer.keys.to("cpu", dtype), layer.values.to("cpu", dtype)) for layer in layers]
    return stored, indices.to(torch.int32)


def _budget(corpus_tokens: int, rate: float | None, budget: int | None) -> int:
    if rate is not None and budget is not None:
        raise BudgetError(f"Both rate {rate:g} and budget {budget} were given; pass one of them.")
    if budget is None:
        rate = DEFAULT_RATE if rate is None else rate
        if not 1 <= rate < float("inf"):
            raise BudgetError(f"The rate is {rate:g}; 16 means sixteen times shorter, so pass a number of at least 1.")
        budget = int(corpus_tokens / rate)
    if not 0 < budget <= corpus_tokens:
        raise BudgetError(
            f"The budget is {budget} tokens but the corpus has {corpus_tokens}; pass a budget between 1 and "
            f"{corpus_tokens}, or a rate."
        )
    return budget


def _fits_resident(guide_tokens: int, budget: int, corpus_tokens: int) -> bool:
    return guide_tokens <= budget * _RESIDENT_SHARE and budget < corpus_tokens


def _chunk_tokens(
    backbone: Backbone, corpus: TokenizedCorpus, keep: int, guide_tokens: int, wanted: int | None, *, doubled: bool
) -> int:
    """How many tokens to read at once, so that kept tokens, chunk and guide fit the window."""
    room = (backbone.window - keep - guide_tokens) // (2 if doubled else 1)
    if room < 1:
        raise BudgetError(
            f"The budget of {keep} and the guide of {guide_tokens} tokens leave no room for a chunk in the model's "
            f"window of {backbone.window}; lower the budget or shorten the task."
        )
    if wanted is None:
        return min(2048 if backbone.device.type == "cpu" else 8192, room, len(corpus))
    chunk = len(corpus) if wanted == 0 else wanted
    if not 0 < chunk <= max(room, 0):
        raise BudgetError(
            f"A chunk of {chunk} tokens does not fit: the model's window is {backbone.window}, of which the budget takes {keep} "
            f"and the guide {guide_tokens}; pass chunk_tokens between 1 and {room}."
        )
    return min(chunk, len(corpus))


def _storage_dtype(dtype: str | None, backbone: Backbone) -> torch.dtype:
    if dtype is None:
        return backbone.dtype
    if dtype not in _DTYPES:
        raise BudgetError(f"There is no storage dtype {dtype!r}; use {', '.join(_DTYPES)}.")
    return _DTYPES[dtype]


def _origins(corpus: TokenizedCorpus, indices: Tensor) -> Tensor:
    used = indices.unique()
    used = used[used >= 0].long()
    return torch.cat([used[:, None].to(torch.int32), corpus.origins[used]], 1)


def _entries(corpus: TokenizedCorpus) -> list[DocumentEntry]:
    inside = corpus.origins[:, 0]
    tokens = torch.bincount(inside[inside >= 0].long(), minlength=len(corpus.documents)).tolist()
    return [
        DocumentEntry(id=document.id, characters=len(document.text), tokens=count, metadata=_jsonable(document.metadata))
        for document, count in zip(corpus.documents, tokens, strict=True)
    ]


def _jsonable(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as JSON can hold it; whatever else a framework puts there is kept as its text."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(metadata), default=str))
    return plain


def _corpus_digest(documents: Sequence[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.id, document.text):
            encoded = part.encode()
            digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()[:16]
