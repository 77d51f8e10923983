"""Sheets that are written over in place while they are open: answers stay as they were, or the change is told."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT

from cribsheet import CompressedKnowledgeLLM, SheetCache, build_sheet, load_sheet, save_sheet
from cribsheet.errors import SheetError
from cribsheet.testing import save_tiny_model, tiny_backbone

SRC = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


@pytest.fixture(scope="module")
def others(backbone, tmp_path_factory):
    """The bytes of two sheets."""
    folder = tmp_path_factory.mktemp("two")
    made = [build_sheet(backbone, DOCUMENTS, FEW_SHOT, rate=3, scorer="random", seed=seed) for seed in (1, 2)]
    data = [save_sheet(sheet, folder / f"{number}.sheet").read_bytes() for number, sheet in enumerate(made)]
    assert data[0] != data[1]
    return data


@pytest.fixture
def file(others, tmp_path):
    path = tmp_path / "a.sheet"
    path.write_bytes(others[0])
    return path


@pytest.fixture(params=["small", "large"])
def size(request, monkeypatch):
    """Large sheets are those whose layers are read when they are first used."""
    if request.param == "large":
        monkeypatch.setattr("cribsheet.sheet.file._AT_ONCE", 0)
    return request.param


def over(path, data):
    """As `cp` and `rsync --inplace` write: into the file that is there."""
    with open(path, "r+b") as opened:
        opened.write(data)
        opened.truncate()
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))  # a clock may be coarser than this test is quick


def numbers(sheet):
    return torch.stack([torch.stack([layer.keys, layer.values]) for layer in sheet.layers])


def test_answers_stay_as_they_were(file, others, size, backbone):
    with (
        CompressedKnowledgeLLM.load(file, model=backbone) as kb,
        CompressedKnowledgeLLM.load(file, model=backbone) as b,
    ):
        b.ask("Who?", max_tokens=2)
        over(file, others[1])
        asked, again = (each.ask("Where does Alice live?", max_tokens=12) for each in (kb, b))
    file.write_bytes(others[0])
    with CompressedKnowledgeLLM.load(file, model=backbone) as kb:
        wanted = kb.ask("Where does Alice live?", max_tokens=12)
    assert asked.text == again.text == wanted.text and asked.sources == again.sources == wanted.sources


def test_what_was_read_stays(file, others, size):
    sheet = load_sheet(file)
    before = numbers(sheet)
    over(file, others[1])
    assert torch.equal(numbers(sheet), before)
    assert not torch.equal(numbers(load_sheet(file)), before)


def test_what_was_not_read_is_told_to_have_changed(file, others, monkeypatch):
    monkeypatch.setattr("cribsheet.sheet.file._AT_ONCE", 0)
    for data in (others[1], others[1][: len(others[1]) // 2], b""):
        over(file, others[0])
        sheet = load_sheet(file)
        assert len(sheet.layers) == 3 and sheet.spans()
        over(file, data)
        for _ in range(2):
            with pytest.raises(SheetError, match=r"a\.sheet' cannot be read: it .*; open it again"):
                len(sheet.layers[0].keys)


def test_a_file_that_another_one_replaced_is_still_the_one_that_was_opened(file, others, size, tmp_path):
    sheet, wanted = load_sheet(file), numbers(load_sheet(file))
    (tmp_path / "new").write_bytes(others[1])
    os.replace(tmp_path / "new", file)
    assert torch.equal(numbers(sheet), wanted)
    opened = load_sheet(file)
    file.unlink()
    assert not torch.equal(numbers(opened), wanted)


def test_an_open_sheet_goes_to_another_process(file, size):
    sheet = pickle.loads(pickle.dumps(load_sheet(file)))
    file.unlink()
    assert numbers(sheet).isfinite().all()


def test_a_cache_never_gives_an_old_version_for_a_new_one(file, others):
    cache = SheetCache(1 << 30)
    first = numbers(cache.load(file))
    over(file, others[1])
    assert not torch.equal(numbers(cache.load(file)), first) and len(cache) == 1


def test_files_are_closed(file, size):
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("reads /proc")
    before = len(os.listdir("/proc/self/fd"))
    sheets = [load_sheet(file) for _ in range(20)]
    sheets = [(sheet, numbers(sheet)) for sheet in sheets]
    assert len(os.listdir("/proc/self/fd")) == before
    load_sheet(file)
    assert len(os.listdir("/proc/self/fd")) == before


_ASKS = """
import sys
from cribsheet import CompressedKnowledgeLLM
model, path = sys.argv[1:]
kb = CompressedKnowledgeLLM.load(path, model=model)
first = kb.ask("Where does Bob live?", max_tokens=8)
open(path, "wb").close()
second = kb.ask("Where does Bob live?", max_tokens=8)
assert (second.text, second.sources) == (first.text, first.sources), (first, second)
kb.extend([{"id": "zoe", "text": "Zoe lives in Zagreb."}])
kb.save(path + ".again")
print("alive")
"""


def test_a_truncated_sheet_does_not_end_the_process(tmp_path):
    model, file = save_tiny_model(tmp_path / "model"), tmp_path / "a.sheet"
    with CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=model, rate=2, mode="independent") as kb:
        kb.save(file)
    environment = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _ASKS, str(model), str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
    assert len(load_sheet(f"{file}.again").documents) == len(DOCUMENTS) + 1


def test_what_is_shown_of_a_large_sheet_takes_no_key_or_value(file, monkeypatch):
    wanted = repr(load_sheet(file))
    monkeypatch.setattr("cribsheet.sheet.file._AT_ONCE", 0)
    sheet = load_sheet(file)
    over(file, b"")  # so that nothing more can be read
    assert repr(sheet) == wanted
    with pytest.raises(SheetError, match="cannot be read"):
        sheet.layers[0]
