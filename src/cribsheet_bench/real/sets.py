"""Corpora of real documents and questions, made from public data sets: `python -m cribsheet_bench.real.sets DATA OUT`.

DATA holds the sets in these forms (docs/benchmarks/real-data.md says where they come from); what is missing is left out:

    reading/{xquad,covidqa,fairytale,nq}.jsonl       {"id", "title", "text", "questions": [{"question", "answers", "kind"}]}
    multihop_train100/{hotpotqa,musique}_qa_train.json   training files of HotpotQA and MuSiQue, as published
    openstax_anatomy/{modules,exercises}.jsonl       {"module", "title", "text"}; {"module", "kind", "question", "options", "answer"}
    qmsum/val.jsonl                                  meetings of QMSum, as published
    peps/{peps_public_domain.tar.gz,headers.jsonl}   pep-NNNN.rst; {"PEP", "Title", "Author", "Created", ...}

OUT gets a folder for each set, length and corpus, in the form of `corpora.py`. The first pieces of a set (articles,
stories, meetings) give the examples and stand in no corpus, and the answer of an example is none that a corpus holds.
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import logging
import random
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from cribsheet.compare.compare import Corpus
from cribsheet.compare.metrics import normalise
from cribsheet.compare.questions import CHOICE, SUMMARY, Asked
from cribsheet.corpus.documents import Document
from cribsheet.corpus.task import Task
from cribsheet.errors import DocumentError
from cribsheet_bench.command import tell_progress
from cribsheet_bench.real.corpora import write_corpus

logger = logging.getLogger(__name__)

LENGTHS = (4000, 8000, 16000, 32000)
CASES, QUESTIONS = 6, 24  # of each set and length, and about each corpus, at most
_CHARACTERS = 4  # of a token, roughly, in English
_LEAST = 0.5  # of the wanted length; what is shorter is no corpus of that length
_SHORT = 80  # characters of an answer that an example shows, if there are such answers
_FEW_WORDS = "Answer with a few words taken from the documents, nothing else."
_MAIL = re.compile(r"\s*<[^>]*>")


@dataclass(frozen=True, slots=True)
class Piece:
    """What goes into a corpus whole: texts by the ids of their documents, and questions that they answer."""

    texts: Mapping[str, str]
    questions: Sequence[Asked]


@dataclass(frozen=True, slots=True)
class RealSet:
    """A data set: its task, how its pieces are read, and how many are held back to give so many `examples`.

    The documents of a `pooled` set stand in no order, so that those of one question do not stand together.
    """

    name: str
    description: str
    read: Callable[[Path, str], Sequence[Piece]]
    held_back: int
    examples: int = 3
    pooled: bool = False


def make_corpora(
    data: Path, chosen: RealSet, tokens: int, *, cases: int = CASES, questions: int = QUESTIONS, seed: int = 0
) -> Iterator[Corpus]:
    """At most `cases` corpora of about `tokens` tokens, none longer, the same every time.

    Raises `OSError` if the set's files are not in `data`.
    """
    pieces = chosen.read(data, chosen.name)
    held, free = pieces[: chosen.held_back], pieces[chosen.held_back :]
    for number, group in enumerate(islice(_grouped(free, _CHARACTERS * tokens), cases)):
        draw = random.Random(f"{chosen.name} {tokens} {number} {seed}")
        texts = {name: text for piece in group for name, text in piece.texts.items()}
        asked = [question for piece in group for question in piece.questions]
        draw.shuffle(asked)
        names = list(texts)
        if chosen.pooled:
            draw.shuffle(names)
        examples = _examples(held, texts, chosen.examples, draw)
        if not examples:
            logger.warning("%s at %d tokens: each answer of an example stands in the corpus", chosen.name, tokens)
        yield Corpus(
            f"{chosen.name}/{tokens}/{number}",
            [Document(texts[name], name) for name in names],
            Task(chosen.description, tuple((each.text, each.golds[0]) for each in examples)),
            asked[:questions],
        )


def _grouped(pieces: Sequence[Piece], size: int) -> Iterator[list[Piece]]:
    """Pieces in their order, as many at a time as `size` characters hold; too long ones are left out."""
    group: list[Piece] = []
    for piece in pieces:
        if _size([piece]) > size:
            continue
        if _size([*group, piece]) > size:
            if _size(group) >= _LEAST * size:
                yield group
            group = []
        group.append(piece)
    if _size(group) >= _LEAST * size:
        yield group


def _size(group: Sequence[Piece]) -> int:
    return sum(map(len, {name: text for piece in group for name, text in piece.texts.items()}.values()))


def _examples(held: Sequence[Piece], texts: Mapping[str, str], count: int, draw: random.Random) -> list[Asked]:
    """Questions of pieces that were held back, each piece in turn; neither their documents nor answers in `texts`."""
    words = f" {normalise(' '.join(texts.values()))} "
    strange = [piece for piece in held if not piece.texts.keys() & texts.keys()]
    usable = []
    for piece in strange:
        own = [each for each in piece.questions if f" {normalise(_answer(each))} " not in words]
        draw.shuffle(own)
        usable.append(sorted(own, key=lambda each: each.type != SUMMARY and len(each.golds[0]) > _SHORT))
    turns = max(map(len, usable), default=0)
    return [own[n] for n in range(turns) for own in usable if n < len(own)][:count]


def _answer(asked: Asked) -> str:
    """The answer in words, where it is a letter too."""
    if asked.type != CHOICE:
        return asked.golds[0]
    return next(line for line in asked.text.splitlines() if line.startswith(f"{asked.golds[0]}. "))[3:]


def _reading(data: Path, name: str) -> list[Piece]:
    pieces = []
    for row in _lines(data / f"reading/{name}.jsonl"):
        asked = [
            Asked(each["question"].strip(), tuple(each["answers"]), each["kind"] or name, (row["id"],))
            for each in row["questions"]
            if each["answers"]
        ]
        text = f"{row['title']}\n\n{row['text']}" if row["title"] else row["text"]
        pieces.append(Piece({row["id"]: text}, asked))
    return pieces


def _hotpot(data: Path, name: str) -> list[Piece]:
    pieces = []
    for row in _json(data / "multihop_train100/hotpotqa_qa_train.json"):
        texts = {title: f"{title}\n{''.join(sentences).strip()}" for title, sentences in row["context"]}
        needed = tuple(dict.fromkeys(title for title, _ in row["supporting_facts"]))
        pieces.append(Piece(texts, [Asked(row["question"].strip(), (row["answer"],), row["type"], needed)]))
    return pieces


def _musique(data: Path, name: str) -> list[Piece]:
    numbers: dict[str, str] = {}  # several paragraphs have one title
    pieces = []
    for row in _json(data / "multihop_train100/musique_qa_train.json"):
        texts, needed = {}, []
        for each in row["paragraphs"]:
            text = f"{each['title']}\n{each['paragraph_text'].strip()}"
            document = numbers.setdefault(text, f"{each['title']} ({len(numbers)})")
            texts[document] = text
            needed += [document] if each["is_supporting"] else []
        golds = (row["answer"], *row["answer_aliases"])
        pieces.append(Piece(texts, [Asked(row["question"].strip(), golds, row["id"].split("__")[0], tuple(needed))]))
    return pieces


def _anatomy(data: Path, name: str) -> list[Piece]:
    asked: dict[str, list[Asked]] = {}
    for row in _lines(data / "openstax_anatomy/exercises.jsonl"):
        if row["kind"] != "multiple-choice" or not row.get("answer"):
            continue
        options = [f"{letter}. {option}" for letter, option in zip("ABCDEF", row["options"], strict=False)]
        text = "\n".join([row["question"].strip(), *options, "Answer with the letter."])
        asked.setdefault(row["module"], []).append(Asked(text, (row["answer"],), CHOICE, (row["module"],)))
    modules = _lines(data / "openstax_anatomy/modules.jsonl")
    made = [(row["module"], f"{row['title']}\n\n{row['text']}") for row in modules]
    return [Piece({module: text}, asked[module]) for module, text in made if module in asked]


def _qmsum(data: Path, name: str) -> list[Piece]:
    pieces = []
    for row in _lines(data / "qmsum/val.jsonl"):
        text = "\n".join(f"{turn['speaker']}: {turn['content']}" for turn in row["meeting_transcripts"])
        asked = [Asked(each["query"].strip(), (each["answer"],), SUMMARY) for each in row["specific_query_list"]]
        pieces.append(Piece({row["meeting_id"]: text}, asked))
    return pieces


def _peps(data: Path, name: str) -> list[Piece]:
    with tarfile.open(data / "peps/peps_public_domain.tar.gz") as archive:
        texts = {
            int(found[1]): file.read().decode()
            for member in archive.getmembers()
            if (found := re.search(r"pep-(\d+)\.", member.name)) and (file := archive.extractfile(member)) is not None
        }
    headers = [row for row in _lines(data / "peps/headers.jsonl") if int(row["PEP"]) in texts]
    random.Random(0).shuffle(headers)  # neighbours have authors and dates in common
    return [Piece({f"PEP {row['PEP']}": texts[int(row["PEP"])]}, list(_header_questions(row))) for row in headers]


_HEADERS = {
    "Author": "Who is the author of PEP {}?",
    "Status": "What is the status of PEP {}?",
    "Type": "What is the type of PEP {}?",
    "Created": "When was PEP {} created?",
    "Python-Version": "Which Python version is PEP {} for?",
    "Superseded-By": "Which PEP supersedes PEP {}?",
    "Replaces": "Which PEP does PEP {} replace?",
    "Resolution": "Where is the resolution of PEP {}?",
}


def _header_questions(row: Mapping[str, str]) -> Iterator[Asked]:
    """Questions whose answer is one value of a header; lists are left out, as they have many right forms."""
    for key, wording in _HEADERS.items():
        value = _MAIL.sub("", row.get(key) or "").strip()
        if value and "," not in value and "\n" not in value:
            yield Asked(wording.format(row["PEP"]), (value,), key.lower(), (f"PEP {row['PEP']}",))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def _json(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return rows


_SEVERAL = "Answer questions about people, places, works and events, which may need facts of several documents. "
SETS = (
    RealSet("xquad", f"Answer questions about facts in encyclopedia articles. {_FEW_WORDS}", _reading, held_back=3),
    RealSet("covidqa", f"Answer medical questions from research articles. {_FEW_WORDS}", _reading, held_back=4),
    RealSet("fairytale", f"Answer questions about what happens in fairy tales. {_FEW_WORDS}", _reading, held_back=3),
    RealSet("nq", f"Answer questions about facts. {_FEW_WORDS}", _reading, held_back=40),
    RealSet("hotpot", _SEVERAL + _FEW_WORDS, _hotpot, held_back=12, pooled=True),
    RealSet("musique", _SEVERAL + _FEW_WORDS, _musique, held_back=12, pooled=True),
    RealSet(
        "anatomy", "Answer multiple-choice questions of a textbook with the letter of the right option.", _anatomy, 6
    ),
    RealSet(
        "qmsum", "Say what was said, proposed and decided in meetings, in two or three sentences.", _qmsum, held_back=3
    ),
    RealSet("peps", f"Look up what the headers of PEPs say. {_FEW_WORDS}", _peps, held_back=12),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the corpora of the command line's sets and lengths."""
    parser = argparse.ArgumentParser(description="Make corpora of real documents and questions.")
    parser.add_argument("data", type=Path, help="a folder of data sets")
    parser.add_argument("out", type=Path, help="where the corpora go")
    parser.add_argument("--tokens", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--sets", nargs="+", choices=[each.name for each in SETS], default=[each.name for each in SETS])
    parser.add_argument("--cases", type=int, default=CASES, help="of each set and length, at most")
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="about each corpus, at most")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    tell_progress()
    written = 0
    for chosen in (each for each in SETS if each.name in given.sets):
        for tokens in given.tokens:
            try:
                made = list(
                    make_corpora(
                        given.data, chosen, tokens, cases=given.cases, questions=given.questions, seed=given.seed
                    )
                )
            except OSError as error:
                logger.warning("%s is left out: %s", chosen.name, error)
                break
            for corpus in made:
                write_corpus(given.out / corpus.name, corpus)
            written += len(made)
            sizes = [sum(len(each.text) for each in corpus.documents) // _CHARACTERS for corpus in made]
            asked = sum(len(corpus.questions) for corpus in made)
            logger.info("%s at %d: %d questions, about %s tokens", chosen.name, tokens, asked, sizes)
    if not written:
        raise DocumentError(f"No corpus could be made from {given.data}; see cribsheet_bench.real.sets for its forms.")


if __name__ == "__main__":
    main()
