"""What is condensed: documents with text, id and metadata. Nothing here knows about tokens.

How documents come in is told in `cribsheet.corpus.sources`, what files mean in `cribsheet.corpus.formats`.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeAlias

from cribsheet.corpus.formats.record import mending_of, normalise, short, surrogate_in
from cribsheet.corpus.sources import Draft, drafts_of
from cribsheet.errors import DocumentError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Document:
    r"""A text with a name: what a corpus is made of.

    The text is normalised here, once: CRLF and CR become LF, space around the whole goes. Character spans
    reported anywhere in cribsheet count in this normalised `text`. `metadata` is copied; `read_documents`
    puts `source` there (the path as it was given), `row` for rows, and `title` and `pages` (where each page
    starts) where a format has them.

    Raises `DocumentError` for a text that is no string, for an empty id, and where text, id or metadata hold half a
    surrogate pair.
    """

    text: str
    id: str
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not _is_string(self.id) or not self.id.strip():
            raise DocumentError(f"a document's id is {self.id!r}; give a string that names the document")
        if not _is_string(self.text):
            kind = type(self.text).__name__
            raise DocumentError(f"the text of document {self.id!r} is of type {kind}; give a string")
        object.__setattr__(self, "text", normalise(self.text))
        object.__setattr__(self, "metadata", dict(self.metadata))
        for what, value in (("", self.text), ("the id of ", self.id), ("the metadata of ", self.metadata)):
            if found := surrogate_in(value):
                raise DocumentError(
                    f"{what}document {self.id!r} holds {found}, which no encoding can store; {mending_of(found)}"
                )


def _is_string(value: object) -> bool:
    return isinstance(value, str)


# `object` stands for any framework's document: something with `page_content`, `get_content()` or `text`.
Source: TypeAlias = str | os.PathLike[str] | Document | Mapping[str, Any] | Iterable[Any] | object


def read_documents(*sources: Source) -> list[Document]:
    """Documents from any mix of sources, in the order given, each with an id of its own.

    - `Path`: a file, a folder (read recursively in sorted order; hidden and unsupported files are skipped,
      links to folders not followed) or a glob pattern.
    - `str`: a path where it names something that exists or a pattern that matches; an error where it only
      looks like one (a single word of ASCII letters, or with a suffix, separator or wildcard; a line that ends in a
      suffix that is read); else a text.
    - `Document`; a mapping {"text", "id", "metadata"}; an object with `page_content` (as in LangChain),
      `get_content()` (as in LlamaIndex) or `text`.
    - an iterable of all these, nested as you like.

    Ids: as given; for files the path below the given folder or pattern, with `#row` in files of many
    documents, and with parent folders in front where two would be the same; `text-1`, `text-2`, ... for
    strings.

    A document without text is skipped with a warning, but a source that yields nothing else is an error.
    Raises `DocumentError` for whatever is missing, unreadable, unsupported or named twice.
    """
    if not sources:
        raise DocumentError("no documents were given; name a file or folder, or pass texts or documents")
    drafts = [draft for source in sources for draft in _with_text(list(drafts_of(source)), source)]
    ids = _unique_ids(drafts)
    return [Document(draft.text, id_, draft.metadata) for draft, id_ in zip(drafts, ids, strict=True)]


def _with_text(drafts: list[Draft], source: Source) -> list[Draft]:
    full = [draft for draft in drafts if draft.text.strip()]
    if not full:
        where = drafts[0].where if len(drafts) == 1 else f"the source {short(source)}"
        raise DocumentError(f"{where} has no text, so there is nothing to read; leave it out, or check its content")
    if len(full) < len(drafts):
        empty = [draft.where for draft in drafts if not draft.text.strip()]
        logger.warning("skipped documents without text (%d): %s", len(empty), _listed(empty))
    return full


def _unique_ids(drafts: list[Draft]) -> list[str]:
    """An id for each draft: the shortest of its names that no other has.

    Raises `DocumentError` where even their longest names are the same: one file twice, or one id given twice.
    """
    _number_shared_names(drafts)
    named = [draft for draft in drafts if draft.names]
    for first, second, *_ in _alike(named, lambda draft: draft.id_at(-1)):
        raise DocumentError(
            f"two documents have the id {first.id_at(0)!r}: {first.where} and {second.where}; name each "
            "source once, and give each document an id of its own"
        )
    depths: Counter[tuple[str, ...]] = Counter()  # by names, so that all rows of a file move together
    while clashes := _alike(named, lambda draft: draft.id_at(depths[draft.names])):
        clashing = {draft.names for group in clashes for draft in group}
        depths.update(names for names in clashing if depths[names] + 1 < len(names))
    taken = {draft.id_at(depths[draft.names]) for draft in named}
    free = (name for number in count(1) if (name := f"text-{number}") not in taken)
    return [draft.id_at(depths[draft.names]) if draft.names else next(free) for draft in drafts]


def _alike(drafts: list[Draft], key: Callable[[Draft], object]) -> list[list[Draft]]:
    """Groups of two or more drafts with the same key."""
    groups: defaultdict[object, list[Draft]] = defaultdict(list)
    for draft in drafts:
        groups[key(draft)].append(draft)
    return [group for group in groups.values() if len(group) > 1]


def _number_shared_names(drafts: list[Draft]) -> None:
    """Loaders give a document a page, all with the file as source: number them where there are several."""
    for group in _alike([draft for draft in drafts if draft.shares_name], lambda draft: draft.names):
        for row, draft in enumerate(group, 1):
            draft.row = row


def _listed(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
