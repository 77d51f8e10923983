"""The artifact: kept keys and values, where each token came from, and what it was made with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
from torch import Tensor

from cribsheet.correction import Correction
from cribsheet.documents import Document
from cribsheet.fingerprint import Fingerprint
from cribsheet.selection import ABSENT, Allocation
from cribsheet.showing import sheet_line, sheet_table
from cribsheet.stored import LayersOfFile, StorageDtype, StoredLayer
from cribsheet.task import Task

FORMATS = (1, 2)  # 2 packs four bits a number, which readers of 1 cannot read

Count = Annotated[int, Field(ge=0, lt=1 << 31)]  # of tokens, characters, documents: `indices` and `origins` are int32
SEEDS = range(-(1 << 63), 1 << 64)  # those that torch takes

Mode = Literal["sequential", "independent"]
Operation = Literal["built", "extended", "replaced", "removed", "merged", "combined"]


class DocumentEntry(BaseModel):
    """One document as the manifest lists it; `tokens` is its length in the corpus, `digest` that of id and text."""

    model_config = ConfigDict(extra="forbid")

    id: str
    characters: Count
    tokens: Count
    metadata: dict[str, Any] = {}
    digest: str = ""


class SegmentEntry(BaseModel):
    """A stretch of the corpus that was read alone: so many documents, tokens `read`, and tokens `kept` of them.

    Where heads keep different numbers of tokens, `kept` is their mean.
    """

    model_config = ConfigDict(extra="forbid")

    documents: Count
    read: Count
    kept: Count


class Change(BaseModel):
    """One entry of a sheet's history; of what was removed, nothing but the number of documents."""

    model_config = ConfigDict(extra="forbid")

    operation: Operation
    at: str
    documents: Count


class Rung(BaseModel):
    """What a sheet of some rate retains: of `counted` probes, how many it answers as the reference does."""

    model_config = ConfigDict(extra="forbid")

    rate: FiniteFloat
    budget: Count
    counted: Count
    retained: Count

    @property
    def share(self) -> float:
        """0 to 1; 0 where nothing counts."""
        return self.retained / self.counted if self.counted else 0.0


class Retention(BaseModel):
    """What a check found: of the probes that full context answers, how many the sheet answers alike.

    reference
        whose answers count: those of full context, or where the window does not hold it, of the stretches alone that
        the probes were written about.
    bound
        the share that was asked for, or below which a check warns.
    asked, known, confirmed
        probes; those that the model answers alike closed book, which do not count; and those that the reference answers
        as their stretches alone do.
    counted, retained
        probes that the reference answers otherwise than closed book, and those that the sheet answers as it does.
    held_back
        probes that are examples of the task; the sheet was made without them.
    rungs
        sheets of other rates that were asked too, and this one if it was chosen among them.
    why
        why nothing was checked, or empty.
    """

    model_config = ConfigDict(extra="forbid")

    reference: Literal["full context", "stretches"] = "full context"
    bound: FiniteFloat
    asked: Count = 0
    known: Count = 0
    confirmed: Count = 0
    counted: Count = 0
    retained: Count = 0
    held_back: Count = 0
    rungs: list[Rung] = []
    why: str = ""

    @property
    def share(self) -> float | None:
        """What is retained, 0 to 1; none if nothing was checked."""
        return self.retained / self.counted if self.counted and not self.why else None

    @property
    def is_weak(self) -> bool:
        """Whether the model knows more than it finds with everything before it."""
        return self.asked > 0 and self.confirmed < max(1, self.known)

    def __str__(self) -> str:
        """In a line."""
        if self.why:
            return f"not checked: {self.why}"
        whose = "full context does" if self.reference == "full context" else "their stretches alone are answered"
        return f"answers {self.retained} of {self.counted} probes as {whose}"


class Manifest(BaseModel):
    """Everything a sheet was made with; stored as JSON in the file's metadata (docs: the sheet format)."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1, 2] = 1
    cribsheet: str
    created: str
    fingerprint: Fingerprint
    system: str
    template_options: dict[str, Any]
    head: str
    task: dict[str, Any]
    guide: Literal["resident", "dropped"]
    guide_tokens: Count
    corpus_digest: str
    corpus_tokens: Annotated[Count, Field(ge=1)]
    head_tokens: Count
    documents: Annotated[list[DocumentEntry], Field(min_length=1)]
    scorer: str
    seed: int
    budget: Annotated[Count, Field(ge=1)]
    chunk_tokens: Count
    dtype: StorageDtype
    build: dict[str, Any]
    mode: Mode = "sequential"
    allocation: Allocation = "uniform"
    correction: Correction = "none"
    document_rate: Annotated[FiniteFloat, Field(ge=1)] | None = None
    document_most: Annotated[FiniteFloat, Field(gt=0)] | None = None
    segments: list[SegmentEntry] = []
    history: list[Change] = []
    cut_from: Annotated[Count, Field(ge=1)] | None = None
    retention: Retention | None = None
    form: str = ""

    def check(self) -> None:
        """Raise `ValueError` where parts of it contradict each other."""
        made, listed = self.fingerprint, sum(document.tokens for document in self.documents)
        found = {
            f"sheets in {self.dtype} have another format than {self.format}": self.format != format_of(self.dtype),
            f"{made.layers} layers have {len(made.windows)} windows": made.layers != len(made.windows),
            "no layer sees everything": None not in made.windows,
            f"{made.heads} heads share {made.kv_heads} keys": made.heads % made.kv_heads != 0,
            "a document has no id": not all(document.id.strip() for document in self.documents),
            f"the head's {self.head_tokens} and the documents' {listed} tokens are more than the corpus's "
            f"{self.corpus_tokens}": self.head_tokens + listed > self.corpus_tokens,
            f"the budget of {self.budget} is more than everything": self.budget
            > self.corpus_tokens + self.guide_tokens,
            f"a guide of {self.guide_tokens} tokens is {self.guide}": (self.guide == "resident")
            != (self.guide_tokens > 0),
            f"{self.seed} is no seed": self.seed not in SEEDS,
            "a sequential sheet was read in chunks of nothing": self.mode == "sequential" and self.chunk_tokens == 0,
        }
        if wrong := next((what for what, is_wrong in found.items() if is_wrong), None):
            raise ValueError(wrong)

    @property
    def rotated(self) -> bool:
        """Whether keys are stored rotated for their positions."""
        return self.mode == "sequential" and self.dtype != "int4"

    @property
    def cuttable(self) -> bool:
        """Whether smaller sheets can be cut from the reading that it is of."""
        return self.mode == "sequential" and self.correction == "none"

    @property
    def digest(self) -> str:
        """What tells two sheets apart: model, corpus, task and settings, but not when and how fast they were made."""
        return hashlib.sha256(
            self.model_dump_json(exclude={"created", "build", "history", "retention"}).encode()
        ).hexdigest()[:16]


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
        keys are not rotated yet, so that documents can come and go (`segments.py`), nor in int4 (`packing.py`).
    indices
        (F, K, P) int32, for the F layers that see everything: index in the corpus of each kept token, -1 for tokens
        of the guide. A head that keeps fewer than P tokens has -2 in front of them.
    origins
        (U, 4) int32, ascending: corpus index of a kept token, number of its document (-1: none), first and
        last-plus-one character in the document's text.
    texts
        the documents' texts, or nothing if they were left out when saving.
    """

    layers: Sequence[StoredLayer]
    indices: Tensor
    origins: Tensor
    manifest: Manifest
    texts: Sequence[str] = field(default=())

    def __repr__(self) -> str:
        """One line."""
        return f"<Sheet of {sheet_line(self)}>"

    def _repr_html_(self) -> str:
        """Size, rate and documents, for notebooks."""
        return sheet_table(self)

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

    def extend(self, documents: Any, *, model: Any = None, **options: Any) -> Sheet:
        """An independent sheet with more documents (`living.py`); by default its own `model` is loaded."""
        from cribsheet import living  # it is made of what is here

        return living.extend(living.backbone_of(self, model), self, documents, **options)

    def replace(self, document_id: str, document: Any, *, model: Any = None, **options: Any) -> Sheet:
        """An independent sheet with another text in the place of a document."""
        from cribsheet import living

        return living.replace(living.backbone_of(self, model), self, document_id, document, **options)

    def remove(self, *document_ids: str, model: Any = None) -> Sheet:
        """An independent sheet without these documents; nothing of them is left in it."""
        from cribsheet import living

        return living.remove(living.backbone_of(self, model), self, *document_ids)

    def merge(self, other: Sheet, *, model: Any = None) -> Sheet:
        """An independent sheet with the documents of another one behind its own."""
        from cribsheet import living

        return living.merge(living.backbone_of(self, model), self, other)

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


def format_of(dtype: StorageDtype) -> Literal[1, 2]:
    """The format of a sheet in a storage type."""
    return 2 if dtype == "int4" else 1


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
