"""Our own kernels beside their slow references, interpreted on a CPU: `make kernels`.

The interpreter must be asked for before anything imports Triton, so elsewhere these tests are skipped. On a card the
library compares the kernels before it uses them, and so does the speed bench.
"""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("make kernels runs these", allow_module_level=True)

from corpus import DOCUMENTS, FEW_SHOT

from cribsheet.attention import backends, dispatch, plain
from cribsheet.attention.attend import attend, column_mass, column_peak
from cribsheet.attention.cache import prefix_cache
from cribsheet.attention.prefix import LayerPrefix, Prefix
from cribsheet.attention.recorder import Glance, question_weights
from cribsheet.build import build_sheet
from cribsheet.compress import keeping
from cribsheet.compress.scoring import recall
from cribsheet.compress.scoring.view import LayerView
from cribsheet.engine.batch import Batch
from cribsheet.engine.prefill import ShortPrefill
from cribsheet.engine.request import Answering, Request
from cribsheet.engine.sampling import SamplingParams
from cribsheet.kernels import columns as kernels
from cribsheet.kernels import keeping as taking
from cribsheet.testing import tiny_backbone

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")  # the interpreter's


@pytest.fixture
def kernels_are_used(monkeypatch):
    monkeypatch.setattr(dispatch, "usable", lambda q, kv_heads, softcap=None: softcap is None)
    monkeypatch.setattr(dispatch, "can_merge", lambda out: True)


def random_prefix(backbone, tokens, counts=()):
    shape = (sum(counts),) if counts else (backbone.kv_heads, tokens)
    generator = torch.Generator().manual_seed(1)
    layers = [
        LayerPrefix(*(torch.randn(*shape, backbone.head_size, generator=generator) for _ in range(2)), None, counts)
        for _ in range(backbone.num_layers)
    ]
    return Prefix(layers, max(counts, default=tokens))


@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_give_what_the_plain_path_gives(dtype, size):
    errors = dispatch.check(torch.device("cpu"), dtype, size, 3)
    assert len(errors) == (10 if size == 64 else 8)
    assert max(errors.values()) < (1e-5 if dtype == torch.float32 else 1e-3), errors


def test_a_planted_bug_is_found_and_the_plain_path_stays(monkeypatch):
    right = kernels.columns
    monkeypatch.setattr(kernels, "columns", lambda *given, **named: right(*given, **named) * 1.1)
    monkeypatch.setattr(dispatch, "_verdicts", {})
    assert not dispatch.agree(dispatch.check, torch.device("cpu"), torch.float32, 64, 2)
    monkeypatch.undo()
    assert dispatch.agree(dispatch.check, torch.device("cpu"), torch.float32, 64, 2)


def passed(backbone, work):
    """Logits of one pass, as the engine makes it."""
    logits = backbone.step(*work.inputs(backbone))[:, -1]
    work.note()
    return logits


def steps(backbone, prefix, told=((0, 0), (0, 0))):
    """Logits and masses of two questions of different lengths, read together and two tokens decoded."""
    generator = torch.Generator().manual_seed(2)
    found = []
    sequences = []
    for length, passages in zip((5, 9), told, strict=True):
        ids = torch.randint(20, 200, (length,), generator=generator)
        request = Request(
            prefix, ids, SamplingParams(), lambda event: None, evidence=True,
            told=(passages,) if passages[1] else (), lead=passages[1],
        )  # fmt: skip
        sequences.append(Answering(request, backbone.tokenizer, frozenset()))
    prefill, batch = ShortPrefill(sequences, prefix), Batch(prefix)
    found.append(passed(backbone, prefill))
    for row, sequence in enumerate(sequences):
        sequence.last = 30 + row
        batch.insert(sequence, prefill.suffix(row))
    found += [passed(backbone, batch) for _ in range(2)]
    return found, [sequence.looked for sequence in sequences]


@pytest.mark.parametrize("told", [((0, 0), (0, 0)), ((1, 3), (2, 7))])
@pytest.mark.parametrize("counts", [(), (40, 23)])
def test_answers_and_what_they_look_at_are_the_same_with_kernels(request, counts, told):
    backbone = tiny_backbone("llama")
    prefix = random_prefix(backbone, 40, counts)
    wanted = steps(backbone, prefix, told)
    request.getfixturevalue("kernels_are_used")
    got = steps(backbone, prefix, told)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_rows_that_weigh_nothing_leave_no_trace(kernels_are_used):
    backbone = tiny_backbone("llama")
    prefix = random_prefix(backbone, 40)
    weights = question_weights(6)
    masses = []
    for padding in (0, 3):
        cache = prefix_cache(prefix.layers, prefix.tokens)
        padded = torch.cat([weights, torch.zeros(padding)])
        glance = Glance(cache.layers, backbone.full, [(0, 0)], [padded])
        ids = torch.arange(20, 26 + padding).unsqueeze(0)
        backbone.step(ids, torch.arange(40, 46 + padding).unsqueeze(0), cache)
        masses.append(glance.masses[0])
    torch.testing.assert_close(masses[0], masses[1], atol=1e-6, rtol=1e-5)


def test_sums_and_peaks_of_a_build_are_the_same_with_kernels(request):
    generator = torch.Generator().manual_seed(3)
    q, k = torch.randn(4, 37, 32, generator=generator), torch.randn(2, 150, 32, generator=generator)
    lse, weight = torch.randn(4, 37, generator=generator) + 5, torch.rand(37, generator=generator)
    runs = [
        lambda: column_mass(q, k, lse, scale=0.2, row_weight=weight),
        lambda: column_peak(q, k, lse, scale=0.2),
    ]
    wanted = [run() for run in runs]
    request.getfixturevalue("kernels_are_used")
    torch.testing.assert_close([run() for run in runs], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("counts", [(130, 130), (0, 70), (9, 150)])
@pytest.mark.parametrize(("batch", "rows"), [(1, 3), (5, 1), (5, 7), (17, 4), (3, 16), (2, 20)])
def test_sequences_of_few_rows_share_a_pass(batch, rows, counts):
    random = torch.Generator().manual_seed(7)
    q, keys = torch.randn(2, batch, rows, 24, generator=random), torch.randn(sum(counts), 24, generator=random)
    seen = torch.randn(2, batch, rows, generator=random) + 3
    seen[:, -1, 0] = float("inf")  # a row that weighs nothing
    starts = torch.tensor([0, counts[0], sum(counts)], dtype=torch.int32)
    for peak in (False, True):
        wanted = torch.zeros(batch, 2, 150)
        for head, own in enumerate(keys.split(counts)):
            weights = torch.exp(q[head] @ own.t() * 0.3 - seen[head, ..., None])
            wanted[:, head, 150 - len(own) :] = weights.amax(1) if peak else weights.sum(1)
        got = kernels.columns(q, seen, keys, starts, max(counts), 150, 0.3, peak=peak)
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_a_row_that_saw_nothing_in_either_part_is_zero_and_says_so():
    out, nothing = torch.ones(1, 2, 3, 16), torch.full((1, 2, 3), float("-inf"))
    found, lse = kernels.merge((out, nothing), (out, nothing))
    assert (found == 0).all() and lse.isneginf().all()
    found, lse = kernels.merge((out, nothing), (out * 2, torch.zeros(1, 2, 3)))
    assert (found == 2).all() and (lse == 0).all()


@pytest.mark.parametrize("size", [16, 96])
def test_what_is_taken_and_set_by_kernels_is_what_is_taken_and_set_without(size):
    errors = keeping.errors(torch.device("cpu"), torch.float32, size, 1)
    assert len(errors) == 10 and max(errors.values()) < 1e-6, errors


@pytest.mark.parametrize("options", [{}, {"allocation": "adaptive"}, {"allocation": "uniform", "guide": "dropped"}])
def test_a_build_by_kernels_keeps_what_a_build_without_keeps(options, monkeypatch):
    backbone, sheets = tiny_backbone(), []
    for used in (False, True):
        monkeypatch.setattr(keeping, "_by_kernels", lambda kept, used=used: used)
        sheets.append(build_sheet(backbone, DOCUMENTS, FEW_SHOT, rate=3, chunk_tokens=90, **options))
    one, other = sheets
    assert torch.equal(one.indices, other.indices) and one.indices.shape[2] > 20
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        assert mine.counts == theirs.counts
        torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-6, rtol=1e-5)
        assert torch.equal(mine.values, theirs.values)


def test_a_planted_bug_in_what_is_taken_is_found(monkeypatch):
    right = taking.take
    monkeypatch.setattr(taking, "take", lambda places, *given: right(places.roll(1, 1), *given))
    assert max(keeping.errors(torch.device("cpu"), torch.float32, 16, 1).values()) > 0.1


@pytest.mark.parametrize("repeated", [200, 64, 7])
def test_a_repetition_is_looked_at_by_a_kernel_as_without(repeated, monkeypatch):
    made = torch.Generator().manual_seed(2)
    queries, keys, values = (torch.randn(heads, 230, 32, generator=made) for heads in (6, 2, 2))
    lse, places = torch.rand(6, 230, generator=made) + 3, torch.arange(230).expand(2, -1)
    carried = torch.empty(2, 0)
    view = LayerView(keys, values, places, queries, lse, carried, scale=0.2, layer=0, repeated=repeated)
    wanted = recall.copied(view)
    monkeypatch.setattr(dispatch, "usable", lambda q, kv_heads, softcap=None: True)
    assert wanted.shape == (6, repeated)
    torch.testing.assert_close(recall.copied(view), wanted, atol=1e-5, rtol=1e-4)


def test_rows_that_see_up_to_their_own_key_go_to_the_kernel_for_hopper_where_it_may_be_used(monkeypatch):
    made = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, heads, 150, 64, generator=made) for heads in (6, 2, 2))
    wanted = plain.attend_plain(q, k, v, scale=0.1, causal=True)
    monkeypatch.setattr(backends, "on_cpu", lambda q: False)
    monkeypatch.setattr(backends, "on_cuda", lambda q: True)
    monkeypatch.setattr(dispatch, "can_flash", lambda q, k: True)
    for got, other in zip(attend(q, k, v, scale=0.1, causal=True), wanted, strict=True):
        torch.testing.assert_close(got, other, atol=1e-5, rtol=1e-4)
