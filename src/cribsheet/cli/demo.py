"""`cribsheet demo`: a sheet of real documents, built and asked before your eyes, next to the full context."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cribsheet.cli.ask import source_lines
from cribsheet.cli.console import AsJson, build_progress, quiet_libraries, say, say_json
from cribsheet.cli.inspect import columns
from cribsheet.cli.options import flat

if TYPE_CHECKING:
    from cribsheet.demo.run import Demo, Exchange


@flat
def demo(
    fast: Annotated[bool, typer.Option("--fast", help="Fewer documents and questions.")] = False,
    model: Annotated[str, typer.Option(metavar="MODEL", help="pocket, a model folder, or a hub id.")] = "pocket",
    as_json: AsJson = False,
) -> None:
    """Build, ask and measure a sheet of real documents.

    They ship with cribsheet; the same questions are put to the full context, so that what is lost can be seen.
    """
    quiet_libraries()
    from cribsheet.demo import read_script
    from cribsheet.demo.run import Demo

    script = read_script(fast=fast)
    with build_progress(hidden=as_json) as progress:
        shown = Demo(script, model=model, progress=progress)
    exchanges = []
    if not as_json:
        _show(_opening(shown))
    for question in script.questions:
        exchanges.append(shown.ask(question))
        if not as_json:
            _show(_exchange_lines(exchanges[-1]))
    figures = shown.figures(exchanges)
    if as_json:
        say_json(figures | {"exchanges": [exchange.to_dict() for exchange in exchanges]})
    else:
        _show(_closing(shown, figures))


def _show(lines: Iterator[str]) -> None:
    for line in lines:
        say(line)


def _opening(shown: Demo) -> Iterator[str]:
    made, task = shown.kb.sheet.manifest, shown.script.task
    yield f"Condensed {len(made.documents)} documents, {made.corpus_tokens:,} tokens, to {shown.kb.sheet.tokens:,}."
    yield f"Task: {task.description}"
    for question, answer in task.examples:
        yield f"  for example: {question} => {answer}"
    if shown.no_full_reason:
        yield f"No comparison with the full context: {shown.no_full_reason}"


def _exchange_lines(exchange: Exchange) -> Iterator[str]:
    question = exchange.question
    yield ""
    yield f"Q  {question.text}"
    yield f"A  {_judged(exchange, exchange.answer.text)}"
    if exchange.full is not None:
        yield f"   full context: {_judged(exchange, exchange.full.text)}"
    for line in source_lines(exchange.sources):
        yield f"   {line}"


def _judged(exchange: Exchange, answer: str) -> str:
    right = exchange.question.is_answered_by(answer)
    return answer if right else f"{answer}  (expected: {exchange.question.expected[0]})"


def _closing(shown: Demo, figures: dict[str, Any]) -> Iterator[str]:
    sheet, full = figures["sheet"], figures["full_context"]
    rows = [("", "sheet", "full context")]
    rows.append(("tokens in the context", f"{sheet['tokens']:,}", f"{full['tokens']:,}"))
    rows.append(("bytes of keys and values", f"{sheet['bytes']:,}", f"{full['bytes']:,}"))
    rows.append(("seconds to build", _number(sheet["build_seconds"], 2), _number(full["build_seconds"], 2)))
    rows.append(("seconds per answer", _number(sheet["seconds_per_answer"], 3), _number(full["seconds_per_answer"], 3)))
    rows.append(("right answers", _right(sheet), _right(full)))
    yield ""
    yield from columns(rows)
    yield ""
    yield (
        f"Rate {figures['rate']:.1f}; model {figures['model']} on {figures['device']}, {figures['threads']} threads. "
        "A demo, not a benchmark."
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _right(side: dict[str, Any]) -> str:
    return "-" if side["right"] is None else f"{side['right']} of {side['asked']}"
