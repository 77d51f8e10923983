"""The loop that condenses a corpus: for each chunk read, score, keep, move.

After each chunk the guide is read, and every token cached so far, old or new, competes for the budget that the part
read until then has earned (FINCH, TACL 2024; arXiv 2503.04973). Memory is bounded by chunk and budget, never by the
corpus. One chunk as long as the corpus is the single-pass form.

Letters as in `scoring/view.py`: `K` key/value heads, `S` cached tokens, `P` kept tokens, `D` head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cribsheet.attention.cache import ReadingLayer
from cribsheet.attention.prefix import LayerPrefix
from cribsheet.compress.archiving import Archiving
from cribsheet.compress.checkpoint import Checkpoint
from cribsheet.compress.correction import refitted
from cribsheet.compress.keeping import Turns, as_prefix, condense, kept_tokens, of_chosen
from cribsheet.compress.kept import Kept, State
from cribsheet.compress.progress import Listener, Steps, shown
from cribsheet.compress.scoring import SCORERS, LayerView, Scorer
from cribsheet.compress.selection import (
    Chosen,
    apportion,
    best_of_all,
    keep_best,
    keep_counts,
    keep_top,
    present,
    split_like,
    spread,
    take,
)
from cribsheet.model.backbone import Backbone
from cribsheet.prompt.chunks import Chunk, TokenizedCorpus
from cribsheet.sheet.archive.writer import ArchiveWriter
from cribsheet.vocabulary import ABSENT, Allocation, Correction

Tell = Callable[[int], None]  # is told how many tokens of the corpus were read, also within a chunk
Step = Callable[[], None]  # is called after each part of a chunk's work
Keep = Callable[[Chunk, Sequence[ReadingLayer]], None]  # is given each chunk as all layers read it


@dataclass(frozen=True, slots=True)
class Reading:
    """What a build does with each chunk; all counts are in tokens.

    After a chunk, scorers that ask for the task read `guide` (T,); those that ask for a repetition read `repeat` (R,),
    the turn that asks for it, and the chunk as the answer, without the `preamble_tokens` that the corpus begins with.
    What the scorer does not ask for is empty.
    `budget` is kept per layer and head when everything was read, on average over the heads if the `allocation` is
    adaptive, and then no more than `most` and no fewer than `least` by any head; the first `pinned` tokens stay in all.
    If it is adaptive, what the scorer tells apart as needs is `spread` over the heads, or its one score counts.
    If it is profiled, half of it goes where the scores are highest, and of the other half `weigh` says what each head
    of the layers that see everything keeps, the mean being 1.
    With a `correction`, what is kept is made to stand for what was dropped.
    """

    scorer: Scorer
    guide: Tensor
    repeat: Tensor
    budget: int
    chunk_tokens: int
    preamble_tokens: int
    pinned: int
    allocation: Allocation = "uniform"
    spread: bool = True
    weigh: Callable[[], Sequence[float]] = list
    correction: Correction = "none"
    least: int = 1
    most: int = 0
    seed: int = 0

    def on(self, corpus: TokenizedCorpus) -> Reading:
        """The same, but where all of a corpus is kept there is nothing to score, to share or to correct."""
        if self.budget < len(corpus):
            return self
        nothing = self.guide[:0]
        scorer = SCORERS["recent"]()
        return replace(self, scorer=scorer, guide=nothing, repeat=nothing, allocation="uniform", correction="none")

    def behind(self, chunk: Chunk) -> Tensor:
        """The tokens (T,) that are read behind a chunk to score it."""
        return torch.cat([self.guide, self.repeat, chunk.ids[len(chunk.ids) - self.repeated(chunk) :]])

    def repeated(self, chunk: Chunk) -> int:
        """How many tokens at the end of the guide are those of the chunk, for scorers that ask for a repetition."""
        return min(len(chunk.ids), max(0, chunk.stop - self.preamble_tokens)) if self.scorer.reads.repetition else 0


def read_through(
    backbone: Backbone,
    corpus: TokenizedCorpus,
    how: Reading,
    *,
    progress: Listener = None,
    checkpoint: Checkpoint | None = None,
    archive: ArchiveWriter | None = None,
) -> State:
    """All that is kept of a corpus, going on from a checkpoint if there is one, which remembers each chunk.

    All that was read goes to an `archive`.
    """
    start = checkpoint.load(backbone.device, backbone.num_layers, len(corpus)) if checkpoint else None
    state = start or State(0, nothing_kept(backbone))
    if archive:
        archive.begin() if checkpoint is None or start is None else archive.resume(start.done, checkpoint.archive)
    keep_all = Archiving(backbone, archive, state.done) if archive else None
    with shown(progress) as told:
        tell = None if told is None else lambda read: told(read, len(corpus))
        if tell is not None:
            tell(state.done)
        for state in compress(backbone, corpus, how, start, tell, keep_all):
            if checkpoint:
                checkpoint.save(state, archive.digest if archive else "")
            if tell is not None:
                tell(state.done)
    return state


def compress(
    backbone: Backbone,
    corpus: TokenizedCorpus,
    how: Reading,
    start: State | None = None,
    tell: Tell | None = None,
    keep_all: Keep | None = None,
) -> Iterator[State]:
    """Condense a corpus, yielding the state after each chunk; `start` continues from where another run stopped.

    `tell` hears of chunks that take long before they are done; `keep_all` is given all that was read of each.
    """
    done, kept = (start.done, start.kept) if start else (0, nothing_kept(backbone))
    how = how.on(corpus)
    for chunk in corpus.split(how.chunk_tokens):
        if chunk.start < done:
            continue
        step = steps(backbone, chunk, how, tell)
        guide, size = how.behind(chunk), kept_tokens(backbone, kept)
        layers = backbone.read(as_prefix(backbone, kept), size, chunk.ids, guide, step)
        if keep_all is not None:
            keep_all(chunk, layers)
        budget = earned_budget(how.budget, chunk.stop, len(corpus), how.pinned)
        indices = places(kept, chunk)
        scores = [
            score(backbone, layers[n], old, indices[n], how, how.repeated(chunk), n, step) for n, old in enumerate(kept)
        ]
        keep = choose(backbone, scores, indices, how, budget)
        back = Turns(backbone, size, size + len(chunk.ids), -1)
        turn = [back.of(number) for number in range(len(layers))]
        kept = [condense(*each) for each in zip(layers, kept, indices, scores, keep, turn, strict=True)]
        if how.correction == "refit":
            kept = correct(backbone, layers, kept, how.repeated(chunk), step)
        yield State(chunk.stop, kept)


def steps(backbone: Backbone, chunk: Chunk, how: Reading, tell: Tell | None) -> Step | None:
    """What is called after each part of a chunk's work: reading, scoring, correcting a layer."""
    if tell is None:
        return None
    parts = backbone.num_layers * (2 if how.correction == "none" else 3)
    return Steps(tell, chunk.start, len(chunk.ids), parts, backbone.wait)


def cut(backbone: Backbone, state: State, how: Reading) -> State:
    """What a reading of a smaller budget keeps of a finished one, chosen again by the scores that it was kept by.

    Of a corpus that was read in one chunk it is what a reading of that budget would have kept, token for token: a token
    is among the best of fewer only if it was among the best of more. Where the corpus was read in several chunks, each
    was read on what the larger budget had kept of those before it.
    """
    kept = state.kept
    keep = choose(backbone, [layer.scores for layer in kept], [layer.indices for layer in kept], how, how.budget)
    return State(state.done, [_chosen(layer, indices) for layer, indices in zip(kept, keep, strict=True)])


def _chosen(layer: Kept, keep: Chosen) -> Kept:
    """Of a layer's kept tokens those that were chosen."""
    keys, values = take(layer.keys, keep.places), take(layer.values, keep.places)
    return Kept(keys, values, *of_chosen(keep, layer.indices, layer.scores))


def places(kept: Sequence[Kept], chunk: Chunk) -> list[Tensor]:
    """(K, S) index in the corpus of each old and new token, by layer."""
    fresh = torch.arange(chunk.start, chunk.stop, device=kept[0].indices.device)
    return [torch.cat([old.indices, fresh.expand(old.indices.shape[0], -1)], 1) for old in kept]


def score(
    backbone: Backbone,
    read: ReadingLayer,
    old: Kept,
    indices: Tensor,
    how: Reading,
    repeated: int,
    layer: int,
    step: Step | None = None,
) -> Tensor:
    """Scores (K, S) of old and new tokens of one layer; in a sliding-window layer the latest tokens are the best.

    `indices` (K, S) are their places in the corpus; of the guide so many rows are a repetition. Where heads share a
    budget and the scorer tells several needs apart, they are (N, K, S).
    """
    if step is not None:
        step()
    if backbone.windows[layer] is not None:
        return indices.float()
    view = LayerView(
        keys=torch.cat([read.prefix.padded_keys(), read.chunk_keys], 1),
        values=torch.cat([old.values, read.chunk_values], 1),
        positions=indices,
        queries=read.guide_queries,
        lse=read.guide_lse,
        carried=old.scores,
        scale=backbone.scale,
        layer=layer,
        seed=how.seed,
        softcap=backbone.softcap,
        repeated=repeated,
    )
    needs: Callable[[LayerView], Tensor] | None = getattr(how.scorer, "needs", None)
    if needs and how.allocation == "profiled":
        scores = needs(view).amax(0)
    elif needs and how.spread and how.allocation == "adaptive":
        scores = needs(view)
    else:
        scores = how.scorer.score(view)
    return scores.masked_fill(indices == ABSENT, float("-inf"))


def choose(
    backbone: Backbone,
    scores: Sequence[Tensor],
    indices: Sequence[Tensor],
    how: Reading,
    budget: int,
) -> list[Chosen]:
    """Which of its S tokens each head of each layer keeps.

    Scores (K, S), or (N, K, S) for N needs, and corpus indices (K, S) are by layer. The first tokens of the corpus stay
    if they are pinned. A layer with a sliding window has no choice: it keeps the latest tokens that the next one can
    see. Needs are spread over the heads here, of the tokens that are left: what is kept as their scores is not.
    """
    found: dict[int, Chosen] = {}
    for number, window in enumerate(backbone.windows):
        if window is not None:
            found[number] = _alike(keep_top(scores[number], min(window - 1, scores[number].shape[1])))
    wanted, standing = ([part[number] for number in backbone.full] for part in (scores, indices))
    token = torch.cat([layer.flatten() for layer in standing])
    if wanted[0].dim() == 3:
        needs = [torch.cat([layer[n].flatten() for layer in wanted]) for n in range(len(wanted[0]))]
        flat = torch.stack([spread(need, token) for need in needs]).amax(0)
    else:
        flat = torch.cat([layer.flatten() for layer in wanted])
    flat = flat.masked_fill((token >= 0) & (token < how.pinned), float("inf"))
    full = dict(zip(backbone.full, split_like(flat, standing), strict=True))
    shortest = min(layer.shape[1] for layer in full.values())
    if how.allocation == "uniform":
        found |= _keep_top_of_each(full, min(budget, shortest))
    elif how.allocation == "profiled":
        layers = list(full.values())
        found |= dict(zip(full, keep_counts(layers, _counts(layers, standing, how, budget)), strict=True))
    else:
        least = min(shortest, budget, how.least)
        best = keep_best(list(full.values()), budget, least=least, most=max(budget, how.most))
        found |= dict(zip(full, best, strict=True))
    return [found[number] for number in range(len(scores))]


def _counts(scores: Sequence[Tensor], standing: Sequence[Tensor], how: Reading, budget: int) -> list[list[int]]:
    """How many of its tokens (K, S) each head of each layer keeps: half by its weight, half by its scores."""
    most, total = max(budget, how.most), budget * sum(len(layer) for layer in scores)
    weights = how.weigh()  # while a GPU still reads
    both: list[list[int]] = torch.stack([present(standing), best_of_all(scores, total)]).tolist()  # a GPU is waited for
    limits = [min(limit, most) for limit in both[0]]
    shares = [(weight + won / budget) / 2 for weight, won in zip(weights, both[1], strict=True)]
    counts = apportion(shares, limits, total, least=min(budget, max(how.least, how.pinned)))
    heads = len(standing[0])
    return [counts[first : first + heads] for first in range(0, len(counts), heads)]


def _alike(places: Tensor) -> Chosen:
    """As many of all heads (K, P)."""
    return Chosen(places, (places.shape[1],) * len(places))


def _keep_top_of_each(scores: dict[int, Tensor], budget: int) -> dict[int, Chosen]:
    """`keep_top` of several layers (K, S), in one go where they are of one length, as they nearly always are."""
    if len({layer.shape for layer in scores.values()}) > 1:
        return {number: _alike(keep_top(layer, budget)) for number, layer in scores.items()}
    kept = keep_top(torch.stack(list(scores.values())), budget)
    return {number: _alike(layer) for number, layer in zip(scores, kept, strict=True)}


def correct(
    backbone: Backbone,
    layers: Sequence[ReadingLayer],
    kept: Sequence[Kept],
    repeated: int,
    step: Step | None = None,
) -> list[Kept]:
    """What is kept, refitted in the layers that see everything; a sliding window drops only what nobody sees."""
    found, size = list(kept), kept_tokens(backbone, kept)
    for number in backbone.full:
        if step is not None:
            step()
        found[number] = refitted(backbone, layers[number], kept[number], size, repeated, number)
    return found


def earned_budget(budget: int, read: int, total: int, pinned: int) -> int:
    """Tokens to keep once `read` of `total` tokens were read: the preamble, and the budget in proportion."""
    if read >= total:
        return budget
    share = (budget - pinned) * max(0, read - pinned) / max(1, total - pinned)
    return max(1, min(read, pinned + round(share)))


def nothing_read(backbone: Backbone) -> list[LayerPrefix]:
    """The prefix of what is read first, of no tokens; layers with sliding windows have them."""
    return as_prefix(backbone, nothing_kept(backbone))


def nothing_kept(backbone: Backbone) -> list[Kept]:
    """What every layer keeps before the first chunk."""
    shape = (backbone.kv_heads, 0, backbone.head_size)
    device = backbone.device
    empty = Kept(
        torch.empty(shape, device=device),
        torch.empty(shape, dtype=backbone.dtype, device=device),
        torch.empty(shape[:2], dtype=torch.int64, device=device),
        torch.empty(shape[:2], device=device),
    )
    return [empty] * backbone.num_layers
