"""What a question may be asked with: the settings that there are, forms of answers, and passages that help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

from cribsheet.engine.sampling import SamplingParams
from cribsheet.errors import RequestError
from cribsheet.retrieval.dense import require_dense
from cribsheet.structured.grammar import Grammar
from cribsheet.structured.tools import Toolbox
from cribsheet.vocabulary import Mode, NoArchive

BUILT_IN = ("bm25", "dense")  # retrievers of every sheet by name; the first is the default
POINTING = "sheet"  # in mode recall, the sheet itself: where the question looks in it
PASSAGE_TOKENS = 512
SURE = 0.7  # decisions/0018 and 0026 have the measurements behind this

_FORMS = {"json_schema": Grammar.json_schema, "regex": Grammar.regex, "choices": Grammar.choices}
_TOOLS = ("tools", "tool_choice")
_PASSAGES = ("retriever", "mode", "passage_tokens", "sure", "no_archive")
_SAMPLED = {field.name for field in fields(SamplingParams) if field.init}
SETTINGS = frozenset({*_SAMPLED, *_FORMS, *_TOOLS, *_PASSAGES, "timeout", "evidence"})


def check_settings(sampling: Mapping[str, Any]) -> None:
    """Raise `RequestError` for settings that there are not, and for a time that never comes."""
    unknown = set(sampling) - SETTINGS
    if unknown:
        known = ", ".join(sorted(SETTINGS))
        raise RequestError(f"Unknown sampling settings {', '.join(sorted(unknown))}; use {known}.")
    timeout = sampling.get("timeout")
    if timeout is not None and not (isinstance(timeout, (int, float)) and timeout > 0):
        raise RequestError(f"timeout is {timeout!r}; give seconds above 0, or none.")


def with_form(sampling: Mapping[str, Any], toolbox: Toolbox | None = None) -> dict[str, Any]:
    """Those of `SamplingParams` that are set, `json_schema`, `regex`, `choices` or a forced call as their grammar."""
    wanted = {name: sampling[name] for name in (*_FORMS, "grammar") if sampling.get(name) is not None}
    if toolbox and toolbox.forced:
        wanted["tool_choice"] = toolbox.schema
    elif toolbox and "json_schema" in wanted:
        Grammar.json_schema(wanted["json_schema"])  # trouble in it should be told of it, not of what it becomes
        wanted["json_schema"] = toolbox.beside(wanted["json_schema"])
    if len(wanted) > 1:
        raise RequestError(f"An answer has one form, but {' and '.join(wanted)} were given; pass one of them.")
    others = (*_FORMS, *_TOOLS, "timeout", "evidence")
    given = {name: value for name, value in sampling.items() if name not in others and value is not None}
    for name, value in wanted.items():
        given["grammar"] = value if name == "grammar" else _FORMS.get(name, Grammar.json_schema)(value)
    return given


@dataclass(frozen=True, slots=True)
class Retrieval:
    """How passages help with a question: settings that were checked.

    `top_k` bounds how many passages are told, `passage_tokens` how many tokens they take, gaps included.
    `sure` is how certain `auto` must be, 0 to 1, that passages add nothing to a draft: 0 takes every draft, 1 none.
    `no_archive` is what `recall` does where there is no archive, or it cannot be read: raise, or ask the sheet alone.
    """

    mode: Mode
    retriever: Any = BUILT_IN[0]
    top_k: int | None = None
    passage_tokens: int = PASSAGE_TOKENS
    sure: float = SURE
    no_archive: NoArchive = "error"

    def __post_init__(self) -> None:
        """Refuse settings that make no sense, with `RequestError`."""
        if self.mode not in get_args(Mode):
            raise RequestError(f"The mode is {self.mode!r}; use one of {', '.join(get_args(Mode))}.")
        for name, value in (("top_k", self.top_k), ("passage_tokens", self.passage_tokens)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise RequestError(f"{name} is {value!r}; use a whole number of at least 1.")
        if isinstance(self.sure, bool) or not isinstance(self.sure, int | float) or not 0 <= self.sure <= 1:
            raise RequestError(f"sure is {self.sure!r}; give a probability from 0 to 1.")
        if self.no_archive not in get_args(NoArchive):
            raise RequestError(f"no_archive is {self.no_archive!r}; use one of {', '.join(get_args(NoArchive))}.")
        self._check_retriever()

    def _check_retriever(self) -> None:
        if self.points and self.mode != "recall":
            raise RequestError(
                f"The retriever {POINTING!r} points to what is recalled, and the mode is {self.mode!r}; use "
                'mode="recall", or another retriever.'
            )
        if isinstance(self.retriever, str) and not self.points and self.retriever not in BUILT_IN:
            names = ", ".join(map(repr, (*BUILT_IN, POINTING)))
            raise RequestError(f"There is no built-in retriever {self.retriever!r}; use {names}, or pass your own.")
        if self.retriever == "dense":
            require_dense()

    @classmethod
    def taken_from(cls, settings: Mapping[str, Any]) -> tuple[Retrieval | None, dict[str, Any]]:
        """The retrieval that settings ask for, or none, and the settings that remain.

        A retriever alone means `hybrid`, or `recall` if it is the sheet; a mode alone means the built-in BM25. Where
        something is retrieved, `top_k` counts passages; with a `Retrieval` as the mode, which has its own, it is that
        of `SamplingParams`.
        """
        rest = dict(settings)
        if isinstance(whole := rest.get("mode"), cls):
            del rest["mode"]
            return (None if whole.mode == "sheet" else whole), rest
        given = {name: value for name in _PASSAGES if (value := rest.pop(name, None)) is not None}
        if not given.keys() & {"retriever", "mode"}:
            if given:
                raise RequestError(f"{', '.join(given)} is about passages; pass a retriever or a mode with it.")
            return None, rest
        given.setdefault("mode", "recall" if _is_pointing(given.get("retriever")) else "hybrid")
        if given["mode"] != "sheet":
            given["top_k"] = rest.pop("top_k", None)
        retrieval = cls(**given)
        return (None if retrieval.mode == "sheet" else retrieval), rest

    @property
    def points(self) -> bool:
        """Whether the sheet itself says what is recalled."""
        return _is_pointing(self.retriever)

    @property
    def takes_all(self) -> bool:
        """Whether `auto` takes every draft, so that nothing need be searched."""
        return self.mode == "auto" and self.sure == 0

    def takes(self, certainty: float) -> bool:
        """Whether `auto` takes a draft that is so certain."""
        return self.sure <= certainty and self.sure < 1


def _is_pointing(retriever: Any) -> bool:
    return isinstance(retriever, str) and retriever == POINTING
