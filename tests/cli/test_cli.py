"""The command line: what goes to which stream, exit codes, and what an interrupted build leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest
from corpus import DOCUMENTS

from cribsheet import BuildOptions, CompressedKnowledgeLLM, load_sheet, save_sheet
from cribsheet.cli import console, run
from cribsheet.cli.console import calm_threads
from cribsheet.cli.inspect import columns
from cribsheet.compress.progress import lines
from cribsheet.compress.scoring import SCORERS
from cribsheet.demo import FOLDER, read_script
from cribsheet.errors import BudgetError
from cribsheet.plan.options import BuildKeywords
from cribsheet.sheet.manifest import Manifest
from cribsheet.testing import save_tiny_model
from cribsheet_pocket_training.worlds import make_world

KINDS = ("join2", "direct")  # of questions
SRC = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=16384)


@pytest.fixture(scope="module")
def staff(tmp_path_factory):
    folder = tmp_path_factory.mktemp("staff")
    for document in DOCUMENTS:
        (folder / f"{document.id}.txt").write_text(document.text)
    return folder


@pytest.fixture(scope="module")
def sheet(model, staff, tmp_path_factory):
    file = tmp_path_factory.mktemp("sheets") / "staff.sheet"
    assert run(["build", str(staff), "--task", "Who lives where?", "--model", str(model), "-o", str(file), *RATE]) == 0
    return file


RATE = ["--rate", "2"]


def start(*arguments, **options):
    """The real program in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    return subprocess.Popen([sys.executable, "-m", "cribsheet", *map(str, arguments)], **{**pipes, **options})


def test_help_does_not_import_torch_and_is_fast():
    code = "import sys; from cribsheet.cli import run; run(['--help']); print('torch' in sys.modules, file=sys.stderr)"
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(SRC)}
    )
    assert done.stderr.strip() == "False"
    assert "Condense documents" in done.stdout
    assert time.perf_counter() - began < 5  # 0.2 s on an idle core


def test_version_and_no_arguments(cli):
    assert cli("--version").out.startswith("cribsheet 0.")
    nothing = cli()
    assert (nothing.code, nothing.out) == (2, "")
    assert "Commands:" in nothing.err


def test_build_writes_a_sheet_and_says_what_became_of_the_corpus(cli, model, staff, tmp_path):
    done = cli(
        *("build", staff / "alice.txt", staff / "h*.txt", "--task", "Where do people live?", "--model", model),
        *("--example", "Where does Bob live? => Oslo", "--rate", 2, "--guide", "dropped", "--scorer", "task"),
        *("--chunk-tokens", 20, "--storage-dtype", "bfloat16", "--no-texts", "-o", tmp_path / "a.sheet"),
    )
    assert done.code == 0, done.err
    made = load_sheet(tmp_path / "a.sheet")
    assert [document.id for document in made.documents] == ["alice.txt", "hugo.txt"]
    assert made.task.examples == (("Where does Bob live?", "Oslo"),)
    assert (made.manifest.scorer, made.manifest.guide, made.manifest.dtype) == ("task", "dropped", "bfloat16")
    assert made.manifest.chunk_tokens == 20
    assert not made.texts
    assert f"{made.manifest.corpus_tokens} tokens of 2 documents became {made.tokens} (rate 2." in done.out
    assert f" MB, {made.length} of 16,384 positions of the window, in " in done.out
    assert "\x1b" not in done.out + done.err
    assert done.err == ""


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_a_build_without_a_task_notes_that_and_is_made_all_the_same(cli, model, staff, tmp_path, dry_run):
    # in a process of its own, as logging is set up once
    process = start("build", staff, "--model", model, *RATE, "-o", tmp_path / "a.sheet", *dry_run)
    out, err = process.communicate()
    assert process.returncode == 0 and err.startswith("cribsheet: no task was given, so ")
    assert err.count("no task") == 1 and "documents" in out


def test_a_build_without_a_model_says_how_small_the_one_is_that_ships(cli, model, staff, tmp_path):
    asked = ("build", staff / "bob.txt", "--task", "Where do people live?", "--rate", 1)
    line = "cribsheet: no --model was given, so this is made with the pocket model that ships, which is for trying "
    made = cli(*asked, "-o", tmp_path / "a.sheet")
    assert made.code == 0 and made.err.count(line) == made.err.count("\n") == 1 and "pocket" not in made.out
    assert cli(*asked, "--dry-run").err.count(line) == 1
    for chosen in ("--model", "pocket"), ("--model", model), ("--json",):
        assert cli(*asked, "--dry-run", *chosen).err == ""
    assert cli("ask", tmp_path / "a.sheet", "Where does Bob Smith live?", "--max-tokens", 2).err == ""


def test_four_bits_are_built_foretold_and_shown(cli, model, staff, tmp_path):
    asked = ("build", staff, "--task", "Where do people live?", "--model", model, "--scorer", "task", *RATE)
    four = (*asked, "--storage-dtype", "int4", "-o", tmp_path / "a.sheet")
    told = cli(*four, "--dry-run", "--json").data
    assert told["sheet_bytes"] < cli(*asked, "-o", tmp_path / "b.sheet", "--dry-run", "--json").data["sheet_bytes"]
    assert cli(*four).code == 0
    shown = cli("inspect", tmp_path / "a.sheet").out
    assert "(format 2," in shown and "of keys and values in int4" in shown
    size = load_sheet(tmp_path / "a.sheet").opened_bytes(4)
    assert f"{size:,} bytes in float32" in shown
    refused = cli(*asked, "--storage-dtype", "int3", "-o", tmp_path / "c.sheet")
    assert refused.code == 2 and "'int4'" in refused.err


def test_a_dry_run_says_what_a_build_would_take_and_writes_nothing(cli, model, staff, tmp_path):
    asked = ("build", staff, "--model", model, "--scorer", "task", "-o", tmp_path / "a.sheet", "--dry-run", *RATE)
    told = cli(*asked, "--json")
    assert told.code == 0 and list(tmp_path.iterdir()) == [], told.err
    data = told.data
    assert data["tokens"] < data["corpus_tokens"] and data["sheet_bytes"] < data["peak_bytes"] and data["seconds"] > 0
    shown = cli(*asked)
    assert f"{data['corpus_tokens']:,} tokens of {data['documents']} documents would become" in shown.out
    assert "memory at most about" in shown.out and "as the first" in shown.out
    refused = cli(*asked, "--ray")
    assert refused.code == 2 and "leave --ray, --check and --retain out" in refused.err


def test_a_dry_run_is_told_what_the_build_is_told(cli, model, staff, tmp_path, monkeypatch):
    heard = {}

    def hears(name, options):
        heard[name] = {key: value for key, value in options.items() if key in BuildKeywords.__annotations__}
        raise BudgetError("heard")

    monkeypatch.setattr("cribsheet.forecast.forecast", lambda *_, **options: hears("forecast", options))
    monkeypatch.setattr(CompressedKnowledgeLLM, "build", lambda *_, **options: hears("build", options))
    asked = ("build", staff, "--model", model, "-o", tmp_path / "a.sheet", "--correction", "refit", "--guide", "form")
    asked += ("--budget", 60, "--scorer", "task", "--chunk-tokens", 50, "--system", "Short.", "--seed", 3)
    asked += ("--storage-dtype", "int8", "--allocation", "adaptive")
    for more in ((), ("--dry-run",)):
        assert cli(*asked, *more).code == 2
    assert heard["forecast"] == heard["build"] and set(heard["build"]) == set(BuildKeywords.__annotations__) - {
        "template_options"
    }
    assert BuildOptions(**heard["forecast"]) == BuildOptions(
        correction="refit", guide="form", budget=60, scorer="task", chunk_tokens=50, system="Short.", seed=3,
        dtype="int8", allocation="adaptive",
    )  # fmt: skip


def test_a_dry_run_counts_what_a_correction_takes(cli, model, tmp_path):
    (tmp_path / "long.txt").write_text("Bob Smith lives in Oslo. He enjoys chess and works for Nordwind Labs. " * 80)
    asked = ("build", tmp_path / "long.txt", "--model", model, "--dry-run", "--json", "--rate", 2, "--scorer", "task")
    plain, corrected = (cli(*asked, "--correction", each).data for each in ("none", "refit"))
    assert corrected["peak_bytes"] > 1.2 * plain["peak_bytes"]  # the seconds of so little are noise


def test_a_dry_run_needs_no_file_and_minds_none(cli, model, staff, tmp_path, capfd):
    asked = ("build", staff, "--model", model, "--scorer", "task", "--dry-run", "--json", *RATE)
    there = tmp_path / "a.sheet"
    there.write_text("mine")
    told, kept = cli(*asked, "--resume").data, cli(*asked, "-o", there, "--resume").data
    assert told["tokens"] == kept["tokens"] and there.read_text() == "mine" and list(tmp_path.iterdir()) == [there]
    never = cli(*asked, "-o", tmp_path / "none" / "a.sheet")
    assert never.code == 2 and "does not exist" in never.err


def test_build_takes_the_task_from_a_file(cli, model, staff, tmp_path):
    (tmp_path / "task.toml").write_text('description = "Who?"\nexamples = [{question = "a", answer = "b"}]')
    done = cli(
        *("build", staff, "--task-file", tmp_path / "task.toml", "--model", model, "--budget", 90),
        *("--json", "-o", tmp_path / "a.sheet"),
    )
    assert done.data["tokens"] == 90
    assert done.data["file_bytes"] == (tmp_path / "a.sheet").stat().st_size
    assert load_sheet(tmp_path / "a.sheet").task.description == "Who?"


def test_an_existing_file_is_only_overwritten_on_demand(cli, model, staff, tmp_path):
    target = tmp_path / "a.sheet"
    target.write_text("precious")
    refused = cli("build", staff, "--model", "no-such-model-is-looked-for", "-o", target)
    assert refused.code == 2
    assert "--force" in refused.err
    assert target.read_text() == "precious"
    assert cli("build", staff, "--model", model, "--force", "-o", target).code == 0
    assert load_sheet(target).tokens > 0


MISUSES = {
    "unknown option": (["build", "{staff}", "-o", "{new}", "--ratio", "2"], "--ratio"),
    "no output": (["build", "{staff}"], "--output (-o)"),
    "not a number": (["build", "{staff}", "-o", "{new}", "--rate", "many"], "it is 'many'; give a number"),
    "output in no folder": (["build", "{staff}", "-o", "{new}/x/y.sheet"], "does not exist"),
    "output is a folder": (["build", "{staff}", "-o", "{staff}"], "is a folder"),
    "rate and budget": (["build", "{staff}", "-o", "{new}", "--rate", "2", "--budget", "9"], "leave all but one out"),
    "rate and retain": (["build", "{staff}", "-o", "{new}", "--rate", "2", "--retain", "0.9"], "leave all but one out"),
    "retain above one": (["build", "{staff}", "-o", "{new}", "--model", "{model}", "--retain", "95"], "at most 1"),
    "dry run with check": (["build", "{staff}", "-o", "{new}", "--dry-run", "--check"], "--dry-run"),
    "task twice": (["build", "{staff}", "-o", "{new}", "--task", "a", "--task-file", "b.toml"], "--task-file"),
    "empty task": (["build", "{staff}", "-o", "{new}", "--task", " "], "description"),
    "no arrow": (["build", "{staff}", "-o", "{new}", "--example", "a -> b"], "=>"),
    "stored in a type": (["build", "{staff}", "-o", "{new}", "--dtype", "int4"], "is --storage-dtype int4"),
    "computed in no type": (["build", "{staff}", "-o", "{new}", "--dtype", "int3"], "float32, bfloat16, float16 (see"),
    "a GGUF": (["build", "{staff}", "-o", "{new}", "--model", "a.gguf"], "transformers model"),
    "no such document": (["build", "{staff}/eve.txt", "-o", "{new}"], "eve.txt"),
    "no such model": (["build", "{staff}", "-o", "{new}", "--model", "./nowhere"], "nowhere"),
    "no such scorer": (["build", "{staff}", "-o", "{new}", "--model", "{model}", "--scorer", "best"], "reconstruction"),
    "no such guide": (["build", "{staff}", "-o", "{new}", "--guide", "best"], "dropped"),
    "rate below one": (["build", "{staff}", "-o", "{new}", "--model", "{model}", "--rate", "0.5"], "at least 1"),
    "budget above corpus": (["build", "{staff}", "-o", "{new}", "--model", "{model}", "--budget", "9999"], "9999"),
    "empty question": (["ask", "{sheet}", " "], "empty"),
    "temperature below zero": (["ask", "{sheet}", "Who?", "--temperature", "-1"], "temperature"),
    "no such device": (["ask", "{sheet}", "Who?", "--device", "abacus"], "abacus"),
    "question beyond the window": (["ask", "{sheet}", "Who? " * 9000], "window"),
    "json and stream": (["ask", "{sheet}", "Who?", "--json", "--stream"], "--stream"),
}
FAILURES = {
    "no such sheet": (["ask", "{new}", "Who?"], "There is no sheet"),
    "truncated sheet": (["inspect", "{torn}"], "truncated"),
    "a folder": (["ask", "{staff}", "Who?"], "is a folder, and a sheet is a file"),
    "a text": (["ask", "{staff}/bob.txt", "Who?"], "bob.txt' is no sheet: it does not begin as"),
    "not a sheet": (["inspect", "{model}/model.safetensors"], "not a sheet"),
    "sheet of another model": (["ask", "{sheet}", "Who?", "--model", "{other}"], "another weights"),
}


@pytest.mark.parametrize(
    ("code", "arguments", "told"),
    [(2, *case) for case in MISUSES.values()] + [(1, *case) for case in FAILURES.values()],
    ids=[*MISUSES, *FAILURES],
)
def test_an_error_is_one_clear_line_and_an_exit_code(cli, code, arguments, told, model, staff, sheet, tmp_path):
    torn = tmp_path / "torn.sheet"
    torn.write_bytes(sheet.read_bytes()[:-100])
    other = save_tiny_model(tmp_path / "other", seed=1) if "{other}" in arguments else ""
    places = {"model": model, "staff": staff, "sheet": sheet, "new": tmp_path / "new", "torn": torn, "other": other}
    done = cli(*(argument.format(**places) for argument in arguments))
    assert done.code == code, done.err
    assert told in done.err
    assert done.err.startswith("cribsheet: error: ")
    assert done.err.count("\n") == 1
    assert done.out == ""
    assert not (tmp_path / "new").exists()


def test_debug_shows_the_traceback(cli):
    done = cli("inspect", "nowhere.sheet", "--debug")
    assert done.code == 1
    assert "Traceback" in done.err


def test_an_unexpected_error_is_a_line_too(cli, monkeypatch):
    monkeypatch.setattr("cribsheet.sheet.file.load", lambda path: 1 / 0)
    done = cli("inspect", "a.sheet")
    assert done.code == 1
    assert "ZeroDivisionError" in done.err
    assert done.err.count("\n") == 1


def test_ask_prints_the_answer_and_streaming_prints_the_same(cli, sheet):
    whole = cli("ask", sheet, "Where does Hugo Ali live?", "--max-tokens", 9)
    streamed = cli("ask", sheet, "Where does Hugo Ali live?", "--max-tokens", 9, "--stream")
    assert whole.code == streamed.code == 0
    assert whole.out == streamed.out
    assert whole.out.strip()
    assert whole.err == streamed.err == ""


def test_ask_shows_sources(cli, sheet):
    plain = cli("ask", sheet, "Where does Hugo Ali live?", "--max-tokens", 5).out
    done = cli("ask", sheet, "Where does Hugo Ali live?", "--max-tokens", 5, "--sources")
    assert done.out.startswith(plain)
    assert ".txt [" in done.out.removeprefix(plain)


def test_json_is_all_there_is_on_stdout(cli, sheet):
    asked = cli("ask", sheet, "Who?", "--json", "--sources", "--max-tokens", 4, "--temperature", 1, "--seed", 3)
    assert asked.data["usage"]["completion_tokens"] <= 4
    assert asked.data["usage"]["cached_tokens"] == load_sheet(sheet).length
    assert {"document_id", "start", "stop", "weight", "text", "retrieved", "metadata"} == set(asked.data["sources"][0])
    chatted = cli("chat", sheet, "--json", "--max-tokens", 4, stdin="Who?\n\nWhere?\n")
    assert [turn["question"] for turn in chatted.data["turns"]] == ["Who?", "Where?"]
    assert chatted.data["turns"][1]["usage"]["prompt_tokens"] > chatted.data["turns"][0]["usage"]["prompt_tokens"]


def test_chat_answers_one_line_after_the_other(cli, sheet):
    first = cli("ask", sheet, "Who?", "--max-tokens", 4).out
    done = cli("chat", sheet, "--max-tokens", 4, stdin="Who?\nWhere?\n")
    assert done.code == 0
    assert done.out.startswith(first)
    assert len(done.out) > len(first)
    assert ">" not in done.err


def test_inspect_shows_everything_without_a_model(cli, sheet, staff):
    shown = cli("inspect", sheet).out
    data = cli("inspect", sheet, "--json").data
    made = load_sheet(sheet)
    for text in ("Who lives where?", "hugo.txt", made.manifest.corpus_digest, made.manifest.fingerprint.weights):
        assert text in shown
    assert data["manifest"]["task"]["description"] == "Who lives where?"
    assert data["bytes"] == made.nbytes
    assert (data["positions"], data["window"]) == (made.length, 16384) and made.length > made.tokens
    assert f"{made.length} of 16,384 positions" in shown
    assert set(data["kept_per_document"]) == {"alice.txt", "bob.txt", "clara.txt", "hugo.txt"}


def test_a_sheet_of_an_earlier_version_does_not_know_its_model_s_window(cli, sheet, tmp_path):
    made = load_sheet(sheet)
    build = {name: value for name, value in made.manifest.build.items() if name != "window"}
    old = save_sheet(replace(made, manifest=made.manifest.model_copy(update={"build": build})), tmp_path / "old.sheet")
    assert f"window       {made.length} positions, tokens" in cli("inspect", old).out
    data = cli("inspect", old, "--json").data
    assert (data["positions"], data["window"]) == (made.length, None)


def test_threads_sleep_while_they_wait_unless_the_user_wants_them_otherwise(tmp_path):
    mine: dict[str, str] = {}
    calm_threads(mine, tmp_path)
    assert mine == {"OMP_WAIT_POLICY": "PASSIVE"}  # no control groups here: torch counts the processors itself
    set_by_user = {"OMP_WAIT_POLICY": "ACTIVE"}
    calm_threads(set_by_user, tmp_path)
    assert set_by_user == {"OMP_WAIT_POLICY": "ACTIVE"}


@pytest.mark.skipif(console._processors() < 2, reason="one processor is the least there is")
def test_threads_are_no_more_than_a_container_has_processors(tmp_path):
    both = tmp_path / "cpu.max"
    for quota, wanted in (
        ("max 100000", None),
        ("50000 100000", "1"),
        ("100000 100000", "1"),
        ("6400000 100000", None),
    ):
        both.write_text(quota + "\n")
        mine: dict[str, str] = {}
        calm_threads(mine, tmp_path)
        assert mine.get("OMP_NUM_THREADS") == wanted, quota
    both.unlink()
    (tmp_path / "cpu").mkdir()
    for name, number in (("quota", 100000), ("period", 100000)):
        (tmp_path / "cpu" / f"cpu.cfs_{name}_us").write_text(f"{number}\n")
    older = {"OMP_NUM_THREADS": "7"}
    calm_threads(older, tmp_path)
    assert older["OMP_NUM_THREADS"] == "7"
    del older["OMP_NUM_THREADS"]
    calm_threads(older, tmp_path)
    assert older["OMP_NUM_THREADS"] == "1"


def test_the_program_calms_its_threads_before_torch_is_there():
    code = "import sys, os; sys.argv = ['cribsheet', '--version']\nfrom cribsheet.cli import main\ntry: main()\n"
    code += "finally: print('torch' in sys.modules, os.environ.get('OMP_WAIT_POLICY'))"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment | {"PYTHONPATH": str(SRC)}
    )
    assert done.stdout.splitlines()[-1] == "False PASSIVE", done.stderr


def test_the_demo_shows_answers_sources_seconds_and_sizes(cli, model):
    done = cli("demo", "--fast", "--model", model)
    assert done.code == 0, done.err
    for question in read_script("fast").questions:
        assert f"Q  {question.text}" in done.out
    shown = done.out.splitlines()
    ways = ("sheet", "BM25 passages", "everything, kept", "everything, read again")
    assert [line for line in shown if all(way in line for way in ways)]
    for row in ("right answers", "seconds per answer", "seconds to build, once", "tokens in the context", "MB between"):
        assert [line for line in shown if line.startswith(row)], row
    assert any(".rst [" in line for line in shown)
    bars = {way: line.count("█") + line.count("#") for way in ways for line in shown if line.startswith(f"  {way}  ")}
    assert set(bars) == set(ways) and max(bars.values()) == bars["everything, read again"] == 50 > bars["sheet"] >= 1
    assert "\x1b" not in done.out


def test_the_demo_tells_all_as_json(cli, model):
    told = cli("demo", "--fast", "--model", model, "--json").data
    sheet, passages, kept, again = (
        told[name] for name in ("sheet", "passages", "full_context", "full_context_read_again")
    )
    assert sheet["tokens"] * 4 == pytest.approx(kept["tokens"], rel=0.01)
    assert kept["bytes"] > sheet["bytes"] > passages["bytes"] == again["bytes"] == 0
    assert 0 < passages["tokens"] < kept["tokens"] == again["tokens"]
    assert again["seconds_per_answer"] == pytest.approx(kept["seconds_per_answer"] + kept["build_seconds"], abs=1e-3)
    exchanges, questions = told["exchanges"], read_script("fast").questions
    assert [exchange["question"] for exchange in exchanges] == [x.text for x in questions]
    for way, prefix in ((sheet, ""), (passages, "passages_"), (kept, "full_context_")):
        assert way["right"] == sum(exchange[f"{prefix}right"] for exchange in exchanges)
        mean = sum(exchange[f"{prefix}seconds"] for exchange in exchanges) / len(exchanges)
        assert way["seconds_per_answer"] == pytest.approx(mean, abs=1e-3)


def test_the_demo_without_room_for_the_full_context_says_so(cli, tmp_path):
    small = save_tiny_model(tmp_path, max_position_embeddings=3400)
    done = cli("demo", "--fast", "--model", small)
    assert done.code == 0, done.err
    assert "No comparison with the full context" in done.out
    assert [line for line in done.out.splitlines() if line.startswith("right answers") and line.endswith(" -")]


@pytest.mark.parametrize("name", ["companies", "fast", "papers"])
def test_the_demo_knows_right_from_wrong(name):
    script = read_script(name)
    texts = {file.name: file.read_text(encoding="utf-8") for file in script.files}
    assert sum(len(text) for text in texts.values()) < 60_000
    shown = {question for question, _ in script.task.examples}
    for question in script.questions:
        assert question.text not in shown
        assert question.is_answered_by(f"It is {question.expected[0].upper()}.")
        assert not question.is_answered_by("I do not know.")
        assert any(question.expected[0] in text for text in texts.values()), question


def test_the_demo_s_companies_are_those_that_its_file_says():
    """So nobody has chosen among questions, or changed texts by hand."""
    script = read_script()
    made = re.search(
        r'make_world\("(\S+)", tokens=(\d+), kind="(\w+)", questions=(\d+)', (FOLDER / "demo.toml").read_text()
    )
    world = make_world(made[1], tokens=int(made[2]), kind=made[3], questions=int(made[4]), kinds_of_question=KINDS)
    assert script.files[0].read_text(encoding="utf-8") == f"{world.text}\n"
    about = {"director": ("director", "leads", "charge"), "department": ("department",)}
    drawn = {
        (kind, what): [q for q in world.questions if q.kind == kind and any(w in q.text.lower() for w in about[what])]
        for kind, what in (("join2", "department"), ("direct", "director"), ("direct", "department"))
    }
    assert [example for example, _ in script.task.examples] == [own[0].text for own in drawn.values()]
    asked = [q for own, count in zip(drawn.values(), (8, 4, 4), strict=True) for q in own[1 : count + 1]]
    assert [(q.text, q.expected, q.places) for q in script.questions] == [
        (q.text, (q.answer,), 2 if q.kind == "join2" else 1) for q in asked
    ]


def test_a_terminated_build_ends_with_143_and_leaves_no_file(cli, model, staff, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def terminating(hidden):
        yield lambda read, total: os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(import_module("cribsheet.cli.build"), "build_progress", terminating)
    before = signal.getsignal(signal.SIGTERM)
    done = cli("build", staff, "--model", model, "-o", tmp_path / "a.sheet")
    assert (done.code, done.out, done.err) == (143, "", "cribsheet: interrupted\n")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_help_names_every_scorer_and_storage_type(cli):
    shown = cli("build", "--help").out
    types = get_args(Manifest.model_fields["dtype"].annotation)
    whole = "".join(shown.split())  # names are broken at the end of a line
    assert [name for name in SCORERS if name not in whole] == []
    assert f"--storage-dtype <{'|'.join(types)}>" in " ".join(shown.split())


def test_progress_in_lines_comes_now_and_then(capfd):
    seconds = iter(range(0, 1000, 1))
    update = lines(10, clock=lambda: next(seconds) * 3.0)
    for read in range(0, 101, 5):
        update(read, 100)
    shown = capfd.readouterr().err.splitlines()
    assert 2 < len(shown) < 12
    assert all("tokens/s" in line and "s left" in line for line in shown)


def test_columns_align():
    assert list(columns([("", "a", "b"), ("row", "1", "222")])) == ["     a    b", "row  1  222"]


# ---- the real program: signals and streams


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("long") / "long.txt"
    file.write_text("\n".join(f"Person {n} lives in town {n * 7 % 1000}." for n in range(20_000)))
    return file


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_build_that_is_stopped_leaves_no_file_but_its_checkpoint(number, code, model, long_corpus, tmp_path):
    checkpoint = tmp_path / "a.sheet.partial"
    building = start(
        *(
            "build",
            long_corpus,
            "--model",
            model,
            "--scorer",
            "task",
            "--chunk-tokens",
            256,
            "-o",
            tmp_path / "a.sheet",
        ),
        *("--rate", 64, "--resume"),
    )
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and building.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    building.send_signal(number)
    out, err = building.communicate(timeout=30)
    assert building.returncode == code, err
    left = {file for file in tmp_path.iterdir() if number == signal.SIGINT or not file.match(".*.part")}
    assert left == {checkpoint}  # one that is killed can leave a checkpoint that it was writing
    assert out == ""
    assert "Traceback" not in err


def test_an_answer_that_is_interrupted_ends_the_program_cleanly(sheet):
    asking = start("ask", sheet, "Who?", "--stream", "--max-tokens", 10_000, text=False, bufsize=0)
    asking.stdout.read(1)
    asking.send_signal(signal.SIGINT)
    _, err = asking.communicate(timeout=30)
    assert (asking.returncode, err) == (130, b"cribsheet: interrupted\n")


def test_the_real_program_keeps_its_streams_apart(sheet, tmp_path):
    asking = start("ask", sheet, "Who?", "--json", "--max-tokens", 3)
    out, err = asking.communicate(timeout=60)
    assert asking.returncode == 0
    assert json.loads(out)["finish_reason"] in ("length", "stop")
    assert err == ""


def test_a_killed_build_goes_on_with_resume_and_leaves_nothing_beside_the_sheet(model, long_corpus, tmp_path, cli):
    target, partial = tmp_path / "a.sheet", tmp_path / "a.sheet.partial"
    source = tmp_path / "short.txt"
    source.write_text(long_corpus.read_text()[:16_000])
    asked = (
        "build",
        source,
        "--model",
        model,
        "--chunk-tokens",
        256,
        "--rate",
        32,
        "--scorer",
        "task",
        "--json",
        "-o",
    )
    building = start(*asked, target, "--resume")
    deadline = time.monotonic() + 60
    while building.poll() is None and time.monotonic() < deadline:
        building.send_signal(signal.SIGSTOP)  # held, so that no write has begun when it is killed
        if partial.exists() and not list(tmp_path.glob(".*.part")):
            break
        building.send_signal(signal.SIGCONT)
        time.sleep(0.01)
    building.kill()
    building.communicate(timeout=30)
    assert partial.exists() and not target.exists()
    whole = cli(*asked, tmp_path / "whole.sheet")
    assert whole.code == 0 and {file.name for file in tmp_path.iterdir()} == {
        "short.txt", "whole.sheet", "a.sheet.partial",
    }  # fmt: skip
    assert cli(*asked, target, "--resume").code == 0
    assert {file.name for file in tmp_path.iterdir()} == {"short.txt", "whole.sheet", "a.sheet"}
    resumed, straight = load_sheet(target), load_sheet(tmp_path / "whole.sheet")
    assert (resumed.indices == straight.indices).all() and (resumed.layers[2].keys == straight.layers[2].keys).all()


def test_inspect_verifies_the_bytes_if_asked(sheet, tmp_path, cli):
    copy = tmp_path / "a.sheet"
    copy.write_bytes(sheet.read_bytes())
    assert cli("inspect", copy, "--verify").code == 0
    damaged = bytearray(copy.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    copy.write_bytes(damaged)
    result = cli("inspect", copy, "--verify")
    assert result.code == 1 and "was changed after it was saved" in result.err


def ids(file):
    return [entry.id for entry in load_sheet(file).manifest.documents]


def test_a_sheet_file_is_extended_changed_and_merged_in_place(cli, model, staff, tmp_path):
    file, other, out = (tmp_path / name for name in ("a.sheet", "b.sheet", "c.sheet"))
    options = ["--model", str(model), "--scorer", "task", "--mode", "independent", *RATE]
    assert run(["build", str(staff / "alice.txt"), str(staff / "bob.txt"), "-o", str(file), *options]) == 0
    assert run(["build", str(staff / "hugo.txt"), "-o", str(other), *options]) == 0
    assert run(["extend", str(file), str(staff / "clara.txt")]) == 0
    assert run(["replace", str(file), "alice.txt", str(staff / "hugo.txt")]) == 0
    assert load_sheet(file).texts[0].startswith("Hugo Ali")
    refused = cli("extend", file, staff / "clara.txt")
    assert refused.code == 2 and "has a document 'clara.txt' already; `replace` puts another text in" in refused.err
    assert run(["remove", str(file), "bob.txt", "--output", str(out)]) == 0
    assert ids(file) == ["alice.txt", "bob.txt", "clara.txt"] and ids(out) == ["alice.txt", "clara.txt"]
    result = cli("merge", file, other, "--json")
    assert result.code == 0 and result.data["documents"] == 4 and result.data["change"] == "merged"
    assert ids(file) == ["alice.txt", "bob.txt", "clara.txt", "hugo.txt"]


def test_a_change_that_fails_leaves_the_file_as_it_was(cli, staff, sheet, tmp_path):
    before = sheet.read_bytes()
    for arguments in (["remove", sheet, "bob.txt"], ["extend", sheet, staff / "bob.txt"], ["merge", sheet, sheet]):
        result = cli(*arguments)
        assert result.code == 1 and "--mode independent" in result.err and result.err.count("\n") == 1
    assert sheet.read_bytes() == before
    assert sorted(path.name for path in sheet.parent.iterdir()) == [sheet.name]


def test_inspect_shows_the_form_that_stands_in_the_place_of_the_examples(cli, staff, tmp_path):
    made = tmp_path / "form.sheet"
    task = ["--task", "Where do people live?", "--example", "Where does Bob Smith live? => Oslo"]
    assert cli("build", staff, *task, "--guide", "form", "--rate", 2, "-o", made).code == 0
    assert "in the place of the examples" in cli("inspect", made).out
