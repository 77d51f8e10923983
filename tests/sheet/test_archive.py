"""Archives: all that a build read, beside its sheet, and any stretch of it again, bit by bit or not at all."""

from __future__ import annotations

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT

from cribsheet import build_sheet, load_sheet
from cribsheet.attention.rope import rotate
from cribsheet.errors import RequestError
from cribsheet.prompt.chunks import TokenizedCorpus
from cribsheet.sheet.file import read_manifest, save
from cribsheet.sheet.layers import StoredLayer
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
    corpus = TokenizedCorpus.build(sheet.documents, sheet.manifest.head, encoder_of(tiny))
    for number, document in enumerate(sheet.documents):
        first, stop = sheet.archive.places(number, 5, 25)
        rows = corpus.origins[first:stop]
        assert bool((rows[:, 0] == number).all()) and int(rows[0, 1]) <= 5 < int(rows[0, 2])
        assert int(rows[-1, 1]) < 25 <= int(rows[-1, 2])
        assert sheet.archive.places(number, 0, len(document.text))[1] > stop
    for nowhere in [(len(DOCUMENTS), 0, 5), (-1, 0, 5), (0, 7, 7), (0, 10**6, 10**7)]:
        with pytest.raises(RequestError, match="There are no tokens of the characters"):
            sheet.archive.places(*nowhere)


def encoder_of(backbone):
    from cribsheet.prompt.encoder import Encoder

    return Encoder(backbone.tokenizer)


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
    beside.unlink()
    assert same(load_sheet(second).archive.stretch(0, len(whole)), opened.archive.stretch(0, len(whole)))


def test_the_sheet_is_the_same_with_and_without_one(tiny):
    mine, other = build(tiny), build(tiny, archive=False)
    assert other.archive is None and other.manifest.archive is None
    assert mine.manifest.digest == other.manifest.digest and torch.equal(mine.indices, other.indices)
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(mine.layers, other.layers, strict=True))
