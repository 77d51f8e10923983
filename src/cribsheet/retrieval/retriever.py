"""Passages: stretches of text that a search finds for a question, by BM25 over our own documents or by anybody's retriever.

Retrievers of other frameworks are told by their methods, so that no framework is imported: `retrieve` (LlamaIndex),
`invoke` (LangChain), their async forms, or a plain callable.
"""  # noqa: E501

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from types import ModuleType
from typing import Any

from cribsheet.corpus.documents import Document
from cribsheet.corpus.formats.record import short
from cribsheet.errors import RequestError

PASSAGE_CHARACTERS = 400  # a paragraph or a few sentences: small enough that several fit a few hundred tokens

# Where a text may be cut, the best places first: blank lines, lines, sentences, words.
_BREAKS = tuple(map(re.compile, (r"\n\s*\n", r"\n", r"(?<=[.!?])\s+|(?<=[。！？])", r"\s+")))
# Scripts that put no blanks between words are searched by their characters.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
_HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair, which no tokenizer takes
_JAX, _IMPORTING = ("jax", "jax.lax"), threading.Lock()
_ORIGIN_KEYS = ("document_id", "source", "file_path", "file_name")


@dataclass(frozen=True, slots=True)
class Passage:
    """A stretch of text that was retrieved.

    `document_id` is where it came from, as the retriever says, or empty; `start` and `stop` are its characters in
    that document's text, if known; `score` is the retriever's own, higher is better; `metadata` are those of what
    was retrieved, as the retriever gives them.
    """

    text: str
    document_id: str = ""
    start: int | None = None
    stop: int | None = None
    score: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)


def cut_into_passages(documents: Sequence[Document], characters: int = PASSAGE_CHARACTERS) -> list[Passage]:
    """Documents as passages of at most so many characters, cut between paragraphs, lines or sentences if possible.

    What is small stays together: a passage takes in as many neighbours as fit.
    """
    if characters < 1:
        raise RequestError(
            f"Passages of {characters} characters hold nothing; allow at least 1, better {PASSAGE_CHARACTERS}."
        )
    return [
        Passage(document.text[start:stop], document.id, start, stop, metadata=document.metadata)
        for document in documents
        for start, stop in _cut(document.text, 0, len(document.text), characters)
        if document.text[start:stop].strip()
    ]


def searchable(documents: Sequence[Document], characters: int) -> list[Passage]:
    """Passages to search. Raises `RequestError` if there is no text."""
    passages = cut_into_passages(documents, characters)
    if not passages:
        raise RequestError(
            "There is no text to search: the sheet was saved without its documents' texts; pass a retriever of "
            "your own, or build the sheet again and save it with them."
        )
    return passages


def bm25s_without_jax() -> ModuleType:
    """The library of BM25, which would load JAX if it is installed, for nothing that is used here.

    JAX takes three quarters of a GPU for itself at its first call, and that call is made at the import.
    """
    with _IMPORTING:
        if "bm25s" not in sys.modules:
            hidden: dict[str, ModuleType] = {name: sys.modules[name] for name in _JAX if name in sys.modules}
            try:
                sys.modules.update(dict.fromkeys(_JAX))  # type: ignore[arg-type]  # None: an import of it fails
                return import_module("bm25s")
            finally:
                for name in _JAX:
                    del sys.modules[name]
                sys.modules.update(hidden)
    return import_module("bm25s")


class BM25Retriever:
    """Finds passages of documents that share words with a query (BM25, by the `bm25s` library); thread-safe.

    The words of a document's id and title count for each of its passages.
    """

    def __init__(self, documents: Sequence[Document], *, characters: int = PASSAGE_CHARACTERS) -> None:
        """Index documents. Raises `RequestError` if there is no text to search."""
        bm25s = bm25s_without_jax()  # only here: most sheets are never searched
        self.passages = searchable(documents, characters)
        names = {document.id: words(f"{document.id} {document.metadata.get('title', '')}") for document in documents}
        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells of every index otherwise
        self._index = bm25s.BM25()
        self._index.index([names[each.document_id] + words(each.text) for each in self.passages], show_progress=False)

    def retrieve(self, query: str, top_k: int | None = None) -> list[Passage]:
        """Passages that share a word with the query, best first, equals in the documents' order; at most `top_k`."""
        wanted = words(query)
        if not wanted:
            return []
        scores = self._index.get_scores(wanted).tolist()
        best = sorted((n for n, score in enumerate(scores) if score > 0), key=lambda n: -scores[n])
        return [replace(self.passages[n], score=scores[n]) for n in best[:top_k]]


@dataclass(frozen=True, slots=True)
class Search:
    """Any retriever in one form: a query to passages, best first, blocking or not."""

    fetch: Callable[[str], list[Passage]]
    afetch: Callable[[str], Awaitable[list[Passage]]]


def as_retriever(retriever: Any) -> Search:
    """`retriever` in our form, whatever it is.

    It may be a `BM25Retriever` or `DenseRetriever`; a LlamaIndex retriever or anything with `retrieve` or `aretrieve`;
    a LangChain retriever, runnable or anything with `invoke` or `ainvoke`; an index or vector store with
    `as_retriever`; or a callable, async or not, from a query to texts, mappings, documents or passages. Raises
    `RequestError` for anything else.
    """
    if isinstance(retriever, Search):
        return retriever
    for sync_name, async_name in (("retrieve", "aretrieve"), ("invoke", "ainvoke")):
        sync, awaitable = _method(retriever, sync_name), _method(retriever, async_name)
        if sync or awaitable:
            return _search(retriever, sync, awaitable)
    if callable(retriever) and not isinstance(retriever, type):
        is_async = inspect.iscoroutinefunction(retriever)
        return _search(retriever, None if is_async else retriever, retriever if is_async else None)
    if (make := _method(retriever, "as_retriever")) is not None and not hasattr(retriever, "sheet"):
        return as_retriever(make())
    raise RequestError(
        f"The retriever is {short(retriever)}, which has neither retrieve() nor invoke() and cannot be called; pass "
        '"bm25", "dense", a LangChain or LlamaIndex retriever, or a function from a query to texts.'
    )


def _search(retriever: Any, sync: Callable[..., Any] | None, awaitable: Callable[..., Any] | None) -> Search:
    """Both forms out of whichever there is."""
    name = type(retriever).__name__

    async def afetch(query: str) -> list[Passage]:
        if awaitable is not None:
            return _passages(await awaitable(query), name)
        return await asyncio.to_thread(fetch, query)

    def fetch(query: str) -> list[Passage]:
        if sync is not None:
            return _passages(sync(query), name)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(afetch(query))
        raise RequestError(f"The retriever {name} is async only, and an event loop runs here; use `aask` or `astream`.")

    return Search(fetch, afetch)


def _passages(found: Any, name: str) -> list[Passage]:
    if found is None:
        return []
    if isinstance(found, str | Mapping | Passage):  # a chain that ends in one text
        found = [found]
    if isinstance(found, bytes) or not isinstance(found, Iterable):
        raise RequestError(
            f"The retriever {name} gave {short(found)}; it must give a list of documents, nodes or texts."
        )
    made = [_passage(each, name) for each in found]
    return [replace(each, text=_HALF.sub("\ufffd", each.text)) for each in made if each.text]


def _passage(item: Any, name: str) -> Passage:
    """A passage from whatever a retriever gives: a text, a mapping, a LangChain document, a LlamaIndex node."""
    if isinstance(item, Passage):
        return item
    if isinstance(item, str):
        return Passage(item.strip())
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], int | float):  # (document, score)
        return replace(_passage(item[0], name), score=float(item[1]))
    node = getattr(item, "node", item)
    read: Callable[[str], Any] = node.get if isinstance(node, Mapping) else lambda key: getattr(node, key, None)
    metadata = read("metadata")
    metadata = metadata if isinstance(metadata, Mapping) else {}
    text = next((text for text in _texts(node, read) if isinstance(text, str)), None)
    if text is None:
        raise RequestError(
            f"The retriever {name} gave {short(item)}, which has no text: neither page_content, get_content() nor text."
        )
    origins = (read("ref_doc_id"), *(metadata.get(key) for key in _ORIGIN_KEYS), read("document_id"))
    ids = (*origins, read("id"), read("node_id"), read("id_"))
    document_id = next((str(each) for each in ids if isinstance(each, str | int) and each != ""), "")
    start = next((at for at in (read("start_char_idx"), metadata.get("start_index")) if isinstance(at, int)), None)
    score = next((x for x in (getattr(item, "score", None), read("score")) if isinstance(x, int | float)), None)
    bare = text.strip()
    if start is not None:
        start += text.index(bare)
    stop = None if start is None else start + len(bare)
    return Passage(bare, document_id, start, stop, None if score is None else float(score), dict(metadata))


def _texts(node: Any, read: Callable[[str], Any]) -> Iterator[Any]:
    yield read("page_content")
    get_content = getattr(node, "get_content", None)
    yield get_content() if callable(get_content) else None
    yield read("text")


def _method(retriever: Any, name: str) -> Callable[..., Any] | None:
    method = None if isinstance(retriever, str) else getattr(retriever, name, None)
    return method if callable(method) else None


def words(text: str) -> list[str]:
    """The words of a text in small letters, without punctuation; where no blanks part them, its characters."""
    return _WORD.findall(text.casefold())


def _cut(
    text: str, start: int, stop: int, size: int, breaks: Sequence[re.Pattern[str]] = _BREAKS
) -> Iterator[tuple[int, int]]:
    """Spans of at most `size` characters, cut at the first kind of break that helps; small neighbours are joined."""
    if stop - start <= size:
        yield start, stop
        return
    if not breaks:
        yield from ((at, min(at + size, stop)) for at in range(start, stop, size))
        return
    first, last = start, start
    for piece in _between(text, start, stop, breaks[0]):
        for begin, end in _cut(text, *piece, size, breaks[1:]):
            if end - first > size and last > first:
                yield first, last
                first = begin
            first, last = (begin if last == first else first), end
    if last > first:
        yield first, last


def _between(text: str, start: int, stop: int, pattern: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    """The stretches between the breaks."""
    for found in pattern.finditer(text, start, stop):
        if found.start() > start:
            yield start, found.start()
        start = found.end()
    if start < stop:
        yield start, stop
