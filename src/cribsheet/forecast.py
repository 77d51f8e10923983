"""What a build will take, before it starts: its sizes by arithmetic, its time from reading a first piece here.

The piece is read as the build would read it, scorer and notes included. Later chunks cost more, because they stand on
more kept tokens; how much more is counted in operations of matrix products and attention, so the figure is an estimate.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cribsheet.backbone import Backbone
from cribsheet.build import Budgets, GuideMode, Plan, plan, resolve_defaults, storage_dtype, warn_without_task
from cribsheet.chunks import Chunk, TokenizedCorpus
from cribsheet.compress import Reading, compress, earned_budget, nothing_read
from cribsheet.documents import Document
from cribsheet.packing import packed_bytes
from cribsheet.scoring import Scorer
from cribsheet.selection import Allocation
from cribsheet.stored import StorageDtype
from cribsheet.task import Task
from cribsheet.template import ChatLayout

PROBE_TOKENS = 1024  # the longest piece that is read to time it
_SCORES = 1 << 26  # bytes of attention logits that scoring holds at once, at most; three copies of them
_STORED = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Forecast:
    """Sizes in tokens and bytes, and seconds; `peak_bytes` counts tensors, not Python and its libraries."""

    documents: int
    corpus_tokens: int
    tokens: int
    rate: float
    chunks: int
    chunk_tokens: int
    sheet_bytes: int
    peak_bytes: int
    seconds: float
    probe_tokens: int
    probe_seconds: float


def forecast(
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
    allocation: Allocation | None = None,
) -> Forecast:
    """What `build_sheet` with the same options would take; raises and warns of what it would."""
    layout = ChatLayout(backbone.tokenizer, system=system, options=template_options)
    scorer, allocation = resolve_defaults(scorer, allocation)
    warn_without_task(task, scorer)
    budgets = Budgets(rate, budget, guide, chunk_tokens, allocation)
    dtype = budgets.stored_as(dtype)
    planned = plan(backbone, layout, documents, task, budgets, scorer=scorer, seed=seed)
    corpus, reading = planned.corpus, planned.reading
    took, piece = _probe(backbone, corpus, reading)
    return Forecast(
        documents=len(corpus.documents),
        corpus_tokens=len(corpus),
        tokens=planned.budget,
        rate=planned.rate,
        chunks=-(-len(corpus) // reading.chunk_tokens),
        chunk_tokens=reading.chunk_tokens,
        sheet_bytes=_sheet_bytes(backbone, planned, storage_dtype(dtype, backbone)),
        peak_bytes=_peak_bytes(backbone, planned),
        seconds=took * _work(backbone, corpus, reading) / _work(backbone, piece, reading),
        probe_tokens=len(piece),
        probe_seconds=took,
    )


def _probe(backbone: Backbone, corpus: TokenizedCorpus, reading: Reading) -> tuple[float, TokenizedCorpus]:
    """Seconds that the first piece of a corpus takes, and the piece."""
    size = min(len(corpus), reading.chunk_tokens, PROBE_TOKENS)
    piece = dataclasses.replace(corpus, ids=corpus.ids[:size], origins=corpus.origins[:size])
    budget = max(1, earned_budget(reading.budget, size, len(corpus), reading.pinned))
    how = dataclasses.replace(reading, budget=budget, chunk_tokens=size)
    backbone.read(nothing_read(backbone), 0, piece.ids[:64], piece.ids[:0])  # whatever is made at a first use
    reading.weigh()  # the model's profile is measured once, whatever is built
    _wait(backbone)
    began = time.perf_counter()
    for _ in compress(backbone, piece, how):
        _wait(backbone)
    return time.perf_counter() - began, piece


def _wait(backbone: Backbone) -> None:
    if backbone.device.type == "cuda":
        torch.cuda.synchronize(backbone.device)


def _work(backbone: Backbone, corpus: TokenizedCorpus, reading: Reading) -> float:
    """Operations of reading a corpus: of matrix products, and of attention to what is kept, chunk and guide."""
    body = sum(weight.numel() for name, weight in backbone.model.named_parameters() if "embed" not in name)
    pair = 4 * backbone.num_heads * backbone.head_size * backbone.num_layers
    total = 0.0
    for chunk in corpus.split(reading.chunk_tokens):
        rows = _rows(reading, chunk)
        kept = chunk.start * reading.budget / max(1, len(corpus))
        total += rows * (2 * body + pair * (kept + rows / 2))
    return total


def _rows(reading: Reading, chunk: Chunk) -> int:
    """Tokens that are read for a chunk, the guide included."""
    again = len(chunk.ids) if reading.scorer.guide.endswith("repeat") else 0
    return len(chunk.ids) + again + len(reading.guide)


def _vectors(backbone: Backbone, tokens: int) -> int:
    """Keys, or values, of a prefix of so many tokens: vectors in all layers and heads."""
    held = [tokens if window is None else min(tokens, window - 1) for window in backbone.windows]
    return sum(held) * backbone.kv_heads


def kept_bytes(backbone: Backbone, tokens: int, dtype: StorageDtype) -> int:
    """Bytes of the keys and values of a prefix of so many tokens; of int4 nearly, as heads differ in length."""
    size, held = backbone.head_size, _vectors(backbone, tokens)
    if dtype == "int4":
        return packed_bytes(held, backbone.num_layers * backbone.kv_heads, size)
    return 2 * held * (size + 4 if dtype == "int8" else size * _STORED[dtype])


def _sheet_bytes(backbone: Backbone, planned: Plan, dtype: StorageDtype) -> int:
    """Bytes of the file: keys, values, their indices and origins, and the documents' texts."""
    tensors = kept_bytes(backbone, planned.budget, dtype)
    indices = 4 * len(backbone.full) * backbone.kv_heads * planned.budget
    texts = sum(len(document.text.encode()) for document in planned.corpus.documents)
    return tensors + indices + 16 * len(planned.corpus) + texts


def _peak_bytes(backbone: Backbone, planned: Plan) -> int:
    """Bytes of tensors at once: the weights, what is kept (twice while it is chosen), a chunk, and what reads it."""
    reading, config = planned.reading, backbone.config
    size, head = backbone.model.dtype.itemsize, backbone.head_size
    weights = sum(weight.nbytes for weight in backbone.model.parameters())
    chunk = min(len(planned.corpus), reading.chunk_tokens)
    rows = _rows(reading, Chunk(planned.corpus.ids[:chunk], 0, chunk))
    kept = _vectors(backbone, reading.budget) * (2 * head * (4 + size) + 2 * head * size)
    cached = 2 * _vectors(backbone, rows) * head * size
    ranked = len(backbone.full) * backbone.kv_heads * (reading.budget + chunk) * 20
    wide: int = getattr(config, "intermediate_size", 4 * config.hidden_size)
    passing = rows * size * (3 * wide + 6 * config.hidden_size)
    logits = min(_SCORES, 4 * backbone.num_heads * max(1, rows - chunk) * (reading.budget + chunk))
    most: int = weights + kept + cached + max(ranked + 3 * logits, passing)
    return most
