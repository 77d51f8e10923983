"""`cribsheet demo`: a sheet, built and asked before your eyes, next to passages and to everything in the context."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cribsheet.cli.ask import source_lines
from cribsheet.cli.console import AsJson, build_progress, quiet_libraries, say, say_json
from cribsheet.cli.inspect import columns
from cribsheet.cli.options import flat
from cribsheet.corpus.printable import in_line

if TYPE_CHECKING:
    from cribsheet.asking.answer import Answer
    from cribsheet.demo import DemoQuestion
    from cribsheet.demo.run import Demo, Exchange

_BAR = 50  # characters of the longest bar
_WAYS = {
    "sheet": "sheet",
    "passages": "BM25 passages",
    "full_context": "everything, kept",
    "full_context_read_again": "everything, read again",
}


@flat
def demo(
    fast: Annotated[bool, typer.Option("--fast", help="Two short documents and three questions.")] = False,
    model: Annotated[str, typer.Option(metavar="MODEL", help="pocket, a model folder, or a hub id.")] = "pocket",
    as_json: AsJson = False,
) -> None:
    """Build a sheet and ask it, beside passages that BM25 finds, and beside everything in the context.

    The documents ship with cribsheet, and so does the model; every question is put to each, and every answer counts.
    The set was picked to show where a sheet is good, one narrow task: of questions about other made-up worlds that were
    tried, BM25's passages answered more.
    """
    quiet_libraries()
    from cribsheet.demo import read_script
    from cribsheet.demo.run import Demo

    script = read_script("fast" if fast else "companies")
    with build_progress(hidden=as_json) as progress:
        shown = Demo(script, model=model, progress=progress)
    exchanges = []
    if not as_json:
        _show(_opening(shown))
    shown.warm_up()
    for question in script.questions:
        exchanges.append(shown.ask(question))
        if not as_json:
            _show(_exchange_lines(exchanges[-1], with_source=len(exchanges) == 1))
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


def _exchange_lines(exchange: Exchange, *, with_source: bool) -> Iterator[str]:
    yield ""
    yield f"Q  {exchange.question.text}"
    yield f"A  {_judged(exchange, exchange.answer)}"
    for line in source_lines(list(exchange.sources[:1])) if with_source else ():
        yield f"   looked at {line.strip()}"
    yield f"   BM25 passages: {_judged(exchange, exchange.passages)}"
    if exchange.full is not None:
        yield f"   everything in the context: {_judged(exchange, exchange.full)}"


def _judged(exchange: Exchange, answer: Answer) -> str:
    right = exchange.question.is_answered_by(answer.text)
    wrong = "" if right else f"  <- wrong: {exchange.question.expected[0]}"
    return f"{in_line(answer.text)}  ({answer.seconds:.2f} s){wrong}"


def _closing(shown: Demo, figures: dict[str, Any]) -> Iterator[str]:
    sides = [figures[name] for name in _WAYS]
    questions = shown.script.questions
    rows: list[tuple[str, ...]] = [
        ("", *_WAYS.values()),
        ("right answers", *(_of(s["right"], questions) for s in sides)),
    ]
    if joined := [question for question in questions if question.places > 1]:
        rows.append(("  of those about two places", *(_of(s["right_about_two_places"], joined) for s in sides)))
    rows.append(("seconds per answer", *(_number(side["seconds_per_answer"], 2) for side in sides)))
    rows.append(("seconds to build, once", *(_number(side["build_seconds"], 1) for side in sides)))
    rows.append(("tokens in the context", *(f"{side['tokens']:,}" for side in sides)))
    rows.append(("MB between questions", *(f"{side['bytes'] / 1e6:,.1f}" for side in sides)))
    yield ""
    yield from columns(rows)
    yield ""
    yield from _bars([(name, side["seconds_per_answer"]) for name, side in zip(_WAYS.values(), sides, strict=True)])
    yield ""
    yield (
        f"Rate {figures['rate']:.1f}; model {figures['model']} on {figures['device']}, {figures['threads']} threads. "
        f'"Read again" is what reading took once, and an answer. A demo, not a benchmark.'
    )


def _bars(rows: Sequence[tuple[str, float | None]]) -> Iterator[str]:
    """Seconds per answer as bars, in characters that the terminal has."""
    measured = [(name, seconds) for name, seconds in rows if seconds is not None]
    longest, wide = max(seconds for _, seconds in measured), max(len(name) for name, _ in measured)
    mark = "█" if (sys.stdout.encoding or "").lower().startswith("utf") else "#"
    yield "seconds per answer"
    for name, seconds in measured:
        yield f"  {name.ljust(wide)}  {mark * max(1, round(_BAR * seconds / longest))} {seconds:.2f} s"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _of(right: int | None, asked: Sequence[DemoQuestion]) -> str:
    return "-" if right is None else f"{right} of {len(asked)}"
