"""Answers that must have a form: JSON schema, regular expression or one of several choices, always complete.

A grammar alone keeps an answer valid only as far as it goes; cut off by the token limit it is invalid after all. So a
running answer always knows one way to finish within the tokens that are left, and takes that way as soon as the
model's own choice would lead to where none is known. Grammars are compiled and checked by llguidance.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor

from cribsheet.errors import RequestError

_SEPARATORS: Any = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
_TRIES = 3  # choices of the model that are weighed before the known way out is taken
_ORDERS = 9  # orders of tokens tried when looking for a way out; the first is made for JSON, the second for text


@dataclass(frozen=True, slots=True)
class Grammar:
    """A checked grammar in llguidance's form; make one with the class methods."""

    source: str
    what: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Grammar:
        """JSON that fits a schema. Raises `RequestError` for a schema that is invalid or cannot be satisfied."""
        try:
            plain = json.loads(schema) if isinstance(schema, str) else json.loads(json.dumps(schema))
            source = LLMatcher.grammar_from_json_schema(plain, overrides=_SEPARATORS)
        except (TypeError, ValueError) as error:
            raise RequestError(f"The JSON schema cannot be used: {error}") from error
        return cls(source, "JSON schema")._checked()

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that matches a regular expression from its first to its last character."""
        return cls(LLMatcher.grammar_from_regex(pattern), "regular expression")._checked()

    @classmethod
    def choices(cls, options: Sequence[str]) -> Grammar:
        """Exactly one of several texts."""
        if isinstance(options, str) or not options or any(not isinstance(o, str) or not o for o in options):
            raise RequestError(f"The choices are {options!r}; give a list of non-empty texts.")
        either = " | ".join(json.dumps(option, ensure_ascii=False) for option in options)
        return cls(LLMatcher.grammar_from_lark(f"start: {either}"), "list of choices")._checked()

    def _checked(self) -> Grammar:
        trouble = LLMatcher.validate_grammar(self.source)
        if trouble:
            raise RequestError(f"The {self.what} cannot be used: {trouble.strip().splitlines()[0]}")
        return self


class GrammarTokens:
    """A tokenizer as grammars see it, with the orders in which a way out is looked for; made once per tokenizer."""

    _known: ClassVar[weakref.WeakKeyDictionary[Any, GrammarTokens]] = weakref.WeakKeyDictionary()

    def __init__(self, tokenizer: Any, eos: frozenset[int], vocabulary: int) -> None:
        self.tokens: LLTokenizer = from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=sorted(eos) or None)
        self.eos = eos
        self.vocabulary = vocabulary
        texts = [self.tokens.decode_bytes([token]) for token in range(vocabulary)]
        first = np.array([_closing_rank(text) for text in texts], dtype=np.float32)
        first[list(eos)] = -1e9
        draw = np.random.default_rng(0)
        lengths = np.array([len(text) for text in texts], dtype=np.float32)
        ending = np.array([_ending_rank(text) for text in texts], dtype=np.float32)
        ending[list(eos)] = -1e9
        self.orders = [first, ending]
        for number in range(2, _ORDERS):
            order = draw.random(vocabulary, dtype=np.float32) * 10 - (lengths if number % 2 else 0)
            order[list(eos)] = -1e9
            self.orders.append(order)

    @classmethod
    def of(cls, tokenizer: Any, eos: frozenset[int], vocabulary: int) -> GrammarTokens:
        """The view of a tokenizer, made at most once."""
        found = cls._known.get(tokenizer)
        if found is None or found.vocabulary != vocabulary:
            found = cls._known[tokenizer] = cls(tokenizer, eos, vocabulary)
        return found


class Constraint:
    """The state of one answer in its grammar. Raises `RequestError` if no answer of `limit` tokens is found."""

    def __init__(self, grammar: Grammar, tokens: GrammarTokens, limit: int) -> None:
        self._tokens = tokens
        self._matcher = LLMatcher(tokens.tokens, grammar.source)
        if self._matcher.is_error():
            raise RequestError(f"The {grammar.what} cannot be used: {self._matcher.get_error()}")
        self._left = limit
        way_out = self._way_out(limit)
        if way_out is None:
            raise RequestError(
                f"No answer that fits the {grammar.what} was found within max_tokens={limit}; allow more tokens or "
                "loosen it."
            )
        self._plan = way_out

    def masked(self, logits: Tensor) -> Tensor:
        """Logits (V,) with every token that the grammar forbids at minus infinity."""
        allowed = torch.from_numpy(self._allowed()).to(logits.device)
        return logits.masked_fill(~allowed[: logits.shape[-1]], float("-inf"))

    def accept(self, token: int) -> bool:
        """Take a token if a complete answer can still follow; otherwise nothing changes and it is refused."""
        if self._plan and token == self._plan[0]:
            self._consume(token, self._plan[1:])
            return True
        if not self._matcher.consume_token(token):
            return False
        way_out = self._way_out(self._left - 1)
        if way_out is None:
            self._matcher.rollback(1)
            return False
        self._left -= 1
        self._plan = way_out
        return True

    def choose(self, logits: Tensor, pick: Any) -> tuple[int, Tensor]:
        """The sampler's token if a complete answer can follow it, or the next one of the known way out.

        `pick(logits)` returns a token and log-probabilities, as `Sampler.pick`.
        """
        logits = self.masked(logits)
        for _ in range(_TRIES):
            token, logprobs = pick(logits)
            if self.accept(token):
                return token, logprobs
            logits = logits.clone()
            logits[token] = float("-inf")
            if torch.isneginf(logits).all():
                break
        token = self._plan[0]
        self.accept(token)
        return token, logprobs

    def _consume(self, token: int, plan: list[int]) -> None:
        self._matcher.consume_token(token)
        self._left -= 1
        self._plan = plan

    def _allowed(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(packed, bitorder="little")[: self._tokens.vocabulary].astype(bool)

    def _way_out(self, limit: int) -> list[int] | None:
        """Tokens, the end token last, that complete the answer from here in at most `limit` of them before the end."""
        for order in self._tokens.orders:
            path: list[int] = []
            while len(path) <= limit:
                token = int(np.where(self._allowed(), order, np.inf).argmin())
                if token in self._tokens.eos:
                    self._matcher.rollback(len(path))
                    return [*path, token]
                if not self._matcher.consume_token(token):
                    break
                path.append(token)
            self._matcher.rollback(len(path))
        return None


def _closing_rank(text: bytes) -> float:
    """How well a token helps to finish JSON: closers first, then short values, spaces and openers last."""
    if not text:
        return 1e6
    if all(byte in b'"}]' for byte in text):
        return -10.0 * len(text)
    if text in (b"0", b"1", b"null", b"true"):
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
