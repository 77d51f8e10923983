"""Archives on the command line: built, resumed, shown, verified, refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpus import DOCUMENTS

from cribsheet import load_sheet
from cribsheet.sheet.archive.archive import archive_path
from cribsheet.testing import save_tiny_model

SRC = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("staff")
    for document in DOCUMENTS:
        (folder / f"{document.id}.txt").write_text(document.text)
    model = save_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=16384)
    return ["build", str(folder), "--model", str(model), "--rate", "2", "--task", "Who lives where?"]


@pytest.mark.parametrize("mode", ["sequential", "independent"])
def test_both_sizes_are_told_and_shown(cli, asked, tmp_path, mode):
    file = tmp_path / "a.sheet"
    told = cli(*asked, "--archive", "--mode", mode, "-o", file, "--dry-run", "--json").data
    made = cli(*asked, "--archive", "--mode", mode, "-o", file, "--json").data
    size = archive_path(file).stat().st_size
    assert told["archive_bytes"] == made["archive_bytes"] == size
    shown = cli("inspect", file, "--verify", "--json").data
    assert shown["archive_bytes"] == size and shown["manifest"]["archive"]["dtype"] == "int4"
    assert f"{size:,} bytes of all tokens in int4" in cli("inspect", file).out
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.sheet", "a.sheet.archive"]
    data = archive_path(file).read_bytes()
    archive_path(file).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused = cli("inspect", file, "--verify")
    assert refused.code == 1 and "is damaged" in refused.err
    archive_path(file).unlink()
    assert "is missing" in cli("inspect", file).out  # and the rest is shown all the same


def test_the_type_alone_asks_for_one(cli, asked, tmp_path):
    file = tmp_path / "a.sheet"
    assert "and an archive of" in cli(*asked, "--archive-dtype", "int8", "-o", file).out
    assert load_sheet(file).archive.dtype == "int8"


def test_what_cannot_be_is_refused_before_any_work(cli, asked, tmp_path):
    assert "leave --ray or --archive out" in cli(*asked, "--archive", "--ray", "-o", tmp_path / "a.sheet").err
    archive_path(tmp_path / "b.sheet").write_text("somebody else's")
    refused = cli(*asked, "--archive", "-o", tmp_path / "b.sheet")
    assert refused.code == 2 and f"{str(archive_path(tmp_path / 'b.sheet'))!r} exists" in refused.err
    assert cli(*asked, "-o", tmp_path / "b.sheet").out
    assert archive_path(tmp_path / "b.sheet").read_text() == "somebody else's"


def test_a_killed_build_is_resumed_with_its_archive(asked, tmp_path):
    """The real program, killed for good once it has a checkpoint."""
    whole, file = tmp_path / "whole.sheet", tmp_path / "a.sheet"
    arguments = [sys.executable, "-m", "cribsheet", *asked, "--archive", "--chunk-tokens", "7"]
    environment = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    subprocess.run([*arguments, "-o", str(whole)], env=environment, check=True, capture_output=True)
    process = subprocess.Popen([*arguments, "--resume", "-o", str(file)], env=environment, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "a.sheet.partial"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists() and Path(f"{checkpoint}.archive.part").exists() and not file.exists()
    subprocess.run([*arguments, "--resume", "-o", str(file)], env=environment, check=True, capture_output=True)
    assert archive_path(file).read_bytes() == archive_path(whole).read_bytes()
    left = {each.name for each in tmp_path.iterdir() if not each.name.endswith(".part")}
    assert left == {f"{name}.sheet{end}" for name in ("a", "whole") for end in ("", ".archive")}
