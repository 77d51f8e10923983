"""Passages by what they mean: an embedding model places queries and passages, and the nearest are found.

The model is one of sentence-transformers, the extra `[dense]`; it is loaded when something is first searched.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cribsheet.corpus.documents import Document
from cribsheet.corpus.formats.record import short
from cribsheet.errors import RequestError
from cribsheet.retrieval.retriever import PASSAGE_CHARACTERS, Passage, searchable

logger = logging.getLogger(__name__)

DENSE_MODEL = "sentence-transformers/all-mpnet-base-v2"  # what research compares with, 420 MB
MODEL_VARIABLE = "CRIBSHEET_DENSE_MODEL"  # of the environment: another default
_LIBRARY = "sentence_transformers"


class Embedder(Protocol):
    """Places texts, as a `SentenceTransformer` does: N texts to vectors (N, D), of an array or tensor of any type."""

    def encode_query(self, texts: list[str], /, *, show_progress_bar: bool) -> Any:
        """Vectors of what is searched for."""

    def encode_document(self, texts: list[str], /, *, show_progress_bar: bool) -> Any:
        """Vectors of what is found."""


class DenseRetriever:
    """Finds the passages of documents that an embedding model places nearest to a query (cosine); thread-safe.

    model
        a folder or hub id of sentence-transformers, or such a model that is loaded already; by default what the
        environment names in `CRIBSHEET_DENSE_MODEL`, or `sentence-transformers/all-mpnet-base-v2`. An id is downloaded
        once, by that library.
    characters
        the length of passages, cut as for BM25. What is longer than the model reads is placed by its beginning.
    device
        where the model runs; the best there is by default.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        *,
        model: str | Path | Embedder | None = None,
        characters: int = PASSAGE_CHARACTERS,
        device: str | None = None,
    ) -> None:
        """Place the passages. Raises `RequestError` if there is no text, no such model, or the extra is missing."""
        self.passages = searchable(documents, characters)
        self._embedder = _embedder(model, device)
        self._lock = threading.Lock()  # models of others need not be safe
        logger.info("placing %d passages", len(self.passages))
        texts = [each.text for each in self.passages]
        self._places = _unit(self._embedder.encode_document(texts, show_progress_bar=False))

    def retrieve(self, query: str, top_k: int | None = None) -> list[Passage]:
        """The nearest passages, best first, equals in the documents' order; at most `top_k`, of an empty query none."""
        if not query.strip():
            return []
        with self._lock:
            place = _unit(self._embedder.encode_query([query], show_progress_bar=False))
        scores = (self._places @ place[0]).tolist()
        best = sorted(range(len(scores)), key=lambda n: -scores[n])
        return [replace(self.passages[n], score=scores[n]) for n in best[:top_k]]


def require_dense() -> None:
    """Raise `RequestError` with the way out where the extra is not installed."""
    if find_spec(_LIBRARY) is None:
        raise RequestError(
            'The retriever "dense" needs sentence-transformers: pip install "cribsheet[dense]"; or use "bm25", or pass '
            "a retriever of your own."
        )


def _embedder(model: str | Path | Embedder | None, device: str | None) -> Embedder:
    if model is None:
        model = os.environ.get(MODEL_VARIABLE) or DENSE_MODEL
    if isinstance(model, str | Path):
        require_dense()
        return _loaded(str(model), device)
    if not hasattr(model, "encode_query") or not hasattr(model, "encode_document"):
        raise RequestError(
            f"The model of the retriever is {short(model)}; give a folder, an id, or a loaded SentenceTransformer."
        )
    return model


@lru_cache(maxsize=1)  # all sheets of a process share it
def _loaded(model: str, device: str | None) -> Embedder:
    import sentence_transformers  # only here: it is an extra, and slow to import

    try:
        found: Embedder = sentence_transformers.SentenceTransformer(model, device=device)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RequestError(
            f"The model {model!r} of the retriever cannot be loaded ({reason}); name a folder or id of a "
            f"sentence-transformers model, with DenseRetriever(documents, model=...) or {MODEL_VARIABLE}."
        ) from error
    return found


def _unit(vectors: Any) -> Tensor:
    """Vectors (N, D) of length one, in float32 on the CPU."""
    return F.normalize(torch.as_tensor(vectors).detach().to("cpu", torch.float32), dim=-1)
