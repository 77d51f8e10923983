"""Advice in the reader's language: options in Python, flags on the command line, and nothing that is so already."""

from __future__ import annotations

import ast

import pytest
import typer
from corpus import DOCUMENTS, FEW_SHOT, ZERO_SHOT
from test_boundaries import FILES, UPPER

from cribsheet.build import build_sheet
from cribsheet.cli import app, run
from cribsheet.cli.console import OPTIONS, in_flags
from cribsheet.errors import BudgetError
from cribsheet.forecast import forecast
from cribsheet.testing import save_tiny_model


def options_of(command):
    for each in getattr(command, "commands", {}).values():
        yield from options_of(each)
    for option in command.params:
        yield from ((option.name, flag) for flag in option.opts)


def test_every_option_that_is_translated_is_a_flag_of_some_command():
    known = set(options_of(typer.main.get_command(app)))
    assert [name for name in OPTIONS if (name, f"--{name.replace('_', '-')}") not in known] == []


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("Build it again with mode='independent' to go on.", "Build it again with --mode independent to go on."),
        ("use another, or correction='none'.", "use another, or --correction none."),
        ("pass a rate, with check=True to hear", "pass a rate, with --check to hear"),
        ("say it with task=, best with examples", "say it with --task, best with examples"),
        ("the model's window; pass chunk_tokens from 1 on.", "the model's window; pass --chunk-tokens from 1 on."),
        ("not complete after timeout=0.5 seconds", "not complete after --timeout 0.5 seconds"),
        ("found within max_tokens=4; allow", "found within --max-tokens 4; allow"),
        ("pass rate=1, which keeps all.", "pass --rate 1, which keeps all."),
        ("build it with build(..., archive=True), or ask with another mode or no_archive=\"sheet\".",
         "build it with `cribsheet build --archive`, or ask with another mode or --no-archive sheet."),
        ("elsewhere (archive_folder=) or in fewer bits (archive='int4').",
         "elsewhere (--output) or in fewer bits (--archive-dtype int4)."),
        ("build the sheet again with archive=True.", "build the sheet again with --archive."),
        ("with rate=3, dtype='int4' it answers", "with --rate 3, --storage-dtype int4 it answers"),
        ("start vLLM with dtype='bfloat16'.", "start vLLM with dtype='bfloat16'."),
        ("no file 'mode=a.txt' nor \"max_tokens\"", "no file 'mode=a.txt' nor \"max_tokens\""),
        ("a/task=1/chunk_tokens/x and half_rate=2", "a/task=1/chunk_tokens/x and half_rate=2"),
    ],
)  # fmt: skip
def test_options_become_flags_and_quotations_stay(said, told):
    assert in_flags(said) == told


def test_the_library_names_no_flags():
    for name, path in FILES.items():
        if name.startswith((*UPPER, "__main__")):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")).endswith(
                ("Error", "warning", "info")
            ):
                texts = [each.value for each in ast.walk(node) if isinstance(each, ast.Constant)]
                flags = [text for text in texts if isinstance(text, str) and " --" in text and "qpdf" not in text]
                assert flags == [], name


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wording")
    (folder / "staff.txt").write_text("\n\n".join(document.text for document in DOCUMENTS))
    model = save_tiny_model(folder / "model")
    common = ["--model", str(model), "--task", ZERO_SHOT.description]
    assert run(["build", str(folder / "staff.txt"), *common, "--rate", "1", "-o", str(folder / "a.sheet")]) == 0
    return folder, ["build", str(folder / "staff.txt"), *common, "-o", str(folder / "b.sheet")]


@pytest.mark.parametrize(
    ("asked", "advice"),
    [
        (["--mode", "independent", "--allocation", "profiled"], "use --allocation adaptive"),
        (["--mode", "independent", "--correction", "refit"], "use --correction none"),
        (["--mode", "independent", "--retain", "0.9"], "with --check to hear what it retains, or --mode sequential"),
        (["--correction", "refit", "--retain", "0.9"], "pass it with correction and --check"),
        (["--correction", "refit", "--scorer", "recent"], "or --correction none"),
        (["--budget", "30", "--guide", "resident"], "a shorter task, or --guide dropped"),
        (["--budget", "2", "--mode", "independent"], "a shorter task, or --guide dropped"),
        (["--budget", "2", "--allocation", "uniform"], "or a lower rate"),
        (["--rate", "2", "--chunk-tokens", "-1"], "pass --chunk-tokens between 1 and"),
        (["--rate", "2", "--chunk-tokens", "-1", "--dry-run"], "pass --chunk-tokens between 1 and"),
    ],
    ids=" ".join,
)
def test_the_command_line_advises_flags(places, capsys, asked, advice):
    assert run([*places[1], *asked]) == 2
    told = capsys.readouterr().err
    assert advice in told and "='" not in told and "=True" not in told


def test_commands_that_change_and_ask_advise_flags_too(places, capsys):
    sheet = str(places[0] / "a.sheet")
    assert run(["remove", sheet, "staff.txt"]) == 1
    assert "with --mode independent" in capsys.readouterr().err
    assert run(["ask", sheet, "Who?", "--max-tokens", "0"]) == 2
    assert "--max-tokens is 0;" in capsys.readouterr().err
    assert run(["ask", str(places[0] / "none.sheet"), "Who?"]) == 1
    assert "build one with `cribsheet build`" in capsys.readouterr().err
    assert run(["ask", sheet, "Who?", "--mode", "recall"]) == 2
    assert "`cribsheet build --archive`, or ask with another mode or --no-archive sheet." in capsys.readouterr().err


@pytest.mark.parametrize("path", ["nowhere", "nowhere*.txt", "-"])
def test_paths_that_name_nothing_are_not_answered_with_a_class(capsys, tmp_path, path):
    assert run(["build", path, "-o", str(tmp_path / "a.sheet")]) == 2
    told = capsys.readouterr().err
    assert "no such file" in told and "Document(" not in told and "a pipe into a file first" in told


@pytest.mark.parametrize("make", [build_sheet, forecast])
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"budget": 2, "guide": "dropped"}, r"the template's preamble takes \d+; pass a budget of at least \d+ or"),
        ({"budget": 2}, r"the template's preamble takes \d+; pass a budget of at least \d+ or a lower rate\.$"),
        ({"budget": 2, "guide": "dropped", "mode": "independent"},
         r"but preamble takes \d+ and 4 .* or fewer documents\.$"),
        ({"rate": 10000}, r"or a lower rate\.$"),
        ({"budget": 10000}, r"or a rate\.$"),
    ],
)  # fmt: skip
def test_no_message_advises_what_is_so_already(tiny, make, how, said):
    with pytest.raises(BudgetError, match=said) as refused:
        make(tiny, DOCUMENTS, FEW_SHOT, scorer="task", **how)
    assert "guide='dropped'" not in str(refused.value) and "guide 0" not in str(refused.value)


def test_where_no_budget_is_enough_none_is_advised(tiny):
    with pytest.raises(BudgetError, match=r"pass rate=1, which keeps all, a shorter task, or guide='dropped'"):
        build_sheet(tiny, DOCUMENTS[:1], FEW_SHOT, scorer="task", budget=20, guide="resident")
    assert build_sheet(tiny, DOCUMENTS[:1], FEW_SHOT, scorer="task", rate=1, guide="resident").resident


@pytest.mark.parametrize(
    "name", ["task=4.csv", "rate=4/part.json", "seed=7.toml", "chunk_tokens.txt", "data/mode=x.md"]
)
def test_a_file_that_is_called_like_an_option_keeps_its_name(name):
    assert in_flags(f"{name}, row 3: broken; pass rate=4.5, or budget=7.") == (
        f"{name}, row 3: broken; pass --rate 4.5, or --budget 7."
    )
