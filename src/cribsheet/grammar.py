"""Answers that must have a form: JSON schema, regular expression or one of several choices, always complete.

A grammar alone keeps an answer valid only as far as it goes; cut off by the token limit it is invalid after all. So a
running answer always knows one way to finish within the tokens that are left, and takes that way as soon as the
model's own choice would lead to where none is known. Grammars are compiled and checked by llguidance.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher
from torch import Tensor

from cribsheet.errors import RequestError
from cribsheet.grammar_tokens import GrammarTokens

_SEPARATORS: Any = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
_TRIES = 3  # choices of the model that are weighed before the known way out is taken


@dataclass(frozen=True, slots=True)
class Grammar:
    """A checked grammar in llguidance's Lark form; make one with the class methods."""

    source: str
    what: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Grammar:
        """JSON that fits a schema. Raises `RequestError` for a schema that is invalid or cannot be satisfied."""
        try:
            plain = json.loads(schema) if isinstance(schema, str) else json.loads(json.dumps(schema))
        except (TypeError, ValueError) as error:
            raise RequestError(f"The JSON schema cannot be used: {error}") from error
        if not isinstance(plain, dict):
            raise RequestError(f"The JSON schema is {plain!r}; give a mapping.")
        source = json.dumps({**plain, "x-guidance": _SEPARATORS})
        return cls(f"start: %json {source}", "JSON schema")._checked()

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that matches a regular expression from its first to its last character."""
        made = json.loads(LLMatcher.grammar_from_regex(pattern))
        return cls(made["grammars"][0]["lark_grammar"], "regular expression")._checked()

    @classmethod
    def choices(cls, options: Sequence[str]) -> Grammar:
        """Exactly one of several texts."""
        if isinstance(options, str) or not options or any(not isinstance(o, str) or not o for o in options):
            raise RequestError(f"The choices are {options!r}; give a list of non-empty texts.")
        either = " | ".join(json.dumps(option, ensure_ascii=False) for option in options)
        return cls(f"start: {either}", "list of choices")._checked()

    def _checked(self) -> Grammar:
        trouble = LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(self.source))
        if trouble:
            raise RequestError(f"The {self.what} cannot be used: {trouble.strip().splitlines()[0]}")
        return self


class Constraint:
    """The state of one answer in its grammar. Raises `RequestError` if no answer of `limit` tokens is found."""

    def __init__(self, grammar: Grammar, tokens: GrammarTokens, limit: int) -> None:
        self._tokens = tokens
        self._matcher = LLMatcher(tokens.tokens, LLMatcher.grammar_from_lark(tokens.options + grammar.source))
        if self._matcher.is_error():
            raise RequestError(f"The {grammar.what} cannot be used: {self._matcher.get_error()}")
        self._left = limit
        self._taken: list[int] = []
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
        if not self._push(token):
            return False
        way_out = self._way_out(self._left - 1)
        if way_out is None:
            self._pop(1)
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
        self._push(token)
        self._left -= 1
        self._plan = plan

    def _push(self, token: int) -> bool:
        """Take a token if the grammar allows it."""
        if not self._matcher.consume_token(int(self._tokens.meaning(self._taken)[token])):
            return False
        self._taken.append(token)
        return True

    def _pop(self, count: int) -> None:
        """Take back the newest tokens."""
        self._matcher.rollback(count)
        del self._taken[len(self._taken) - count :]

    def _allowed(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        bits = np.unpackbits(packed, bitorder="little")
        return bits[self._tokens.meaning(self._taken)].astype(bool)

    def _way_out(self, limit: int) -> list[int] | None:
        """Tokens, the end token last, that complete the answer from here in at most `limit` of them before the end."""
        for order in self._tokens.orders:
            path: list[int] = []
            while len(path) <= limit:
                ranks = np.where(self._allowed(), order, np.inf)
                token = int(ranks.argmin())
                if ranks[token] == np.inf:
                    break
                if token in self._tokens.eos:
                    self._pop(len(path))
                    return [*path, token]
                if not self._push(token):
                    break
                path.append(token)
            self._pop(len(path))
        return None
