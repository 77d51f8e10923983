"""Notes: the model writes down what the task needs of a chunk, and the attention of these notes decides what is kept.

Examples show the form of questions but look at the people and things that they name; notes go through all of them.
The idea is that of CacheNotes (EACL 2026), here chunk by chunk. Notes only guide: they are dropped after scoring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cribsheet.attention.cache import prefix_cache
from cribsheet.attention.prefix import LayerPrefix
from cribsheet.model.backbone import Backbone

NOTES_TOKENS = 256  # longest notes about a chunk; of a short one, at most half its length

MOST_QUESTIONS = 24  # self-asked questions about a chunk

_REQUEST = "Write down every fact in the documents that this task needs, one per line and in order."


def notes_request(tokenizer: Any) -> str:
    """What the user's turn says after the task line to get notes.

    A model that was trained to write notes says how it wants to be asked, as `cribsheet_notes` in its tokenizer's
    configuration; the pocket model needs no more than the task line.
    """
    return str(getattr(tokenizer, "init_kwargs", {}).get("cribsheet_notes", _REQUEST))


def write_notes(
    backbone: Backbone,
    prefix: Sequence[LayerPrefix],
    start: int,
    chunk: Tensor,
    request: Tensor,
    limit: int,
    step: Callable[[], None] | None = None,
) -> tuple[str, list[tuple[Tensor, Tensor]]]:
    """Notes about a chunk (c,) that stands on a prefix of `start` tokens, greedy, at most `limit` tokens.

    `step` is called after each token. Also the chunk's keys and values (1, K, c, D) of each layer, so that nobody has
    to read it again.

    `request` (R,) is the rendered turn that asks for them. A line that was there before ends the notes: small models
    go round in circles when they have run out of facts.
    """
    cache = prefix_cache(prefix, start)
    ids = torch.cat([chunk, request]).unsqueeze(0)
    written: list[int] = []
    text, lines = "", 0
    while len(written) < limit:
        positions = torch.arange(start, start + ids.shape[1]).unsqueeze(0)
        token = int(backbone.step(ids, positions, cache)[0, -1].argmax())
        start += ids.shape[1]
        if token in backbone.eos_ids:
            break
        written.append(token)
        if step is not None:
            step()
        text = backbone.tokenizer.decode(written, skip_special_tokens=True)
        if text.count("\n") > lines:
            lines = text.count("\n")
            *before, last = text.rstrip("\n").split("\n")
            if last in before:
                text = "\n".join(before)
                break
        ids = torch.tensor([[token]])
    read = [(layer.keys[:, :, : len(chunk)], layer.values[:, :, : len(chunk)]) for layer in cache.layers]
    return text.strip(), read


def self_asked(notes: str, examples: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The examples' questions asked about everything else in the notes, with the answers that the notes give.

    Notes are lines of `name: fact; fact; ...`. An example whose question names one of the names, and whose answer is
    one of its facts, is asked again about every other name; so the guide looks for all of them in the way that real
    questions will. At most `MOST_QUESTIONS`, evenly over the notes.
    """
    lines = [line.partition(": ") for line in notes.splitlines()]
    facts = {name: values.split("; ") for name, _, values in lines if values}
    asked: dict[str, str] = {}
    for question, answer in examples:
        named = max((name for name in facts if name in question), key=len, default=None)
        if named is None or answer not in facts[named]:
            continue
        place = facts[named].index(answer)
        for name, values in facts.items():
            if name != named and place < len(values):
                asked.setdefault(question.replace(named, name), values[place])
    pairs = list(asked.items())
    step = max(1, -(-len(pairs) // MOST_QUESTIONS))
    return pairs[::step]
