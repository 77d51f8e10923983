"""Files that take the place of others: links stay links, modes stay modes, and nothing half-written is left."""

from __future__ import annotations

import os
import stat

import pytest
from corpus import DOCUMENTS, FEW_SHOT

from cribsheet import CompressedKnowledgeLLM, build_sheet, load_sheet, save_sheet
from cribsheet.cli import run
from cribsheet.compare.journal import write_whole
from cribsheet.errors import SheetError
from cribsheet.sheet.atomic import replacing, writing
from cribsheet.testing import save_tiny_model, tiny_backbone


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def kb(model):
    with CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=model, rate=2, mode="independent") as kb:
        yield kb


@pytest.fixture
def sheet_file(kb, tmp_path):
    return kb.save(tmp_path / "a.sheet")


@pytest.mark.parametrize("bits", [0o600, 0o640, 0o444, 0o664])
def test_a_sheet_that_is_written_again_keeps_its_mode(kb, sheet_file, bits):
    sheet_file.chmod(bits)
    kb.save(sheet_file)
    assert mode(sheet_file) == bits
    load_sheet(sheet_file)


def test_a_private_sheet_is_private_while_it_is_written(sheet_file):
    sheet_file.chmod(0o600)
    with replacing(sheet_file) as unfinished:
        assert stat.S_IMODE(os.stat(unfinished).st_mode) == 0o600


def test_a_link_stays_one_and_what_it_leads_to_is_written(kb, sheet_file, tmp_path):
    (tmp_path / "deep").mkdir()
    target = tmp_path / "deep" / "real.sheet"
    sheet_file.rename(target)
    sheet_file.symlink_to("deep/real.sheet")
    before = target.read_bytes()
    target.chmod(0o600)
    kb.save(sheet_file, texts=False)
    assert sheet_file.is_symlink() and os.readlink(sheet_file) == "deep/real.sheet"
    assert target.read_bytes() != before and mode(target) == 0o600
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["real.sheet"]


def test_a_link_to_nothing_yet_is_followed(kb, tmp_path):
    (tmp_path / "link").symlink_to("new.sheet")
    kb.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and load_sheet(tmp_path / "new.sheet").tokens


@pytest.mark.parametrize("change", ["extend", "replace", "remove", "merge", "build", "pull", "compare"])
def test_every_command_that_writes_keeps_mode_and_link(change, kb, model, sheet_file, tmp_path):
    text, link = tmp_path / "zoe.txt", tmp_path / "link.sheet"
    text.write_text("Zoe lives in Zagreb.")
    link.symlink_to(sheet_file.name)
    sheet_file.chmod(0o600)
    before, other = sheet_file.read_bytes(), tmp_path / "other.sheet"
    if change == "merge":
        zoe = [{"id": "zoe", "text": "Zoe lives in Zagreb."}]
        with CompressedKnowledgeLLM.build(zoe, FEW_SHOT, model=model, rate=2, mode="independent") as second:
            second.save(other)
    if change == "pull":
        kb.save(other, texts=False)
        assert run(["push", str(other), str(tmp_path / "hub"), "--name", "staff"]) == 0
    given = ["--model", str(model)]
    commands = {
        "extend": ["extend", str(link), str(text), *given],
        "replace": ["replace", str(link), DOCUMENTS[0].id, str(text), *given],
        "remove": ["remove", str(link), DOCUMENTS[0].id, *given],
        "merge": ["merge", str(link), str(other), *given],
        "build": ["build", str(text), "-o", str(link), "--force", "--rate", "1.2", "--task", "Who?", *given],
        "pull": ["pull", f"{tmp_path}/hub#staff", "-o", str(link), "--force"],
    }
    if change == "compare":  # its results are written by this
        write_whole(link, "{}")
    else:
        assert run(commands[change]) == 0
    assert link.is_symlink() and mode(sheet_file) == 0o600 and sheet_file.read_bytes() != before


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root gives files away")
def test_the_owner_stays(kb, sheet_file):
    os.chown(sheet_file, 12345, 23456)
    kb.save(sheet_file)
    found = sheet_file.stat()
    assert (found.st_uid, found.st_gid) == (12345, 23456)


def test_what_is_no_regular_file_is_not_replaced(kb, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SheetError, match=r"cannot be written to .*pipe': .* is no regular file"):
        kb.save(tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert run(["pull", str(tmp_path / "a.sheet"), "-o", "/dev/null", "--force"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_full_disk_is_told_and_leaves_what_was_there(tmp_path):
    target = tmp_path / "a"
    target.write_text("before")
    told = pytest.raises(SheetError, match=r"The sheet cannot be written to .*No space left.*as it was")
    with told, writing(target, "The sheet"):
        raise OSError(28, "No space left on device")
    assert target.read_text() == "before" and os.listdir(tmp_path) == ["a"]


def test_a_new_file_has_the_mode_that_new_files_have(tmp_path):
    sheet = build_sheet(tiny_backbone(), DOCUMENTS, FEW_SHOT, rate=3)
    before = os.umask(0o027)
    try:
        assert mode(save_sheet(sheet, tmp_path / "a.sheet")) == 0o640
    finally:
        os.umask(before)
