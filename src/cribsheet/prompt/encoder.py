"""Text to token ids, so that pieces encoded apart are the tokens of the whole, and no document can forge a turn."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

_GAP = "\n\n"
_PIECE, _CONTEXT = 1 << 13, 64  # characters encoded in one go, and encoded again before them
_SIDE_BY_SIDE = 16  # pieces that are encoded at once, by as many processors as there are
_STRETCH = 1 << 15  # characters of a stretch by which it is seen how long a text is
LONG = 2 * _STRETCH  # characters of a text that is not encoded whole before it is known that it may fit
_ENDS = 16  # tokens of a stretch that may be others than those of the whole
_WORD_BREAK = re.compile(r"(?<=\w) (?=\w)")
# Lookalikes of the same length, so that character spans stay true.
_LOOKALIKE = str.maketrans({"<": "‹", "[": "［", "{": "｛", "|": "¦", "▁": "_"})


class Encoder:
    """A tokenizer as the library uses it: offsets, one BOS, and special tokens only where the template wrote them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        specials = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        specials |= {token for token in tokenizer.all_special_tokens if token}
        ordered = sorted(specials, key=len, reverse=True)
        self._specials = re.compile("|".join(map(re.escape, ordered))) if ordered else None
        plain = tokenizer("x")["input_ids"]
        self._bos: int | None = tokenizer.bos_token_id
        self._adds_bos = self._bos is not None and plain[:1] == [self._bos]

    def defuse(self, text: str) -> str:
        """The text with special tokens spelt out in it made harmless; its length does not change.

        A document that contains `<|end|>` must not end the user's turn, so its first character is replaced by a
        lookalike.
        """
        if self._specials is None:
            return text
        return self._specials.sub(lambda found: _defused(found[0]), text)

    def left(self, text: str) -> tuple[Tensor, Tensor]:
        """Ids (N,) and character spans (N, 2), int64, of text that begins a prompt; one BOS if the model has one."""
        bounds, pieces = _pieces(text), list[tuple[Tensor, Tensor]]()
        while some := list(islice(bounds, _SIDE_BY_SIDE)):
            pieces += self._encoded_pieces(text, some)
        ids, spans = torch.cat([ids for ids, _ in pieces]), torch.cat([spans for _, spans in pieces])
        if self._adds_bos and ids[:1].tolist() != [self._bos]:
            ids = torch.cat([torch.tensor([self._bos]), ids])
            spans = torch.cat([torch.zeros(1, 2, dtype=torch.int64), spans])
        return ids, spans

    def after(self, text: str, *, continues: bool = False) -> Tensor:
        """Ids of text as they would follow a blank line in the same prompt, and if it `continues`, precede a word."""
        return self.placed(text, continues=continues)[0]

    def placed(self, text: str, *, continues: bool = False) -> tuple[Tensor, Tensor]:
        """As `after`, with the character spans (N, 2) of the ids."""
        ids, spans = self._open(_GAP + text) if continues else self._encode(_GAP + text)
        new = spans[:, 1] > len(_GAP)
        return ids[new], spans[new] - len(_GAP)

    def plain(self, text: str) -> Tensor:
        """Ids of text alone."""
        return self._encode(text)[0]

    def count(self, texts: Iterable[str]) -> int:
        """Number of tokens of the texts, each alone."""
        return sum(len(self._encode(text)[0]) for text in texts)

    def exceeds(self, text: str, tokens: int) -> bool:
        """Whether a long text surely takes more than twice so many tokens; only as much of it is read as shows that.

        It is read in stretches, which may tokenize otherwise at their ends than the whole does: hence twice, and a few
        tokens of each stretch do not count. A text of few stretches is better encoded: False.
        """
        if len(text) <= LONG:
            return False
        taken = 0
        for start in range(0, len(text), _STRETCH):
            taken += max(0, self.count([text[start : start + _STRETCH]]) - _ENDS)
            if taken > 2 * tokens:
                return True
        return False

    def first(self, text: str, tokens: int) -> str:
        """The longest beginning of a text, in whole words, that takes at most so many tokens alone."""
        _, spans = self._encode(text)
        if len(spans) <= tokens:
            return text
        stop = int(spans[tokens - 1, 1]) if tokens > 0 else 0
        while stop > 0 and not text[stop].isspace():
            stop -= 1
        return text[:stop].rstrip()

    def _encoded_pieces(self, text: str, bounds: Sequence[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
        """Ids and spans of some `text[start:stop]` as the tokens of the whole: encoded with some text before each."""
        contexts = [max(0, start - _CONTEXT) for start, _ in bounds]
        given = [text[context:stop] for context, (_, stop) in zip(contexts, bounds, strict=True)]
        is_last = bounds[-1][1] == len(text)
        encoded = self._encode_all(given[:-1] if is_last else given)
        if is_last:
            encoded.append(self._open(given[-1]))
        found = []
        for (ids, spans), context, (start, _) in zip(encoded, contexts, bounds, strict=True):
            new = (spans[:, 1] + context > start) | (start == 0)
            found.append((ids[new], spans[new] + context))
        return found

    def _open(self, text: str) -> tuple[Tensor, Tensor]:
        """As `_encode`, for text that a word follows: some tokenizers split a blank line otherwise at the very end."""
        ids, spans = self._encode(text + "x")
        inside = spans[:, 1] <= len(text)
        return (ids[inside], spans[inside]) if int(spans[inside].max()) == len(text) else self._encode(text)

    def _encode(self, text: str) -> tuple[Tensor, Tensor]:
        return self._encode_all([text])[0]

    def _encode_all(self, texts: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        """Ids (N,) and character spans (N, 2) of each text alone."""
        if not texts:
            return []
        encoded = self._tokenizer(
            list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False, truncation=False
        )
        ids = [torch.tensor(each, dtype=torch.int64) for each in encoded["input_ids"]]
        spans = [_as_tensor(each) for each in encoded["offset_mapping"]]
        return list(zip(ids, spans, strict=True))


def _as_tensor(spans: Sequence[tuple[int, int]]) -> Tensor:
    """(N, 2); a list of numbers is read several times faster than a list of pairs."""
    return torch.tensor(list(chain.from_iterable(spans)), dtype=torch.int64).view(-1, 2)


def _pieces(text: str) -> Iterator[tuple[int, int]]:
    """Stretches of a long text, cut before the space between two words, which no token crosses.

    A tokenizer takes some hundred bytes of memory for each token while it works; pieces keep that bounded.
    """
    start = 0
    while cut := _WORD_BREAK.search(text, start + _PIECE):
        yield start, cut.start()
        start = cut.start()
    yield start, len(text)


def _defused(special: str) -> str:
    first = special[0].translate(_LOOKALIKE)
    return (first if first != special[0] else "·") + special[1:]
