"""Text to token ids, so that pieces encoded apart are the tokens of the whole, and no document can forge a turn."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

_GAP = "\n\n"
_PIECE, _CONTEXT = 1 << 15, 64  # characters encoded at once, and encoded again before them
LONG = 2 * _PIECE  # characters of a text that is not encoded whole before it is known that it may fit
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
        pieces = [self._piece(text, start, stop) for start, stop in _pieces(text)]
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
        for start in range(0, len(text), _PIECE):
            taken += max(0, self.count([text[start : start + _PIECE]]) - _ENDS)
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

    def _piece(self, text: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Ids and spans of `text[start:stop]` as the tokens of the whole: encoded with some text before it."""
        context = max(0, start - _CONTEXT)
        encode = self._open if stop == len(text) else self._encode
        ids, spans = encode(text[context:stop])
        spans = spans + context
        new = (spans[:, 1] > start) | (start == 0)
        return ids[new], spans[new]

    def _open(self, text: str) -> tuple[Tensor, Tensor]:
        """As `_encode`, for text that a word follows: some tokenizers split a blank line otherwise at the very end."""
        ids, spans = self._encode(text + "x")
        inside = spans[:, 1] <= len(text)
        return (ids[inside], spans[inside]) if int(spans[inside].max()) == len(text) else self._encode(text)

    def _encode(self, text: str) -> tuple[Tensor, Tensor]:
        encoded = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False, truncation=False
        )
        spans = torch.tensor(encoded["offset_mapping"], dtype=torch.int64).reshape(-1, 2)
        return torch.tensor(encoded["input_ids"], dtype=torch.int64), spans


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
