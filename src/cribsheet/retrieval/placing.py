"""A question in tokens, and where among them the passages stand that are told with it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from cribsheet.corpus.task import Task
from cribsheet.prompt.template import ChatLayout, Message
from cribsheet.retrieval.passages import GAP, HEADING, with_passages
from cribsheet.retrieval.retriever import Passage
from cribsheet.sheet.sheet import Sheet


class Told(NamedTuple):
    """Token ids (T,) of a question with its passages.

    `places` are the first and last-plus-one token of each passage, counted from the end of the prefix; `lead` is how
    many of these tokens come before what is asked.
    """

    ids: Tensor
    places: tuple[tuple[int, int], ...] = ()
    lead: int = 0


def after_sheet(
    layout: ChatLayout, task: Task, resident: bool, turns: Sequence[Message], passages: Sequence[Passage] = ()
) -> Told:
    """A conversation as it follows a sheet, with passages at the beginning of its last turn."""
    told = with_passages(turns, passages)
    text = layout.question(told, task, resident)
    ids, spans = layout.encoder.placed(text)
    # the whole last turn, because it may quote the passages
    at = text.rfind(layout.encoder.defuse(str(told[-1]["content"]).strip())) if passages else -1
    if at < 0:
        return Told(ids)
    places = _places(spans, passages, at + len(HEADING + GAP))
    return Told(ids, places, places[-1][1])


def beside_documents(
    layout: ChatLayout, task: Task, sheet: Sheet, turns: Sequence[Message], passages: Sequence[Passage]
) -> Told:
    """A conversation as it follows the documents of a sheet, with passages as further documents.

    They stand where the guide begins if it is resident, so that it is read again behind them.
    """
    ids, spans = layout.encoder.placed(_as_documents(layout, passages), continues=True)
    return _asked_behind(_guided(layout, task, sheet, ids), _places(spans, passages, 0), layout, task, sheet, turns)


def behind_recalled(
    layout: ChatLayout, task: Task, resident: bool, turns: Sequence[Message], sizes: Sequence[int]
) -> Told:
    """A conversation behind recalled stretches of so many tokens, which are not among its own."""
    return Told(after_sheet(layout, task, resident, turns).ids, tuple(pairwise([0, *accumulate(sizes)])))


def instead_of_documents(
    layout: ChatLayout, task: Task, sheet: Sheet, turns: Sequence[Message], passages: Sequence[Passage]
) -> Told:
    """A conversation behind passages that stand where the documents would."""
    return _asked_behind(*opening(layout, task, sheet, passages), layout, task, sheet, turns)


def opening(
    layout: ChatLayout, task: Task, sheet: Sheet, passages: Sequence[Passage]
) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
    """Tokens (T,) of what a sheet would stand for, preamble, passages as documents, a resident guide; and places."""
    preamble = sheet.manifest.head
    ids, spans = layout.encoder.left(preamble + _as_documents(layout, passages))
    return _guided(layout, task, sheet, ids), _places(spans, passages, len(preamble))


def _as_documents(layout: ChatLayout, passages: Sequence[Passage]) -> str:
    """Passages as documents stand in a prompt, each before a blank line."""
    return "".join(layout.encoder.defuse(passage.text) + GAP for passage in passages)


def _guided(layout: ChatLayout, task: Task, sheet: Sheet, ids: Tensor) -> Tensor:
    """Tokens (T,) of documents, and of the guide behind them if it is resident."""
    if not sheet.resident:
        return ids
    return torch.cat([ids, layout.encoder.after(layout.guide(task).resident, continues=True)])


def _asked_behind(
    lead: Tensor,
    places: tuple[tuple[int, int], ...],
    layout: ChatLayout,
    task: Task,
    sheet: Sheet,
    turns: Sequence[Message],
) -> Told:
    """A conversation behind `lead` (T,), documents and guide, among which passages have `places`."""
    asked = after_sheet(layout, task, sheet.resident, turns)
    return Told(torch.cat([lead, asked.ids]), places, len(lead))


def _places(spans: Tensor, passages: Sequence[Passage], start: int) -> tuple[tuple[int, int], ...]:
    """Tokens of each passage, given the characters (N, 2) of all tokens and where the first passage starts."""
    found = []
    for passage in passages:
        inside = ((spans[:, 0] < start + len(passage.text)) & (spans[:, 1] > start)).nonzero()
        found.append((int(inside[0]), int(inside[-1]) + 1))
        start += len(passage.text) + len(GAP)
    return tuple(found)
