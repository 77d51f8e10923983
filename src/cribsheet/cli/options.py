"""Options that several commands have, declared once: a group of them is a dataclass, which a command takes whole."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, get_type_hints

import typer

from cribsheet.cli.console import Debug, Device, Revision, Verbose, misuse

SheetFile = Annotated[str, typer.Argument(metavar="FILE", help="A sheet: a file, a URL, or REGISTRY#NAME.")]


def flat(command: Callable[..., None]) -> Callable[..., None]:
    """A command as typer takes it: groups become the options in them, and --verbose and --debug come last."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {
        name: p.annotation for name, p in signature.parameters.items() if is_dataclass(p.annotation)
    }
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        parameters += (
            _options(groups[name]) if name in groups else [_named(name, parameter.annotation, parameter.default)]
        )
    parameters += [_named("verbose", Verbose, False), _named("debug", Debug, False)]

    @functools.wraps(command)
    def called(*, verbose: bool, debug: bool, **values: Any) -> None:  # both are heard before the command is called
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called


def _options(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [_named(field.name, hints[field.name], field.default) for field in fields(group)]


def _named(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


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

    max_tokens: Annotated[int | None, typer.Option(metavar="N", help="Longest answer in tokens.  [default: 256]")] = (
        None
    )
    temperature: Annotated[
        float | None, typer.Option(metavar="X", help="0 takes the most probable token each time.  [default: 0]")
    ] = None
    top_p: Annotated[
        float | None, typer.Option(metavar="X", help="Draw from the most probable tokens that sum up to this.")
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(metavar="N", help="Draw from this many most probable tokens; with --retriever, passages at most."),
    ] = None
    seed: Annotated[int | None, typer.Option(metavar="N", help="Makes drawing repeatable.")] = None
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End the answer before this text; repeatable.")
    ] = None


@dataclass(frozen=True, slots=True)
class PassageOptions:
    """What is searched beside the sheet, and what answers."""

    retriever: Annotated[
        Literal["bm25", "dense"] | None,
        typer.Option(
            help="Search the documents, by words or by an embedding model, and tell passages after the sheet."
        ),
    ] = None
    mode: Annotated[
        Literal["sheet", "retrieval", "hybrid", "auto"] | None,
        typer.Option(help="What answers; auto retrieves if passages may help.  [default: hybrid with --retriever]"),
    ] = None
    passage_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Most tokens of passages.  [default: 512]")
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
