"""Scores and a budget become indices, and indices become tokens."""

from __future__ import annotations

import pytest
import torch

from cribsheet.compress.selection import keep_top, spread_out, take
from cribsheet.errors import BudgetError
from cribsheet.vocabulary import ABSENT


def test_the_best_tokens_of_each_head_stay_in_reading_order():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7], [0.8, 0.2, 0.3, 0.1]])
    assert keep_top(scores, 2).tolist() == [[1, 3], [0, 2]]


def test_ties_go_to_the_earlier_token():
    assert keep_top(torch.tensor([[1.0, 2.0, 1.0, 1.0, 2.0]]), 3).tolist() == [[0, 1, 4]]
    assert keep_top(torch.zeros(2, 500), 7).tolist() == [list(range(7))] * 2


def test_a_pinned_token_beats_every_score():
    scores = torch.tensor([[1e30, float("inf"), 3e38]])
    assert keep_top(scores, 1).tolist() == [[1]]


def test_a_budget_of_everything_keeps_everything():
    assert keep_top(torch.rand(3, 6), 6).tolist() == [list(range(6))] * 3


@pytest.mark.parametrize("budget", [0, -1, 6])
def test_a_budget_that_does_not_fit_is_refused_with_value_limit_and_way_out(budget):
    with pytest.raises(BudgetError) as refused:
        keep_top(torch.rand(2, 5), budget)
    assert str(refused.value) == (
        f"The budget is {budget} tokens but 5 are in the cache; pass a budget between 1 and 5."
    )


def test_a_token_counts_less_in_each_further_head_that_wants_it_less():
    first = torch.tensor([[9.0, 3.0, 2.0], [10.0, 6.0, 0.0]])
    second = torch.tensor([[18.0, 2.0, 1.0]])
    alike = torch.arange(3)
    spread = spread_out([first, second], [alike.expand(2, -1), alike.expand(1, -1)])
    assert spread[0].tolist() == [[1.0, 0.75, 2.0], [2.5, 6.0, 0.0]]
    assert spread[1].tolist() == [[18.0, pytest.approx(2 / 9), 0.25]]


def test_tokens_are_told_apart_by_where_they_stand_in_the_corpus_and_absent_ones_stay_out():
    absent = float("-inf")
    first, second = torch.tensor([[absent, absent, 4.0]]), torch.tensor([[4.0, 8.0]])
    spread = spread_out([first, second], [torch.tensor([[ABSENT, ABSENT, 7]]), torch.tensor([[3, 7]])])
    assert spread[0].tolist() == [[absent, absent, 1.0]]
    assert spread[1].tolist() == [[4.0, 8.0]]


def test_take_picks_by_head_from_tokens_and_from_vectors():
    indices = torch.tensor([[0, 2], [1, 2]])
    assert take(torch.tensor([[10, 11, 12], [20, 21, 22]]), indices).tolist() == [[10, 12], [21, 22]]
    vectors = torch.arange(12.0).reshape(2, 3, 2)
    assert take(vectors, indices).tolist() == [[[0, 1], [4, 5]], [[8, 9], [10, 11]]]


def test_what_was_taken_does_not_hold_on_to_what_was_not():
    tokens = torch.rand(1, 1000, 4)
    assert take(tokens, torch.tensor([[3]])).untyped_storage().nbytes() == 16
