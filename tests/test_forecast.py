"""A build's forecast: exact in tokens, near in bytes, and refused for whatever the build would refuse."""

from __future__ import annotations

import pytest

from cribsheet.build import build_sheet
from cribsheet.corpus.documents import Document
from cribsheet.corpus.task import Task
from cribsheet.errors import BudgetError
from cribsheet.forecast import PROBE_TOKENS, forecast
from cribsheet.sheet.file import save
from cribsheet.testing import tiny_backbone

TASK = Task("Who lives where?")
TEXT = " ".join(f"Person {n} lives in house {n * 7 % 31}." for n in range(150))
DOCUMENTS = [Document(text=TEXT, id="street"), Document(text="Bob lives in Oslo.", id="bob")]


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone("llama")


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
@pytest.mark.parametrize("scorer", ["task", "reconstruction"])
def test_a_forecast_is_what_the_build_then_takes(backbone, scorer, dtype, tmp_path):
    options = {"rate": 4, "scorer": scorer, "chunk_tokens": 300, "dtype": dtype}
    told = forecast(backbone, DOCUMENTS, TASK, **options)
    sheet = build_sheet(backbone, DOCUMENTS, TASK, **options)
    made = sheet.manifest
    assert (told.documents, told.corpus_tokens, told.chunk_tokens) == (2, made.corpus_tokens, 300)
    assert (told.tokens, told.chunks) == (sheet.tokens, -(-made.corpus_tokens // 300))
    assert told.rate == pytest.approx(sheet.rate, rel=0.01)
    assert save(sheet, tmp_path / "a.sheet").stat().st_size == pytest.approx(told.sheet_bytes, rel=0.2)
    assert told.peak_bytes > sheet.nbytes + sum(weight.nbytes for weight in backbone.model.parameters())


@pytest.mark.parametrize("mode", ["sequential", "independent"])
@pytest.mark.parametrize("archive", ["float32", "int4"])
def test_an_archive_takes_the_bytes_that_were_told(backbone, mode, archive):
    options = {"rate": 4, "scorer": "task", "chunk_tokens": 300, "mode": mode, "allocation": "uniform"}
    told = forecast(backbone, DOCUMENTS, TASK, archive=archive, **options)
    assert told.archive_bytes == build_sheet(backbone, DOCUMENTS, TASK, archive=archive, **options).archive.bytes
    assert forecast(backbone, DOCUMENTS, TASK, **options).archive_bytes == 0


def test_more_to_read_takes_longer_than_the_piece_that_was_timed(backbone):
    told = forecast(backbone, DOCUMENTS, TASK, rate=4, scorer="task", chunk_tokens=200)
    assert told.probe_tokens == 200 <= PROBE_TOKENS
    share = told.corpus_tokens / told.probe_tokens
    assert told.seconds > told.probe_seconds * share  # later chunks stand on more


def test_a_larger_chunk_takes_more_memory(backbone):
    small, large = (forecast(backbone, DOCUMENTS, TASK, scorer="task", chunk_tokens=size) for size in (100, 0))
    assert small.peak_bytes < large.peak_bytes and large.chunks == 1


def test_what_a_build_refuses_is_refused(backbone):
    with pytest.raises(BudgetError, match="at least 1"):
        forecast(backbone, DOCUMENTS, TASK, rate=0.5)
    with pytest.raises(BudgetError, match="storage dtype"):
        forecast(backbone, DOCUMENTS, TASK, dtype="int3", scorer="task")


@pytest.mark.parametrize("mode", ["sequential", "independent"])
def test_where_nothing_is_said_of_the_size_it_is_of_the_sheet_that_a_build_makes(backbone, mode):
    told = forecast(backbone, DOCUMENTS, TASK, guide="dropped", mode=mode)
    made = build_sheet(backbone, DOCUMENTS, TASK, guide="dropped", mode=mode)
    assert made.manifest.dtype == "int4" and told.tokens == made.manifest.budget
    assert told.sheet_bytes < forecast(backbone, DOCUMENTS, TASK, guide="dropped", mode=mode, rate=4).sheet_bytes


def test_short_documents_that_are_read_alone_have_blocks_of_their_own(backbone):
    short = [Document(text=text, id=str(number)) for number, text in enumerate(TEXT.split(".")[:30])]
    kept = {}
    for dtype in ("float32", "int4"):
        how = {"mode": "independent", "dtype": dtype, "rate": 2, "scorer": "task"}
        sheet = build_sheet(backbone, short, TASK, **how)
        kept[dtype] = forecast(backbone, short, TASK, **how).sheet_bytes, sum(layer.nbytes for layer in sheet.layers)
    beside = kept["float32"][0] - kept["float32"][1]  # indices, origins and texts, which are the same
    assert kept["int4"][0] - beside == pytest.approx(kept["int4"][1], rel=0.2)


@pytest.mark.parametrize(
    "how",
    [{"mode": "independent", "rate": 3}, {"mode": "independent", "budget": 600}, {"rate": 1, "correction": "refit"}],
    ids=str,
)
def test_it_is_exact_for_every_kind_of_sheet(backbone, how, tmp_path):
    options = {"chunk_tokens": 300, "dtype": "float32", **how}
    told = forecast(backbone, DOCUMENTS, TASK, **options)
    sheet = build_sheet(backbone, DOCUMENTS, TASK, **options)
    assert (told.tokens, told.corpus_tokens) == (sheet.manifest.budget, sheet.manifest.corpus_tokens)
    assert told.rate == pytest.approx(sheet.rate, rel=0.01)
    assert save(sheet, tmp_path / "a.sheet").stat().st_size == pytest.approx(told.sheet_bytes, rel=0.2)
    with pytest.raises(BudgetError, match="read apart"):
        forecast(backbone, DOCUMENTS, TASK, mode="independent", correction="refit")


def test_a_correction_takes_time_and_memory_that_grow_with_what_is_kept(backbone):
    options = {"scorer": "task", "chunk_tokens": 400, "allocation": "uniform"}
    plain = forecast(backbone, DOCUMENTS, TASK, rate=2, **options)
    refit, small = (forecast(backbone, DOCUMENTS, TASK, rate=r, correction="refit", **options) for r in (2, 16))
    assert refit.seconds > 2 * plain.seconds and refit.peak_bytes > small.peak_bytes
    per_token = refit.probe_seconds / refit.probe_tokens
    assert refit.seconds > 2 * per_token * refit.corpus_tokens  # what is kept grows from chunk to chunk


def test_texts_that_are_left_out_take_no_bytes(backbone):
    whole, bare = (forecast(backbone, DOCUMENTS, TASK, rate=4, scorer="task", texts=texts) for texts in (True, False))
    assert whole.sheet_bytes - bare.sheet_bytes == sum(len(document.text) for document in DOCUMENTS)
