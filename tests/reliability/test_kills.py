"""kill -9 at random moments of build, save and changes, a full disk, no memory.

What is left is the old file or the new, and always valid.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cribsheet import Backbone, CompressedKnowledgeLLM, build_sheet, load_sheet, read_documents, save_sheet
from cribsheet.corpus.task import Task
from cribsheet.sheet.file import read_manifest, verify
from cribsheet.testing import save_tiny_model

pytestmark = pytest.mark.reliability
SRC = Path(__file__).parents[2] / "src"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}

# Forks, for each line it reads, a child that writes versions of a sheet over and over, and tells the child's number.
_WRITER = """
import os, sys
import torch
torch.set_num_threads(1)
from cribsheet import CompressedKnowledgeLLM, build_sheet, read_documents, save_sheet
from cribsheet.model.backbone import Backbone
from cribsheet.corpus.task import Task
what, model, target = sys.argv[1:]
backbone = Backbone.load(model)
texts = ["Alice Moreno lives in Lisbon. " * 20, "Bob Smith lives in Oslo. " * 20]
task = Task.of("Who lives where?")
def build(number):
    return build_sheet(backbone, read_documents(texts), task, rate=4, scorer="recent", seed=number, chunk_tokens=64)
def changed(number):
    kb = CompressedKnowledgeLLM.load(target, model=backbone)
    ids = [document.id for document in kb.sheet.documents]
    text = {"id": f"new-{os.getpid()}-{number}", "text": f"Clara Berg lives in Town {number}. " * 5}
    if what == "extend":
        kb.extend([text]) if len(ids) < 6 else kb.remove(*ids[2:])
    elif what == "replace":
        kb.replace(ids[0], text["text"])
    else:
        kb.remove(ids[-1]) if len(ids) > 1 else kb.extend([text, {**text, "id": text["id"] + "b"}])
    return kb.sheet
one = build(1)
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child:
        print(child, flush=True)
        os.waitpid(child, 0)
        print("dead", flush=True)
        continue
    number = 1
    while True:
        number += 1
        save_sheet(one if what == "save" else build(number) if what == "build" else changed(number), target)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def killed(what, model, target, wait, dice, times):
    """Goes on after each child of a writer that was killed within `wait` seconds; the file it left is valid."""
    command = [sys.executable, "-c", _WRITER, what, str(model), str(target)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=ENVIRONMENT, **pipes) as writer:
        assert writer.stdout.readline() == "ready\n"
        for _ in range(times(100)):
            print("go", file=writer.stdin, flush=True)
            child = int(writer.stdout.readline())
            time.sleep(dice.uniform(0.0, wait))
            os.kill(child, signal.SIGKILL)
            assert writer.stdout.readline() == "dead\n"
            verify(target)
            yield
        writer.stdin.close()


@pytest.mark.parametrize("what", ["build", "save"])
def test_a_killed_writer_leaves_the_old_file_or_the_new(what, model, sheet_file, dice, times, tmp_path):
    target = tmp_path / "staff.sheet"
    shutil.copy(sheet_file, target)
    digests = {read_manifest(target).created}
    for _ in killed(what, model, target, 0.15, dice, times):
        digests.add(read_manifest(target).created + read_manifest(target).digest)
    assert len(digests) > 1  # it was written indeed
    assert all(path == target or path.name.startswith(".") for path in tmp_path.iterdir())  # hidden leftovers


@pytest.mark.parametrize("what", ["extend", "replace", "remove"])
def test_a_killed_change_leaves_the_old_sheet_or_the_new(what, model, dice, times, tmp_path):
    """And whatever it leaves can be asked, and changed again: each child goes on with what the last one left."""
    target = tmp_path / "staff.sheet"
    backbone = Backbone.load(model)
    texts = ["Alice Moreno lives in Lisbon. " * 5, "Bob Smith lives in Oslo. " * 5]
    terms = {"rate": 4, "scorer": "recent", "mode": "independent"}
    save_sheet(build_sheet(backbone, read_documents(texts), Task.of("Who lives where?"), **terms), target)
    changes, before = 0, target.read_bytes()
    for _ in killed(what, model, target, 0.4, dice, times):
        sheet = load_sheet(target)
        after = target.read_bytes()
        changes, before = changes + (after != before), after
        assert len(sheet.texts) == len(sheet.manifest.documents) == len(sheet.manifest.segments)
        for document, entry in zip(sheet.documents, sheet.manifest.documents, strict=True):
            assert len(document.text) == entry.characters
    assert changes > 0
    with CompressedKnowledgeLLM.load(target, model=backbone) as kb:
        assert kb.ask("Who?", max_tokens=3).usage.completion_tokens


def test_a_full_disk_leaves_the_old_file(model, sheet_file, tmp_path):
    """A limit on file size stands for the disk: writing beyond it fails the same way, with an OSError underway."""
    target = tmp_path / "staff.sheet"
    shutil.copy(sheet_file, target)
    before = target.read_bytes()
    (tmp_path / "a.txt").write_text("Alice Moreno lives in Lisbon. " * 400)
    command = [
        "build",
        str(tmp_path / "a.txt"),
        "--task",
        "Who?",
        "--model",
        str(model),
        "-o",
        str(target),
        "--rate",
        "2",
    ]

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command += ["--scorer", "recent", "--force"]
    done = subprocess.run(
        [sys.executable, "-m", "cribsheet", *command],
        env=ENVIRONMENT,
        preexec_fn=limited,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "cannot be written" in done.stderr or "too large" in done.stderr.lower(), done.stderr
    assert target.read_bytes() == before
    assert not list(tmp_path.glob(".*.part"))


def test_a_build_without_memory_says_so_and_the_process_lives(tmp_path):
    """A build that needs more than the process may have ends with an error; an answer before and after is the same."""
    model = save_tiny_model(tmp_path / "wide", hidden_size=256, intermediate_size=8192)
    script = """
import resource, sys
import torch
torch.set_num_threads(1)
from cribsheet import CompressedKnowledgeLLM
from cribsheet.errors import BudgetError
def build(times):
    return CompressedKnowledgeLLM.build(
        ["Bob lives in Oslo. " * times], "Who?", model=sys.argv[1], budget=60, scorer="recent", chunk_tokens=3000
    )
kb = build(20)
before = kb.ask("Who?", max_tokens=5).text
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
try:
    build(400)
except BudgetError as error:
    print(type(error).__name__, str(error)[:300].replace(chr(10), " "), file=sys.stderr)
else:
    sys.exit("it was built all the same")
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert kb.ask("Who?", max_tokens=5).text == before
print("alive")
"""
    done = subprocess.run([sys.executable, "-c", script, str(model)], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout.strip() == "alive", done.stderr
    assert "memory" in done.stderr.lower(), done.stderr
