"""A tokenizer as grammars see it: which bytes each token stands for.

For most tokenizers a token always stands for the same bytes. In some, a word has the same token with and without the
space before it, and what stands before it decides. There the grammar gets a vocabulary of its own, of all texts that
tokens can stand for, and the answer so far says which of them a token means.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from llguidance import LLTokenizer
from tokenizers import Tokenizer

from cribsheet.errors import RequestError

_ORDERS = 9  # orders of tokens tried when looking for a way out; the first is made for JSON, the second for text
Numbers = np.ndarray[Any, np.dtype[np.int64]]
_SAMPLE = '{"name": "Ada Byron", "age": 36}'
_MARK = "▁"  # what normalisers put where words begin


class GrammarTokens:
    """A tokenizer as grammars see it, with the orders in which a way out is looked for; made once per tokenizer."""

    _known: ClassVar[weakref.WeakKeyDictionary[Any, GrammarTokens]] = weakref.WeakKeyDictionary()

    def __init__(self, tokenizer: Any, eos: frozenset[int], vocabulary: int) -> None:
        self.ends = eos  # as given; those beyond the vocabulary never come
        self.eos = eos = frozenset(token for token in eos if token < vocabulary)
        if not eos:
            raise RequestError("The model has no end token, so an answer with a form could not end; ask without one.")
        self.vocabulary = vocabulary
        self._tokenizer = tokenizer
        self._exact = exact = _unnormalised(tokenizer)
        self._same = np.arange(vocabulary)
        self._places: _Places | None = None
        self.options = ""  # what grammars for these tokens begin with
        tokens = _in_bytes(tokenizer, exact, eos, vocabulary)
        if tokens is not None:
            self.tokens = tokens
            texts = [tokens.decode_bytes([token]) for token in range(vocabulary)]
        else:
            self._places = places = _Places(tokenizer, exact, vocabulary, eos)
            self.tokens = LLTokenizer(places, eos_token=sorted(int(places.after_word[token]) for token in eos))  # type: ignore[arg-type]
            self.options = '%llguidance {"no_forcing": true}\n'  # what it would force may be no token of ours here
            texts = [places.tokens[number] for number in places.after_word]
        first = np.array([_closing_rank(text) for text in texts], dtype=np.float32)
        first[list(eos)] = -1e9
        draw = np.random.default_rng(0)
        lengths = np.array([len(text) for text in texts], dtype=np.float32)
        ending = np.array([_ending_rank(text) for text in texts], dtype=np.float32)
        ending[list(eos)] = -1e9
        ranks = [first, ending]
        for number in range(2, _ORDERS):
            rank = draw.random(vocabulary, dtype=np.float32) * 10 - (lengths if number % 2 else 0)
            if number % 3 == 0:  # what the first order cannot finish, such as 0.000..., in other words
                rank = np.where(first <= 0, first - 1e3, rank)
            rank[list(eos)] = -1e9
            ranks.append(rank)
        self.orders: list[Numbers] = [rank.argsort(kind="stable") for rank in ranks]
        single = [int(token) for token in self.orders[0] if len(texts[token]) == 1 and token not in eos]
        self.characters = sorted(single, key=lambda token: texts[token] == b"\\")  # an escape leads far astray

    def spelled(self, text: str) -> list[int]:
        """The tokens that a text is usually written in."""
        return _spelled(self._exact, text)

    def decode(self, ids: Sequence[int], **how: Any) -> str:
        """The text that the grammar took tokens for; a tokenizer may leave out the space that an answer begins with."""
        if self._places is None:
            return self.tokens.decode_bytes(list(ids)).decode(errors="replace")
        text: str = self._tokenizer.decode(list(ids), **how)
        return text

    def meaning(self, taken: Sequence[int]) -> Numbers:
        """(V,) which of the grammar's tokens each token stands for after those taken."""
        return self._places.meaning(taken) if self._places else self._same

    def meanings(self, taken: Sequence[int], path: Sequence[int]) -> list[int]:
        """What the tokens of a path stand for, one after the other after those taken."""
        if self._places is None:
            return [*path]
        before = [*taken]
        found = []
        for token in path:
            found.append(int(self.meaning(before)[token]))
            before.append(token)
        return found

    @classmethod
    def of(cls, tokenizer: Any, eos: frozenset[int], vocabulary: int) -> GrammarTokens:
        """The view of a tokenizer, made at most once."""
        found = cls._known.get(tokenizer)
        if found is None or found.vocabulary != vocabulary or found.ends != eos:
            found = cls._known[tokenizer] = cls(tokenizer, eos, vocabulary)
        return found


class _Places:
    """All texts that tokens stand for, after a word and elsewhere, in the form that llguidance takes."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Any, exact: Tokenizer, size: int, eos: frozenset[int]) -> None:
        self._exact = exact
        after_word, elsewhere, self._glues = _texts_by_place(tokenizer, size)
        special = {*tokenizer.all_special_ids, *eos} & set(range(size))
        for token in special:
            after_word[token] = elsewhere[token] = b"<special %d>" % token
        number = {text: at for at, text in enumerate(dict.fromkeys(after_word + elsewhere))}
        self.tokens = list(number)
        self.after_word = np.array([number[text] for text in after_word])
        self.elsewhere = np.array([number[text] for text in elsewhere])
        self.special_token_ids = sorted(int(self.after_word[token]) for token in special)
        self.eos_token_id = int(self.after_word[min(eos)])
        self.bos_token_id = None

    def meaning(self, taken: Sequence[int]) -> Numbers:
        """As in `GrammarTokens`; an answer begins where no space can be."""
        return self.elsewhere if not taken or self._glues[taken[-1]] else self.after_word

    def __call__(self, text: bytes | str) -> list[int]:
        """A text in the grammar's tokens; llguidance takes hints from it, nothing depends on it."""
        plain = text.decode(errors="replace") if isinstance(text, bytes) else text
        return [int(self.after_word[token]) for token in _spelled(self._exact, plain)]


def _unnormalised(tokenizer: Any) -> Tokenizer:
    """The tokenizer that takes texts as they are: composed, compatible or capital letters stay what they are.

    A form is what its caller reads, letter by letter, and what a model writes is never normalised. Only questions are.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec |= {"normalizer": _kept(spec["normalizer"]), "padding": None, "truncation": None}
    if (spec["decoder"] or {}).get("type") == "Metaspace":  # in words that llguidance knows
        mark = {"String": spec["decoder"]["replacement"]}
        spaced = {"type": "Replace", "pattern": mark, "content": " "}
        spec["decoder"] = {"type": "Sequence", "decoders": [spaced, {"type": "ByteFallback"}]}
    return Tokenizer.from_str(json.dumps(spec))


def _kept(normalizer: Any) -> Any:
    """What of a normaliser, in `tokenizers`' JSON, leaves letters as they are: it marks words, or spells in bytes."""
    kind = normalizer["type"] if normalizer else None
    if kind == "Sequence":
        kept = [inner for each in normalizer["normalizers"] if (inner := _kept(each))]
        return {**normalizer, "normalizers": kept} if kept else None
    marks = kind in ("Prepend", "ByteLevel") or (kind == "Replace" and _MARK in normalizer["content"])
    return normalizer if marks else None


def _spelled(exact: Tokenizer, text: str) -> list[int]:
    ids: list[int] = exact.encode(text, add_special_tokens=False).ids
    return ids


def _in_bytes(tokenizer: Any, exact: Tokenizer, eos: frozenset[int], size: int) -> LLTokenizer | None:
    """The tokenizer for llguidance; nothing where the bytes of tokens, in a row, are not what they are decoded to."""
    try:
        tokens = LLTokenizer(exact.to_str(), n_vocab=size, eos_token=sorted(eos))
    except ValueError:  # tokens that are joined by rules, such as "##ing"
        return None
    ids = exact.encode(_SAMPLE, add_special_tokens=False).ids
    decoded: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if tokens.decode_bytes(ids).decode(errors="replace").lstrip(" ") != decoded.lstrip(" "):
        return None
    return tokens


def _texts_by_place(tokenizer: Any, size: int) -> tuple[list[bytes], list[bytes], list[bool]]:
    """Bytes of each token after a word and where no space can be, and whether a word after it stands without one."""

    def decoded(*ids: int) -> str:
        text: str = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        return text

    word, other = tokenizer("one two", add_special_tokens=False)["input_ids"][:2]
    names = tokenizer.convert_ids_to_tokens(range(min(size, len(tokenizer))))
    spaced: list[bytes] = []
    glued: list[bytes] = []
    glues: list[bool] = []
    for token, name in enumerate(names):
        raw = re.fullmatch(r"<0x([0-9A-F]{2})>", name)
        after_word = decoded(word, token)
        spaced.append(bytes.fromhex(raw[1]) if raw else after_word[len(decoded(word)) :].encode())
        glued.append(bytes.fromhex(raw[1]) if raw else decoded(token).encode())
        glues.append(not decoded(word, token, other)[len(after_word) :].startswith(" "))
    missing = [b""] * (size - len(names))
    return spaced + missing, glued + missing, glues + [False] * len(missing)


def _closing_rank(text: bytes) -> float:
    """How well a token helps to finish JSON: closers first, then what leads on, then short values, openers last."""
    bare = text.strip()
    if not text:
        return 1e6
    if bare and all(byte in b'"}]' for byte in bare):
        return -10.0 * len(bare)
    if bare and all(byte in b'",: ' for byte in bare):
        return 0.0
    if bare in (b"0", b"null", b"true"):
        return 1.0
    opens = any(byte in b"{[" for byte in text)
    blank = text.isspace()
    return 10.0 + 50 * opens + 100 * blank - min(len(text), 9)


def _ending_rank(text: bytes) -> float:
    """How well a token helps to finish text: full stops first, then other signs, then the longest words."""
    if not text:
        return 1e6
    if all(byte in b".!?;)" for byte in text):
        return 0.0
    return 20.0 - min(len(text), 9) - 10 * (not any(chr(byte).isalnum() or byte > 127 for byte in text))
