"""The loop that condenses a corpus: for each chunk read, score, keep, move.

After each chunk the guide is read, and every token cached so far, old or new, competes for the budget that the part
read until then has earned (FINCH, TACL 2024; arXiv 2503.04973). Memory is bounded by chunk and budget, never by the
corpus. One chunk as long as the corpus is the single-pass form.

Letters as in `scoring/view.py`: `K` key/value heads, `S` cached tokens, `P` kept tokens, `D` head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cribsheet.backbone import Backbone
from cribsheet.chunks import Chunk, TokenizedCorpus
from cribsheet.errors import BudgetError
from cribsheet.prefix import LayerPrefix, ReadingLayer
from cribsheet.rope import rotate
from cribsheet.scoring import LayerView, Scorer
from cribsheet.selection import keep_top, take

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Kept:
    """What one layer keeps: keys (K, P, D) *before* rotation in float32, values (K, P, D), indices and scores (K, P).

    Unrotated keys can be given any position without adding up rounding errors from chunk to chunk.
    """

    keys: Tensor
    values: Tensor
    indices: Tensor
    scores: Tensor

    def at(self, positions: Tensor, inv_freq: Tensor) -> Tensor:
        """Keys (K, P, D) rotated for `positions` (P,), in the dtype of the values."""
        return rotate(self.keys, positions, inv_freq).to(self.values.dtype)


def compress(
    backbone: Backbone,
    corpus: TokenizedCorpus,
    guide: Tensor,
    repeat: Tensor,
    *,
    scorer: Scorer,
    budget: int,
    chunk_tokens: int,
    progress: Progress | None = None,
    kept: list[Kept] | None = None,
    done: int = 0,
) -> Iterator[tuple[int, list[Kept]]]:
    """Condense `corpus` to `budget` tokens per layer and head; yields (tokens read, what is kept) after each chunk.

    `guide` (T,) is read after each chunk by scorers that ask for the task, `repeat` (R,) and the chunk again by
    scorers that ask for a repetition. `kept` and `done` continue an interrupted run.
    """
    kept = kept or _nothing(backbone)
    for chunk in corpus.split(chunk_tokens):
        if chunk.start < done:
            continue
        layers = read(backbone, kept, chunk, _guide(scorer, guide, repeat, chunk))
        earned = earned_budget(budget, chunk.stop, len(corpus), corpus.head_tokens if scorer.pins_head else 0)
        pinned = corpus.head_tokens if scorer.pins_head else 0
        kept = [
            condense(backbone, number, old, layer, chunk, scorer, earned, pinned)
            for number, (old, layer) in enumerate(zip(kept, layers, strict=True))
        ]
        if progress is not None:
            progress(chunk.stop, len(corpus))
        yield chunk.stop, kept


def read(backbone: Backbone, kept: Sequence[Kept], chunk: Chunk, guide: Tensor) -> list[ReadingLayer]:
    """One forward pass over `[kept; chunk; guide]`, the kept keys at compact positions 0..P-1."""
    size = kept[0].keys.shape[1]
    positions = torch.arange(size, device=backbone.device)
    prefix = [LayerPrefix(layer.at(positions, backbone.inv_freq), layer.values) for layer in kept]
    return backbone.read(prefix, size, chunk.ids, guide)


def condense(
    backbone: Backbone,
    number: int,
    old: Kept,
    read: ReadingLayer,
    chunk: Chunk,
    scorer: Scorer,
    budget: int,
    pinned: int,
) -> Kept:
    """Score old and new tokens of one layer together and keep the best `budget`; the first `pinned` always stay."""
    size, heads = old.keys.shape[1], old.keys.shape[0]
    device = read.chunk_keys.device
    keys = torch.cat([read.prefix_keys[0], read.chunk_keys], 1)
    values = torch.cat([old.values, read.chunk_values], 1)
    fresh = torch.arange(chunk.start, chunk.stop, device=device).expand(heads, -1)
    indices = torch.cat([old.indices, fresh], 1)
    view = LayerView(
        keys, values, indices, read.guide_queries, read.guide_lse, old.scores, backbone.scale, number
    )
    scores = scorer.score(view).float()
    ranked = scores.masked_fill(indices < pinned, float("inf"))
    keep = keep_top(ranked, min(budget, keys.shape[1]))
    new_positions = torch.arange(size, size + len(chunk.ids), device=device)
    unrotated = torch.cat([old.keys, rotate(read.chunk_keys, -new_positions, backbone.inv_freq)], 1)
    return Kept(take(unrotated, keep), take(values, keep), take(indices, keep), take(scores, keep))


def earned_budget(budget: int, read: int, total: int, pinned: int) -> int:
    """Tokens to keep once `read` of `total` tokens were read: the head, and the budget in proportion."""
    if read >= total:
        return budget
    share = (budget - pinned) * max(0, read - pinned) / max(1, total - pinned)
    return max(1, min(read, pinned + round(share)))


def check_window(backbone: Backbone, budget: int, chunk_tokens: int, guide_tokens: int) -> None:
    """Refuse a chunk that would not fit the model's window on top of what is kept. Raises `BudgetError`."""
    needed = budget + chunk_tokens + guide_tokens
    if needed > backbone.window:
        room = backbone.window - budget - guide_tokens
        way_out = f"pass chunk_tokens of at most {room}" if room > 0 else "lower the budget or shorten the task"
        raise BudgetError(
            f"A budget of {budget}, a chunk of {chunk_tokens} and a guide of {guide_tokens} tokens need {needed} "
            f"positions, but the model's window is {backbone.window}; {way_out}."
        )


def _guide(scorer: Scorer, guide: Tensor, repeat: Tensor, chunk: Chunk) -> Tensor:
    if scorer.guide == "task":
        return guide
    return torch.cat([repeat, chunk.ids]) if scorer.guide == "repeat" else guide[:0]


def _nothing(backbone: Backbone) -> list[Kept]:
    shape = (backbone.kv_heads, 0, backbone.head_size)
    device = backbone.device
    empty = Kept(
        torch.empty(shape, device=device),
        torch.empty(shape, dtype=backbone.dtype, device=device),
        torch.empty(shape[:2], dtype=torch.int64, device=device),
        torch.empty(shape[:2], device=device),
    )
    return [empty] * backbone.num_layers
