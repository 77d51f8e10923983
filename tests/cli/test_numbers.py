"""Numbers on the command line: what none can be is refused before any work, with the value and its limits."""

from __future__ import annotations

import types
from typing import Annotated, Union, get_args, get_origin, get_type_hints

import pytest

from cribsheet.cli import app, run
from cribsheet.cli.options import number, whole

COMMANDS = [command.callback for command in app.registered_commands]
COMMANDS += [inner.callback for group in app.registered_groups for inner in group.typer_instance.registered_commands]


def is_number(kind):
    """Whether it is `int` or `float`, or a list of them, or nothing else."""
    if get_origin(kind) in (list, Union, types.UnionType):
        return any(is_number(part) for part in get_args(kind))
    return kind in (int, float)


def numbers_of(command):
    for name, hint in get_type_hints(command, include_extras=True).items():
        if get_origin(hint) is Annotated and is_number(get_args(hint)[0]):
            yield name, get_args(hint)[1]


def test_every_number_is_read_by_our_own_words():
    found = [(f"{command.__name__} {name}", option) for command in COMMANDS for name, option in numbers_of(command)]
    assert len(found) > 50
    assert [name for name, option in found if getattr(option.parser, "__module__", "") != whole.__module__] == []


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["serve", "a", "--port", "70000"], "'--port': it is 70000; give a whole number of at least 0 and at most"),
        (["serve", "a", "--port", "-1"], "'--port': it is -1; give a whole number of at least 0 and at most 65535"),
        (["serve", "a", "--port", "1e3"], "'--port': it is '1e3'; give a whole number of at least 0 and at most 65535"),
        (["serve", "a", "--max-tokens", "0"], "'--max-tokens': it is 0; give a whole number of at least 1"),
        (["serve", "a", "--max-answers", "0"], "'--max-answers': it is 0; give a whole number of at least 1"),
        (["serve", "a", "--requests-per-minute", "-5"], "it is -5; give a whole number of at least 1"),
        (["serve", "a", "--timeout", "0"], "'--timeout': it is 0; give a number above 0"),
        (["serve", "a", "--timeout", "nan"], "'--timeout': it is nan; give a number above 0"),
        (["serve", "a", "--drain", "inf"], "'--drain': it is inf; give a number of at least 0 and at most 86400"),
        (["serve", "a", "--drain", "nan"], "'--drain': it is nan; give a number of at least 0 and at most 86400"),
        (["serve", "a", "--replica-cpus", "inf"], "it is inf; give a number of at least 0 and at most 65536"),
        (["serve", "a", "--slots", "0"], "'--slots': it is 0; give a whole number of at least 1"),
        (["build", "a", "-o", "b", "--task-cpus", "-1"], "'--task-cpus': it is -1; give a number of at least 0 and at"),
        (["build", "a", "-o", "b", "--study", "1e308"], "it is 1e308; give a number above 0 and at most 525600"),
        (["build", "a", "-o", "b", "--study", "nan"], "it is nan; give a number above 0 and at most 525600"),
        (["build", "a", "-o", "b", "--study-steps", "0"], "it is 0; give a whole number of at least 1"),
        (["build", "a", "-o", "b", "--rate", "four"], "'--rate': it is 'four'; give a number"),
        (["ask", "a", "Who?", "--top-k", "1.5"], "'--top-k': it is '1.5'; give a whole number"),
        (["compare", "a", "--questions", "q", "--seed", str(1 << 64)], "is 18446744073709551616; give a whole number"),
        (["compare", "a", "--questions", "q", "--top-k", "0"], "'--top-k': it is 0; give a whole number of at least 1"),
        (["bench", "quality", "--cases", "0"], "'--cases': it is 0; give a whole number of at least 1"),
        (["bench", "quality", "--tokens", "9", "--tokens", "-9"], "'--tokens': it is -9; give a whole number of at"),
        (["bench", "quality", "--rate", "0.5"], "'--rate': it is 0.5; give a number of at least 1"),
        (["bench", "speed", "--seconds", "-1"], "'--seconds': it is -1; give a number above 0"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else "",
)  # fmt: skip
def test_a_number_that_cannot_be_is_refused_with_its_limits(capsys, asked, told):
    assert run(asked) == 2
    assert told in capsys.readouterr().err


def test_limits_are_numbers_that_can_be():
    assert [whole(0, 65_535)(text) for text in ("0", "8000", "65535")] == [0, 8000, 65_535]
    assert number(1)("1") == 1.0 and number(0, above=True)("inf") == float("inf") and number()("-2.5") == -2.5
