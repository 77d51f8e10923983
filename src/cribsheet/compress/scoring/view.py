"""What a scorer sees, with every shape given once, and the one method that it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Reads:
    """What is read after each chunk for a scorer: the `task` with its examples, then a `repetition` of the chunk."""

    task: bool = False
    repetition: bool = False


@dataclass(frozen=True, slots=True)
class LayerView:
    """One layer of the cache just after a chunk was read, and how the guide looked at it.

    Letters: `H` query heads, `K` key/value heads, `S` cached tokens (those kept before, then the chunk), `T` guide
    rows, `D` head size. The batch is one. Guide tokens stand after the `S` cached ones and are not among them.

    keys, values
        (K, S, D), keys rotated for the positions they had during the read.
    positions
        (K, S) index of each token in the corpus, int64; ascending along a head.
    queries
        (H, T, D) rotated queries of the guide's tokens; T is 0 for scorers that read nothing.
    lse
        (H, T) float32 log-sum-exp of each guide row over everything it saw: the S tokens and the guide up to itself.
    repeated
        how many of the last guide rows are the chunk again, as the answer to the turn that asks to repeat it.
    carried
        (K, P) or (N, K, P) float32 scores of the first P tokens from when they were kept; P is 0 in the first chunk.
    scale
        factor of the attention logits, normally D ** -0.5.
    softcap
        bound of the attention logits in families that have one (see `attention.capped`).
    layer
        index of the layer, from 0.
    seed
        seed of the build, for scorers that draw; with layer and position it is all their randomness, so that an
        interrupted build goes on as if it had not been.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    queries: Tensor
    lse: Tensor
    carried: Tensor
    scale: float
    layer: int
    seed: int = 0
    softcap: float | None = None
    repeated: int = 0


class Scorer(Protocol):
    """How much each cached token matters, per key/value head.

    `reads` says what is read after each chunk for this scorer; by its attention the chunk is scored.
    `pins_preamble` says whether the template's preamble (attention sinks among it) is always kept; if heads share a
    budget, it is the first token only, and the rest of the preamble competes.

    A scorer may also have `needs(view)`, scores (N, K, S) of zero or more. It is asked instead where heads share a
    budget: of each need a token counts less in each further head (`selection.spread_out`), and its best need counts.
    """

    reads: ClassVar[Reads]
    pins_preamble: ClassVar[bool]

    def score(self, view: LayerView) -> Tensor:
        """Scores (K, S), higher is more important; finite float32."""
        ...
