"""What a sheet is for: a description, a few example questions with answers, and how to answer."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cribsheet.corpus.formats.record import mending_of, surrogate_in
from cribsheet.errors import TaskError

_KEYS = ("description", "examples", "instruction")
_EXAMPLE_KEYS = ("question", "answer")
_ARROW = "=>"
_QUESTION_MARKS = ("?", "？", "؟")
_ENDS = (".", "!", "。", "！")
_YEAR = re.compile(r"(?:1\d|20)\d\d")
_SENTENCE_ENDS = (".", "!", "?", "。", "！", "？")
_SHORT = 4  # words of a name, a number or a date at most
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]")  # scripts that do not set words apart
_SAID_TWICE = 2  # so often does each answer of a closed set come, on average


@dataclass(frozen=True, slots=True)
class Task:
    """What a sheet is for: the questions to come, described and by example.

    `examples` may be given as any iterable of (question, answer) pairs or of mappings {"question", "answer"}.
    All texts are stripped. Raises `TaskError` for an empty description, question or answer, and for anything
    that is no text or holds half a surrogate pair.
    """

    description: str
    examples: tuple[tuple[str, str], ...] = ()
    instruction: str = "Answer from the documents."

    def __post_init__(self) -> None:
        object.__setattr__(self, "description", _filled(self.description, "the task's description"))
        object.__setattr__(self, "examples", _pairs(self.examples))
        object.__setattr__(self, "instruction", _text(self.instruction, "the task's instruction"))

    @classmethod
    def of(cls, task: Task | str | Mapping[str, Any] | Path | None) -> Task:
        """A task from whatever stands for one.

        A mapping as in `from_dict`, a path or the name of an existing .toml or .json file, any other string
        as the description, and None as a general task. A single word that ends in .toml or .json but names no
        file is an error.
        """
        if task is None:
            return cls("Answer questions about the documents.")
        if isinstance(task, Task):
            return task
        if isinstance(task, Mapping):
            return cls.from_dict(task)
        if isinstance(task, Path) or (isinstance(task, str) and _names_a_file(task)):
            return cls.from_file(task)
        return cls(task)

    @classmethod
    def from_file(cls, path: str | Path) -> Task:
        """A task from TOML or JSON with `description` and, as you like, `instruction` and `examples`.

        Each example is a table with `question` and `answer`. Raises `TaskError`, with the file's name, for a
        file that is missing, broken or holds unknown keys.
        """
        path = Path(path)
        parse = _PARSERS.get(path.suffix.lower())
        if parse is None:
            raise TaskError(f"{path} is no task file: its suffix is {path.suffix!r}; use {' or '.join(_PARSERS)}")
        if path.exists() and not path.is_file():
            raise TaskError(f"{path} is no task file: it is no regular file; copy its content into one")
        try:
            return cls.from_dict(parse(path.read_text(encoding="utf-8-sig")))
        except OSError as error:
            raise TaskError(f"cannot read the task file {path}: {error.strerror}; check its path") from error
        except TaskError as error:
            raise TaskError(f"{path}: {error}") from error
        except (ValueError, RecursionError) as error:
            kind = path.suffix[1:].upper()
            raise TaskError(f"{path} is broken {kind} ({error}); repair it there") from error

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Task:
        """The inverse of `to_dict`; unknown keys are refused by name."""
        if not isinstance(data, Mapping):
            raise TaskError(f"a task is {data!r}; give an object with {', '.join(_KEYS)}")
        _refuse_unknown(data, _KEYS, "a task")
        if "description" not in data:
            raise TaskError('a task has no "description"; say there in a sentence what will be asked')
        return cls(**data)

    @staticmethod
    def parse_example(text: str) -> tuple[str, str]:
        """Question and answer from the command line's "question => answer"."""
        question, *rest = text.split(_ARROW)
        if len(rest) != 1:
            raise TaskError(
                f"the example {text!r} has {len(rest)} times '{_ARROW}' where one is needed; write 'question "
                f"{_ARROW} answer', and put texts that hold '{_ARROW}' into a task file"
            )
        return _pair((question, rest[0]), f"the example {text!r}")

    @property
    def few_shot(self) -> bool:
        """Whether there are examples."""
        return bool(self.examples)

    @property
    def line(self) -> str:
        """What a prompt says of the task.

        A description that is a question is quoted: as it stands, a model answers it instead of the user's own.
        """
        if self.description.endswith(_QUESTION_MARKS):
            return f'Answer questions like "{self.description}" about the documents.'
        return self.description

    @property
    def form(self) -> str:
        """A sentence on the form of the examples' answers (`form_of`); empty without examples."""
        return form_of([answer for _, answer in self.examples]) if self.examples else ""

    def shown(self, form: str) -> Task:
        """The task as a guide shows it: with such a sentence in the place of its examples, or as it is without one."""
        if not form:
            return self
        line = self.line if self.line.endswith(_ENDS) else f"{self.line}."
        return replace(self, description=f"{line} {form}", examples=())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, from which `from_dict` makes the same task."""
        examples = [dict(zip(_EXAMPLE_KEYS, pair, strict=True)) for pair in self.examples]
        return {"description": self.description, "instruction": self.instruction, "examples": examples}


_PARSERS = {".toml": tomllib.loads, ".json": json.loads}


def _names_a_file(text: str) -> bool:
    if Path(text).suffix.lower() not in _PARSERS:
        return False
    return os.path.isfile(text) or not any(map(str.isspace, text))


def _pairs(examples: object) -> tuple[tuple[str, str], ...]:
    if isinstance(examples, str | Mapping) or not isinstance(examples, Iterable):
        raise TaskError(f"the task's examples are {examples!r}; give a list of (question, answer) pairs")
    return tuple(_pair(example, f"example {number}") for number, example in enumerate(examples, 1))


def _pair(example: object, where: str) -> tuple[str, str]:
    if isinstance(example, Mapping):
        _refuse_unknown(example, _EXAMPLE_KEYS, where)
        example = tuple(example.get(key, "") for key in _EXAMPLE_KEYS)
    if not isinstance(example, tuple | list) or len(example) != 2:
        raise TaskError(f"{where} is {example!r}; give a pair (question, answer)")
    question, answer = example
    return _filled(question, f"the question of {where}"), _filled(answer, f"the answer of {where}")


def _filled(value: object, what: str) -> str:
    if text := _text(value, what):
        return text
    raise TaskError(f"{what} is {value!r}, which holds no text; write it out, or leave it away")


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise TaskError(f"{what} is {value!r}, which is no text; put it in quotes")
    if found := surrogate_in(value):
        raise TaskError(f"{what} holds {found}, which no encoding can store; {mending_of(found)}")
    return value.strip()


def _refuse_unknown(data: Mapping[str, Any], allowed: tuple[str, ...], where: str) -> None:
    unknown = ", ".join(repr(key) for key in data if key not in allowed)
    if unknown:
        raise TaskError(f"{where} has the unknown key {unknown}; allowed are {', '.join(allowed)}")


def form_of(answers: Sequence[str]) -> str:
    """A sentence on how to answer, in the form of these answers, of which there is at least one.

    A model that has lost the place of an answer gives an example's instead, if it has read one; how long answers are
    and of what kind is said here without a word of theirs. Answers that come again and again are no examples but all
    that there are, labels: these are named.
    """
    labels = list(dict.fromkeys(answers))
    if _SAID_TWICE * len(labels) <= len(answers):
        return f"Answer with {' or '.join(labels)}, nothing else."
    if all(_is_sentence(answer) for answer in answers):
        return f"Answer with {_sizes(answers)}, in sentences."
    kinds = list(dict.fromkeys(kind for answer in answers if (kind := _kind(answer))))
    such = f", such as {', '.join(kinds)}" if kinds else ""
    return f"Answer with {_sizes(answers)}{such}; nothing else."


def _sizes(answers: Sequence[str]) -> str:
    """How long the answers are, in words, or in characters where words are not set apart."""
    if any(map(_UNSPACED.search, answers)):
        return _span([len(answer) for answer in answers], "character")
    return _span([len(answer.split()) for answer in answers], "word")


def _span(sizes: Sequence[int], unit: str) -> str:
    """A span, and a little more where all are of one size: the next answer need not be."""
    least, most = min(sizes), max(sizes)
    return f"{least} to {max(most, least + 1)} {unit}s"


def _is_sentence(answer: str) -> bool:
    return answer.endswith(_SENTENCE_ENDS) and len(answer.split()) > _SHORT


def _kind(answer: str) -> str:
    """What an answer is, or nothing if that cannot be told."""
    bare = answer.rstrip(".")
    if bare.lower() in ("yes", "no"):
        return "yes or no"
    if len(bare) == 1 and bare.isalpha():
        return "a letter"
    if _YEAR.fullmatch(bare):
        return "a year"
    if len(bare.split()) > _SHORT:
        return ""
    if any(character.isdigit() for character in bare):
        return "a number"
    return "a name" if bare[:1].isupper() else ""
