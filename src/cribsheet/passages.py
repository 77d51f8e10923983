"""Passages in a question: which are told, in which form, within how many tokens, and none of them twice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from cribsheet.retrieval import Passage
from cribsheet.template import Message
from cribsheet.tokens import Encoder

HEADING = "Passages:"
GAP = "\n\n"
_OVERLAP = 20  # characters that the end of a passage and the beginning of the next share when they were cut so
_SHORTEST_CUT = 8  # tokens; less of a passage says nothing
_RECOGNISED = 50  # characters in a row of a document that show that somebody has retrieved already
_WHOLE = 20  # characters of a document that show the same where it is all of it


def query_of(turns: Sequence[Message]) -> str:
    """What to search for: the last turn's text."""
    return str(turns[-1]["content"])


def with_passages(turns: Sequence[Message], passages: Sequence[Passage]) -> list[Message]:
    """The conversation with passages told at the beginning of its last turn."""
    if not passages:
        return list(turns)
    return [*turns[:-1], {**turns[-1], "content": block_of(passages) + GAP + str(turns[-1]["content"])}]


def choose(
    found: Iterable[Passage],
    turns: Sequence[Message],
    order: Sequence[str],
    encoder: Encoder,
    *,
    tokens: int,
    top_k: int | None = None,
    heading: bool = True,
) -> list[Passage]:
    """The first passages that fit into `tokens`, none of them told twice, as they stand in the documents.

    What a turn or an earlier passage already says is left out, also where two overlap; the first passage that does not
    fit is cut at a word, and the rest is left out. Unless all are known to be in the documents of `order`, ids in the
    order of the sheet, they keep the retriever's.
    """
    said = "\n".join(str(turn["content"]) for turn in turns)
    left = tokens - (encoder.count([HEADING + GAP]) if heading else 0)
    chosen: list[Passage] = []
    for passage in found:
        if len(chosen) == top_k:
            break
        new = _unsaid(passage, said, chosen)
        if new is None:
            continue
        fitting = _fitting(new, left, encoder)
        if fitting is not None:
            chosen.append(fitting)
        if fitting is not new:
            break
        left -= _tokens(new.text, encoder)
    return _in_order(chosen, order)


def is_told_already(turns: Sequence[Message], texts: Sequence[str]) -> bool:
    """Whether the question holds passages: under our heading, or a stretch of the documents' `texts`, or all of one."""
    asked = _asked(turns)
    if asked[-1].startswith(HEADING + GAP):
        return True
    return any(_quotes(part, text) for part in asked for text in texts)


def says(turns: Sequence[Message], passage: Passage) -> bool:
    """Whether the question holds all of a passage."""
    flat = _flat(passage.text)
    return len(flat) >= _WHOLE and any(flat in _flat(part) for part in _asked(turns))


def _asked(turns: Sequence[Message]) -> list[str]:
    """Where chains put what they have retrieved: system texts, and last the question itself."""
    return [str(turn["content"]) for turn in turns if turn["role"] == "system"] + [query_of(turns)]


def _quotes(asked: str, text: str) -> bool:
    """Whether a question holds a long stretch of a text, wherever, or all of it; found by a part, then grown."""
    whole = text.strip()
    if len(whole) >= _WHOLE and whole in asked:
        return True
    part = _RECOGNISED // 2
    for at in range(0, len(asked) - part + 1, part):
        found = text.find(asked[at : at + part])
        if found >= 0:
            before = _alike(asked[:at][-_RECOGNISED:][::-1], text[:found][-_RECOGNISED:][::-1])
            after = _alike(asked[at:][:_RECOGNISED], text[found : found + _RECOGNISED])
            if before + after >= _RECOGNISED:
                return True
    return False


def _alike(first: str, second: str) -> int:
    """Characters that two texts begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))


def block_of(passages: Sequence[Passage]) -> str:
    """What is told of passages: their heading and texts."""
    return GAP.join([HEADING, *(each.text for each in passages)])


def _unsaid(passage: Passage, said: str, chosen: Sequence[Passage]) -> Passage | None:
    """What of a passage is new: nothing if all of it was said, without the part where it overlaps another."""
    text = passage.text
    flat = _flat(text)
    if flat in _flat(said) or any(flat in _flat(each.text) for each in chosen):
        return None
    for each in chosen:
        shared = _shared(each.text, text)
        text = text[shared:]
        shared = _shared(text, each.text)
        text = text[: len(text) - shared]
    start, stop = passage.start, passage.stop
    if start is not None and stop is not None and text != passage.text:
        start += passage.text.index(text)
        stop = start + len(text)
    return replace(passage, text=text, start=start, stop=stop) if text.strip() else None


def _shared(before: str, after: str) -> int:
    """Characters at the end of one text that the next begins with; 0 for fewer than chance would share."""
    longest = min(len(before), len(after))
    return next((n for n in range(longest, _OVERLAP - 1, -1) if before[-n:] == after[:n]), 0)


def _fitting(passage: Passage, tokens: int, encoder: Encoder) -> Passage | None:
    """The passage, or as many of its first words as fit; nothing if that is hardly any."""
    if _tokens(passage.text, encoder) <= tokens:
        return passage
    kept = encoder.first(encoder.defuse(passage.text), tokens - encoder.count([GAP]))
    if not kept or encoder.count([kept]) < _SHORTEST_CUT:
        return None
    text = passage.text[: len(kept)]
    return replace(passage, text=text, stop=None if passage.start is None else passage.start + len(text))


def _tokens(text: str, encoder: Encoder) -> int:
    """What a passage takes, the gap after it included."""
    return encoder.count([encoder.defuse(text) + GAP])


def _in_order(passages: list[Passage], order: Sequence[str]) -> list[Passage]:
    """As they stand in the documents of these ids, if all of them are known to be there."""
    numbers = {document_id: number for number, document_id in enumerate(order)}
    if any(each.start is None or each.document_id not in numbers for each in passages):
        return passages
    return sorted(passages, key=lambda each: (numbers[each.document_id], each.start or 0))


def _flat(text: str) -> str:
    return " ".join(text.split())
