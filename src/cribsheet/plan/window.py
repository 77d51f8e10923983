"""What fits the model's window: how much is read at once, and how much a head may keep."""

from __future__ import annotations

from cribsheet.errors import BudgetError
from cribsheet.model.backbone import Backbone

QUESTION_SHARE = 0.25  # of the window that no head fills
_CHUNK_CPU, _CHUNK_ACCELERATOR = 2048, 8192  # tokens at which matrix products run near their best


def usual_chunk(backbone: Backbone) -> int:
    """How many tokens are read at once where they fit."""
    return _CHUNK_CPU if backbone.device.type == "cpu" else _CHUNK_ACCELERATOR


def chunk_that_fits(
    backbone: Backbone, corpus_tokens: int, keep: int, guide_tokens: int, wanted: int | None, *, twice: bool
) -> int:
    """How many tokens to read at once, so that kept tokens, chunk and guide fit the window.

    `twice` says that a chunk is read and then repeated. Raises `BudgetError` if none fits, or not what is wanted.
    """
    room = (backbone.window - keep - guide_tokens) // (2 if twice else 1)
    beside = (
        f"The budget of {keep} tokens leaves"
        if not guide_tokens
        else (f"The budget of {keep} and the guide of {guide_tokens} tokens leave")
    )
    if room < 1:
        raise BudgetError(
            f"{beside} no room for a chunk in the model's window of {backbone.window}; lower the budget, which a "
            f"higher rate does{' too, or shorten the task' if guide_tokens else ''}."
        )
    if wanted is None:
        return min(usual_chunk(backbone), room, corpus_tokens)
    chunk = corpus_tokens if wanted == 0 else min(wanted, corpus_tokens)
    if not 0 < chunk <= room:
        raise BudgetError(
            f"A chunk of {chunk} tokens does not fit: the model's window is {backbone.window}. {beside} {room} for a "
            f"chunk, as it is read{' twice' if twice else ''}; pass chunk_tokens between 1 and {room}."
        )
    return chunk


def check_whole(backbone: Backbone, corpus_tokens: int, guide_tokens: int) -> None:
    """Raise `BudgetError` unless a corpus that is kept as it is leaves room for a question in the window."""
    if corpus_tokens + guide_tokens >= backbone.window:
        guide = f" and the guide {guide_tokens}" if guide_tokens else ""
        raise BudgetError(
            f"Nothing would be condensed, but the corpus takes {corpus_tokens} tokens{guide} of the model's window of "
            f"{backbone.window}, which leaves no room for a question; pass a higher rate or fewer documents."
        )


def most_tokens(backbone: Backbone, keep: int, resident: int, read: int) -> int:
    """The most tokens that one head may keep: besides them a chunk is `read`, and later questions want some room."""
    return max(keep, min(backbone.window - read, int(backbone.window * (1 - QUESTION_SHARE)) - resident))
