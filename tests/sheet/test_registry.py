"""Sheets behind URLs and in registries: fetched once, verified, never half there."""

from __future__ import annotations

import http.server
import json
import os
import threading
import time
from functools import partial
from typing import ClassVar

import fsspec
import pytest
import torch

from cribsheet import CompressedKnowledgeLLM, build_sheet, load_sheet, read_documents, save_sheet
from cribsheet.cli import run
from cribsheet.corpus.task import Task
from cribsheet.errors import SheetError
from cribsheet.sheet.registry import Registry, file_digest, is_url, local, resolve


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    """Two sheets of other seeds."""
    folder = tmp_path_factory.mktemp("sheets")
    documents = read_documents(["Alice lives in Lisbon. " * 8, "Bob lives in Oslo. " * 8])
    made = [build_sheet(tiny, documents, Task.of("Who?"), rate=2, scorer="random", seed=seed) for seed in (1, 2)]
    return [save_sheet(sheet, folder / f"{number}.sheet") for number, sheet in enumerate(made, 1)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CRIBSHEET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=["folder", "memory", "file"])
def registry(request, tmp_path):
    place = {"folder": str(tmp_path / "hub"), "memory": f"memory://{tmp_path.name}", "file": f"file://{tmp_path}/hub"}
    return Registry(place[request.param])


def test_a_url_is_one_and_a_path_is_none():
    assert all(map(is_url, ("s3://bucket/a.sheet", "memory://a", "https://host/a.sheet", "zip://a::file:///b.zip")))
    assert not any(map(is_url, ("a.sheet", "/a/b.sheet", "C:/a.sheet", "a/b:c.sheet")))


def test_versions_are_kept_by_number_and_the_newest_is_found(registry, files):
    assert registry.names() == [] and registry.versions("staff") == []
    first, second = (registry.push(file, "staff") for file in files)
    assert (first.version, second.version) == (1, 2) and first.digest != second.digest
    assert registry.push(files[0], "staff") == first  # the same file again
    assert registry.names() == ["staff"] and registry.versions("staff") == [first, second]
    assert registry.pull("staff").read_bytes() == files[1].read_bytes()
    assert resolve(f"{registry.place}#staff@1").read_bytes() == files[0].read_bytes()
    assert resolve(f"{registry.place}#staff").read_bytes() == files[1].read_bytes()


def test_what_is_not_there_is_said(registry, files):
    registry.push(files[0], "staff")
    for wrong in ("staff@2", "staff@x", "nobody", "../staff", ""):
        with pytest.raises(SheetError):
            resolve(f"{registry.place}#{wrong}")
    with pytest.raises(SheetError, match="cannot be named"):
        registry.push(files[0], "a/b")


def test_only_sound_sheets_are_pushed(registry, files, tmp_path):
    broken = tmp_path / "broken.sheet"
    data = bytearray(files[0].read_bytes())
    data[len(data) // 2] ^= 1
    broken.write_bytes(data)
    with pytest.raises(SheetError, match="changed after it was saved"):
        registry.push(broken, "staff")
    assert registry.names() == []


def test_a_file_that_was_changed_in_the_registry_is_refused(registry, files):
    version = registry.push(files[0], "staff")
    filesystem, root = fsspec.core.url_to_fs(registry.place)
    filesystem.pipe_file(f"{root}/staff/{version.file}", files[1].read_bytes())
    with pytest.raises(SheetError, match="was expected"):
        registry.pull("staff")


def test_an_index_cannot_point_elsewhere(registry, files):
    registry.push(files[0], "staff")
    filesystem, root = fsspec.core.url_to_fs(registry.place)
    index = json.loads(filesystem.cat_file(f"{root}/staff/index.json"))
    index["versions"][0]["file"] = "../../../etc/passwd"
    filesystem.pipe_file(f"{root}/staff/index.json", json.dumps(index).encode())
    with pytest.raises(SheetError, match="no name of a file"):
        registry.pull("staff")
    filesystem.pipe_file(f"{root}/staff/index.json", b'{"versions": [{}]}')
    with pytest.raises(SheetError, match="damaged index"):
        registry.pull("staff")


def test_a_push_that_was_interrupted_is_no_version(registry, files):
    registry.push(files[0], "staff")
    filesystem, root = fsspec.core.url_to_fs(registry.place)
    filesystem.pipe_file(f"{root}/staff/2.sheet", b"half")
    assert [each.version for each in registry.versions("staff")] == [1]
    assert registry.push(files[1], "staff").version == 3


def test_what_is_behind_a_url_is_fetched_once_and_verified(cache, files, tmp_path):
    place = f"memory://{tmp_path.name}/staff.sheet"
    filesystem, inside = fsspec.core.url_to_fs(place)
    filesystem.pipe_file(inside, files[0].read_bytes())
    first = local(place)
    assert first.parent == cache and first.read_bytes() == files[0].read_bytes()
    seen = first.stat().st_mtime_ns
    assert local(place) == first and first.stat().st_mtime_ns == seen
    filesystem.pipe_file(inside, files[0].read_bytes()[:-3])
    with pytest.raises(SheetError):
        local(place)
    assert [path for path in cache.iterdir() if path != first] == []
    with pytest.raises(SheetError, match="cannot be fetched"):
        local(f"memory://{tmp_path.name}/none.sheet")
    with pytest.raises(SheetError, match="cannot be"):
        local("nosuchprotocol://user:secret@host/x.sheet")
    assert file_digest(first) == file_digest(files[0])


def test_a_password_in_a_url_is_not_shown():
    with pytest.raises(SheetError) as caught:
        local("nosuchprotocol://user:secret@host/x.sheet")
    assert "secret" not in str(caught.value)


def test_a_sheet_answers_from_wherever_it_is(tiny, registry, files):
    registry.push(files[0], "staff")
    load = CompressedKnowledgeLLM.load
    with load(f"{registry.place}#staff", model=tiny) as there, load(files[0], model=tiny) as here:
        assert there.ask("Who?", max_tokens=5).text == here.ask("Who?", max_tokens=5).text
    assert torch.equal(load_sheet(f"{registry.place}#staff").indices, load_sheet(files[0]).indices)


def test_a_sheet_is_inspected_wherever_it_is(files, tmp_path, capsys):
    hub = Registry(tmp_path / "hub")
    hub.push(files[0], "staff")
    shown = []
    for place in (str(files[0]), f"{tmp_path}/hub#staff@1", f"file://{files[0]}"):
        assert run(["inspect", place, "--json", "--verify"]) == 0
        shown.append(json.loads(capsys.readouterr().out)["manifest"])
    assert shown[0] == shown[1] == shown[2]
    assert run(["inspect", f"{tmp_path}/hub#nobody"]) == 1
    assert "no version" in capsys.readouterr().err


def test_the_command_line_pushes_and_pulls(files, tmp_path, capsys):
    hub, copy = tmp_path / "hub", tmp_path / "copy.sheet"
    assert run(["push", str(files[0]), str(hub), "--name", "staff", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == 1
    assert run(["pull", f"{hub}#staff@1", "-o", str(copy)]) == 0
    assert copy.read_bytes() == files[0].read_bytes()
    assert run(["pull", f"{hub}#staff", "-o", str(copy)]) == 2
    assert run(["pull", f"{hub}#staff@9", "-o", str(copy), "--force"]) == 1
    assert copy.read_bytes() == files[0].read_bytes()


class Files(http.server.SimpleHTTPRequestHandler):
    """Files over HTTP, with the headers of `told`, and how often each was fetched."""

    told: ClassVar[set[str]] = set()
    fetched: ClassVar[list[str]] = []
    token: ClassVar[str] = ""

    def log_message(self, *args):
        pass

    def send_header(self, keyword, value):
        if keyword != "Last-Modified" or keyword in self.told:
            super().send_header(keyword, value)

    def end_headers(self):
        if "ETag" in self.told and os.path.isfile(self.translate_path(self.path)):
            super().send_header("ETag", f'"{file_digest(self.translate_path(self.path))[:16]}"')
        super().end_headers()

    def do_GET(self):
        self.fetched.append(self.path)
        super().do_GET()

    def send_head(self):
        if self.token and not self.path.endswith(f"?token={self.token}"):
            return self.send_error(403)
        return super().send_head()


@pytest.fixture
def web(tmp_path):
    pytest.importorskip("aiohttp", reason="fsspec's HTTP needs it")
    folder = tmp_path / "web"
    folder.mkdir()
    Files.told, Files.fetched, Files.token = {"ETag"}, [], ""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("told", "age", "fetched"),
    [("ETag", 0, 1), ("Last-Modified", 1000, 1), ("Last-Modified", 0, 3), ("", 1000, 3)],
)
def test_what_is_behind_http_is_fetched_again_when_it_has_changed(web, files, told, age, fetched):
    """However little a server tells, and within one second; and only then, where that can be known."""
    folder, url = web
    Files.told = {told}
    for number, file in enumerate(files):
        data, at = file.read_bytes(), int(time.time()) - age + number * (age > 0)
        (folder / "a.sheet").write_bytes(data)
        os.utime(folder / "a.sheet", (at, at))
        Files.fetched.clear()
        for _ in range(3):
            assert local(f"{url}/a.sheet").read_bytes() == data
        assert len(Files.fetched) == fetched


def test_a_download_that_was_damaged_is_fetched_again(web, cache, files, caplog):
    folder, url = web
    (folder / "a.sheet").write_bytes(files[0].read_bytes())
    hub = Registry(folder / "hub")
    hub.push(files[0], "staff")
    for place in (f"{url}/a.sheet", f"{url}/hub#staff"):
        caplog.clear()
        path = resolve(place)
        assert path.parent == cache
        for damage in (
            lambda data: data[:-9],
            lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
            lambda _: b"",
        ):
            path.write_bytes(damage(files[0].read_bytes()))
            assert resolve(place) == path and path.read_bytes() == files[0].read_bytes()
        assert caplog.text.count("is fetched again") == 3


def test_a_download_in_the_place_of_another_is_fetched_again(web, cache, files):
    """A sound sheet, but another one: its own digest does not tell, that of the index does."""
    folder, url = web
    Registry(folder / "hub").push(files[0], "staff")
    path = resolve(f"{url}/hub#staff")
    path.write_bytes(files[1].read_bytes())
    assert resolve(f"{url}/hub#staff").read_bytes() == files[0].read_bytes()


def test_a_registry_behind_http_tells_of_new_versions(web, files):
    folder, url = web
    hub = Registry(folder / "hub")
    for number, file in enumerate(files, 1):
        hub.push(file, "staff")
        assert [each.version for each in Registry(f"{url}/hub").versions("staff")] == list(range(1, number + 1))
        assert resolve(f"{url}/hub#staff").read_bytes() == file.read_bytes()


def test_what_http_is_asked_with_stays_behind_the_path_and_is_not_told(web, tiny, tmp_path, caplog):
    folder, url = web
    documents = read_documents(["Alice lives in Lisbon. " * 8])
    sheet = build_sheet(tiny, documents, Task.of("Who?"), rate=2, scorer="recent", archive=True)
    file = save_sheet(sheet, folder / "a.sheet")
    Registry(folder / "hub").push(file, "staff")
    Files.token = "secret/"
    for place in (
        f"{url}/a.sheet?token=secret/",
        f"{url}/hub?token=secret/#staff",
        f"{url}/hub/?token=secret/#staff@1",
    ):
        load_sheet(place).archive.verify()
    assert not caplog.records and Registry(f"{url}/hub?token=secret/").versions("staff")
    for place in (f"{url}/a.sheet?token=guess", f"{url}/none.sheet?token=guess", f"{url}/hub?token=guess#staff"):
        with pytest.raises(SheetError, match=r"cannot be fetched|has no version") as refused:
            load_sheet(place)
        assert "guess" not in str(refused.value)
    (folder / "a.sheet.archive").unlink()
    (tmp_path / "cache").rename(tmp_path / "before")
    assert load_sheet(f"{url}/a.sheet?token=secret/").archive.trouble
    assert "a.sheet?...' cannot be fetched" in caplog.text and "secret" not in caplog.text
    assert run(["pull", f"{url}/hub?token=secret/#staff", "-o", str(tmp_path / "copy.sheet")]) == 0
    assert (tmp_path / "copy.sheet.archive").is_file()
