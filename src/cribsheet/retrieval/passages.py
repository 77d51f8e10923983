"""Passages in a question: which are told, in which form, within how many tokens, and none of them twice."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from cribsheet.prompt.encoder import Encoder
from cribsheet.prompt.template import Message
from cribsheet.retrieval.quoted import Known
from cribsheet.retrieval.retriever import Passage

HEADING = "Passages:"
GAP = "\n\n"
_OVERLAP = 20  # characters that the end of a passage and the beginning of the next share when they were cut so
SHORTEST_CUT = 8  # tokens; less of a passage says nothing
_WHOLE = 20  # characters of a passage that nobody writes by chance
# Characters of documents that show that somebody has retrieved already: in lines of their own, and anywhere in a row.
_APART, _QUOTED = 150, 300
_SYSTEM_APART, _SYSTEM_QUOTED = 75, 80
_LINES = 500  # of a prompt that are looked for at most, or stretches: each takes a while in a large corpus
_PARAGRAPH = re.compile(r"\n[^\S\n]*\n|^[^\w\n]{3,}$", re.M)  # blank lines, rulers
_SENTENCE = re.compile(r"[.!?…]['\")\]]*(?:\s|$)|[。！？]")
# What prompts put before a passage, such as "Context:", "[2]", "Source 3:" or "<text>"; not the letters of options.
_LABEL = re.compile(r"^(?:\[\d+\]|<[^<>]{2,30}>|[^\W\d_][\w #.-]{1,20}:)\s*")


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
    heading: bool = False,
) -> list[Passage]:
    """The first passages that fit into `tokens`, none of them told twice, as they stand in the documents.

    What a turn or an earlier passage already says is left out, also where two overlap; the first passage that does not
    fit is cut at a word, and the rest is left out. Unless all are known to be in the documents of `order`, ids in the
    order of the sheet, they keep the retriever's. With a `heading` it counts, too.
    """
    said = [flattened("\n".join(str(turn["content"]) for turn in turns))]
    left = tokens - (encoder.count([HEADING + GAP]) if heading else 0)
    chosen: list[Passage] = []
    for passage in found:
        if len(chosen) == top_k:
            break
        new = _unsaid(passage, said, chosen)
        if new is None:
            continue
        taken = _tokens(new.text, encoder)
        fitting = new if taken <= left else _cut(new, left, encoder)
        if fitting is not None:
            chosen.append(fitting)
            said.append(flattened(fitting.text))
        if fitting is not new:
            break
        left -= taken
    return _in_order(chosen, order)


def known_of(texts: Sequence[str]) -> Known:
    """Texts of documents to be looked in, a line each; takes some 0.05 s for each megabyte, so make it once."""
    return Known("\n".join(["", *map(flattened, texts), ""]))


def is_told_already(turns: Sequence[Message], known: Known) -> bool:
    """Whether a chain has put passages into the prompt: under our heading, or stretches of documents that are `known`.

    A question may quote a document, and still nothing was retrieved for it. So passages are what stands apart, in
    lines of its own that are sentences and no title, before the last line, which asks; or more than anybody quotes.
    In a system text, where nobody asks, less of either will do.
    """
    if query_of(turns).startswith(HEADING + GAP):
        return True
    *others, asked = _asked(turns)
    systems = ["\n\n".join(reversed(others))] if others else []  # the latest first, for not all may be looked for
    if len(asked) < _APART // 2 and not systems:
        return False
    if any(_tells(each, known, _SYSTEM_APART) or _quotes(each, known, _SYSTEM_QUOTED) for each in systems):
        return True
    if flattened(asked) in known:  # such as a question that stands in a list of questions
        return False
    before, _, _ = asked.rstrip().rpartition("\n")
    return _tells(before, known, _APART) or _quotes(asked, known, _QUOTED)


def says(turns: Sequence[Message], passage: Passage) -> bool:
    """Whether the prompt holds all of a passage, in lines of its own."""
    flat, asked = flattened(passage.text), _asked(turns)
    if not _WHOLE <= len(flat) <= sum(len(part) + 1 for part in asked):
        return False
    return flat in flattened(" ".join(_piece(line, flat) or "" for part in asked for line in part.splitlines()))


def _asked(turns: Sequence[Message]) -> list[str]:
    """Where chains put what they have retrieved: system texts, and last the question itself.

    A chain that formats nothing tells documents as Python writes them, line breaks as a backslash and a letter.
    """
    texts = [str(turn["content"]) for turn in turns if turn["role"] == "system"] + [query_of(turns)]
    return [text.replace("\\n", "\n") for text in texts]


def _tells(prompt: str, known: Known, least: int) -> bool:
    """Whether at least so many characters of a prompt stand apart and are known: from texts, one flat text a line.

    A whole document counts twice: nobody quotes all of one.
    """
    first = "\n".join(prompt.splitlines()[:_LINES])
    return sum(_told(paragraph, known, least) for paragraph in _PARAGRAPH.split(first)) >= least


def _told(paragraph: str, known: Known, least: int) -> int:
    """Characters of known lines; of long stretches only where other lines stand among them, as among answers."""
    stretches: list[list[str]] = []
    others = False
    for line in paragraph.splitlines():
        piece = _piece(line, known)
        if piece is None:
            others = True
        elif stretches and " ".join([*stretches[-1], piece]) in known:
            stretches[-1].append(piece)
        elif piece:
            stretches.append([piece])
    whole = [" ".join(lines) for lines in stretches if len(lines) > 1 or _SENTENCE.search(lines[0])]
    long = [each for each in whole if len(each) >= (least if others else _WHOLE)]
    return sum(len(each) * (2 if f"\n{each}\n" in known else 1) for each in long)


def _piece(line: str, known: Known | str) -> str | None:
    """What of a line is known: all, or all but a label, which is nothing of a line that is a label only; or none."""
    flat = flattened(line)
    return next((piece for piece in dict.fromkeys((flat, _LABEL.sub("", flat))) if piece in known), None)


def _quotes(prompt: str, known: Known, least: int) -> bool:
    """Whether so many characters of a prompt in a row are known; found by a part, then grown."""
    asked, part = flattened(prompt), least // 2
    for at in range(0, min(len(asked) - part + 1, _LINES * part), part):
        found = known.find(asked[at : at + part])
        if found >= 0:
            before = _alike(asked[max(0, at - least) : at][::-1], known.text[max(0, found - least) : found][::-1])
            after = _alike(asked[at : at + least], known.text[found : found + least])
            if before + after >= least:
                return True
    return False


def _alike(first: str, second: str) -> int:
    """Characters that two texts begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))


def block_of(passages: Sequence[Passage]) -> str:
    """What is told of passages: their heading and texts."""
    return GAP.join([HEADING, *(each.text for each in passages)])


def _unsaid(passage: Passage, said: Sequence[str], chosen: Sequence[Passage]) -> Passage | None:
    """What of a passage is new: nothing if a flat text has said it, without the part where it overlaps another."""
    text = passage.text
    flat = flattened(text)
    if any(flat in each for each in said):
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
    if after[:_OVERLAP] not in before:  # as nearly always, of any two passages
        return 0
    longest = min(len(before), len(after))
    return next((n for n in range(longest, _OVERLAP - 1, -1) if before[-n:] == after[:n]), 0)


def _cut(passage: Passage, tokens: int, encoder: Encoder) -> Passage | None:
    """As many of the first words of a passage that is too long as fit; nothing if that is hardly any."""
    room = tokens - encoder.count([GAP])
    kept = encoder.first(encoder.defuse(passage.text), room)
    while kept and _tokens(kept, encoder) > tokens:
        room -= 1
        kept = encoder.first(kept, room)
    if not kept or encoder.count([kept]) < SHORTEST_CUT:
        return None
    text = passage.text[: len(kept)]
    return replace(passage, text=text, stop=None if passage.start is None else passage.start + len(text))


def _tokens(text: str, encoder: Encoder) -> int:
    """What a passage takes between others, the gap after it included."""
    return len(encoder.after(encoder.defuse(text) + GAP, continues=True))


def _in_order(passages: list[Passage], order: Sequence[str]) -> list[Passage]:
    """As they stand in the documents of these ids, if all of them are known to be there."""
    numbers = {document_id: number for number, document_id in enumerate(order)}
    if any(each.start is None or each.document_id not in numbers for each in passages):
        return passages
    return sorted(passages, key=lambda each: (numbers[each.document_id], each.start or 0))


def flattened(text: str) -> str:
    """In one line, whatever blanks and breaks there are."""
    return " ".join(text.split())
