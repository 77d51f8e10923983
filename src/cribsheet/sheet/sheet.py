"""The artifact: kept keys and values, and where each token came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from cribsheet.corpus.documents import Document
from cribsheet.corpus.task import Task
from cribsheet.engines.export import EngineName, export
from cribsheet.sheet.archive.archive import Archive
from cribsheet.sheet.archive.writer import ArchiveWriter
from cribsheet.sheet.html import table
from cribsheet.sheet.layers import LayersOfFile, StoredLayer
from cribsheet.sheet.manifest import Manifest
from cribsheet.vocabulary import ABSENT

_ROWS = 20  # documents in a table


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a document that kept tokens came from; `kept` is the share of heads, 0 to 1, that keep it."""

    document_id: str
    start: int
    stop: int
    kept: float


@dataclass(frozen=True)
class Sheet:
    """A condensed corpus: one file on disk, one read-only prefix in a model.

    layers
        keys and values (K, P, D) of each layer, keys rotated for positions 0..P-1; layers with sliding-window
        attention hold the last tokens before the question instead, fewer than their window. In an independent sheet
        keys are not rotated yet, so that documents can come and go (`living/segments.py`), nor in int4
        (`sheet/int4.py`).
    indices
        (F, K, P) int32, for the F layers that see everything: index in the corpus of each kept token, -1 for tokens
        of the guide. A head that keeps fewer than P tokens has -2 in front of them.
    origins
        (U, 4) int32, ascending: corpus index of a kept token, number of its document (-1: none), first and
        last-plus-one character in the document's text.
    texts
        the documents' texts, or nothing if they were left out when saving.
    archive
        keys and values of all tokens that were read, in a file, if the sheet was built with one.
    """

    layers: Sequence[StoredLayer]
    indices: Tensor
    origins: Tensor
    manifest: Manifest
    texts: Sequence[str] = field(default=())
    archive: Archive | None = None

    def __repr__(self) -> str:
        """One line."""
        return f"<Sheet of {self.summary}>"

    def _repr_html_(self) -> str:
        """The summary, the task, and how much was kept of each document, for notebooks."""
        made, kept = self.manifest, self.kept_per_document()
        rows = [
            (
                escape(entry.id),
                f"{entry.tokens:,}",
                f"{kept[entry.id]:,.0f}",
                f"{kept[entry.id] / max(1, entry.tokens):.0%}",
            )
            for entry in made.documents[:_ROWS]
        ]
        more = len(made.documents) - len(rows)
        left = f"<p>and {_documents(more)} more</p>" if more > 0 else ""
        head = f"<p>{escape(self.summary)}<br>task: {escape(self.task.description)}</p>"
        return head + table(("document", "tokens", "kept", "share"), rows) + left

    @property
    def summary(self) -> str:
        """What was condensed, to how much, and by which model, in a line."""
        made = self.manifest
        return (
            f"{_documents(len(made.documents))}, {made.corpus_tokens:,} tokens became {self.tokens:,} "
            f"(rate {self.rate:.1f}), {self.nbytes / 1e6:,.1f} MB in {made.dtype}, by {made.fingerprint.model}"
        )

    def export(
        self,
        path: str | Path,
        *,
        to: EngineName = "llama.cpp",
        version: int | None = None,
        gguf: str | Path | None = None,
    ) -> Path:
        """Write it as a file of another engine (`engines/export.py`); build it with `for_engines=True`.

        `version` is that of llama.cpp's format, `gguf` a file that must then be the model that made the sheet. Raises
        `SheetError` where the engine cannot take it, with the way out.
        """
        return export(self.manifest, self.layers, path, to=to, version=version, gguf=gguf)

    @property
    def length(self) -> int:
        """Positions that the sheet takes of the model's window: tokens of the head that keeps most, with the guide."""
        return self.indices.shape[2]

    @property
    def window(self) -> int | None:
        """Positions of the model's window, if the sheet says so; those of earlier versions do not."""
        window = self.manifest.build.get("window")
        return window if isinstance(window, int) else None

    @property
    def tokens(self) -> int:
        """Kept tokens per layer and head, the guide included; the mean where heads keep different numbers."""
        if self.manifest.allocation == "uniform":
            return self.length
        return round(float((self.indices != ABSENT).float().mean()) * self.length)

    @property
    def rate(self) -> float:
        """How many times shorter than the corpus."""
        return self.manifest.corpus_tokens / self.tokens

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, of which nothing is read for it."""
        if isinstance(self.layers, LayersOfFile):
            return self.layers.nbytes
        return sum(layer.nbytes for layer in self.layers)

    def opened_bytes(self, size: int) -> int:
        """Bytes of all keys and values once it is opened with a model whose numbers have `size` bytes.

        In int4 on CUDA it is about `nbytes` instead, if it is large and kernels read codes (`living/opened.py`).
        """
        if isinstance(self.layers, LayersOfFile):
            vectors = self.layers.vectors
        else:
            vectors = sum(layer.vectors for layer in self.layers)
        return 2 * vectors * self.manifest.fingerprint.head_size * size

    @property
    def task(self) -> Task:
        """The task that the sheet is for."""
        return Task.from_dict(self.manifest.task)

    @property
    def resident(self) -> bool:
        """Whether task and examples, or the form of these, are part of the sheet."""
        return self.manifest.guide == "resident"

    @property
    def shown_task(self) -> Task:
        """The task as a resident guide shows it; questions are rendered with it."""
        return self.task.shown(self.manifest.form)

    @property
    def documents(self) -> list[Document]:
        """The condensed documents; their texts are empty if the sheet was saved without them."""
        texts = self.texts or [""] * len(self.manifest.documents)
        return [
            Document(text=text, id=entry.id, metadata=entry.metadata)
            for text, entry in zip(texts, self.manifest.documents, strict=True)
        ]

    @cached_property
    def places(self) -> Tensor:
        """(F, K, P) row of `origins` for each kept token; meaningless where `indices` is -1."""
        rows = torch.searchsorted(self.origins[:, 0].contiguous().long(), self.indices.long().clamp(min=0))
        return rows.clamp(max=max(0, len(self.origins) - 1))

    @cached_property
    def kept_share(self) -> Tensor:
        """(U,) share of layers and heads, 0 to 1, that keep each token of `origins`."""
        heads = self.indices.shape[0] * self.indices.shape[1]
        kept = self.places[self.indices >= 0]
        return torch.bincount(kept, minlength=len(self.origins)).float() / heads

    def kept_per_document(self) -> dict[str, float]:
        """Tokens kept of each document, averaged over layers and heads."""
        kept = torch.zeros(len(self.manifest.documents))
        inside = self.origins[:, 1] >= 0
        kept.index_add_(0, self.origins[inside, 1].long(), self.kept_share[inside])
        return {entry.id: float(n) for entry, n in zip(self.manifest.documents, kept, strict=True)}

    def spans(self) -> list[Span]:
        """Where the kept tokens came from: neighbouring tokens joined, in document order."""
        found: list[Span] = []
        previous_index = -2
        for (index, number, start, stop), share in zip(self.origins.tolist(), self.kept_share.tolist(), strict=True):
            if number < 0:
                continue
            document_id = self.manifest.documents[number].id
            last = found[-1] if found else None
            if last is not None and last.document_id == document_id and index == previous_index + 1:
                found[-1] = Span(document_id, last.start, stop, max(last.kept, share))
            else:
                found.append(Span(document_id, start, stop, share))
            previous_index = index
        return found


def with_archive(sheet: Sheet, written: ArchiveWriter) -> Sheet:
    """The sheet with the archive that was written, all of it, while it was read."""
    manifest = sheet.manifest.model_copy(update={"archive": written.finish()})
    return replace(sheet, manifest=manifest, archive=Archive(written.path, manifest, owner=written))


def _documents(count: int) -> str:
    return f"{count:,} document{'s' * (count != 1)}"


def mean_kept(counts: Tensor) -> int:
    """Tokens that the heads of all layers keep (F, K), as one number."""
    return round(int(counts.sum()) / counts.numel())


def segment_bounds(indices: Tensor, guide_tokens: int, read: Sequence[int]) -> Tensor:
    """Where in `Sheet.indices` (F, K, P) each head's tokens of some stretches of the corpus begin: (F, K, n + 1).

    The stretches stand one behind the other and had `read` tokens (n,); the guide begins where the last one ends.
    """
    first = torch.tensor([0, *read]).cumsum(0).to(indices.dtype)
    corpus = indices[..., : indices.shape[-1] - guide_tokens].contiguous()
    return torch.searchsorted(corpus, first.expand(*indices.shape[:2], -1).contiguous())
