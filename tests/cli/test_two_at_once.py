"""Two commands that write one sheet at once: nothing of either is lost without a word."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpus import DOCUMENTS

from cribsheet import CompressedKnowledgeLLM, load_sheet
from cribsheet.cli import run
from cribsheet.errors import SheetError
from cribsheet.sheet.atomic import Seen, changing
from cribsheet.testing import save_tiny_model

SRC = Path(__file__).parents[2] / "src"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}

# The program in a process that waits, right before it writes a sheet, until it may go on; without locks if asked.
_WAITING = """
import sys, time
from pathlib import Path
from cribsheet.cli import run
from cribsheet.sheet import file
locks, folder, *arguments = sys.argv[1:]
if locks == "no":
    import fcntl
    def flock(*given):
        raise OSError(37, "No locks available")
    fcntl.flock = flock
write = file.save_file
def wait_and_write(*given, **how):
    Path(folder, "ready").touch()
    while not Path(folder, "go").exists():
        time.sleep(0.01)
    write(*given, **how)
file.save_file = wait_and_write
sys.exit(run(arguments))
"""
# Holds a sheet until its input ends.
_HOLDING = """
import sys
from pathlib import Path
from cribsheet.sheet.atomic import changing
with changing(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def built(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("built") / "staff.sheet"
    with CompressedKnowledgeLLM.build(
        DOCUMENTS, "Who?", model=model, rate=2, scorer="recent", mode="independent"
    ) as kb:
        return kb.save(path)


@pytest.fixture
def staff(built, tmp_path):
    (tmp_path / "new.txt").write_text("Zoe lives in Zagreb.")
    return Path(shutil.copy(built, tmp_path / "staff.sheet"))


class Waiting:
    """A command in another process, which has done its work and is about to write."""

    def __init__(self, folder: Path, *arguments: object, locks: bool = True) -> None:
        self.folder = folder
        folder.mkdir()
        command = [sys.executable, "-c", _WAITING, "yes" if locks else "no", folder, *arguments]
        self.process = subprocess.Popen([str(part) for part in command], env=ENVIRONMENT, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while not (folder / "ready").exists() and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (folder / "ready").exists(), self.process.communicate()

    def go(self) -> tuple[int, str]:
        """Let it write: its exit code and what it said."""
        (self.folder / "go").touch()
        err = self.process.communicate(timeout=120)[1].decode()
        return self.process.returncode, err


def ids(path):
    return [entry.id for entry in load_sheet(path).manifest.documents]


CHANGES = {
    "extend": ["extend", "{sheet}", "{new}"],
    "replace": ["replace", "{sheet}", DOCUMENTS[0].id, "{new}"],
    "remove": ["remove", "{sheet}", DOCUMENTS[0].id],
    "merge": ["merge", "{sheet}", "{sheet}"],
    "study": ["study", "{sheet}", "--steps", "1"],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_sheet_that_another_process_changes_is_not_changed_too(change, cli, staff, tmp_path):
    pytest.importorskip("fcntl")
    command = [part.format(sheet=staff, new=tmp_path / "new.txt") for part in CHANGES[change]]
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDING, staff], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        before = staff.read_bytes()
        refused = cli(*command)
        assert refused.code == 1
        assert f"Another process is changing '{staff}', so nothing was done; run this again" in refused.err
        assert staff.read_bytes() == before
        other.stdin.close()


def test_of_two_changes_at_once_one_is_refused_and_then_made(cli, staff, tmp_path):
    pytest.importorskip("fcntl")
    first, second = DOCUMENTS[0].id, DOCUMENTS[1].id
    removing = Waiting(tmp_path / "first", "remove", staff, first)
    refused = cli("remove", staff, second)
    assert refused.code == 1 and "Another process is changing" in refused.err
    aside = cli("remove", staff, second, "--output", tmp_path / "aside.sheet")  # which takes nothing from anybody
    assert aside.code == 0 and first in ids(tmp_path / "aside.sheet")
    assert removing.go()[0] == 0
    assert cli("remove", staff, second).code == 0
    assert not {first, second} & set(ids(staff))


@pytest.mark.parametrize("change", ["remove", "extend"])
def test_without_locks_what_was_changed_meanwhile_is_not_written_over(change, cli, staff, tmp_path):
    pytest.importorskip("fcntl")
    arguments = {"remove": [DOCUMENTS[1].id], "extend": [tmp_path / "new.txt"]}[change]
    slow = Waiting(tmp_path / "slow", change, staff, *arguments, locks=False)
    assert cli("remove", staff, DOCUMENTS[0].id).code == 0  # it is not held
    after = staff.read_bytes()
    code, err = slow.go()
    assert code == 1 and f"'{staff}' was changed meanwhile" in err and "was not written" in err
    assert staff.read_bytes() == after and DOCUMENTS[0].id not in ids(staff)
    assert not list(tmp_path.glob(".*.part"))


def test_what_a_save_from_python_has_put_there_is_not_written_over_by_a_command(built, staff, tmp_path):
    removing = Waiting(tmp_path / "slow", "remove", staff, DOCUMENTS[0].id)
    with CompressedKnowledgeLLM.load(staff) as kb:
        kb.remove(DOCUMENTS[1].id).save(staff)
    code, err = removing.go()
    assert code == 1 and "was changed meanwhile" in err
    assert DOCUMENTS[0].id in ids(staff) and DOCUMENTS[1].id not in ids(staff)


def test_who_opened_a_sheet_before_it_was_replaced_locks_what_took_its_place(staff, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    flock, locked = fcntl.flock, []

    def late(handle, how):
        if not locked:  # another's change ends between opening and locking
            shutil.copy(staff, staff.with_name("other.sheet"))
            os.replace(staff.with_name("other.sheet"), staff)
        flock(handle, how)
        locked.append(os.fstat(handle).st_ino)

    monkeypatch.setattr(fcntl, "flock", late)
    with changing(staff) as seen:
        assert seen.file[0] == locked[1] == os.stat(staff).st_ino != locked[0]
        with pytest.raises(SheetError, match="Another process is changing"), changing(staff):
            pass
    with changing(staff):
        pass


def test_a_sheet_that_is_written_to_in_place_or_taken_away_is_seen(staff):
    seen = Seen.at(staff)
    seen.check()
    staff.unlink()
    with pytest.raises(SheetError, match="was changed meanwhile"):
        seen.check()
    Seen(staff).check()
    staff.write_text("other")
    with pytest.raises(SheetError, match="was changed meanwhile"):
        Seen(staff).check()


@pytest.mark.parametrize("archive", [False, True])
def test_of_two_builds_of_one_file_the_second_is_kept_beside_it(archive, model, tmp_path):
    (tmp_path / "a.txt").write_text("Ada lives in Oslo. " * 20)
    (tmp_path / "b.txt").write_text("Bob lives in Rome. " * 20)
    how = ["--task", "Who?", "--model", model, "--rate", "2", "--scorer", "recent", "--resume"]
    how += ["--archive"] if archive else []
    target = tmp_path / "same.sheet"
    slow = Waiting(tmp_path / "slow", "build", tmp_path / "a.txt", "-o", target, *how)
    (tmp_path / "same.sheet.partial").unlink(missing_ok=True)
    assert run(["build", str(tmp_path / "b.txt"), "-o", str(target), *map(str, how)]) == 0
    before = target.read_bytes()
    code, err = slow.go()
    (beside,) = (path for path in tmp_path.glob("same*.sheet") if path != target)
    assert code == 1 and f"'{target}' was written by another process meanwhile" in err and str(beside) in err
    assert target.read_bytes() == before and ids(target) == ["b.txt"] and ids(beside) == ["a.txt"]
    for path in (target, beside):
        sheet = load_sheet(path)
        assert (sheet.archive is not None) == archive
        assert not archive or sheet.archive.trouble == ""


def test_a_build_that_may_overwrite_does(cli, model, tmp_path):
    (tmp_path / "a.txt").write_text("Ada lives in Oslo. " * 20)
    how = ["--task", "Who?", "--model", model, "--rate", "2", "--scorer", "recent", "--force"]
    target = tmp_path / "same.sheet"
    slow = Waiting(tmp_path / "slow", "build", tmp_path / "a.txt", "-o", target, *how)
    target.write_text("other")
    assert slow.go()[0] == 0 and ids(target) == ["a.txt"]
    assert json.loads(cli("inspect", target, "--json").out)
