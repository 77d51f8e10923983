"""The kernel beside its slow reference: attention, its log-sum-exp, the merge, and the column sums."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from reference import attention_weights

from cribsheet.attention import backends, plain
from cribsheet.attention.attend import _attend_long, attend, attend_shared, column_mass, column_peak, merge
from cribsheet.attention.plain import attend_plain

SCALE = 0.3
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(b=2, h=4, kv=2, t=5, s=5, d=16, dtype=torch.float32):
    return (
        random(b, h, t, d, dtype=dtype),
        random(b, kv, s, d, dtype=dtype, seed=1),
        random(b, kv, s, d, dtype=dtype, seed=2),
    )


def by_loops(q, k, v, visible, softcap=None):
    """Softmax attention in float64, one row at a time; `visible(b, row, column)` says who sees whom."""
    b, h, t, d = q.shape
    group, s = h // k.shape[1], k.shape[2]
    out, lse = torch.zeros(b, h, t, d, dtype=torch.float64), torch.full((b, h, t), float("-inf"), dtype=torch.float64)
    for i in range(b):
        for head in range(h):
            for row in range(t):
                seen = [column for column in range(s) if visible(i, row, column)]
                if seen:
                    logits = k[i, head // group, seen].double() @ q[i, head, row].double() * SCALE
                    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
                    lse[i, head, row] = logits.logsumexp(0)
                    out[i, head, row] = logits.softmax(0) @ v[i, head // group, seen].double()
    return out, lse


def assert_same(found, expected, dtype):
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found[0].double(), expected[0].double(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(found[1].double(), expected[1].double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("function", [attend, attend_plain])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention_and_its_log_sum_exp_follow_the_formula(function, dtype):
    q, k, v = qkv(t=7, s=11, dtype=dtype)
    found = function(q, k, v, scale=SCALE)
    assert_same(found, by_loops(q, k, v, lambda b, row, column: True), dtype)
    assert found[0].dtype == dtype and found[1].dtype == torch.float32


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("keys", [1, 11, 300])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_one_row_alone_sees_what_it_sees_among_others(dtype, keys, masked):
    q, k, v = qkv(t=1, s=keys, dtype=dtype)
    mask = torch.ones(2, 1, 1, keys, dtype=torch.bool)
    mask[1, ..., : keys - 1] = not masked
    found = attend(q, k, v, scale=SCALE, causal=keys == 1 and not masked, mask=mask if masked else None)
    assert_same(found, by_loops(q, k, v, lambda b, row, column: bool(mask[b, 0, 0, column])), dtype)
    assert found[0].shape == q.shape and found[1].shape == q.shape[:3]


@pytest.mark.parametrize("function", [attend, attend_plain])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_causal_row_sees_itself_and_what_came_before(function, dtype):
    q, k, v = qkv(t=9, s=9, dtype=dtype)
    expected = by_loops(q, k, v, lambda b, row, column: column <= row)
    assert_same(function(q, k, v, scale=SCALE, causal=True), expected, dtype)


@pytest.mark.parametrize("function", [attend, attend_plain])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_row_sees_only_what_its_mask_allows_and_nothing_if_that_is_nothing(function, dtype):
    q, k, v = qkv(t=4, s=6, dtype=dtype)
    mask = torch.rand(2, 1, 4, 6, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[0, 0, 2], mask[1, 0, 0] = False, True
    found = function(q, k, v, scale=SCALE, mask=mask)
    assert_same(found, by_loops(q, k, v, lambda b, row, column: bool(mask[b, 0, row, column])), dtype)
    assert (found[0][0, :, 2] == 0).all() and (found[1][0, :, 2] == float("-inf")).all()


@pytest.mark.parametrize("function", [attend, attend_plain])
def test_a_soft_cap_bends_the_logits_before_the_softmax(function):
    q, k, v = qkv(t=5, s=5)
    found = function(q * 4, k, v, scale=SCALE, causal=True, softcap=2.0)
    expected = by_loops(q * 4, k, v, lambda b, row, column: column <= row, softcap=2.0)
    assert_same(found, expected, torch.float32)


def test_column_sums_bend_logits_alike():
    q, k, v = qkv(b=1, t=3, s=7)
    _, lse = attend_plain(q * 4, k, v, scale=SCALE, softcap=2.0)
    mass = column_mass(q[0] * 4, k[0], lse[0], scale=SCALE, softcap=2.0)
    logits = (q[0] * 4) @ k[0].repeat_interleave(2, 0).transpose(1, 2) * SCALE
    torch.testing.assert_close(mass, (2.0 * (logits / 2.0).tanh()).softmax(-1).sum(1), atol=1e-5, rtol=1e-5)


def test_a_mask_row_may_be_shared_by_all_rows():
    q, k, v = qkv(t=3, s=6)
    mask = torch.tensor([[True] * 6, [False, False, True, True, True, False]])[:, None, None, :]
    expected = by_loops(q, k, v, lambda b, row, column: bool(mask[b, 0, 0, column]))
    assert_same(attend(q, k, v, scale=SCALE, mask=mask), expected, torch.float32)
    assert_same(attend_plain(q, k, v, scale=SCALE, mask=mask), expected, torch.float32)


def test_a_long_run_of_masked_keys_at_the_start_is_skipped_by_the_kernel():
    q, k, v = qkv(t=2, s=1100)
    mask = torch.zeros(2, 1, 2, 1100, dtype=torch.bool)
    mask[0, :, :, 1000:], mask[1, :, 0, 700:], mask[1, :, 1, 5] = True, True, True
    assert_same(attend(q, k, v, scale=SCALE, mask=mask), attend_plain(q, k, v, scale=SCALE, mask=mask), torch.float32)


def test_a_nan_in_a_value_that_is_seen_is_not_hidden_by_the_mask_handling():
    q, k, v = qkv(t=2, s=4)
    v[0, 0, 1] = float("nan")
    out, _ = attend(q, k, v, scale=SCALE, mask=torch.ones(2, 1, 2, 4, dtype=torch.bool))
    assert out[0, 0].isnan().all() and not out[1].isnan().any()


def test_attention_over_no_keys_is_zero_with_a_log_sum_exp_of_minus_infinity():
    q, k, v = qkv(s=0)
    out, lse = attend(q, k, v, scale=SCALE)
    assert out.shape == q.shape and not out.any()
    assert lse.dtype == torch.float32 and (lse == float("-inf")).all()


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1), (6, 2)])
def test_neighbouring_query_heads_share_a_key_head(heads, kv_heads):
    q, k, v = qkv(h=heads, kv=kv_heads, t=3, s=5)
    expected = by_loops(q, k, v, lambda b, row, column: True)
    assert_same(attend(q, k, v, scale=SCALE), expected, torch.float32)
    assert_same(attend_plain(q, k, v, scale=SCALE), expected, torch.float32)


def test_keys_need_not_lie_contiguously_in_memory():
    q, k, v = qkv(t=3, s=8)
    scattered = k.transpose(1, 2).contiguous().transpose(1, 2)
    assert not scattered.is_contiguous()
    assert torch.equal(attend(q, scattered, v, scale=SCALE)[0], attend(q, k, v, scale=SCALE)[0])


@pytest.mark.parametrize("t", [1, 3])
def test_attention_over_a_shared_prefix_equals_each_sequence_alone(t):
    q, k, v = qkv(b=3, h=6, kv=2, t=t, s=20)
    out, lse = attend_shared(q, k[:1], v[:1], scale=SCALE)
    for row in range(3):
        alone = attend(q[row : row + 1], k[:1], v[:1], scale=SCALE)
        assert_same((out[row : row + 1], lse[row : row + 1]), alone, torch.float32)


@pytest.mark.parametrize("cut", [0, 1, 7, 12])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_two_merged_parts_are_attention_over_their_union(cut, dtype):
    q, k, v = qkv(t=4, s=12, dtype=dtype)
    parts = [attend(q, k[:, :, at], v[:, :, at], scale=SCALE) for at in (slice(None, cut), slice(cut, None))]
    assert_same(merge(*parts), attend_plain(q, k, v, scale=SCALE), dtype)
    assert_same(merge(*reversed(parts)), attend_plain(q, k, v, scale=SCALE), dtype)


def test_a_merge_survives_log_sum_exps_that_are_far_apart():
    q, k, v = qkv(t=2, s=6)
    k[:, :, :3] *= 300
    parts = [attend(q, k[:, :, at], v[:, :, at], scale=SCALE) for at in (slice(None, 3), slice(3, None))]
    assert_same(merge(*parts), attend_plain(q, k, v, scale=SCALE), torch.float32)


def guide_rows():
    """Queries, keys and log-sum-exps of a guide of 5 rows after 9 cached tokens; weights of the cached ones."""
    q, k = random(6, 5, 16), random(2, 14, 16, seed=1)
    lse = torch.zeros(6, 5)
    for head in range(6):
        for row in range(5):
            lse[head, row] = (k[head // 3, : 10 + row] @ q[head, row] * SCALE).logsumexp(0)
    return q, k[:, :9], lse, attention_weights(q, k, SCALE, 10)[:, :, :9]


@pytest.mark.parametrize("block", [1, 100, 1 << 24])
def test_column_sums_are_those_of_the_softmax_whatever_the_block(monkeypatch, block):
    monkeypatch.setattr(plain, "_MAX_SCORES", block)
    q, k, lse, weights = guide_rows()
    torch.testing.assert_close(column_mass(q, k, lse, scale=SCALE).double(), weights.sum(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(column_peak(q, k, lse, scale=SCALE).double(), weights.amax(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block", [1, 1 << 24])
def test_rows_are_weighted_before_they_are_summed_or_compared(monkeypatch, block):
    monkeypatch.setattr(plain, "_MAX_SCORES", block)
    weight = torch.tensor([0.1, 2.0, 0.0, 1.0, 0.5])
    q, k, lse, weights = guide_rows()
    weighted = weights * weight[:, None]
    mass = column_mass(q, k, lse, scale=SCALE, row_weight=weight)
    peak = column_peak(q, k, lse, scale=SCALE, row_weight=weight)
    torch.testing.assert_close(mass.double(), weighted.sum(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(peak.double(), weighted.amax(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block", [1, 70])
def test_the_plain_path_gives_the_same_whatever_the_block(monkeypatch, block):
    q, k, v = qkv(t=6, s=6)
    mask = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(4)) > 0.3
    whole = [attend_plain(q, k, v, scale=SCALE, causal=causal, mask=mask) for causal in (False, True)]
    monkeypatch.setattr(plain, "_MAX_SCORES", block)
    for causal, expected in zip((False, True), whole, strict=True):
        assert_same(attend_plain(q, k, v, scale=SCALE, causal=causal, mask=mask), expected, torch.float32)


def test_no_block_of_weights_is_larger_than_the_bound(monkeypatch):
    monkeypatch.setattr(plain, "_MAX_SCORES", 6 * 9 * 2)
    blocks = list(plain._weight_blocks(*guide_rows()[:3], SCALE, None, None))
    assert [tuple(block.shape) for block in blocks] == [(6, 2, 9), (6, 2, 9), (6, 1, 9)]


@pytest.fixture
def planned(monkeypatch):
    """A machine on which cuDNN is the CPU's kernel: what is counted and compared is the same everywhere."""

    def plain(q, k, v, scale, causal):
        return attend_plain(q, k, v, scale=scale, causal=causal)

    monkeypatch.setattr(backends, "is_hopper", lambda device: True)
    monkeypatch.setattr(backends, "flash_cuda", plain)
    monkeypatch.setattr(backends, "cudnn_cuda", lambda *given: tuple(part + 0.0 for part in plain(*given)))
    monkeypatch.setattr(backends, "_PLANNED_ROWS", 8)
    monkeypatch.setattr(backends, "_USES_THAT_PAY", 2)
    monkeypatch.setattr(backends, "_seen", Counter())
    monkeypatch.setattr(backends, "_planned", {})
    return monkeypatch


def test_a_large_shape_that_comes_often_goes_to_the_kernel_that_must_plan(planned):
    q, k, v = qkv(t=9, s=9)
    assert [backends.is_planned(q, k, v, SCALE, True) for _ in range(4)] == [False, False, True, True]
    assert not backends.is_planned(*qkv(t=7, s=9), SCALE, False)  # few rows: never
    assert not backends.is_planned(q, k, v, SCALE, False)  # another shape: counted by itself


@pytest.mark.parametrize("wrong", [lambda *given: (given[0] * 2, given[0][..., 0].float()), lambda *given: 1 / 0])
def test_a_kernel_that_must_plan_and_is_wrong_or_refuses_is_not_used(planned, wrong):
    def refuse(*given):
        try:
            return wrong(*given)
        except ZeroDivisionError:
            raise RuntimeError("no plan") from None

    planned.setattr(backends, "cudnn_cuda", refuse)
    q, k, v = qkv(t=9, s=9)
    assert not any(backends.is_planned(q, k, v, SCALE, True) for _ in range(4))


def test_many_rows_over_blocks_of_a_prefix_see_what_they_see_over_the_whole(planned):
    planned.setattr("cribsheet.attention.attend._BLOCK", 8)
    q, k, v = qkv(b=1, t=9, s=21)
    wanted = attend_plain(q, k, v, scale=SCALE)
    for _ in range(4):
        assert_same(_attend_long(q, k, v, SCALE), wanted, torch.float32)
    assert list(backends._planned.values()) == [True]
