"""Archives: all that a build read, beside its sheet, and any stretch of it again, bit by bit or not at all."""

from __future__ import annotations

import logging
import os
import random
import re
import signal
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT

import cribsheet
from cribsheet import Document, build_sheet, load_sheet
from cribsheet.attention.rope import rotate
from cribsheet.errors import BudgetError, RequestError, SheetError
from cribsheet.plan.options import BuildOptions
from cribsheet.prompt.chunks import TokenizedCorpus
from cribsheet.prompt.encoder import Encoder
from cribsheet.retention.retention import make_checker
from cribsheet.sheet.archive.archive import Archive
from cribsheet.sheet.archive.writer import unfinished_archive
from cribsheet.sheet.file import copy, read_manifest, save
from cribsheet.sheet.layers import StoredLayer
from cribsheet.sheet.tensors import TensorFile
from cribsheet.testing import tiny_backbone

CHUNK = 40
TYPES = ("float32", "bfloat16", "float16", "int8", "int4")


class Killed(Exception):
    pass


def build(backbone, **options):
    usual = {"rate": 3, "chunk_tokens": CHUNK, "scorer": "task", "archive": True}
    return build_sheet(backbone, DOCUMENTS, FEW_SHOT, **{**usual, **options})


def killer(after):
    calls = []

    def progress(done, total):
        calls.append(done)
        if len(calls) > after:
            raise Killed

    return progress


def same(stretch, other):
    return all(
        torch.equal(a, b) for mine, its in zip(stretch, other, strict=True) for a, b in zip(mine, its, strict=True)
    )


@pytest.fixture(scope="module")
def tiny():
    return tiny_backbone()


@pytest.fixture
def saved(tiny, tmp_path):
    """A sheet in a file, its archive beside it."""
    return save(build(tiny), tmp_path / "a.sheet")


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_of_one_chunk_it_holds_the_bits_of_a_sheet_that_keeps_everything(family):
    backbone = tiny_backbone(family)
    sheet = build(backbone, rate=1, guide="dropped", dtype="float32", chunk_tokens=0, archive="float32")
    archive = sheet.archive
    assert archive.tokens == sheet.length == sheet.manifest.corpus_tokens
    positions = torch.arange(archive.tokens)
    stretch = archive.stretch(0, archive.tokens)
    for (keys, values), layer, turn in zip(stretch, sheet.layers, backbone.inv_freqs, strict=True):
        held = layer.keys.shape[1]  # a layer with a sliding window holds the end in a sheet, and all of it here
        assert keys.shape[1] == archive.tokens
        assert torch.equal(rotate(keys, positions, turn)[:, -held:], layer.keys)
        assert torch.equal(values[:, -held:], layer.values)


@pytest.mark.parametrize("dtype", TYPES)
def test_its_numbers_are_those_that_a_sheet_of_its_type_holds(tiny, dtype):
    """Rounding is that of sheets, whose loss is bounded in `test_stored.py`."""
    archive = build(tiny, archive=dtype).archive
    block = archive.layout.ends[1:3]  # from the end of the preamble to that of the chunk
    whole = build(tiny, archive="float32").archive.stretch(*block)
    for (keys, values), layer in zip(whole, archive.layers(*block), strict=True):
        stored = StoredLayer.of(type(layer.restored(torch.device("cpu"), torch.float32))(keys, values), dtype)
        assert all(torch.equal(stored.tensors()[name], tensor) for name, tensor in layer.tensors().items())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("chunk", [CHUNK, 150])
def test_any_stretch_is_that_part_of_the_whole(tiny, dtype, chunk):
    archive = build(tiny, archive=dtype, chunk_tokens=chunk).archive
    whole = archive.stretch(0, archive.tokens)
    for first, stop in [(0, 1), (39, 41), (40, 80), (17, 133), (127, 129), (archive.tokens - 1, archive.tokens)]:
        assert same(archive.stretch(first, stop), [(k[:, first:stop], v[:, first:stop]) for k, v in whole])
    for first, stop in [(-1, 3), (3, 3), (0, archive.tokens + 1), (4, 2)]:
        with pytest.raises(RequestError, match=f"Tokens {first} to {stop} were asked for"):
            archive.stretch(first, stop)


def test_places_are_the_tokens_of_some_characters(tiny):
    sheet = build(tiny)
    corpus = TokenizedCorpus.build(sheet.documents, sheet.manifest.head, Encoder(tiny.tokenizer))
    for number, document in enumerate(sheet.documents):
        first, stop = sheet.archive.places(number, 5, 25)
        rows = corpus.origins[first:stop]
        assert bool((rows[:, 0] == number).all()) and int(rows[0, 1]) <= 5 < int(rows[0, 2])
        assert int(rows[-1, 1]) < 25 <= int(rows[-1, 2])
        assert sheet.archive.places(number, 0, len(document.text))[1] > stop
    for nowhere in [(len(DOCUMENTS), 0, 5), (-1, 0, 5), (0, 7, 7), (0, 10**6, 10**7)]:
        with pytest.raises(RequestError, match="There are no tokens of the characters"):
            sheet.archive.places(*nowhere)


def test_save_and_load_carry_it(tiny, tmp_path):
    sheet = build(tiny)
    whole = sheet.archive.stretch(0, sheet.archive.tokens)
    path = save(sheet, tmp_path / "a.sheet")
    beside = tmp_path / "a.sheet.archive"
    opened = load_sheet(path)
    entry = read_manifest(path).archive
    assert (
        entry.bytes == beside.stat().st_size == opened.archive.bytes and entry.dtype == opened.archive.dtype == "int4"
    )
    assert beside.stat().st_mode == path.stat().st_mode
    assert same(opened.archive.stretch(0, opened.archive.tokens), whole)
    second = save(opened, tmp_path / "b.sheet")
    beside.write_bytes(b"")  # what was opened may no longer be there, and what was copied is a file of its own
    assert same(load_sheet(second).archive.stretch(0, opened.archive.tokens), whole)
    alone = load_sheet(save(load_sheet(second), tmp_path / "c.sheet", archive=False))
    assert alone.archive is None and alone.manifest.archive is None and not (tmp_path / "c.sheet.archive").exists()


def test_the_sheet_is_the_same_with_and_without_one(tiny):
    mine, other = build(tiny), build(tiny, archive=False)
    assert other.archive is None and other.manifest.archive is None
    assert mine.manifest.digest == other.manifest.digest and torch.equal(mine.indices, other.indices)
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(mine.layers, other.layers, strict=True))


def test_what_was_saved_is_written_to_no_more_and_is_not_copied_to_itself(tiny, tmp_path):
    path = save(build(tiny), tmp_path / "a.sheet")
    before = os.stat(f"{path}.archive")
    assert before.st_nlink == 1  # the temporary name is gone with the sheet that was built
    save(load_sheet(path), path)
    assert os.stat(f"{path}.archive").st_ino == before.st_ino


def test_two_sheets_that_are_saved_share_neither_rights_nor_what_is_written_to_one(tiny, tmp_path):
    sheet, private = build(tiny), tmp_path / "private.sheet.archive"
    private.touch(mode=0o600)
    save(sheet, tmp_path / "private.sheet")
    save(sheet, tmp_path / "public.sheet")
    assert private.stat().st_mode & 0o777 == 0o600
    private.write_bytes(b"something else")
    load_sheet(tmp_path / "public.sheet").archive.verify()


def test_what_was_written_to_a_saved_archive_is_not_saved_again(tiny, tmp_path, caplog):
    sheet = build(tiny)
    with open(f"{save(sheet, tmp_path / 'a.sheet')}.archive", "r+b") as file:
        file.seek(-9, os.SEEK_END)
        file.write(b"not these")
    save(sheet, tmp_path / "b.sheet")
    assert "written without its archive" in caplog.text and not (tmp_path / "b.sheet.archive").exists()


@pytest.mark.parametrize("by", ["another build", "nobody"])
def test_a_sheet_is_saved_with_its_own_archive_though_the_checkpoint_s_name_is_taken(tiny, tmp_path, by):
    sheet = build(tiny, checkpoint=tmp_path / "c")
    unfinished_archive(tmp_path / "c").unlink()
    (tmp_path / "c").unlink()
    if by == "another build":
        build(tiny, checkpoint=tmp_path / "c", archive="int8")
    load_sheet(save(sheet, tmp_path / "a.sheet")).archive.verify()
    assert sorted(path.name for path in tmp_path.glob("*a.sheet*")) == ["a.sheet", "a.sheet.archive"]


def test_an_archive_that_came_back_is_not_taken_away(tiny, saved, tmp_path):
    archive, away = tmp_path / "a.sheet.archive", tmp_path / "away"
    archive.rename(away)
    sheet = load_sheet(saved)
    away.rename(archive)
    save(sheet, saved)
    load_sheet(saved).archive.verify()
    away.write_bytes(saved.read_bytes())  # the same sheet from elsewhere, without one
    copy(away, saved)
    load_sheet(saved).archive.verify()


def test_a_sheet_that_is_replaced_while_it_is_opened_has_the_archive_of_the_new_one(tiny, saved, monkeypatch):
    later, beside = [build(tiny, archive="int8")], Archive.beside

    def after_a_save(path, manifest):
        if later:
            save(later.pop(), path)
        return beside(path, manifest)

    monkeypatch.setattr(Archive, "beside", after_a_save)
    sheet = load_sheet(saved)
    sheet.archive.verify()
    assert not later and sheet.archive.dtype == "int8"


def test_a_link_to_a_sheet_leads_to_its_archive_too(tiny, saved, tmp_path):
    link = tmp_path / "latest.sheet"
    link.symlink_to(saved.name)
    load_sheet(link).archive.verify()
    save(build(tiny, archive="int8"), link)
    assert link.is_symlink() and load_sheet(saved).archive.dtype == "int8"
    load_sheet(saved).archive.verify()
    assert not (tmp_path / "latest.sheet.archive").exists()


@pytest.mark.parametrize("dtype", ["int4", "float32"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_killed_build_goes_on_and_ends_with_the_same_archive(tmp_path, family, dtype):
    backbone = tiny_backbone(family)
    whole = build(backbone, archive=dtype)
    for after in (1, 3, 5):
        checkpoint = tmp_path / f"{after}.partial"
        with pytest.raises(Killed):
            build(backbone, archive=dtype, checkpoint=checkpoint, progress=killer(after))
        assert unfinished_archive(checkpoint).stat().st_size == whole.archive.bytes
        again = build(backbone, archive=dtype, checkpoint=checkpoint)
        assert again.archive.digest == whole.archive.digest
        assert same(again.archive.stretch(0, again.archive.tokens), whole.archive.stretch(0, whole.archive.tokens))


def test_a_killed_independent_build_goes_on_too(tiny, tmp_path):
    documents = [Document(text=f"{document.text} " * 4, id=document.id) for document in DOCUMENTS]
    how = {"mode": "independent", "rate": 3, "archive": True}
    checkpoint, read = tmp_path / "a.partial", []
    with pytest.MonkeyPatch.context() as patch:  # else a checkpoint is written when 2048 tokens were read
        patch.setattr("cribsheet.living.independent.usual_chunk", lambda backbone: CHUNK)
        whole = build_sheet(tiny, documents, FEW_SHOT, **how)
        with pytest.raises(Killed):
            build_sheet(tiny, documents, FEW_SHOT, **how, checkpoint=checkpoint, progress=killer(3))
        how["progress"] = lambda done, total: read.append(done)
        again = build_sheet(tiny, documents, FEW_SHOT, **how, checkpoint=checkpoint)
    assert read[0] > 0 and again.archive.digest == whole.archive.digest


@pytest.mark.parametrize(
    "how", [{}, {"mode": "independent", "chunk_tokens": None}, {"rate": None, "retain": 0.5}], ids=str
)
def test_a_build_that_goes_on_has_its_archive_in_the_folder_that_was_named(tiny, tmp_path, how):
    place, checkpoint = tmp_path / "large", tmp_path / "small" / "a.partial"
    place.mkdir()
    checkpoint.parent.mkdir()
    how = {**how, "checkpoint": checkpoint, "archive_folder": place}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cribsheet.living.independent.usual_chunk", lambda backbone: CHUNK)
        with pytest.raises(Killed):
            build(tiny, **how, progress=killer(3))
        (begun,) = place.iterdir()
        assert begun == unfinished_archive(checkpoint, place) != unfinished_archive(tmp_path / "a.partial", place)
        assert [path.name for path in checkpoint.parent.iterdir()] == ["a.partial"]
        with pytest.raises(SheetError, match="give the archive_folder= of before"):
            build(tiny, **{**how, "archive_folder": None})
        sheet = build(tiny, **how)
    assert sheet.archive.path == begun and list(place.iterdir()) == [begun]
    save(sheet, tmp_path / "a.sheet")
    load_sheet(tmp_path / "a.sheet").archive.verify()
    assert unfinished_archive(checkpoint, checkpoint.parent) == unfinished_archive(checkpoint)


def test_a_folder_that_is_not_there_is_told_of_beside_a_checkpoint_too(tiny, tmp_path):
    with pytest.raises(SheetError, match=r"The archive cannot be written to .*archive_folder="):
        build(tiny, checkpoint=tmp_path / "a", archive_folder=tmp_path / "nowhere")


def test_an_archive_that_was_begun_is_taken_for_no_other(tiny, tmp_path):
    checkpoint = tmp_path / "a.partial"
    begun = unfinished_archive(checkpoint)
    with pytest.raises(Killed):
        build(tiny, checkpoint=checkpoint, progress=killer(3))
    held = begun.read_bytes()
    (place, *_) = (e.start for n, e in TensorFile(begun).entries.items() if n == "values")
    for damaged in (held[:-1], held[:place] + b"\0" + held[place + 1 :], b"", held[:100] + b"x" + held[101:]):
        begun.write_bytes(damaged)
        with pytest.raises(SheetError, match=r"unfinished archive .* Delete it and the checkpoint"):
            build(tiny, checkpoint=checkpoint)
    begun.unlink()
    with pytest.raises(SheetError, match=r"cannot be read .*No such file.* Delete it and the checkpoint"):
        build(tiny, checkpoint=checkpoint)
    begun.write_bytes(held)
    for other in ({"archive": "int8"}, {"archive": False}):
        with pytest.raises(SheetError, match="belongs to another build"):
            build(tiny, checkpoint=checkpoint, **other)
    assert build(tiny, checkpoint=checkpoint).archive.dtype == "int4"


def test_a_build_that_fails_leaves_no_file(tiny, tmp_path):
    with pytest.raises(Killed):
        build(tiny, archive_folder=tmp_path, progress=killer(2))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_told_of_before_anything_is_read(tiny, tmp_path):
    read = []
    usage = type("Usage", (), {"free": 1000})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda folder: usage)
        for kind, way in (("int4", r"\(archive_folder=\)"), ("int8", r"\(archive_folder=\) or .*\(archive='int4'\)")):
            with pytest.raises(BudgetError, match=rf"takes [\d,]+ bytes, and .* has 1,000 free; make .* {way}\.$"):
                build(tiny, archive=kind, archive_folder=tmp_path, progress=lambda done, total: read.append(done))
    assert read == [] and list(tmp_path.iterdir()) == []
    with pytest.raises(SheetError, match="The archive cannot be begun in"):
        build(tiny, archive_folder=tmp_path / "nowhere")


def test_memory_does_not_grow_with_the_corpus(tiny):
    """While an archive is written, no tensor is made that is larger than one chunk's rows; the rest is in the file."""
    text = " ".join(document.text for document in DOCUMENTS)
    documents = [Document(text=f"{text} {number}.", id=str(number)) for number in range(16)]
    sizes, contiguous = [], torch.Tensor.contiguous

    def watched(tensor, *how, **more):
        sizes.append(tensor.nbytes)
        return contiguous(tensor, *how, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "contiguous", watched)
        how = {"budget": 60, "chunk_tokens": 256, "scorer": "recent", "archive": "float32"}
        archive = build_sheet(tiny, documents, FEW_SHOT, **how).archive
    row = sum(kind.nbytes for kind in archive.layout.rows.values())
    assert archive.tokens > 3000 and max(sizes) == 256 * row / 2  # keys, or values
    tracemalloc.start()
    archive.verify()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < archive.bytes / 4


@pytest.mark.parametrize("what", ["missing", "cut", "empty", "another", "folder", "text"])
def test_a_sheet_whose_archive_cannot_be_read_is_opened_alone(tiny, saved, tmp_path, caplog, what):
    place = archive_of(saved)
    held = place.read_bytes()
    place.unlink()
    if what == "cut":
        place.write_bytes(held[:-100])
    elif what == "empty":
        place.write_bytes(b"")
    elif what == "another":
        other = save(build(tiny, seed=1, rate=2), tmp_path / "b.sheet")
        place.write_bytes(archive_of(other).read_bytes())
    elif what == "folder":
        place.mkdir()
    elif what == "text":
        place.write_text("a sheet needs no archive")
    with caplog.at_level(logging.WARNING):
        sheet = load_sheet(saved)
    assert len(list(sheet.layers)) == 3 and sheet.archive.tokens == sheet.manifest.corpus_tokens
    way_out = "build the sheet again|put the sheet's own archive there"
    if what == "another":  # the other one was read on what another rate kept
        assert "without its archive" not in caplog.text
    else:
        assert "the sheet is opened without its archive" in caplog.text
    for ask in (lambda: sheet.archive.stretch(0, 5), lambda: sheet.archive.places(0, 0, 5), sheet.archive.verify):
        with pytest.raises(SheetError, match=way_out):
            ask()
    save(sheet, tmp_path / "c.sheet")  # whatever was done with the sheet is not lost
    assert "the sheet is written without its archive" in caplog.text
    assert read_manifest(tmp_path / "c.sheet").archive == sheet.manifest.archive  # it may be found again
    assert not archive_of(tmp_path / "c.sheet").exists()


_INTERRUPTED = """
import os, signal, sys
from cribsheet import load_sheet, save_sheet
sheet, target = load_sheet(sys.argv[1]), os.path.realpath(sys.argv[2])
replace = os.replace

def killed_before_the_sheet(source, place):
    if str(place) == target:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, place)

os.replace = killed_before_the_sheet
save_sheet(sheet, target)
"""


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_save_that_is_killed_between_sheet_and_archive_is_told_of(tiny, saved, tmp_path, caplog, dtype):
    """The archive of the new sheet has another size, or the same one."""
    new = save(build(tiny, rate=2, archive=dtype), tmp_path / "new.sheet")
    before = saved.read_bytes()
    environment = {**os.environ, "PYTHONPATH": str(Path(cribsheet.__file__).parents[1])}
    ended = subprocess.run([sys.executable, "-c", _INTERRUPTED, str(new), str(saved)], env=environment)
    assert ended.returncode == -signal.SIGKILL and saved.read_bytes() == before
    assert archive_of(saved).read_bytes() == archive_of(new).read_bytes()
    with caplog.at_level(logging.WARNING):
        sheet = load_sheet(saved)
    said = "a save was interrupted between sheet and archive: .* save the sheet that was being saved again, or build"
    assert bool(re.search(said, caplog.text)) == (dtype == "int8")  # a size is seen at once, a digest at the first use
    with pytest.raises(SheetError, match=said):
        sheet.archive.stretch(0, 5)
    save(load_sheet(new), saved)
    load_sheet(saved).archive.verify()


def archive_of(sheet):
    return sheet.with_name(f"{sheet.name}.archive")


def test_no_changed_bit_is_ever_taken_for_what_was_read(saved):
    """Wherever it is: damage is found by who reads that stretch, and by nobody who reads another one."""
    place = archive_of(saved)
    held, dice, refused = place.read_bytes(), random.Random(0), 0
    sound = load_sheet(saved).archive
    whole = sound.stretch(0, sound.tokens)
    for _ in range(40):
        flipped = bytearray(held)
        flipped[dice.randrange(len(held))] ^= 1 << dice.randrange(8)
        place.write_bytes(flipped)
        archive = load_sheet(saved).archive
        ends = sound.layout.ends
        for first, stop in pairwise(ends):
            try:
                assert same(archive.stretch(first, stop), [(k[:, first:stop], v[:, first:stop]) for k, v in whole])
            except SheetError as error:
                refused += 1
                assert str(place) in str(error)
        with pytest.raises(SheetError):
            archive.verify()
    assert refused >= 40
    place.write_bytes(held)
    (start,) = (entry.start for name, entry in TensorFile(place).entries.items() if name == "keys")
    place.write_bytes(held[:start] + bytes([held[start] ^ 1]) + held[start + 1 :])
    archive = load_sheet(saved).archive
    with pytest.raises(SheetError, match="its tokens 0 to 23 are not those that were written; copy it again"):
        archive.stretch(5, 30)
    assert same(archive.stretch(100, 120), [(k[:, 100:120], v[:, 100:120]) for k, v in whole])


def test_a_file_that_is_changed_while_it_is_open_is_compared_again(saved):
    place = archive_of(saved)
    archive = load_sheet(saved).archive
    archive.verify()
    held = place.read_bytes()
    with open(place, "r+b") as file:
        file.seek(len(held) - 10)
        file.write(b"\0" * 10)
    os.utime(place, ns=(1, 1))
    with pytest.raises(SheetError, match="is damaged"):
        archive.verify()
    with open(place, "r+b") as file:
        file.truncate(len(held) // 2)
    with pytest.raises(SheetError, match="it ends before what its header announces"):
        archive.verify()
    place.write_bytes(held)
    archive.verify()


def test_stretches_are_read_by_many_threads_at_once(saved):
    archive = load_sheet(saved).archive
    alone = load_sheet(saved).archive
    wanted = [(first, first + 31) for first in range(0, 190, 3)] * 4
    with ThreadPoolExecutor(16) as pool:
        for (first, stop), stretch in zip(wanted, pool.map(lambda pair: archive.stretch(*pair), wanted), strict=True):
            assert same(stretch, alone.stretch(first, stop))


def test_numbers_that_overflow_are_no_archive(tiny):
    backbone = tiny_backbone()
    with torch.no_grad():
        backbone.model.base_model.layers[1].self_attn.v_proj.weight.fill_(float("inf"))
    with pytest.raises((SheetError, BudgetError), match=r"not finite|do not fit int4"):
        build(backbone, archive="float32", scorer="recent")


def test_a_retained_rate_has_the_archive_of_its_reading(tiny):
    """The sheet is cut from the reading of a larger budget; its indices are those of the same corpus."""
    how = BuildOptions(retain=0.5, archive=True, scorer="task", chunk_tokens=CHUNK)
    checker = make_checker(tiny, how.layout(tiny), DOCUMENTS, FEW_SHOT, how)
    assert {checker.plan_at(rate).archive for rate in (2.0, 3.0)} == {"int4"}
    alone = make_checker(tiny, how.layout(tiny), DOCUMENTS, FEW_SHOT, BuildOptions(check=True, archive=True))
    assert alone.plan_at(2.0).archive is None  # what a check reads beside the sheet is kept nowhere


@pytest.mark.parametrize("archive", ["int3", 4, None, "", "True"])
def test_an_archive_of_no_known_type_is_refused(tiny, archive):
    with pytest.raises(BudgetError, match=r"archive is .*; use True"):
        build(tiny, archive=archive)
