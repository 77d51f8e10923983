"""What a sheet says of itself: everything that it was made with, and what was found out about it."""

from __future__ import annotations

import hashlib
import json
from math import comb
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from cribsheet.model.fingerprint import SAID_SINCE, Fingerprint
from cribsheet.vocabulary import SEEDS, Allocation, Correction, SheetKind, StorageDtype

FORMATS = (1, 2)  # 2 packs four bits a number, which readers of 1 cannot read

Count = Annotated[int, Field(ge=0, lt=1 << 31)]  # of tokens, characters, documents: `indices` and `origins` are int32

Operation = Literal["built", "extended", "replaced", "removed", "merged", "combined"]


# What two sheets that are the same may differ in.
_TELLS_NOTHING: Any = {
    **dict.fromkeys(("created", "build", "history", "retention", "archive"), True),
    "fingerprint": SAID_SINCE,
}


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
    """What a sheet of some rate retains: of `counted` probes, how many it answers as the reference does.

    gained, lost
        of the probes that count for both, those that it answers so and the sheet that was checked does not, and those
        of which the opposite is true.
    """

    model_config = ConfigDict(extra="forbid")

    rate: FiniteFloat
    budget: Count
    counted: Count
    retained: Count
    gained: Count = 0
    lost: Count = 0

    @property
    def chance(self) -> float:
        """How probable it is that a sheet which is no better gains so many of those probes or more: the sign test."""
        differing = self.gained + self.lost
        chance: float = sum(comb(differing, count) for count in range(self.gained, differing + 1)) / 2**differing
        return chance

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


class ArchiveEntry(BaseModel):
    """The archive that lies beside a sheet: its `digest`, the type that it is stored in, and the bytes of its file."""

    model_config = ConfigDict(extra="forbid")

    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    dtype: StorageDtype
    bytes: Annotated[int, Field(ge=0, lt=1 << 63)]


class Manifest(BaseModel):
    """Everything a sheet was made with; stored as JSON in the file's metadata (docs: the sheet format)."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1, 2] = 1
    cribsheet: str
    created: str
    fingerprint: Fingerprint
    system: str
    template_options: dict[str, Any]
    head: str  # the preamble; files keep the keys `head` and `head_tokens`, so that sheets of before open
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
    mode: SheetKind = "sequential"
    allocation: Allocation = "uniform"
    correction: Correction = "none"
    document_rate: Annotated[FiniteFloat, Field(ge=1)] | None = None
    document_most: Annotated[FiniteFloat, Field(gt=0)] | None = None
    segments: list[SegmentEntry] = []
    history: list[Change] = []
    cut_from: Annotated[Count, Field(ge=1)] | None = None
    retention: Retention | None = None
    form: str = ""
    archive: ArchiveEntry | None = None

    def check(self) -> None:
        """Raise `ValueError` where parts of it contradict each other."""
        made, listed = self.fingerprint, sum(document.tokens for document in self.documents)
        found = {
            f"sheets in {self.dtype} have another format than {self.format}": self.format != format_of(self.dtype),
            f"{made.layers} layers have {len(made.windows)} windows": made.layers != len(made.windows),
            "no layer sees everything": None not in made.windows,
            f"{made.heads} heads share {made.kv_heads} keys": made.heads % made.kv_heads != 0,
            "a document has no id": not all(document.id.strip() for document in self.documents),
            f"the preamble's {self.head_tokens} and the documents' {listed} tokens are more than the corpus's "
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
        return self.mode == "sequential" and self.correction == "none" and "study" not in self.build

    @property
    def digest(self) -> str:
        """What tells two sheets apart: model, corpus, task and settings, but not when and how fast they were made.

        Nor whether there is an archive.
        """
        told = self.model_dump_json(exclude=_TELLS_NOTHING)
        if studied := self.build.get("study"):  # its figures are those of no other
            told += json.dumps(studied, sort_keys=True, default=str)
        return hashlib.sha256(told.encode()).hexdigest()[:16]


def format_of(dtype: StorageDtype) -> Literal[1, 2]:
    """The format of a sheet in a storage type."""
    return 2 if dtype == "int4" else 1
