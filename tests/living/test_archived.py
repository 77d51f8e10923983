"""Archives of sheets whose documents come and go: what stays is the same bits, and what left is nowhere."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT

from cribsheet import Document, build_sheet, load_sheet
from cribsheet.living import edits
from cribsheet.living.combine import combine
from cribsheet.sheet.archive.archive import archive_path
from cribsheet.sheet.file import save
from cribsheet.testing import tiny_backbone

MORE = [Document(text="Vega dreams of Altair, and nobody knows of it but Deneb. " * 9, id="dream")]


def build(backbone, documents=DOCUMENTS, **options):
    usual = {"mode": "independent", "rate": 3, "chunk_tokens": 40, "archive": True}
    return build_sheet(backbone, documents, FEW_SHOT, **{**usual, **options})


def whole(sheet):
    return sheet.archive.stretch(0, sheet.archive.tokens)


def same(mine, other):
    pairs = zip(whole(mine), whole(other), strict=True)
    return torch.equal(mine.archive.origins, other.archive.origins) and all(
        torch.equal(a, b) for layer, its in pairs for a, b in zip(layer, its, strict=True)
    )


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def family(request):
    return tiny_backbone(request.param)


@pytest.fixture(scope="module")
def tiny():
    return tiny_backbone()


def test_of_an_independent_sheet_it_holds_what_a_sheet_of_everything_does(family):
    sheet = build(family, rate=1, guide="dropped", dtype="float32", archive="float32", chunk_tokens=None)
    assert sheet.archive.tokens == sheet.manifest.corpus_tokens
    for number in family.full:
        keys, values = whole(sheet)[number]
        assert torch.equal(keys, sheet.layers[number].keys) and torch.equal(values, sheet.layers[number].values)


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_a_changed_sheet_has_the_archive_that_a_build_would_have_made(family, tmp_path, dtype):
    sheet = build(family, archive=dtype)
    removed = edits.remove(family, sheet, DOCUMENTS[1].id)
    rest = [document for document in DOCUMENTS if document.id != DOCUMENTS[1].id]
    assert same(removed, build(family, rest, archive=dtype))
    extended = edits.extend(family, removed, MORE)
    assert same(extended, build(family, [*rest, *MORE], archive=dtype))
    new = Document(text=MORE[0].text, id=rest[0].id)
    assert same(edits.replace(family, sheet, new.id, new), build(family, [new, *DOCUMENTS[1:]], archive=dtype))
    again = load_sheet(save(extended, tmp_path / "a.sheet"))
    assert same(again, extended)
    assert same(edits.merge(family, again, build(family, [DOCUMENTS[1]], archive=dtype)),
                build(family, [*rest, *MORE, DOCUMENTS[1]], archive=dtype))  # fmt: skip


def test_nothing_of_a_removed_document_is_left_in_the_file(tiny, tmp_path):
    path = save(build(tiny, archive="float32"), tmp_path / "a.sheet")
    sheet = load_sheet(path)
    first, stop = sheet.archive.places(1, 0, 10**6)
    upper = sheet.archive.stretch(first, stop)[1:]  # the first layer knows a token without what is before it
    rows = [half[:, 3].numpy().tobytes() for layer in upper for half in layer]
    held = archive_path(path).read_bytes()
    assert all(row in held for row in rows)
    save(edits.remove(tiny, sheet, DOCUMENTS[1].id), path)
    left = archive_path(path).read_bytes()
    assert len(left) < len(held) and not any(row in left for row in rows)
    load_sheet(path).archive.verify()


def test_a_sheet_saved_over_one_with_an_archive_takes_it_away(tiny, tmp_path):
    path = save(build(tiny), tmp_path / "a.sheet")
    save(build(tiny, archive=False), path)
    assert not archive_path(path).exists() and load_sheet(path).archive is None
    archive_path(path).write_text("a file of somebody else's")
    save(build(tiny, archive=False), path)
    assert archive_path(path).read_text() == "a file of somebody else's"


def test_an_archive_behind_a_link_is_taken_away_with_the_link(tiny, tmp_path):
    path, elsewhere = save(build(tiny), tmp_path / "a.sheet"), tmp_path / "large.bin"
    archive_path(path).rename(elsewhere)
    archive_path(path).symlink_to(elsewhere)
    load_sheet(path).archive.verify()
    save(build(tiny, archive=False), path)
    assert not elsewhere.exists() and not archive_path(path).is_symlink()


def test_temporary_files_go_with_their_sheets(tiny, tmp_path):
    path = save(build(tiny), tmp_path / "a.sheet")
    changed = edits.remove(tiny, load_sheet(path), DOCUMENTS[0].id)
    (between,) = tmp_path.glob(".cribsheet-*")
    assert changed.archive.path == Path(between)
    del changed
    assert list(tmp_path.glob(".cribsheet-*")) == []


def test_sheets_of_which_not_all_have_one_have_none_together(tiny, caplog):
    mine, other = build(tiny, DOCUMENTS[:2]), build(tiny, DOCUMENTS[2:], archive=False)
    for made in (edits.merge(tiny, mine, other), combine(tiny, [other, mine])):
        assert made.archive is None and made.manifest.archive is None
    eight = build(tiny, DOCUMENTS[2:], archive="int8")
    with caplog.at_level(logging.WARNING):
        assert combine(tiny, [mine, eight]).archive is None
    assert "not all sheets have one" in caplog.text and "they are in int4 and int8" in caplog.text


def test_sheets_that_are_combined_have_one_archive(tiny):
    sequential = build(tiny, DOCUMENTS[:2], mode="sequential", scorer="task", allocation="uniform")
    independent = build(tiny, DOCUMENTS[2:])
    made = combine(tiny, [sequential, independent])
    head = made.manifest.head_tokens
    parts = [sequential.archive.stretch(0, sequential.archive.tokens)]
    parts.append(independent.archive.stretch(head, independent.archive.tokens))
    for (keys, values), *each in zip(whole(made), *parts, strict=True):
        assert torch.equal(keys, torch.cat([part[0] for part in each], 1))
        assert torch.equal(values, torch.cat([part[1] for part in each], 1))
    assert made.archive.places(2, 0, 3)[0] > made.archive.places(1, 0, 3)[0]


def test_an_archive_that_cannot_be_read_is_not_carried_on(tiny, tmp_path, caplog):
    path = save(build(tiny), tmp_path / "a.sheet")
    held = archive_path(path).read_bytes()
    archive_path(path).write_bytes(held[:-1])
    sheet = load_sheet(path)
    changed = edits.remove(tiny, sheet, DOCUMENTS[0].id)
    assert changed.archive is None and changed.manifest.archive is None
    assert "the changed sheet will have no archive" in caplog.text
    archive_path(path).write_bytes(held[:-5000] + b"\1" * 5000)  # found when it is copied
    assert edits.remove(tiny, load_sheet(path), DOCUMENTS[0].id).archive is None
    assert "the sheet has no archive any more" in caplog.text
    assert not archive_path(save(load_sheet(path), tmp_path / "b.sheet")).exists()
    assert "the sheet is written without its archive" in caplog.text


def test_a_checkpoint_of_what_is_added_misses_no_archive(tiny, tmp_path, caplog):
    added = edits.extend(tiny, build(tiny), MORE, checkpoint=tmp_path / "c")
    added.archive.verify()
    assert "has no archive" not in caplog.text
