"""A question in tokens, and where among them the passages stand that are told with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cribsheet.passages import GAP, HEADING, block_of, with_passages
from cribsheet.retrieval import Passage
from cribsheet.sheet import Sheet
from cribsheet.task import Task
from cribsheet.template import ChatLayout, Message


class Told(NamedTuple):
    """Token ids (T,) of a question with its passages.

    `places` are the first and last-plus-one token of each passage; `lead` is how many tokens come before what is asked.
    """

    ids: Tensor
    places: tuple[tuple[int, int], ...] = ()
    lead: int = 0


def after_sheet(
    layout: ChatLayout, task: Task, resident: bool, turns: Sequence[Message], passages: Sequence[Passage] = ()
) -> Told:
    """A conversation as it follows a sheet, with passages at the beginning of its last turn."""
    text = layout.question(with_passages(turns, passages), task, resident)
    ids, spans = layout.encoder.placed(text)
    at = text.rfind(layout.encoder.defuse(block_of(passages))) if passages else -1
    if at < 0:
        return Told(ids)
    places = _places(spans, passages, at + len(HEADING + GAP))
    return Told(ids, places, places[-1][1])


def instead_of_documents(
    layout: ChatLayout, task: Task, sheet: Sheet, turns: Sequence[Message], passages: Sequence[Passage]
) -> Told:
    """A conversation behind passages that stand where the documents would."""
    head, places = opening(layout, task, sheet, passages)
    asked = after_sheet(layout, task, sheet.resident, turns)
    return Told(torch.cat([head, asked.ids]), places, len(head))


def opening(
    layout: ChatLayout, task: Task, sheet: Sheet, passages: Sequence[Passage]
) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
    """Tokens (T,) of what a sheet would stand for: head, passages as documents, the guide if it is resident; places."""
    encoder, head = layout.encoder, sheet.manifest.head
    ids, spans = encoder.left(head + "".join(encoder.defuse(each.text) + GAP for each in passages))
    places = _places(spans, passages, len(head))
    if not sheet.resident:
        return ids, places
    return torch.cat([ids, encoder.after(layout.guide(task).resident, continues=True)]), places


def _places(spans: Tensor, passages: Sequence[Passage], start: int) -> tuple[tuple[int, int], ...]:
    """Tokens of each passage, given the characters (N, 2) of all tokens and where the first passage starts."""
    found = []
    for passage in passages:
        inside = ((spans[:, 0] < start + len(passage.text)) & (spans[:, 1] > start)).nonzero()
        found.append((int(inside[0]), int(inside[-1]) + 1))
        start += len(passage.text) + len(GAP)
    return tuple(found)
