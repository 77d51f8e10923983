"""Corpora as folders: documents, a task and questions, in the forms that `cribsheet compare` takes.

    FOLDER/documents.jsonl    {"id", "text"} a line; or a folder `documents` with whatever `cribsheet build` reads
    FOLDER/task.toml          what is asked for, with examples
    FOLDER/questions.jsonl    {"question", "answers", "type", "documents"} a line

A folder of folders is a collection: `DATA/xquad/4000/0` is the corpus `xquad/4000/0` of the group `xquad/4000`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from cribsheet.compare.compare import Corpus
from cribsheet.compare.questions import read_questions, write_questions
from cribsheet.corpus.documents import read_documents
from cribsheet.corpus.task import Task
from cribsheet.errors import DocumentError

QUESTIONS, TASK, DOCUMENTS = "questions.jsonl", "task.toml", "documents"


def find_corpora(data: str | Path) -> dict[str, Path]:
    """The folders of corpora in `data`, by name: first the first of each group, then the second of each, and so on.

    So a run that ends early has seen all groups. Raises `DocumentError` if there is none.
    """
    data = Path(data)
    folders = sorted((file.parent for file in data.rglob(QUESTIONS)), key=_natural)
    if not folders:
        raise DocumentError(f"{data} holds no corpora: no folder in it has a file {QUESTIONS!r}; see bench/corpora.py")
    named = {"/".join(folder.relative_to(data).parts) or data.resolve().name: folder for folder in folders}
    seen: dict[str, int] = {}
    rank = {}
    for name in named:
        rank[name] = seen[group_of(name)] = seen.get(group_of(name), -1) + 1
    return dict(sorted(named.items(), key=lambda each: rank[each[0]]))


def group_of(name: str) -> str:
    """The group of a corpus: what its name has before the last slash, or the name."""
    return name.rpartition("/")[0] or name


def read_corpus(folder: Path, name: str) -> Corpus:
    """The corpus of a folder. Raises `DocumentError` or `TaskError` with the file that is missing or broken."""
    sources = sorted(folder.glob(f"{DOCUMENTS}*"))
    if not sources:
        raise DocumentError(f"{folder} has no documents; put {DOCUMENTS}.jsonl or a folder {DOCUMENTS!r} there")
    return Corpus(name, read_documents(*sources), Task.from_file(folder / TASK), read_questions(folder / QUESTIONS))


def write_corpus(folder: Path, corpus: Corpus) -> None:
    """The inverse of `read_corpus`; the folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"id": each.id, "text": each.text}, ensure_ascii=False) for each in corpus.documents]
    (folder / f"{DOCUMENTS}.jsonl").write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    (folder / TASK).write_text("\n".join(_toml(corpus.task)), encoding="utf-8")
    write_questions(folder / QUESTIONS, corpus.questions)


def _toml(task: Task) -> Iterable[str]:
    yield f"description = {_quoted(task.description)}"
    yield f"instruction = {_quoted(task.instruction)}"
    for question, answer in task.examples:
        yield f"\n[[examples]]\nquestion = {_quoted(question)}\nanswer = {_quoted(answer)}"
    yield ""


def _quoted(text: str) -> str:
    """A string of TOML: that of JSON, but for one character that JSON leaves as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _natural(path: Path) -> list[tuple[int, str]]:
    """Numbers by their value: 4000 before 16000."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.parts]
