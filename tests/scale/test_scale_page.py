"""The examples of `docs/how-to/scale-out.md` do what the page says, as they stand there. Run by `make ray`.

What names a cluster or a registry elsewhere is only read by the program that it is for, not run.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import uuid
from pathlib import Path

import httpx
import pytest
import typer
import yaml
from processes import environment, marked, started, wait_until

from cribsheet import load_sheet
from cribsheet.cli import app
from cribsheet.testing import save_tiny_model

pytest.importorskip("ray")
theirs = pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")  # in Ray Serve's own models
pytestmark = [pytest.mark.reliability, theirs]

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "scale-out.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]
ELSEWHERE = ("ray://", "hub#", "-gpus 1")
FILES = dict(re.findall(r"^```\{code-block\}[^\n]*\n:caption: ([\w.]+).*?\n\n(.*?)^```$", PAGE, re.M | re.S))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where somebody reads the page: documents, a model, and the page's files."""
    folder = tmp_path_factory.mktemp("page")
    texts = {"alice": "Alice works for Nordwind Labs in Lisbon. " * 20, "bob": "Bob works in Oslo. " * 20}
    for place in ("docs", "corpora/people", "corpora/places"):
        (folder / place).mkdir(parents=True)
        for name, text in texts.items():
            (folder / place / f"{name}.txt").write_text(text)
    save_tiny_model(folder / "a-model")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def mark():
    mark = uuid.uuid4().hex
    yield mark
    wait_until(lambda: not marked(mark))


def here(what):
    """The page's commands of that kind that need nothing else than this machine."""
    found = [line for line in COMMANDS if line.startswith(f"cribsheet {what} ")]
    return [shlex.split(line)[2:] for line in found if not any(mark in line for mark in ELSEWHERE)]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_one_that_the_program_knows(line):
    name, *arguments = shlex.split(line)[1:]
    command = typer.main.get_command(app).commands[name]
    assert command.make_context(name, arguments).params["ray"]


def test_the_builds_make_their_sheets(folder, mark):
    commands = here("build")
    assert len(commands) == 2
    for arguments in commands:
        program = [sys.executable, "-m", "cribsheet", "build", *arguments]
        done = subprocess.run(program, cwd=folder, env=environment(mark), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert len(load_sheet(folder / arguments[arguments.index("-o") + 1]).documents) == 2


def test_the_servers_answer(folder, mark):
    commands = here("serve")
    assert [("--replica-processes" in arguments) for arguments in commands] == [False, True]
    asked = {"model": "staff", "messages": [{"role": "user", "content": "Where does Alice work?"}], "max_tokens": 8}
    said = []
    for arguments in commands:
        with started([*arguments, "--port", "0"], folder, mark) as (_, url):
            reply = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=120)
            assert reply.status_code == 200, reply.text
            said.append(reply.json()["choices"][0]["message"]["content"])
        wait_until(lambda: not marked(mark))
    assert said[0] == said[1]


def test_the_programs_run(folder, mark):
    group = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    for name, before in (("corpora.py", []), ("leads.py", group), ("both.py", group)):
        program = [sys.executable, *before, name]
        done = subprocess.run(program, cwd=folder, env=environment(mark), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    assert {"people.sheet", "places.sheet", "staff.sheet"} <= {each.name for each in folder.iterdir()}


def test_the_deployment_is_one(folder):
    from importlib import import_module

    from cribsheet.ray import Serving

    (told,) = yaml.safe_load(FILES["staff.yaml"])["applications"]
    module, _, name = told["import_path"].partition(":")
    assert getattr(import_module(module), name)(Serving(**told["args"]))
    assert set(Serving(**told["args"]).places()) == {"staff", "handbook"}
