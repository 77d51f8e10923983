"""The sheet of a plan, put together from what was kept."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cribsheet.attention.prefix import LayerPrefix, turned_back
from cribsheet.compress.keeping import as_prefix, kept_tokens
from cribsheet.compress.kept import Kept, State
from cribsheet.model.backbone import Backbone
from cribsheet.plan.describe import describe
from cribsheet.plan.plan import Plan
from cribsheet.plan.room import moved, room_for
from cribsheet.prompt.chunks import TokenizedCorpus
from cribsheet.sheet.archive.layout import Layout
from cribsheet.sheet.archive.writer import ArchiveWriter, unfinished_archive
from cribsheet.sheet.int4 import block_sizes
from cribsheet.sheet.layers import StoredLayer
from cribsheet.sheet.sheet import Sheet, with_archive
from cribsheet.vocabulary import ABSENT, StorageDtype


def archive_writer(
    backbone: Backbone, plan: Plan, checkpoint: str | Path | None, folder: str | Path | None
) -> ArchiveWriter | None:
    """What writes all that is read for a plan, if it is to be kept: as the checkpoint's, or to a temporary file."""
    if plan.archive is None:
        return None
    path = unfinished_archive(checkpoint, folder) if checkpoint is not None else None
    return ArchiveWriter(archive_layout(backbone, plan.archive, archive_runs(plan)), plan.corpus.origins, path, folder)


def archive_runs(plan: Plan) -> list[int]:
    """How many tokens stand one behind the other in an archive: the preamble's, and those of each chunk behind it."""
    stops = (chunk.stop for chunk in plan.corpus.split(plan.reading.chunk_tokens))
    return [stop - start for start, stop in pairwise(sorted({0, plan.corpus.preamble_tokens, *stops}))]


def archive_layout(backbone: Backbone, dtype: StorageDtype, runs: Sequence[int]) -> Layout:
    """How an archive lies of tokens that are read in runs of these lengths."""
    shape = backbone.num_layers, backbone.kv_heads, backbone.head_size
    return Layout(*shape, dtype, block_sizes(runs).tolist())


def finish(backbone: Backbone, plan: Plan, state: State, began: float, archive: ArchiveWriter | None = None) -> Sheet:
    """The sheet of what was kept, begun at a time of `time.perf_counter`, with its archive if that was written."""
    before = as_prefix(backbone, state.kept)
    with ThreadPoolExecutor(1) as meanwhile:
        room = meanwhile.submit(room_for, before, len(plan.resident), plan.dtype)
        layers, indices = _with_guide(backbone, before, state.kept, plan.resident)
        if plan.dtype == "int4":
            length = indices.shape[-1]
            layers = [turned_back(layer, length, turn) for layer, turn in zip(layers, backbone.inv_freqs, strict=True)]
        pairs = zip(layers, room.result(), strict=True)
        stored = [StoredLayer.of(moved(layer, to), plan.dtype) for layer, to in pairs]
    loss, origins = _storage_loss(stored, layers), kept_origins(plan.corpus, indices)
    manifest = describe(plan, backbone, time.perf_counter() - began)
    manifest.build.update(loss)
    texts = [document.text for document in plan.corpus.documents]
    sheet = Sheet(stored, indices, origins, manifest, texts)
    return sheet if archive is None else with_archive(sheet, archive)


def kept_origins(corpus: TokenizedCorpus, indices: Tensor) -> Tensor:
    """`Sheet.origins` for these kept indices: rows (U, 4) of index, document, first and last-plus-one character."""
    seen = torch.zeros(len(corpus) - ABSENT, dtype=torch.bool)  # what stands for no token is below zero
    used = seen.index_fill_(0, indices.flatten().long() - ABSENT, True)[-ABSENT:].nonzero().flatten()
    return torch.cat([used[:, None].to(torch.int32), corpus.origins[used]], 1)


def _with_guide(
    backbone: Backbone, layers: list[LayerPrefix], kept: Sequence[Kept], resident: Tensor
) -> tuple[list[LayerPrefix], Tensor]:
    """The final prefix, with the resident guide (T,) read on top of what is kept.

    Also the indices (F, K, P + T) of what the F layers keep that see everything, as in `Sheet`.
    """
    size = kept_tokens(backbone, kept)
    if len(resident):
        read = backbone.read(layers, size, resident, resident[:0])
        layers = [old.followed_by(new.chunk_keys, new.chunk_values) for old, new in zip(layers, read, strict=True)]
    full = [kept[number].indices for number in backbone.full]
    padded = [F.pad(layer, (size - layer.shape[1], 0), value=ABSENT) for layer in full]
    indices = torch.stack(padded).to(torch.int32).cpu()  # a GPU is waited for
    guide = indices.new_full((*indices.shape[:2], len(resident)), -1)
    return layers, torch.cat([indices, guide], 2)


def _storage_loss(stored: Sequence[StoredLayer], layers: Sequence[LayerPrefix]) -> dict[str, float]:
    """Relative L2 error of all keys and values by the storage type, the worst layer counting."""
    losses = [mine.loss(layer) for mine, layer in zip(stored, layers, strict=True)]
    return {"key_loss": round(max(k for k, _ in losses), 6), "value_loss": round(max(v for _, v in losses), 6)}
