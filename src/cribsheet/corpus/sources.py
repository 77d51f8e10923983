"""Every way documents come in: a source of any kind to drafts, which are documents that have no id yet.

Folders, glob patterns, files, texts, mappings, and the documents of any framework, which are told by their
attributes so that no framework is imported.
"""

from __future__ import annotations

import difflib
import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

from cribsheet.corpus.formats import READERS, read_file
from cribsheet.corpus.formats.record import given_id, is_record, record_of, short, surrogate_in
from cribsheet.errors import DocumentError

logger = logging.getLogger(__name__)

_LONGEST_NAME = 255  # characters; a longer string is a path only if it exists, for prose holds "?" and "/" too
_NAME = re.compile(r"[\w.\-\\/:~]+", re.ASCII)  # no more than a name; a word of Chinese may be a sentence


@dataclass(slots=True, eq=False)
class Draft:
    """A document without its id yet. `names` are its possible ids, shortest first; none for a mere text."""

    text: str
    metadata: Mapping[str, Any]
    where: str
    names: tuple[str, ...] = ()
    row: int | None = None
    shares_name: bool = False  # named after a source that may have given several documents

    def id_at(self, depth: int) -> str:
        """Its id when it goes by the name at that depth."""
        return self.names[depth] + (f"#{self.row}" if self.row else "")


def drafts_of(source: object) -> Iterator[Draft]:
    """The documents of a source of any kind; `DocumentError` where there is none, or it cannot be read."""
    if isinstance(source, str):
        return _from_string(source)
    if isinstance(source, os.PathLike):
        return _from_path(Path(source))
    if isinstance(source, Mapping):
        return _from_mapping(source)
    # attributes before iteration, because pydantic documents are iterable too
    if (text := _text_by_attribute(source)) is not None:
        return _from_object(source, text)
    if isinstance(source, Iterable) and not isinstance(source, bytes | bytearray) and not hasattr(source, "read"):
        return chain.from_iterable(map(drafts_of, source))
    raise DocumentError(
        f"{short(source)} is of type {type(source).__name__}, which is no source of documents; pass a path, "
        "a text, a Document, or an object with page_content, get_content() or text"
    )


# ---- texts, mappings and objects


def _from_string(text: str) -> Iterator[Draft]:
    path = os.path.expanduser(text)
    if os.path.exists(path) or _matches(path):
        return _from_path(Path(path))
    if not _looks_like_path(text):
        return iter([Draft(text, {}, f"the text {short(text)}")])
    if "://" in text:
        raise DocumentError(f"{text} is an address, and addresses are not fetched; download it, and name the file")
    return _from_path(Path(path))


def _looks_like_path(text: str) -> bool:
    line = text.strip()
    if len(line) > _LONGEST_NAME:
        return False
    if any(map(str.isspace, line)):  # "my notes/*.md", "report 2025.pdf"
        return PurePath(line).suffix.lower() in READERS and len(line.splitlines()) == 1
    if _NAME.fullmatch(line):
        return True
    any_suffix = PurePath(line).suffix[1:2].isalpha()  # not "1,003.5"
    separators = {"/", os.sep, os.altsep or os.sep}
    return any_suffix or glob.has_magic(line) or any(mark in line for mark in separators)


def _matches(pattern: str) -> bool:
    if len(pattern) > _LONGEST_NAME or "\n" in pattern or not glob.has_magic(pattern):
        return False
    # not recursive, where ** would search the whole disk for a text that starts with a comment like "/**/ ..."
    return next(glob.iglob(pattern), None) is not None


def _from_mapping(source: Mapping[str, Any]) -> Iterator[Draft]:
    if not is_record(source):
        raise DocumentError(f'a mapping needs a string under "text"; this one is {short(dict(source))}')
    record = record_of(source, "a mapping")
    where = f"the mapping {short(dict(source))}"
    return iter([Draft(record.text, record.metadata, where, (record.id,) if record.id else ())])


def _text_by_attribute(source: object) -> str | None:
    get_content = getattr(source, "get_content", None)
    texts = (
        getattr(source, "page_content", None),
        get_content() if callable(get_content) else None,
        getattr(source, "text", None),
    )
    return next((text for text in texts if isinstance(text, str)), None)


def _from_object(source: object, text: str) -> Iterator[Draft]:
    kind = type(source).__name__
    metadata = getattr(source, "metadata", None)
    metadata = metadata if isinstance(metadata, Mapping) else {}
    part_of = getattr(getattr(source, "node", source), "ref_doc_id", None)  # a LlamaIndex node is cut from a document
    if isinstance(part_of, str) and part_of:
        metadata = {**metadata, "ref_doc_id": part_of}
    ids = (getattr(source, name, None) for name in ("id", "node_id", "id_", "doc_id"))
    origin = metadata.get("source")
    if own := given_id(next(filter(None, ids), None), f"a {kind}"):
        yield Draft(text, metadata, f"the {kind} {own!r}", (own,))
    elif isinstance(origin, str) and origin:
        yield Draft(text, metadata, f"the {kind} from {origin}", (origin,), shares_name=True)
    else:
        yield Draft(text, metadata, f"the {kind} {short(text)}")


# ---- paths


def _from_path(path: Path) -> Iterator[Draft]:
    # os.path, because pathlib raises for names that the system finds too long or may not look at
    if os.path.isdir(path):
        return _from_files(_files_below(path), path, f"the folder {path.as_posix()}")
    if os.path.isfile(path):
        return _from_file(path, path.parent)
    pattern = str(path)
    if glob.has_magic(pattern):
        return _from_files(_files_matching(pattern), _fixed_part(path), f"the pattern {path.as_posix()}")
    if os.path.exists(path):
        raise DocumentError(f"{path.as_posix()} is neither a file nor a folder; copy its content into a file")
    if os.path.islink(path):
        raise DocumentError(f"{path.as_posix()} is a broken link; mend it, or name the file that it should lead to")
    near = " or ".join(map(repr, _near(path)))
    raise DocumentError(
        f"no such file or folder: {path.as_posix()!r} (looked from {Path.cwd().as_posix()})"
        f"{f'; did you mean {near}?' if near else ''}; to pass text, wrap it in Document(text, id)"
    )


def _near(path: Path) -> list[str]:
    """Files and folders where a path should lead whose names are like its last one, the likest first."""
    try:
        names = {name.lower(): name for name in sorted(os.listdir(path.parent)) if not name.startswith(".")}
    except (OSError, ValueError):
        return []
    return [path.with_name(names[like]).as_posix() for like in difflib.get_close_matches(path.name.lower(), names)]


def _files_below(folder: Path) -> list[Path]:
    def give_up(error: OSError) -> None:
        raise DocumentError(
            f"cannot list the folder {error.filename}: {error.strerror}; make it readable, or leave it out"
        ) from error

    files, links = [], []
    for here, folders, names in os.walk(folder, onerror=give_up):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links += [Path(here, name).as_posix() for name in folders if os.path.islink(os.path.join(here, name))]
        files += [Path(here, name) for name in names if not name.startswith(".")]
    if links:
        logger.warning("did not follow links to folders (%d), such as %r; name what they lead to", len(links), links[0])
    return sorted(files)


def _files_matching(pattern: str) -> list[Path]:
    matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
    if not matches:
        raise DocumentError(
            f"no such file: nothing matches the pattern {pattern} (looked from {Path.cwd().as_posix()}); to "
            "pass text, wrap it in Document(text, id)"
        )
    # A folder that matches stands for its files, as in a shell; `**` matches these one by one as well.
    return sorted({file for match in matches for file in (_files_below(match) if match.is_dir() else [match])})


def _fixed_part(pattern: Path) -> Path:
    """The folder above the first wildcard: docs for docs/*/a.md."""
    return next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))


def _from_files(files: list[Path], root: Path, where: str) -> Iterator[Draft]:
    """The supported files among those found; the others are counted in one warning."""
    supported = [file for file in files if file.suffix.lower() in READERS]
    others = Counter(file.suffix.lower() or "no suffix" for file in files if file.suffix.lower() not in READERS)
    kinds = ", ".join(f"{suffix} ({number})" for suffix, number in sorted(others.items()))
    if not supported:
        found = f"only unsupported files: {kinds}" if others else "no files"
        raise DocumentError(f"{where} holds {found}; supported are {', '.join(sorted(READERS))}")
    if others:
        logger.warning("skipped unsupported files (%d) in %s: %s", others.total(), where, kinds)
    return chain.from_iterable(_from_file(file, root) for file in supported)


def _from_file(path: Path, root: Path) -> Iterator[Draft]:
    source = path.as_posix()
    if surrogate_in(source):
        raise DocumentError(
            f"the file name {source!r} is not in UTF-8, so no sheet can hold it; rename the file or its folder, or "
            "pass its text in Document(text, id)"
        )
    names = _possible_names(path, root)
    records = read_file(path)
    if not records:
        yield Draft("", {}, source, names)
    for record in records:
        where = f"{source}, row {record.row}" if record.row else source
        row = {"row": record.row} if record.row else {}
        metadata = {"source": source} | row | record.metadata
        if record.id:
            yield Draft(record.text, metadata, where, (record.id,))
        else:
            yield Draft(record.text, metadata, where, names, record.row)


def _possible_names(path: Path, root: Path) -> tuple[str, ...]:
    """The path below `root`, then the same with more and more of the folders above it."""
    below = len(path.relative_to(root).parts)
    parts = Path(os.path.abspath(path)).parts
    return tuple(PurePath(*parts[-length:]).as_posix() for length in range(below, len(parts) + 1))
