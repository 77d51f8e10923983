"""What killed processes have left behind is deleted by the next one, and what a living one holds is not."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT

import cribsheet
from cribsheet import build_sheet, save_sheet
from cribsheet.sheet.archive.layout import Layout
from cribsheet.sheet.archive.writer import ArchiveWriter
from cribsheet.sheet.leftovers import clean, hold, temporary_file, temporary_folder

pytest.importorskip("fcntl", reason="without locks nothing is deleted")

_OTHER = """
import sys, time
from pathlib import Path
from cribsheet.sheet.leftovers import hold, temporary_file, temporary_folder
made = [temporary_folder(".llama.cpp"), temporary_file(".archive")]
held = [hold(path) for path in made]
(made[0] / "sheet.state").write_text("large")
print(*made, flush=True)
time.sleep(600)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder for temporary files, here and in other processes."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("PYTHONPATH", str(Path(cribsheet.__file__).parents[1]))
    return tmp_path


LAYOUT, ORIGINS = Layout(1, 1, 16, "int8", [1]), torch.zeros(1, 3)


def aged(*paths, seconds=3600):
    for path in paths:
        os.utime(path, (time.time() - seconds,) * 2)


def test_what_a_killed_process_has_left_is_deleted_by_the_next_that_makes_one(place):
    with subprocess.Popen([sys.executable, "-c", _OTHER], stdout=subprocess.PIPE, text=True) as other:
        left = [Path(path) for path in other.stdout.readline().split()]
        aged(*left)
        mine = [temporary_folder(".llama.cpp"), temporary_file(".archive")]
        assert all(path.exists() for path in (*left, *mine))  # it lives
        other.send_signal(signal.SIGKILL)
    temporary_file(".archive")
    assert left[0].exists() and not left[1].exists()
    temporary_folder(".llama.cpp")
    assert not left[0].exists() and all(path.exists() for path in mine)  # too young for anybody to be sure


def test_what_is_not_ours_stays(place):
    mine = temporary_file(".archive")
    others = [place / "a.archive", place / ".cribsheet-0123abcd-abcdefgh.archive", place / f"{mine.name}.bak"]
    for path in others:
        path.touch()
    target = place / "precious"
    target.write_text("precious")
    link = mine.with_name(mine.name.replace(mine.name[-16:-8], "abcdefgh"))
    link.symlink_to(target)
    pipe = mine.with_name(mine.name.replace(mine.name[-16:-8], "pipepipe"))
    os.mkfifo(pipe)
    aged(mine, *others, target, pipe)
    temporary_file(".archive")
    assert not mine.exists() and not pipe.exists()
    assert all(path.exists() for path in others) and link.is_symlink() and target.read_text() == "precious"


def test_a_lock_ends_with_its_descriptor(place):
    path = temporary_folder(".llama.cpp")
    held = hold(path)
    aged(path)
    clean(place, re.escape(path.name), 60)
    assert path.exists()
    os.close(held)
    clean(place, re.escape(path.name), 60)
    assert not path.exists() and hold(path) is None


def test_an_archive_that_a_killed_build_left_is_deleted_and_that_of_a_sheet_that_lives_is_not(tiny, tmp_path):
    build = {"rate": 3, "scorer": "recent", "archive": True, "archive_folder": tmp_path}
    one = build_sheet(tiny, DOCUMENTS, FEW_SHOT, **build)
    left = one.archive.path.with_name(one.archive.path.name.replace(one.archive.path.name[-16:-8], "abcdefgh"))
    left.write_bytes(one.archive.path.read_bytes())
    aged(left, one.archive.path)
    other = build_sheet(tiny, DOCUMENTS, FEW_SHOT, **build)
    assert not left.exists() and one.archive.path.exists()
    path = one.archive.path
    del one
    assert not path.exists() and other.archive.path.exists()


def test_an_archive_that_is_not_begun_for_long_keeps_its_name(tmp_path):
    waits, old = ArchiveWriter(LAYOUT, ORIGINS, None, tmp_path), temporary_file(".archive", tmp_path)
    aged(waits.path, old)
    temporary_file(".archive", tmp_path)
    assert waits.path.exists() and not old.exists()
    waits.begin()
    waits.begin()
    aged(waits.path)
    temporary_file(".archive", tmp_path)
    assert waits.path.exists() and len(waits._held) == 1
    held = waits._held[0]
    del waits
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(held)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_that_lets_go_leaves_the_archive_to_the_one_who_made_it(tmp_path):
    writer = ArchiveWriter(LAYOUT, ORIGINS, None, tmp_path)
    writer.begin()
    path = writer.path
    child = os.fork()
    if child == 0:
        try:
            del writer
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert path.exists()
    del writer
    assert not path.exists()


def test_parts_of_a_sheet_whose_writer_was_killed_are_deleted_by_a_save_of_another_day(tiny, tmp_path):
    sheet = build_sheet(tiny, DOCUMENTS, FEW_SHOT, rate=3, scorer="recent")
    old, new, others = (tmp_path / f".{name}.12-0123abcd.part" for name in ("a.sheet", "a.sheet", "b.sheet"))
    new = new.with_name(".a.sheet.13-0123abcd.part")
    for path in (old, new, others):
        path.touch()
    aged(old, others, seconds=100_000)
    save_sheet(sheet, tmp_path / "a.sheet")
    assert not old.exists() and new.exists() and others.exists()
