"""What a build will take, before it starts: its sizes by arithmetic, its time from reading a first piece here.

The piece is read as the build would read it, scorer included. Later chunks cost more, because they stand on
more kept tokens; how much more is counted in operations of matrix products and attention, so the figure is an estimate.
A correction is timed apart: its cost grows with what the heads keep and not with what is read.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from cribsheet.compress.archiving import AT_ONCE
from cribsheet.compress.correction import rows_of
from cribsheet.compress.kept import State
from cribsheet.compress.loop import Reading, compress, earned_budget, nothing_kept, nothing_read
from cribsheet.corpus.documents import Document
from cribsheet.corpus.task import Task
from cribsheet.errors import BudgetError
from cribsheet.living.archives import runs_of
from cribsheet.living.independent import kept_of, plan_each
from cribsheet.model.backbone import Backbone
from cribsheet.plan.assemble import archive_layout, archive_runs
from cribsheet.plan.options import BuildKeywords, BuildOptions
from cribsheet.plan.plan import Plan, plan, warn_without_task
from cribsheet.prompt.chunks import Chunk, TokenizedCorpus
from cribsheet.sheet.archive.layout import Layout
from cribsheet.sheet.int4 import packed_bytes
from cribsheet.vocabulary import ABSENT, StorageDtype

PROBE_TOKENS = 1024  # the longest piece that is read to time it
_SCORES = 1 << 26  # bytes of attention logits that scoring holds at once, at most; three copies of them
_STORED = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Forecast:
    """Sizes in tokens and bytes, and seconds; `peak_bytes` counts tensors, not Python and its libraries.

    `archive_bytes` are 0 where there is to be none.
    """

    documents: int
    corpus_tokens: int
    tokens: int
    rate: float
    chunks: int
    chunk_tokens: int
    sheet_bytes: int
    archive_bytes: int
    peak_bytes: int
    seconds: float
    probe_tokens: int
    probe_seconds: float


@dataclass(frozen=True, slots=True)
class _Part:
    """A corpus that is read alone, and how: all documents of a sequential sheet, or one of an independent sheet."""

    corpus: TokenizedCorpus
    reading: Reading

    @classmethod
    def of(cls, planned: Plan) -> _Part:
        """Of a plan, without scores where everything is kept."""
        return cls(planned.corpus, planned.reading.on(planned.corpus))

    @property
    def chunks(self) -> int:
        """How many there are."""
        return -(-len(self.corpus) // self.reading.chunk_tokens)


def forecast(
    backbone: Backbone,
    documents: Sequence[Document],
    task: Task,
    *,
    texts: bool = True,
    **options: Unpack[BuildKeywords],
) -> Forecast:
    """What `build_sheet` with the same options would take; raises and warns of what it would.

    `texts` says whether the documents' texts will be in the file. Raises `BudgetError` for `retain` and `check`: how
    many questions they ask shows while they do.
    """
    how = BuildOptions.of(options)
    if how.retain is not None or how.check:
        raise BudgetError("A forecast knows what a build without questions takes; leave retain and check out.")
    layout = how.layout(backbone)
    warn_without_task(task, how)
    if how.mode == "independent":
        terms, plans = plan_each(backbone, layout, documents, task, how)
        tokens, preamble_tokens = kept_of(terms, plans), len(terms.preamble)
        segments = len(plans) + bool(len(terms.preamble)) + bool(len(terms.guide))
    else:
        plans = [plan(backbone, layout, documents, task, how)]
        tokens, preamble_tokens, segments = plans[0].budget, 0, 1
    parts = [_Part.of(each) for each in plans]
    archive = None
    if how.archive_dtype is not None:
        runs = runs_of(plans, preamble_tokens) if how.mode == "independent" else archive_runs(plans[0])
        archive = archive_layout(backbone, how.archive_dtype, runs)
    kept = kept_bytes(backbone, tokens, plans[0].dtype, segments)
    corpus_tokens = preamble_tokens + sum(len(each.corpus) - preamble_tokens for each in parts)
    longest = max(parts, key=lambda part: len(part.corpus))
    piece, took, seconds, lengths = _timed(backbone, longest, parts)
    return Forecast(
        documents=len(documents),
        corpus_tokens=corpus_tokens,
        tokens=tokens,
        rate=corpus_tokens / tokens,
        chunks=sum(part.chunks for part in parts),
        chunk_tokens=max(part.reading.chunk_tokens for part in parts),
        sheet_bytes=_sheet_bytes(backbone, tokens, corpus_tokens, kept, documents if texts else ()),
        archive_bytes=archive.nbytes if archive else 0,
        peak_bytes=_peak_bytes(backbone, longest, tokens, lengths) + _held_bytes(archive),
        seconds=seconds,
        probe_tokens=piece,
        probe_seconds=took,
    )


def _timed(backbone: Backbone, longest: _Part, parts: Sequence[_Part]) -> tuple[int, float, float, Tensor]:
    """Tokens of the first piece, seconds that it and all parts take, and what heads keep (F·K,), the mean being 1."""
    corpus, reading = longest.corpus, longest.reading
    size = min(len(corpus), reading.chunk_tokens, PROBE_TOKENS)
    piece = dataclasses.replace(corpus, ids=corpus.ids[:size], origins=corpus.origins[:size])
    budget = max(1, earned_budget(reading.budget, size, len(corpus), reading.pinned))
    how = dataclasses.replace(reading, budget=budget, chunk_tokens=size)
    backbone.read(nothing_read(backbone), 0, piece.ids[:64], piece.ids[:0])  # whatever is made at a first use
    if reading.allocation == "profiled":
        reading.weigh()  # the model's profile is measured once, whatever is built
    first = _Part(piece, how)
    took, state = _read(backbone, _Part(piece, dataclasses.replace(how, correction="none")))
    counts = torch.cat([(state.kept[n].indices != ABSENT).sum(-1) for n in backbone.full]).cpu().double()
    lengths = counts / counts.mean()
    seconds = took * sum(_work(backbone, part) for part in parts) / _work(backbone, first)
    if reading.correction != "none":
        fitted = max(0.0, _read(backbone, first)[0] - took)
        took += fitted
        seconds += fitted * _fit_work(backbone, longest, lengths) / _fit_work(backbone, first, lengths)
    return size, took, seconds, lengths


def _read(backbone: Backbone, part: _Part) -> tuple[float, State]:
    """Seconds that a part takes, and what is kept of it."""
    state = State(0, nothing_kept(backbone))
    backbone.wait()
    began = time.perf_counter()
    for each in compress(backbone, part.corpus, part.reading):
        state = each
        backbone.wait()
    return time.perf_counter() - began, state


def _work(backbone: Backbone, part: _Part) -> float:
    """Operations of reading a corpus: of matrix products, and of attention to what is kept, chunk and guide."""
    corpus, reading = part.corpus, part.reading
    body = sum(weight.numel() for name, weight in backbone.model.named_parameters() if "embed" not in name)
    pair = 4 * backbone.num_heads * backbone.head_size * backbone.num_layers
    total = 0.0
    for chunk in corpus.split(reading.chunk_tokens):
        rows = _rows(reading, chunk)
        kept = chunk.start * reading.budget / max(1, len(corpus))
        total += rows * (2 * body + pair * (kept + rows / 2))
    return total


def _fit_work(backbone: Backbone, part: _Part, lengths: Tensor) -> float:
    """Operations of correcting what is kept after each chunk: of systems as large as what each head keeps."""
    corpus, reading = part.corpus, part.reading
    total = 0.0
    for chunk in corpus.split(reading.chunk_tokens):
        rows = _fitted_rows(backbone, reading, chunk)
        budget = earned_budget(reading.budget, chunk.stop, len(corpus), reading.pinned)
        kept = (lengths * budget).clamp(max=min(chunk.stop, max(budget, reading.most)))
        total += float((2 * rows * kept**2 + kept**3 / 3 + 6 * rows * kept * backbone.head_size).sum())
    return total


def _fitted_rows(backbone: Backbone, reading: Reading, chunk: Chunk) -> int:
    """Rows of the guide, of all queries of a key/value head, by which a correction fits what that head keeps."""
    guide = _rows(reading, chunk) - len(chunk.ids)
    return rows_of(guide, reading.repeated(chunk)) * backbone.num_heads // backbone.kv_heads


def _rows(reading: Reading, chunk: Chunk) -> int:
    """Tokens that are read for a chunk, the guide included."""
    return len(chunk.ids) + reading.repeated(chunk) + len(reading.guide) + len(reading.repeat)


def _vectors(backbone: Backbone, tokens: int) -> int:
    """Keys, or values, of a prefix of so many tokens: vectors in all layers and heads."""
    held = [tokens if window is None else min(tokens, window - 1) for window in backbone.windows]
    return sum(held) * backbone.kv_heads


def kept_bytes(backbone: Backbone, tokens: int, dtype: StorageDtype, segments: int = 1) -> int:
    """Bytes of the keys and values of a prefix of so many tokens; of int4 nearly, as heads differ in length.

    Blocks of int4 end where one of the `segments` of an independent sheet does.
    """
    size, held = backbone.head_size, _vectors(backbone, tokens)
    if dtype == "int4":
        return packed_bytes(held, segments * backbone.num_layers * backbone.kv_heads, size)
    return 2 * held * (size + 4 if dtype == "int8" else size * _STORED[dtype])


def _sheet_bytes(backbone: Backbone, tokens: int, corpus_tokens: int, kept: int, documents: Sequence[Document]) -> int:
    """Bytes of the file: what is `kept`, its indices and origins, and the texts of these documents."""
    indices = 4 * len(backbone.full) * backbone.kv_heads * tokens
    return kept + indices + 16 * corpus_tokens + sum(len(document.text.encode()) for document in documents)


def _held_bytes(archive: Layout | None) -> int:
    """Bytes of an archive that are in memory while it is written: of a few blocks, three times, and all origins."""
    if archive is None:
        return 0
    rows = min(AT_ONCE, archive.tokens) * sum(row.nbytes for row in archive.rows.values())
    return 3 * rows + archive.tensors["origins"].nbytes


def _peak_bytes(backbone: Backbone, part: _Part, tokens: int, lengths: Tensor) -> int:
    """Bytes of tensors at once: the weights, what is kept (twice while it is chosen), a chunk, and what reads it.

    `tokens` are those of the whole sheet, of which a part may be one document.
    """
    reading, config = part.reading, backbone.config
    size, head = backbone.model.dtype.itemsize, backbone.head_size
    chunk = min(len(part.corpus), reading.chunk_tokens)
    piece = Chunk(part.corpus.ids[:chunk], 0, chunk)
    rows = _rows(reading, piece)
    kept = _vectors(backbone, reading.budget) * (2 * head * (4 + size) + 2 * head * size)
    beside = 2 * _vectors(backbone, max(0, tokens - reading.budget)) * head * size
    cached = 2 * _vectors(backbone, rows) * head * size
    ranked = len(backbone.full) * backbone.kv_heads * (reading.budget + chunk) * 20
    wide: int = getattr(config, "intermediate_size", 4 * config.hidden_size)
    passing = rows * size * (3 * wide + 6 * config.hidden_size)
    logits = min(_SCORES, 4 * backbone.num_heads * max(1, rows - chunk) * (reading.budget + chunk))
    fitting = 0
    if reading.correction != "none":
        longest = int(min(float(lengths.max()) * reading.budget, max(reading.budget, reading.most)))
        seen = _fitted_rows(backbone, reading, piece)
        fitting = 12 * longest * (longest + seen) + 20 * backbone.kv_heads * seen * head
    most: int = backbone.weight_bytes + kept + beside + cached + max(ranked + 3 * logits, passing, fitting)
    return most
