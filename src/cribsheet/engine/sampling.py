"""How the next token is chosen: OpenAI's parameters, checked before work starts, and one sampler per sequence.

Whoever has no wish but a temperature chooses together with all others like that: on the device, in a few calls that are
waited for once, where a vocabulary per sequence and token would have to be brought over.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from cribsheet.corpus.formats.record import short
from cribsheet.errors import EngineError, RequestError
from cribsheet.structured.grammar import Grammar

MAX_STOPS = 1000
MAX_TOP_LOGPROBS = 20
_SORTED = 1024  # tokens that are put in order first
_NONE = -1  # token of a row of which nothing can be drawn, as the model computed no numbers
_HIGHEST = 2**31 - 1  # id that a token of any vocabulary may have


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Settings of one answer, named as in OpenAI's API. Greedy unless `temperature` is above 0.

    max_tokens
        longest answer in tokens; never more than the model's window leaves.
    stop
        the answer ends before the first of these strings (at most 1000), which is cut off; special tokens count too.
        It may cut an answer with a form short.
    logprobs
        how many alternatives to report per token, 0 for the chosen token alone; `None` reports nothing.
    seed
        makes sampling repeatable, whatever else runs at the same time.
    grammar
        the form that the answer must have (`structured/grammar.py`); it is then complete within `max_tokens`.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    logprobs: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: Grammar | None = None
    _biases: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False, compare=False)  # ids, values

    def __post_init__(self) -> None:
        """Refuse values out of range with `RequestError`."""
        if not isinstance(self.stop, Iterable) or isinstance(self.stop, (bytes, Mapping)):
            raise RequestError(f"stop is {self.stop!r}; give a string or a list of strings.")
        object.__setattr__(self, "stop", self.stops)  # whatever can be read only once is read here
        stop = self.stops
        _within("max_tokens", self.max_tokens, 1, math.inf, whole=True)
        _within("temperature", self.temperature, 0, 100)
        _within("top_p", self.top_p, 0, 1)
        _within("top_k", self.top_k, 0, math.inf, whole=True)
        _within("frequency_penalty", self.frequency_penalty, -2, 2)
        _within("presence_penalty", self.presence_penalty, -2, 2)
        _within("the number of stop strings", len(stop), 0, MAX_STOPS)
        if self.logprobs is not None:
            _within("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS, whole=True)
        if self.seed is not None:
            _within("seed", self.seed, -math.inf, math.inf, whole=True)
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"logit_bias is {self.logit_bias!r}; give a mapping from token id to bias.")
        object.__setattr__(self, "_biases", _as_tensors(self.logit_bias))
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise RequestError(f"grammar is {self.grammar!r}; make one with Grammar.json_schema, .regex or .choices.")
        if any(not isinstance(text, str) or not text for text in stop):
            raise RequestError(f"stop holds an empty or non-text entry: {stop!r}; give non-empty strings.")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, one given alone included."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def is_plain(self) -> bool:
        """Whether nothing but a temperature shapes what is chosen from."""
        shaped = self.frequency_penalty or self.presence_penalty or self.logit_bias or self.grammar
        return not (shaped or (self.temperature and (self.top_k or self.top_p < 1)))


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's text and natural-log probability, with the alternatives that were asked for, best first."""

    token_id: int
    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


class Choice(NamedTuple):
    """A token, its natural-log probability before temperature, and the best that were asked for with theirs."""

    token: int
    logprob: float
    best: Sequence[tuple[int, float]]

    def check(self) -> None:
        """Raise `EngineError` where there was nothing to choose from."""
        _check(self.token)

    def described(self, text_of: Callable[[int], str]) -> TokenLogprob:
        """The reportable form, in texts of tokens as they are here; what a grammar forbids is left out."""
        top = tuple((text_of(number), value) for number, value in self.best if value > -math.inf)
        return TokenLogprob(self.token, text_of(self.token), self.logprob, top)


class Sampler:
    """Chooses tokens for one sequence; its random numbers depend on its seed alone."""

    def __init__(self, params: SamplingParams, choice: int = 0) -> None:
        self.params = params
        self._counts: Counter[int] = Counter()
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed((params.seed + choice) % (1 << 63))

    def number(self) -> float:
        """The next of its random numbers, at least 0 and below 1."""
        return float(torch.rand((), generator=self._generator))

    def pick(self, logits: Tensor) -> tuple[int, Tensor]:
        """The next token and the log-probabilities (V,) float32 that it was drawn from, before temperature.

        Raises `EngineError` where there is nothing to choose from.
        """
        logits = self._penalised(logits.float().cpu())
        logprobs = logits.log_softmax(-1)
        token = int(_likeliest(logits)) if self.params.temperature == 0 else self._draw(logits)
        _check(token)
        return token, logprobs

    def took(self, token: int) -> None:
        """Count a token towards the penalties."""
        self._counts[token] += 1

    def _penalised(self, logits: Tensor) -> Tensor:
        params = self.params
        if self._counts and (params.frequency_penalty or params.presence_penalty):
            ids = torch.tensor(list(self._counts))
            counts = torch.tensor(list(self._counts.values()), dtype=torch.float32)
            logits = logits.clone()
            logits[ids] -= params.frequency_penalty * counts + params.presence_penalty
        if params._biases is not None:
            ids, biases = params._biases
            if (highest := int(ids.max())) >= len(logits):
                raise RequestError(f"logit_bias names token {highest}; use ids from 0 to {len(logits) - 1}.")
            logits = logits.index_add(0, ids, biases)
        return logits

    def _draw(self, logits: Tensor) -> int:
        params = self.params
        probabilities = _warmed(logits, params.temperature)
        if 0 < params.top_k < len(probabilities):
            probabilities = _best(probabilities, probabilities.topk(params.top_k).values)
        if params.top_p < 1:
            probabilities = _best(probabilities, _nucleus(probabilities, params.top_p))
        return int(_drawn(probabilities, torch.tensor([self.number()])))


def choose(logits: Tensor, samplers: Sequence[Sampler]) -> list[Choice]:
    """What samplers that are plain take, each of its row of logits (B, V), waited for once."""
    rows = logits.float() if logits.is_cuda else logits.float().cpu()  # Apple's GPUs have no double precision
    tokens = _likeliest(rows)
    warm = [row for row, each in enumerate(samplers) if each.params.temperature]
    if warm:
        temperatures = torch.tensor([[samplers[row].params.temperature] for row in warm], device=rows.device)
        numbers = torch.tensor([[samplers[row].number()] for row in warm], device=rows.device)
        tokens[warm] = _drawn(_warmed(rows[warm], temperatures), numbers)[:, 0]
    if all(each.params.logprobs is None for each in samplers):
        return [Choice(token, math.nan, ()) for token in tokens.tolist()]
    return describe(tokens, rows.log_softmax(-1), [each.params.logprobs or 0 for each in samplers])


def describe(tokens: Tensor, logprobs: Tensor, wanted: Sequence[int]) -> list[Choice]:
    """Tokens (B,) that were taken from log-probabilities (B, V), with as many of the best as are wanted of each row."""
    best = logprobs.topk(min(max(wanted), logprobs.shape[1]))
    told = torch.cat([logprobs.gather(1, tokens[:, None].clamp(min=0)), best.values], 1).tolist()
    every = zip(tokens.tolist(), told, best.indices.tolist(), wanted, strict=True)
    return [
        Choice(token, own, list(zip(ids, values, strict=True))[:count]) for token, (own, *values), ids, count in every
    ]


def _check(token: int) -> None:
    if token == _NONE:
        raise EngineError("The model's probabilities are no numbers (NaN); load it with dtype='float32'.")


def _likeliest(logits: Tensor) -> Tensor:
    """The token (...,) of the highest of logits (..., V); or -1 (`_NONE`) where one is no number."""
    tokens = logits.argmax(-1, keepdim=True)  # of what is no number, if there is any
    return tokens.where(~logits.gather(-1, tokens).isnan(), _NONE)[..., 0]


def _warmed(logits: Tensor, temperature: Tensor | float) -> Tensor:
    """Probabilities (..., V): from the maximum and with a floor, or temperatures near 0 would divide to infinities."""
    floor = temperature.clamp(min=1e-6) if isinstance(temperature, Tensor) else max(temperature, 1e-6)
    return ((logits - logits.amax(-1, keepdim=True)) / floor).softmax(-1)


def _drawn(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """Which of probabilities (..., V) random numbers (..., 1) between 0 and 1 fall on, never on zeros; or -1 (`_NONE`).

    In double precision, as sums of many small numbers in another order must not come to another token.
    """
    sums = probabilities.double().cumsum(-1)
    places = torch.searchsorted(sums, numbers.double() * sums[..., -1:], right=True)
    whole = sums[..., -1:]  # zero where `_best` found nothing among what is no number
    return places.clamp(max=probabilities.shape[-1] - 1).where(whole.isfinite() & (whole > 0), _NONE)


def _nucleus(probabilities: Tensor, share: float) -> Tensor:
    """The largest of them (N,), in order, until they hold that share: at least one, for 0 too.

    They are nearly always among the first thousand; to sort a whole vocabulary takes ten times as long.
    """
    wanted, size = share * probabilities.sum(), len(probabilities)
    for count in (min(_SORTED, size), size):
        ordered = probabilities.topk(count).values
        inside = int((ordered.cumsum(0) - ordered < wanted).sum())
        if inside < count:
            break
    return ordered[: max(1, inside)]


def _best(probabilities: Tensor, kept: Tensor) -> Tensor:
    """Zeros but for the values `kept`, in order the largest; of equals the first, as `argmax` does."""
    above, equal = probabilities > kept[-1], probabilities == kept[-1]
    first = equal & (equal.cumsum(0) <= len(kept) - above.sum())
    return probabilities.where(above | first, 0.0)


def _as_tensors(biases: Mapping[int, float]) -> tuple[Tensor, Tensor] | None:
    """Token ids (N,) int64 and what is added to their logits (N,) float32, made once for all tokens and answers."""
    if not biases:
        return None
    for token, bias in biases.items():
        if isinstance(token, int) and token > _HIGHEST:  # perhaps of more digits than can be written
            raise RequestError(f"logit_bias names a token above {_HIGHEST}; use token ids.")
        if not (text := str(token)).isdecimal() or len(text) > 10 or int(text) > _HIGHEST:
            raise RequestError(f"logit_bias names token {short(token)}; use token ids, from 0 to {_HIGHEST}.")
        _within(f"logit_bias of token {token}", bias, -100, 100)
    return torch.tensor([int(token) for token in biases]), torch.tensor([float(bias) for bias in biases.values()])


def _within(name: str, value: float, low: float, high: float, *, whole: bool = False) -> None:
    fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if fits and low <= value <= high:  # only whole numbers may be without an end, and not-a-number is within nothing
        return
    lower = "" if low == -math.inf else f" of at least {low:g}"
    upper = "" if high == math.inf else f" and at most {high:g}"
    is_long = isinstance(value, int) and abs(value) >= 10**60  # perhaps longer than can be written
    shown = "a number of more than 60 digits" if is_long else repr(value)
    raise RequestError(f"{name} is {shown}; use a {'whole ' if whole else ''}number{lower}{upper}.")
