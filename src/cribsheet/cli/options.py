"""Options that several commands have, declared once: a group of them is a dataclass, which a command takes whole."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import typer

from cribsheet.cli.console import Debug, Device, Revision, Verbose, misuse
from cribsheet.vocabulary import Mode, NoArchive

T = TypeVar("T")
N = TypeVar("N", int, float)
MOST_OF_ONE = 65_536  # processors or accelerators of one task or replica: more than any machine has
SheetFile = Annotated[str, typer.Argument(metavar="FILE", help="A sheet: a file, a URL, or REGISTRY#NAME.")]


def whole(least: int | None = None, most: int | None = None) -> Callable[[str], int]:
    """Reads a whole number, for `typer.Option(parser=...)`; without limits here the library has them."""
    return _reader(int, "a whole number", least, most)


def number(least: int | None = None, most: int | None = None, *, above: bool = False) -> Callable[[str], float]:
    """As `whole`, any number: of at least `least`, or `above` it. What is no number at all is below every limit."""
    return _reader(float, "a number", least, most, above=above)


def _reader(
    kind: Callable[[str], N], noun: str, least: int | None, most: int | None, *, above: bool = False
) -> Callable[[str], N]:
    limits = "" if least is None else f" {'above' if above else 'of at least'} {least}"
    limits += "" if most is None else f" and at most {most}"

    def read(text: str) -> N:
        try:
            value = kind(text)
        except ValueError:
            misuse(f"it is {text!r}; give {noun}{limits}")
        enough = least is None or value > least or (value == least and not above)
        if not enough or (most is not None and value > most):
            misuse(f"it is {text}; give {noun}{limits}")
        return value

    return read


def flat(command: Callable[..., T]) -> Callable[..., T]:
    """A command as typer takes it: groups become the options in them, and --verbose and --debug come last."""
    signature = inspect.signature(command, eval_str=True)
    kinds = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    parameters = [
        option
        for parameter in signature.parameters.values()
        for option in _options(parameter.name, parameter.annotation, parameter.default)
    ]
    parameters += [*_options("verbose", Verbose, False), *_options("debug", Debug, False)]

    @functools.wraps(command)
    def called(*, verbose: bool, debug: bool, **values: Any) -> T:  # both are heard before the command is called
        return command(**{name: _value(name, kind, values) for name, kind in kinds.items()})

    called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called


def _options(name: str, kind: Any, default: Any) -> list[inspect.Parameter]:
    """A parameter as it is, or the options of its group and of the groups in that."""
    if not is_dataclass(kind):
        return [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)]
    hints = _hints(kind)
    return [option for part in fields(kind) for option in _options(part.name, hints[part.name], part.default)]


def _value(name: str, kind: Any, values: Mapping[str, Any]) -> Any:
    """What was given for a parameter; for a group, the group."""
    if not is_dataclass(kind):
        return values[name]
    group: Any = kind
    return group(**{part: _value(part, hint, values) for part, hint in _hints(kind).items()})


def _hints(group: Any) -> dict[str, Any]:
    return get_type_hints(group, include_extras=True)


def given(options: Any) -> dict[str, Any]:
    """Of a group, what was given: the others are left to the library."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """The model behind a sheet: what `CompressedKnowledgeLLM.load` takes."""

    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model, if it is no longer where the sheet was made.")
    ] = None
    device: Device = None
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Type the model computes in.")
    ] = None
    revision: Revision = None


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How an answer is drawn and how long it is: what `CompressedKnowledgeLLM.ask` takes."""

    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", parser=whole(), help="Longest answer in tokens.  [default: 256]")
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option(metavar="X", parser=number(), help="0 takes the most probable token each time.  [default: 0]"),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(metavar="X", parser=number(), help="Draw from the most probable tokens that sum up to this."),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            parser=whole(),
            help="Draw from this many most probable tokens; with --retriever, passages at most.",
        ),
    ] = None
    seed: Annotated[int | None, typer.Option(metavar="N", parser=whole(), help="Makes drawing repeatable.")] = None
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End the answer before this text; repeatable.")
    ] = None


@dataclass(frozen=True, slots=True)
class PassageOptions:
    """What is searched beside the sheet, and what answers."""

    retriever: Annotated[
        Literal["bm25", "dense", "sheet"] | None,
        typer.Option(
            help="Search the documents, by words or by an embedding model, and tell passages after the sheet; or "
            "recall what the sheet itself looks at."
        ),
    ] = None
    mode: Annotated[
        Mode | None,
        typer.Option(
            help="What answers; auto retrieves if passages may help, recall fetches them from the archive.  [default: "
            "hybrid with --retriever]"
        ),
    ] = None
    no_archive: Annotated[
        NoArchive | None,
        typer.Option(help="What recall does where there is no archive, or it cannot be read.  [default: error]"),
    ] = None
    passage_tokens: Annotated[
        int | None, typer.Option(metavar="N", parser=whole(), help="Most tokens of passages.  [default: 512]")
    ] = None
    dense_model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="With --retriever dense, its model: a folder or id of sentence-transformers."
        ),
    ] = None

    def __post_init__(self) -> None:
        """Refuse a model that nothing would use."""
        if self.dense_model is not None and self.retriever != "dense":
            misuse("--dense-model is the model of --retriever dense; give both")


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """What a sheet is for, in words and examples or in a file."""

    task: Annotated[str | None, typer.Option(metavar="TEXT", help="What will be asked, in a sentence.")] = None
    example: Annotated[
        list[str] | None, typer.Option(metavar="'Q => A'", help="An example question with its answer; repeatable.")
    ] = None
    task_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The task as TOML or JSON, instead of --task and --example.")
    ] = None
