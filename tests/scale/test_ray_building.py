"""Builds as Ray tasks, with workers that are killed: the sheet is the one that nobody disturbed. Run by `make ray`."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import pytest
import torch
from processes import MARK, environment, kill, marked, wait_until

from cribsheet import Backbone, build_sheet, load_sheet, read_documents
from cribsheet.corpus.task import Task
from cribsheet.errors import BudgetError, DocumentError
from cribsheet.testing import save_tiny_model

pytest.importorskip("ray")
pytestmark = [pytest.mark.reliability, pytest.mark.filterwarnings("ignore::FutureWarning:ray")]

FOLDERS = Path("/tmp" if Path("/tmp").is_dir() else tempfile.gettempdir())
TASK = Task.of("Who lives where?")
DOCUMENTS = read_documents([{"id": f"d{n}", "text": f"Person {n} lives in Town {n * 7}. " * 60} for n in range(6)])
OPTIONS = {"rate": 4, "scorer": "recent"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def mark():
    """A cluster of our own, whose processes have this mark."""
    from cribsheet.ray import cluster

    with pytest.MonkeyPatch.context() as patch:
        mark = uuid.uuid4().hex
        patch.setenv(MARK, mark)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("RAY_ADDRESS", raising=False)
        with cluster(cpus=2):
            assert marked(mark)
            yield mark
        wait_until(lambda: not marked(mark))


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same(one, other):
    layers = zip(one.layers, other.layers, strict=True)
    assert all(torch.equal(getattr(a, part), getattr(b, part)) for a, b in layers for part in ("keys", "values"))
    assert torch.equal(one.indices, other.indices) and torch.equal(one.origins, other.origins)
    assert [*one.texts] == [*other.texts] and one.manifest.digest == other.manifest.digest
    return True


@pytest.mark.parametrize("place", ["on its machine", "where it was told"])
def test_a_build_whose_worker_is_killed_goes_on_and_ends_with_the_same_sheet(place, mark, model, tmp_path):
    from cribsheet.ray import build_each
    from cribsheet.ray.build import Corpus

    options = {**OPTIONS, "chunk_tokens": 8}
    checkpoint = tmp_path / "a.partial" if place == "where it was told" else None
    told, killed = [], []

    def progress(read, total):
        told.append(read)
        if not killed and read > total * 0.1:
            kill(mark, "ray::_build")
            killed.append(len(told))

    corpora = {"a": Corpus(DOCUMENTS, checkpoint)}
    ((name, sheet),) = build_each(corpora, TASK, model=model, progress=progress, **options)
    assert name == "a" and killed
    assert same(sheet, build_sheet(Backbone.load(model), DOCUMENTS, TASK, **options))
    assert min(told[killed[0] - 1 :]) >= told[killed[0] - 1] - 8  # it went on, from the last chunk but one at worst
    assert not list(tmp_path.iterdir())


def test_several_corpora_become_a_sheet_each(mark, model):
    from cribsheet.ray import build_each
    from cribsheet.ray.build import Corpus

    corpora = {f"s{n}": Corpus(DOCUMENTS[n : n + 2]) for n in range(3)}
    sheets = dict(build_each(corpora, TASK, model=model, **OPTIONS))
    assert set(sheets) == set(corpora)
    backbone = Backbone.load(model)
    for name, corpus in corpora.items():
        assert same(sheets[name], build_sheet(backbone, corpus.documents, TASK, **OPTIONS))


def test_the_documents_of_an_independent_sheet_are_read_by_workers_that_may_be_killed(mark, model):
    from cribsheet.ray import build_independent

    killed = []

    def progress(read, total):
        if not killed and read:
            killed.append(kill(mark, "ray::_segment") if marked(mark, "ray::_segment") else kill(mark, "ray::IDLE"))

    sheet = build_independent(DOCUMENTS, TASK, model=model, progress=progress, **OPTIONS)
    assert killed
    assert same(sheet, build_sheet(Backbone.load(model), DOCUMENTS, TASK, mode="independent", **OPTIONS))


def test_what_cannot_be_built_is_refused_as_without_ray(mark, model):
    from cribsheet.ray import build_each, build_independent
    from cribsheet.ray.build import Corpus

    with pytest.raises(BudgetError, match="rate is"):
        list(build_each({"a": Corpus(DOCUMENTS)}, TASK, model=model, rate=0.5))
    with pytest.raises(DocumentError, match="d0"):
        build_independent([*DOCUMENTS, DOCUMENTS[0]], TASK, model=model, rate=4)


def test_a_command_that_is_killed_goes_on_where_it_was(model, tmp_path):
    mark, documents = uuid.uuid4().hex, tmp_path / "docs"
    documents.mkdir()
    for document in DOCUMENTS:
        (documents / f"{document.id}.txt").write_text(document.text)
    command = [
        sys.executable,
        "-m",
        "cribsheet",
        "build",
        "docs",
        "-o",
        "a.sheet",
        "--ray",
        "--resume",
        "--task",
        "Who?",
    ]
    command += ["--model", str(model), "--rate", "4", "--scorer", "recent", "--chunk-tokens", "8"]
    options = {"cwd": tmp_path, "env": environment(mark)}
    with subprocess.Popen(command, **options, stderr=subprocess.DEVNULL) as first:
        partial = tmp_path / "a.sheet.partial"
        wait_until(lambda: partial.exists() and partial.stat().st_size)
        os.kill(first.pid, 9)
    wait_until(lambda: not marked(mark))
    begun = partial.stat().st_size
    again = subprocess.run(command, **options, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert begun and not partial.exists()
    with contextlib.chdir(tmp_path):
        read = read_documents("docs")  # what is read tells where from
    terms = {**OPTIONS, "chunk_tokens": 8}
    assert same(load_sheet(tmp_path / "a.sheet"), build_sheet(Backbone.load(model), read, Task.of("Who?"), **terms))


def test_a_cluster_of_our_own_takes_work_only_from_those_who_have_its_token(mark):
    import ray

    script = f"import ray; ray.init({ray.get_runtime_context().gcs_address!r}, log_to_driver=False)"
    command = [sys.executable, "-c", f"{script}; print(ray.get(ray.remote(lambda: 'ran').remote()))"]
    for name, works in (("RAY_AUTH_TOKEN", True), ("NO_TOKEN", False)):
        own = {key: value for key, value in environment("none").items() if not key.startswith("RAY_AUTH")}
        own |= {"RAY_AUTH_MODE": "token", name: os.environ["RAY_AUTH_TOKEN"], "HOME": "/nowhere"}
        done = subprocess.run(command, env=own, capture_output=True, text=True)
        assert (done.returncode == 0, "ran" in done.stdout) == (works, works), done.stderr


def test_a_killed_driver_leaves_no_process_and_the_next_one_deletes_its_folder():
    mark = uuid.uuid4().hex
    script = "import time\nfrom cribsheet.ray import cluster\nwith cluster(cpus=1):\n print('up', flush=True)\n input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    left = []
    for _ in range(2):
        with subprocess.Popen([sys.executable, "-c", script], env=environment(mark), **pipes) as driver:
            assert driver.stdout.readline() == "up\n"
            assert len(marked(mark)) > 2
            assert not any(folder.exists() for folder in left)  # the next one has cleaned up
            left = [owner.parent for owner in FOLDERS.glob("*/owner") if owner.read_text().startswith(f"{driver.pid} ")]
            os.kill(driver.pid, 9)
        wait_until(lambda: not marked(mark))
        assert len(left) == 1 and left[0].exists()


def test_nothing_but_its_own_package_imports_ray():
    script = (
        "import sys, cribsheet.llm, cribsheet.cli, cribsheet.server.app, cribsheet.ray; sys.exit('ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], env=environment("none")).returncode == 0
