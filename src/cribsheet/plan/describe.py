"""What a sheet says of itself: its manifest, from the plan that it was built by."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from cribsheet import __version__
from cribsheet.compress.checkpoint import Checkpoint
from cribsheet.corpus.documents import Document
from cribsheet.corpus.formats.record import METADATA_DEPTH
from cribsheet.model.backbone import Backbone
from cribsheet.model.fingerprint import SAID_SINCE, fingerprint
from cribsheet.plan.plan import Plan
from cribsheet.prompt.chunks import TokenizedCorpus
from cribsheet.sheet.manifest import DocumentEntry, Manifest, format_of


def describe(plan: Plan, backbone: Backbone, seconds: float) -> Manifest:
    """The manifest of the sheet that a plan becomes in so many seconds."""
    documents = list_documents(plan.corpus)
    return Manifest(
        format=format_of(plan.dtype),
        cribsheet=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        fingerprint=fingerprint(backbone, plan.layout),
        system=plan.layout.system,
        template_options=plan.layout.options,
        head=plan.preamble,
        task=plan.task.to_dict(),
        guide="resident" if len(plan.resident) else "dropped",
        guide_tokens=len(plan.resident),
        corpus_digest=corpus_digest(documents),
        corpus_tokens=len(plan.corpus),
        head_tokens=plan.corpus.preamble_tokens,
        documents=documents,
        scorer=plan.scorer_name,
        seed=plan.reading.seed,
        budget=plan.budget,
        chunk_tokens=plan.reading.chunk_tokens,
        dtype=plan.dtype,
        allocation=plan.reading.allocation,
        correction=plan.reading.on(plan.corpus).correction,
        build=circumstances(backbone, seconds),
        cut_from=plan.cut_from,
        form=plan.form,
    )


def identity(plan: Plan, backbone: Backbone) -> dict[str, Any]:
    """Everything that decides what is kept, for checkpoints; how it is stored does not."""
    manifest = describe(replace(plan, dtype="float32"), backbone, 0.0)
    nothing: Any = {**dict.fromkeys(("created", "build", "dtype", "archive"), True), "fingerprint": SAID_SINCE}
    told = manifest.model_dump(exclude=nothing)
    archive = {"archive": plan.archive} if plan.archive else {}
    return {**told, **archive, "dtype": str(backbone.dtype)}


def checkpoint_of(plan: Plan, backbone: Backbone, path: str | Path | None) -> Checkpoint | None:
    """What remembers a plan's reading in a file, if there is to be one."""
    return None if path is None else Checkpoint(path, identity(plan, backbone))


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


def corpus_digest(documents: Sequence[DocumentEntry]) -> str:
    """What tells two corpora apart: a digest of the digests of all documents."""
    return hashlib.sha256("".join(entry.digest for entry in documents).encode()).hexdigest()[:16]


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


def _digest(document: Document) -> str:
    digest = hashlib.sha256()
    for part in (document.id, document.text):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()[:16]
