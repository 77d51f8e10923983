"""Archives in registries and behind URLs: they go where their sheets go, and come with them, verified."""

from __future__ import annotations

import logging

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT

from cribsheet import SheetCache, build_sheet, load_sheet
from cribsheet.cli import run
from cribsheet.errors import SheetError
from cribsheet.sheet.archive.archive import archive_path
from cribsheet.sheet.file import save
from cribsheet.sheet.registry import Registry


@pytest.fixture
def saved(tiny, tmp_path):
    sheet = build_sheet(tiny, DOCUMENTS, FEW_SHOT, rate=3, scorer="recent", chunk_tokens=100, archive=True)
    return save(sheet, tmp_path / "a.sheet")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CRIBSHEET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=["folder", "memory", "file"])
def registry(request, tmp_path):
    place = {"folder": str(tmp_path / "hub"), "memory": f"memory://{tmp_path.name}", "file": f"file://{tmp_path}/hub"}
    return Registry(place[request.param])


def same(mine, other):
    pairs = zip(mine.archive.stretch(0, 60), other.archive.stretch(0, 60), strict=True)
    return all(torch.equal(a, b) for layer, its in pairs for a, b in zip(layer, its, strict=True))


def test_a_push_takes_it_along_and_a_pull_brings_it(registry, saved, tmp_path, capsys):
    made = registry.push(saved, "staff")
    assert registry.push(saved, "staff") == made  # the same again
    pulled = load_sheet(f"{registry.place}#staff")
    pulled.archive.verify()
    assert same(pulled, load_sheet(saved))
    assert run(["pull", f"{registry.place}#staff", "-o", str(tmp_path / "copy.sheet")]) == 0
    assert f"and an archive of {pulled.archive.bytes}" in capsys.readouterr().out
    assert archive_path(tmp_path / "copy.sheet").read_bytes() == archive_path(saved).read_bytes()
    assert same(SheetCache(1 << 20).load(f"{registry.place}#staff@1"), pulled)


def test_a_sheet_in_a_cache_gets_an_archive_that_comes_later(saved, tmp_path):
    sheets, away = SheetCache(1 << 20), tmp_path / "away"
    archive_path(saved).rename(away)
    assert sheets.load(saved).archive.trouble
    away.rename(archive_path(saved))
    later = sheets.load(saved)
    later.archive.verify()
    archive_path(saved).unlink()
    assert sheets.load(saved).archive.trouble  # the one that is held had none
    assert len(sheets) == 1 and not later.archive.trouble


def test_a_push_brings_back_what_the_registry_has_lost(saved, tmp_path):
    registry = Registry(tmp_path / "hub")
    made = registry.push(saved, "staff")
    (tmp_path / "hub/staff/1.sheet.archive").unlink()
    assert registry.push(saved, "staff") == made
    load_sheet(registry.pull("staff")).archive.verify()


def test_only_sound_archives_are_pushed(registry, saved):
    place = archive_path(saved)
    held = place.read_bytes()
    for damaged, why in ((held[:-1] + bytes([held[-1] ^ 1]), "is damaged"), (held[:99], "cannot be read")):
        place.write_bytes(damaged)
        with pytest.raises(SheetError, match=why):
            registry.push(saved, "staff")
    place.unlink()
    with pytest.raises(SheetError, match="is missing"):
        registry.push(saved, "staff")
    assert registry.versions("staff") == []


def test_what_is_damaged_behind_a_url_is_not_taken_and_a_damaged_download_is_fetched_again(saved, cache, caplog):
    url = f"file://{saved}"
    assert same(load_sheet(url), load_sheet(saved))
    (download,) = cache.glob("*.archive")
    download.write_bytes(download.read_bytes()[:-1])
    assert same(load_sheet(url), load_sheet(saved)) and not caplog.records
    held = archive_path(saved).read_bytes()
    archive_path(saved).write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
    download.unlink()
    with caplog.at_level(logging.WARNING):
        sheet = load_sheet(url)
    assert "is damaged" in caplog.text and list(cache.glob("*.archive")) == []
    with pytest.raises(SheetError, match="is missing"):
        sheet.archive.stretch(0, 5)
    assert list(sheet.layers)
    archive_path(saved).unlink()
    assert len(load_sheet(url).layers) == 3 and "cannot be fetched" in caplog.text


def test_a_pull_of_a_sheet_without_its_archive_is_one_of_the_sheet(registry, saved, tmp_path, caplog):
    registry.push(saved, "staff")
    folder = tmp_path / "hub" / "staff"
    if not folder.exists():
        return  # in memory there is no file to take away
    (folder / "1.sheet.archive").unlink()
    assert run(["pull", f"{registry.place}#staff", "-o", str(tmp_path / "copy.sheet")]) == 0
    assert not archive_path(tmp_path / "copy.sheet").exists()
    assert load_sheet(tmp_path / "copy.sheet").manifest.archive is not None
