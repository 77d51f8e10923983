"""The desk: what it lends is what the archive holds, each block is fetched once, and it never grows past its bound."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT

from cribsheet import build_sheet
from cribsheet.recall import desk as module
from cribsheet.recall.desk import Desk


@pytest.fixture(scope="module")
def archive(tiny):
    return build_sheet(tiny, DOCUMENTS, FEW_SHOT, rate=3, archive="float32").archive


@pytest.fixture
def desk(archive, tiny, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 16)
    return Desk(archive, tiny)


def joined(recalled):
    return [torch.cat(halves, 2) for halves in zip(*recalled.pieces, strict=True)]


def held_by(archive, *stretches):
    parts = [archive.stretch(first, stop) for first, stop in stretches]
    return [torch.stack([torch.cat([part[layer][half] for part in parts], 1) for layer in range(len(parts[0]))])
            for half in (0, 1)]  # fmt: skip


@pytest.mark.parametrize(
    "stretches", [[(0, 16)], [(15, 17)], [(3, 61)], [(3, 5), (40, 90)], [(5, 9), (9, 12)], [(200, 230)]]
)
def test_it_lends_the_tokens_that_were_asked_for_wherever_blocks_end(archive, desk, stretches):
    for _ in range(2):  # fetched, and lying there
        recalled = desk.take(stretches)
        assert recalled.tokens == sum(stop - first for first, stop in stretches)
        for mine, its in zip(joined(recalled), held_by(archive, *stretches), strict=True):
            assert torch.equal(mine, its)


def test_a_block_is_read_once_and_counts_as_a_hit_afterwards(desk):
    desk.take([(0, 40)])
    assert (desk.reads, desk.hits) == (3, 0)
    desk.take([(10, 20), (33, 50)])
    assert (desk.reads, desk.hits) == (4, 3)


def test_neighbouring_blocks_are_read_at_once(archive, desk, monkeypatch):
    asked, layers = [], archive.layers
    monkeypatch.setattr(archive, "layers", lambda first, stop: asked.append((first, stop)) or layers(first, stop))
    desk.take([(20, 30)])
    desk.take([(0, 60), (100, 110), (archive.tokens - 1, archive.tokens)])
    assert asked == [(16, 32), (0, 16), (32, 64), (96, 112), (archive.tokens // 16 * 16, archive.tokens)]


def test_it_holds_no_more_bytes_than_its_bound_and_lets_go_of_what_was_used_least_lately(archive, desk):
    desk.take([(0, 16)])
    block = desk.nbytes
    assert block == sum(half.nbytes for pair in archive.stretch(0, 16) for half in pair)
    desk.max_bytes = 3 * block
    for first in (16, 32, 0, 48):
        desk.take([(first, first + 16)])
        assert desk.nbytes <= desk.max_bytes
    reads = desk.reads
    desk.take([(0, 16), (32, 64)])
    assert desk.reads == reads  # those that were used last
    desk.take([(16, 32)])
    assert desk.reads == reads + 1
    large = desk.take([(0, 160)])  # more than the bound: lent, and not kept whole
    assert large.tokens == 160 and desk.nbytes <= desk.max_bytes
    desk.max_bytes = 0
    assert desk.take([(0, 16)]).tokens == 16 and desk.nbytes == 0


def test_a_block_that_is_let_go_frees_its_memory_though_it_was_read_with_others(desk):
    recalled = desk.take([(0, 48)])
    assert all(keys.untyped_storage().nbytes() == keys.nbytes for keys, _ in recalled.pieces)


def test_many_who_ask_at_once_for_the_same_wait_for_one_read(archive, desk, monkeypatch):
    asked, layers = [], archive.layers

    def slow(first, stop):
        asked.append((first, stop))
        time.sleep(0.05)
        return layers(first, stop)

    monkeypatch.setattr(archive, "layers", slow)
    got = []
    threads = [threading.Thread(target=lambda: got.append(desk.take([(0, 40)]))) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked == [(0, 48)] and desk.reads == 3 and len(got) == 12
    expected = held_by(archive, (0, 40))
    assert all(torch.equal(mine, its) for each in got for mine, its in zip(joined(each), expected, strict=True))
