"""Sheets in host memory: the same sheets, at most so many bytes of them, and never an old version."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from cribsheet import CompressedKnowledgeLLM, SheetCache
from cribsheet.build import build_sheet
from cribsheet.corpus.documents import Document
from cribsheet.corpus.task import Task
from cribsheet.errors import BudgetError, SheetError
from cribsheet.sheet.file import load, save
from cribsheet.testing import tiny_backbone


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone("llama")


def written(backbone, path, text="Alice lives in Lisbon. Bob lives in Oslo.", **options):
    options = {"rate": 1, "scorer": "task"} | options
    save(build_sheet(backbone, [Document(text=text, id="a")], Task("Who lives where?"), **options), path)
    return path


@pytest.fixture(scope="module")
def files(backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sheets")
    return [written(backbone, folder / f"{name}.sheet") for name in "abc"]


def size(path):
    sheet = load(path)
    return sheet.nbytes + sheet.indices.nbytes + sheet.origins.nbytes


@pytest.mark.parametrize("options", [{}, {"dtype": "int8"}, {"dtype": "int4"}, {"allocation": "adaptive", "rate": 2}])
def test_what_is_kept_is_what_stands_in_the_file(backbone, tmp_path, options):
    path = written(backbone, tmp_path / "a.sheet", text="Person 7 lives in house 9. " * 20, **options)
    kept, mapped = SheetCache(1 << 30).load(path), load(path)
    assert torch.equal(kept.indices, mapped.indices) and torch.equal(kept.origins, mapped.origins)
    assert kept.manifest == mapped.manifest and kept.texts == mapped.texts
    for mine, other in zip(kept.layers, mapped.layers, strict=True):
        assert mine.counts == other.counts and mine.tensors().keys() == other.tensors().keys()
        assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in mine.tensors().items())


def test_a_sheet_that_was_used_is_not_read_again_even_if_its_file_is_gone_bad(files, tmp_path):
    path = tmp_path / "a.sheet"
    path.write_bytes(files[0].read_bytes())
    cache, stamp = SheetCache(1 << 30), path.stat()
    first = cache.load(path)
    path.write_bytes(b"\0" * stamp.st_size)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert cache.load(path) is first
    assert first.layers[0].keys.abs().sum() > 0  # a copy, not the mapped file


def test_those_used_longest_ago_leave_first_and_the_bound_holds(files):
    cache = SheetCache(2 * size(files[0]))
    first, second = (cache.load(path) for path in files[:2])
    assert cache.load(files[0]) is first  # now the second is the oldest
    cache.load(files[2])
    assert len(cache) == 2 and cache.nbytes <= cache.max_bytes
    assert cache.load(files[0]) is first and cache.load(files[1]) is not second


def test_a_sheet_larger_than_the_bound_is_opened_and_not_kept(files):
    cache = SheetCache(size(files[0]) - 1)
    assert cache.load(files[0]).tokens > 0 and (len(cache), cache.nbytes) == (0, 0)


def test_a_file_that_was_written_again_is_read_again_and_its_old_version_leaves(backbone, tmp_path):
    path, cache = written(backbone, tmp_path / "a.sheet"), SheetCache(1 << 30)
    cache.load(path)
    written(backbone, path, text="Clara lives in Cairo, where she keeps a parrot.")
    assert cache.load(path).texts == ("Clara lives in Cairo, where she keeps a parrot.",)
    assert len(cache) == 1
    cache.clear()
    assert cache.nbytes == 0


def test_answers_from_a_cached_sheet_are_those_from_the_file(backbone, files):
    cache = SheetCache(1 << 30)
    texts = []
    for given in (None, cache, cache):
        place = given.load(files[0]) if given is not None else files[0]
        with CompressedKnowledgeLLM.load(place, model=backbone) as kb:
            texts.append(kb.ask("Where does Bob live?", max_tokens=8).text)
    assert len(set(texts)) == 1 and len(cache) == 1


def test_many_threads_keep_the_bound(files):
    cache = SheetCache(2 * size(files[0]))
    threads = [
        threading.Thread(target=lambda n=n: [cache.load(files[(n + k) % 3]) for k in range(20)]) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < cache.nbytes <= cache.max_bytes


@pytest.mark.parametrize("most", [0, -5, True, 1.5])
def test_a_bound_that_is_none_is_refused(most):
    with pytest.raises(BudgetError, match="max_bytes"):
        SheetCache(most)


def test_what_is_no_sheet_is_refused_as_without_a_cache(tmp_path):
    with pytest.raises(SheetError, match="no sheet"):
        SheetCache(1 << 20).load(tmp_path / "none.sheet")
