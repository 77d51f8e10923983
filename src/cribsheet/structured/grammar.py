"""Answers that must have a form: JSON schema, regular expression or one of several choices, complete within a limit.

A grammar alone keeps an answer valid only as far as it goes; cut off by the token limit it is invalid after all. So a
running answer always knows one way to finish within the tokens that are left, and takes that way as soon as the
model's own choice would lead to where none is known. Grammars are compiled and checked by llguidance.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher
from torch import Tensor

from cribsheet.corpus.formats.record import short
from cribsheet.errors import RequestError
from cribsheet.structured.grammar_tokens import GrammarTokens, Numbers

_Bits = np.ndarray[Any, np.dtype[np.uint8]]
TOO_DEEP = "The JSON schema is nested too deeply; give one of at most a hundred levels."
_SEPARATORS: Any = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
_BLOCK = 4096  # tokens that are looked at together
_EXPLORED = 100  # tokens within which a way out is looked for character by character
_LOOKS = 2000  # characters that are tried for it
_WORK = 4096  # tokens that are tried for a first way out, and again while all answers to one question are written
_MORE_WORK = 64  # those that each token of an answer adds; it is the engine's thread that tries them
_WALKED = 256  # tokens of a way out that only another order than the first finds
_SKIPPED = 4  # tokens of a known way out that may have been taken in another form
_HINTS = 4  # known answers that are tried as ways out
_TRIES = 3  # choices of the model that are weighed before the known way out is taken


@dataclass(frozen=True, slots=True)
class Grammar:
    """A checked grammar in llguidance's Lark form; make one with the class methods."""

    source: str
    what: str
    hints: tuple[str, ...] = ()  # short texts that fit it, if some are known

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Grammar:
        """JSON that fits a schema. Raises `RequestError` for a schema that is invalid or cannot be satisfied."""
        try:
            plain = json.loads(schema if isinstance(schema, str) else json.dumps(schema))
        except (TypeError, ValueError) as error:
            raise RequestError(f"The JSON schema cannot be used: {error}") from error
        except RecursionError:
            raise RequestError(TOO_DEEP) from None
        if not isinstance(plain, dict):
            raise RequestError(f"The JSON schema is {short(plain)}; give a mapping.")
        source = json.dumps({**plain, "x-guidance": _SEPARATORS})
        return cls(f"start: %json {source}", "JSON schema")._checked()

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that matches a regular expression from its first to its last character."""
        if not isinstance(pattern, str):
            raise RequestError(f"The regular expression is {pattern!r}; give a text.")
        try:
            made = json.loads(LLMatcher.grammar_from_regex(pattern))
        except UnicodeEncodeError as error:
            raise RequestError(f"The regular expression cannot be used: {error}") from error
        return cls(made["grammars"][0]["lark_grammar"], "regular expression")._checked()

    @classmethod
    def choices(cls, options: Sequence[str]) -> Grammar:
        """Exactly one of several texts."""
        listed = isinstance(options, Sequence) and not isinstance(options, (str, bytes)) and bool(options)
        if not listed or any(not isinstance(option, str) or not option for option in options):
            raise RequestError(f"The choices are {options!r}; give a list of non-empty texts.")
        either = "|".join(map(_quoted, options))
        shortest = tuple(sorted(set(options), key=len)[:_HINTS])
        return cls(f"start: /{either}/", "list of choices", shortest)._checked()

    def _checked(self) -> Grammar:
        try:
            trouble = LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(self.source))
        except UnicodeEncodeError as error:
            trouble = str(error)
        if trouble:
            raise RequestError(f"The {self.what} cannot be used: {trouble.strip().splitlines()[0]}")
        return self


@dataclass(slots=True)
class _Work:
    """How many tokens may still be tried in search of ways out; all answers to one question share it."""

    left: int


class Constraint:
    """The state of one answer in its grammar. Raises `RequestError` if no answer of `limit` tokens is found."""

    def __init__(self, grammar: Grammar, tokens: GrammarTokens, limit: int) -> None:
        self._tokens, self._grammar = tokens, grammar
        self._taken: list[int] = []
        self._matcher = self._made()
        self._gave_up = False  # whether the grammar turned out to be too much for the matcher
        self._left = limit
        self._work = _Work(_WORK)
        way_out = self._way_out(limit) or self._hinted(limit) or self._explored(limit)
        if way_out is None:
            for text in grammar.hints:
                written = tokens.decode(tokens.spelled(text))
                if written.lstrip(" ") != text.lstrip(" "):
                    raise RequestError(
                        f"The model's tokenizer cannot write {text!r}, which becomes {written!r}; use other characters."
                    )
            raise RequestError(
                f"No answer that fits the {grammar.what} was found within max_tokens={limit}; allow more tokens or "
                "loosen it."
            )
        self._plan = way_out
        self._work.left = _WORK

    def copy(self) -> Constraint:
        """The same state for another answer to the question; nothing is compiled or looked for again."""
        other = copy.copy(self)
        other._taken, other._plan = [*self._taken], [*self._plan]
        other._matcher = self._matcher.deep_copy()
        return other

    def decode(self, ids: Sequence[int], **how: Any) -> str:
        """The text that these tokens are in the grammar, as a tokenizer's `decode`."""
        return self._tokens.decode(ids, **how)

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
        way_out = self._kept(self._left - 1) or self._way_out(self._left - 1)
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
        self._work.left += _MORE_WORK
        for _ in range(_TRIES):
            token, logprobs = pick(logits)
            if self.accept(token):
                return token, logprobs
            logits = logits.clone()
            logits[token] = float("-inf")
            if torch.isneginf(logits).all():
                break
        token = self._plan[0]
        self._consume(token, self._plan[1:])
        return token, logprobs

    def _consume(self, token: int, plan: list[int]) -> None:
        self._push(token)
        self._left -= 1
        self._plan = plan

    def _push(self, token: int) -> bool:
        """Take a token if the grammar allows it."""
        if not self._matcher.consume_token(int(self._tokens.meaning(self._taken)[token])):
            self._pop(0)
            return False
        self._taken.append(token)
        return True

    def _pop(self, count: int) -> None:
        """Take back the newest tokens; a matcher that gave up, as some do where too much is possible, is made anew."""
        del self._taken[len(self._taken) - count :]
        if not self._matcher.is_error():
            self._matcher.rollback(count)
            return
        self._matcher, self._gave_up = self._made(), True
        for at, token in enumerate(self._taken):
            self._matcher.consume_token(int(self._tokens.meaning(self._taken[:at])[token]))

    def _made(self) -> LLMatcher:
        source = self._tokens.options + self._grammar.source
        matcher = LLMatcher(self._tokens.tokens, LLMatcher.grammar_from_lark(source), log_level=0)
        if matcher.is_error():
            raise RequestError(f"The {self._grammar.what} cannot be used: {matcher.get_error().splitlines()[0]}")
        return matcher

    def _bits(self) -> _Bits:
        return np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)

    def _allowed(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        bits = np.unpackbits(self._bits(), bitorder="little")
        return bits[self._tokens.meaning(self._taken)].astype(bool)

    def _kept(self, limit: int) -> list[int] | None:
        """The way out that was known before the newest token, as far as it still is one: within a text it mostly is."""
        for skipped in range(min(_SKIPPED, len(self._plan))):
            path = self._plan[skipped:]
            if len(path) - 1 <= limit and self._fits(path):
                return path
        return None

    def _fits(self, path: list[int]) -> bool:
        """Whether tokens, the end token last, complete the answer from here."""
        meant = self._tokens.meanings(self._taken, path)
        return self._matcher.validate_tokens(meant) == len(meant)

    def _way_out(self, limit: int) -> list[int] | None:
        """Tokens, the end token last, that complete the answer from here in at most `limit` of them before the end."""
        for number, order in enumerate(self._tokens.orders):
            longest = min(limit, _WALKED) if number else limit
            path = self._walked(longest, lambda order=order: self._first(order))  # type: ignore[misc]
            if path or self._gave_up:
                return path
        return None

    def _walked(self, limit: int, choose: Callable[[], int | None]) -> list[int] | None:
        """The tokens that `choose` names one after the other, if they end the answer within the limit."""
        path: list[int] = []
        while len(path) <= limit and self._work.left > 0:
            self._work.left -= 1
            token = choose()
            if token in self._tokens.eos and self._matcher.is_accepting():
                self._pop(len(path))
                return [*path, token]
            if token is None or token in self._tokens.eos or not self._push(token):
                break
            path.append(token)
        self._pop(len(path))
        return None

    def _first(self, order: Numbers) -> int | None:
        """The first token of an order that the grammar allows."""
        bits, meaning = self._bits(), self._tokens.meaning(self._taken)
        for start in range(0, len(order), _BLOCK):
            places = meaning[order[start : start + _BLOCK]]
            allowed = bits[places >> 3] >> (places & 7) & 1
            at = int(allowed.argmax())
            if allowed[at]:
                return int(order[start + at])
        return None

    def _hinted(self, limit: int) -> list[int] | None:
        """The way out that spells a text which is known to fit."""
        for text in self._grammar.hints:
            path = [*self._tokens.spelled(text), min(self._tokens.eos)]
            if len(path) - 1 <= limit and self._fits(path):
                return path
        return None

    def _explored(self, limit: int) -> list[int] | None:
        """A way out that takes, wherever one is known, a single character that leads to something new.

        The way out of what a fixed order would write for ever: the part of an address before its "@", for one.
        """
        seen: set[bytes] = set()
        looks = 0

        def choose() -> int | None:
            nonlocal looks
            usual = self._first(self._tokens.orders[0])
            seen.add(self._bits().tobytes())
            if usual in self._tokens.eos:
                return usual
            allowed = self._allowed()
            for token in self._tokens.characters:
                if allowed[token] and looks < _LOOKS and self._push(token):
                    looks += 1
                    state = self._bits().tobytes()
                    self._pop(1)
                    if state not in seen:
                        return token
                if self._gave_up:
                    return None
            return usual

        return self._walked(min(limit, _EXPLORED), choose)


def _quoted(text: str) -> str:
    """A text as a regular expression that matches nothing else."""
    return "".join(c if c.isalnum() or ord(c) > 0xFFFF else f"\\x{{{ord(c):x}}}" for c in text)
