"""Documents to tokens that know where they came from, and tokens to the chunks that are read one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cribsheet.corpus.documents import Document
from cribsheet.errors import DocumentError
from cribsheet.prompt.encoder import Encoder

_GAP = "\n\n"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` to `stop` of the corpus, read in one forward pass; `ids` is (stop - start,)."""

    ids: Tensor
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class TokenizedCorpus:
    """Preamble and documents as one token sequence, each token with its document and character span.

    text
        the documents as they stand in the prompt.
    ids
        (N,) int64: the template's preamble, then the documents with a blank line after each.
    origins
        (N, 3) int32: number of the document, first and last-plus-one character in it; (-1, 0, 0) for tokens of the
        preamble and between documents.
    preamble_tokens
        how many tokens come before the first document.
    """

    documents: tuple[Document, ...]
    text: str
    ids: Tensor
    origins: Tensor
    preamble_tokens: int

    @classmethod
    def build(cls, documents: Sequence[Document], preamble: str, encoder: Encoder) -> TokenizedCorpus:
        """Tokenize `preamble` and the documents' texts. Raises `DocumentError` without documents."""
        if not documents:
            raise DocumentError("There are no documents; a sheet needs at least one.")
        texts = [encoder.defuse(document.text) for document in documents]
        text = _GAP.join(texts)
        ids, spans = encoder.left(preamble + text + _GAP)
        sizes = torch.tensor([len(text) for text in texts])
        starts = len(preamble) + (sizes + len(_GAP)).cumsum(0) - (sizes + len(_GAP))
        first, last = spans.unbind(1)
        number = torch.searchsorted(starts, first.clamp(min=len(preamble)), right=True) - 1
        begin = (first - starts[number]).clamp(min=0)
        end = torch.minimum(last - starts[number], sizes[number])
        inside = (last > len(preamble)) & (begin < end)
        found = torch.stack([number, begin, end], 1).to(torch.int32)
        origins = torch.where(inside[:, None], found, torch.tensor([-1, 0, 0], dtype=torch.int32))
        preamble_tokens = int((last <= len(preamble)).sum())
        return cls(tuple(documents), text, ids, origins, preamble_tokens)

    def __len__(self) -> int:
        """Number of tokens, the preamble included."""
        return len(self.ids)

    def split(self, chunk_tokens: int) -> Iterator[Chunk]:
        """Chunks of `chunk_tokens` tokens, the last one shorter."""
        for start in range(0, len(self.ids), chunk_tokens):
            stop = min(start + chunk_tokens, len(self.ids))
            yield Chunk(self.ids[start:stop], start, stop)
