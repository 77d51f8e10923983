"""How the next token is chosen: OpenAI's parameters, checked, repeatable."""

from __future__ import annotations

import math

import pytest
import torch
from torch.overrides import TorchFunctionMode

from cribsheet.engine.sampling import MAX_STOPS, Sampler, SamplingParams, _best, _nucleus, choose, describe
from cribsheet.errors import EngineError, RequestError

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0, 0.0])


def draw(count=500, logits=LOGITS, **params):
    sampler = Sampler(SamplingParams(**{"temperature": 1.0, "seed": 1, **params}))
    return [sampler.pick(logits)[0] for _ in range(count)]


def test_without_settings_the_most_probable_token_is_taken():
    params = SamplingParams()
    assert params.is_plain
    assert Sampler(params).pick(LOGITS)[0] == 1


@pytest.mark.parametrize(
    "asked",
    [
        {"presence_penalty": 1.0},
        {"frequency_penalty": -1.0},
        {"logit_bias": {1: 2.0}},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 3},
    ],
)
def test_whoever_asks_for_more_does_not_choose_with_the_others(asked):
    assert not SamplingParams(**asked).is_plain


def test_who_chooses_with_others_takes_what_it_takes_alone():
    """Whatever the others ask for."""
    rows = torch.randn(6, 50, generator=torch.Generator().manual_seed(5))
    asked = [{}, {"temperature": 1.0}, {"logprobs": 3}, {"temperature": 0.5, "logprobs": 0}, {"temperature": 9}, {}]
    params = [SamplingParams(seed=7, **each) for each in asked]
    together = choose(rows, [Sampler(each) for each in params])
    for row, each, made in zip(rows, params, together, strict=True):
        token, logprobs = Sampler(each).pick(row)
        assert made.token == token
        if each.logprobs is not None:
            assert made.logprob == pytest.approx(float(logprobs[token]))
            best = logprobs.topk(each.logprobs)
            assert [number for number, _ in made.best] == best.indices.tolist()
            assert [value for _, value in made.best] == pytest.approx(best.values.tolist())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_computes_no_numbers_is_told_from_one_that_does(temperature):
    rows = torch.stack([LOGITS, LOGITS * math.nan])
    good, bad = choose(rows, [Sampler(SamplingParams(temperature=temperature)) for _ in range(2)])
    good.check()
    with pytest.raises(EngineError, match="NaN"):
        bad.check()


@pytest.mark.parametrize("asked", [{}, {"top_p": 0.9}, {"top_k": 3}, {"temperature": 0.0, "presence_penalty": 1.0}])
def test_nothing_is_drawn_from_what_is_no_number(asked):
    broken = LOGITS.clone()
    broken[2] = math.nan
    with pytest.raises(EngineError, match="NaN"):
        draw(1, logits=broken, **asked)


class OnAnApple(torch.Tensor):
    """Numbers of a GPU that has no double precision; brought over, they are plain ones."""

    device = torch.device("mps")
    is_cuda = False

    @classmethod
    def __torch_function__(cls, called, types, args=(), kwargs=None):
        if called is torch.Tensor.double:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support it.")
        found = super().__torch_function__(called, types, args, kwargs or {})
        return found.as_subclass(torch.Tensor) if called is torch.Tensor.cpu else found


def test_a_gpu_without_double_precision_is_sampled_from_as_any_other():
    rows = torch.randn(3, 50, generator=torch.Generator().manual_seed(5))
    samplers = [[Sampler(SamplingParams(temperature=1.0, seed=n)) for n in range(3)] for _ in range(2)]
    there, here = (choose(each, own) for each, own in zip((rows.as_subclass(OnAnApple), rows), samplers, strict=True))
    assert [each.token for each in there] == [each.token for each in here]


REFUSED = {
    "max_tokens": [0, -1, 1.5, "7", True, None],
    "temperature": [-0.1, 101, math.nan, math.inf, "warm", None],
    "top_p": [-0.5, 1.01, math.nan, "all"],
    "top_k": [-1, 2.5, "many"],
    "frequency_penalty": [-2.1, 2.1, math.nan],
    "presence_penalty": [-2.1, 2.1, "none"],
    "logprobs": [-1, 21, 1.5, True],
    "seed": [1.5, "lucky", True],
    "logit_bias": [[1, 2], {1: 101}, {1: math.nan}, {"x": 1}, {-1: 1}, {1.5: 1}, {1: "up"}],
    "stop": ["", ["a", ""], [1], [None], 5, b"a", {"a": 1}],
    "grammar": ["[a-z]+", {"type": "object"}],
}
ACCEPTED = {
    "max_tokens": [1, 10**9],
    "temperature": [0, 0.0, 1, 100],
    "top_p": [0, 1e-9, 1],
    "top_k": [0, 10**6],
    "frequency_penalty": [-2, 2],
    "presence_penalty": [-2, 2],
    "logprobs": [None, 0, 20],
    "seed": [None, 0, -5, 2**70],
    "logit_bias": [{}, {1: -100}, {"1": 100}],
    "stop": [(), "a", ["a"], ("a", "b")],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_a_setting_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(RequestError, match=f"^{name}"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in ACCEPTED.items() for value in values])
def test_the_limits_themselves_are_accepted_and_serve(name, value):
    params = SamplingParams(**{"temperature": 0.7, name: value})
    assert 0 <= Sampler(params).pick(LOGITS)[0] < 5


def test_the_message_gives_value_and_limits():
    with pytest.raises(RequestError, match=r"^temperature is 200; use a number of at least 0 and at most 100\.$"):
        SamplingParams(temperature=200)
    with pytest.raises(RequestError, match=r"^top_p is -1; use a number of at least 0 and at most 1\.$"):
        SamplingParams(top_p=-1)
    with pytest.raises(RequestError, match=r"^max_tokens is 1\.5; use a whole number of at least 1\.$"):
        SamplingParams(max_tokens=1.5)


@pytest.mark.parametrize("top_p", [0, 0.0, 1e-9])
def test_a_top_p_of_nothing_leaves_the_most_probable_token(top_p):
    assert set(draw(50, top_p=top_p)) == set(draw(50, top_p=top_p, temperature=100)) == {1}
    equal = torch.tensor([0.0, 2.0, 2.0, 1.0])
    assert set(draw(50, logits=equal, top_p=top_p)) == {1}


def test_a_thousand_stops_are_accepted_and_one_more_is_not():
    assert len(SamplingParams(stop=[f"s{n}" for n in range(MAX_STOPS)]).stops) == 1000
    with pytest.raises(RequestError, match="the number of stop strings is 1001"):
        SamplingParams(stop=[f"s{n}" for n in range(MAX_STOPS + 1)])


def test_draws_follow_the_softmax_at_the_temperature():
    for temperature in (0.5, 1.0, 2.0):
        counts = torch.bincount(torch.tensor(draw(4000, temperature=temperature)), minlength=5) / 4000
        torch.testing.assert_close(counts, (LOGITS / temperature).softmax(0), atol=0.03, rtol=0)


def test_a_temperature_close_to_zero_is_greedy_and_does_not_overflow():
    assert set(draw(50, temperature=1e-30)) == {1}
    assert set(draw(50, logits=LOGITS * 1e30, temperature=1e-3)) == {1}


def test_top_k_leaves_the_k_best():
    assert set(draw(top_k=2)) == {1, 2}
    assert set(draw(top_k=1)) == {1}
    assert set(draw(top_k=50)) == set(range(5))


def test_of_equally_probable_tokens_the_first_ones_are_left_as_a_greedy_choice_takes_them():
    """Half-precision logits are often equal."""
    equal = torch.tensor([1.0, 3.0, 3.0, 3.0, 0.0] * 40)
    assert set(draw(60, logits=equal, top_k=1)) == {1} == {int(equal.argmax())}
    assert set(draw(60, logits=equal, top_p=1e-9)) == {1}
    assert set(draw(200, logits=equal, top_k=3)) == {1, 2, 3}


def test_stop_strings_that_can_be_read_only_once_are_kept():
    params = SamplingParams(stop=(text for text in ("a", "b")))
    assert params.stops == params.stops == ("a", "b")


def test_alternatives_that_are_forbidden_are_none():
    logprobs = torch.tensor([0.0, -math.inf, -math.inf])
    said = describe(torch.tensor([0]), logprobs[None], [2])[0].described(str)
    assert len(said.top) == 1 and said.top[0][1] == 0.0


def test_top_p_leaves_the_smallest_set_that_reaches_p():
    probabilities = LOGITS.softmax(0)
    assert set(draw(top_p=float(probabilities[1]) - 0.01)) == {1}
    assert set(draw(top_p=float(probabilities[1]) + 0.01)) == {1, 2}
    assert set(draw(top_p=1e-9)) == {1}


def test_top_p_counts_what_top_k_left():
    left = LOGITS[[1, 2]].softmax(0)
    assert set(draw(top_k=2, top_p=float(left[0]) - 0.01)) == {1}
    assert set(draw(top_k=2, top_p=float(left[0]) + 0.01)) == {1, 2}


def test_a_seed_makes_draws_repeatable_and_every_choice_its_own():
    assert draw(50, seed=7) == draw(50, seed=7) != draw(50, seed=8)
    first, second = (Sampler(SamplingParams(temperature=1.0, seed=7), choice) for choice in (0, 1))
    assert [first.pick(LOGITS)[0] for _ in range(50)] != [second.pick(LOGITS)[0] for _ in range(50)]
    assert draw(50, seed=None) != draw(50, seed=None)


def test_draws_neither_read_nor_move_the_global_random_numbers():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = draw(20)
    assert torch.equal(torch.rand(2), expected)
    torch.manual_seed(99)
    assert draw(20) == first


def written(count, **params):
    sampler, tokens = Sampler(SamplingParams(**params)), []
    for _ in range(count):
        tokens.append(sampler.pick(LOGITS)[0])
        sampler.took(tokens[-1])
    return tokens


def test_penalties_fall_on_what_was_already_written():
    assert written(7, frequency_penalty=0.7) == [1, 1, 2, 1, 2, 0, 1]
    assert written(5, presence_penalty=1.5) == [1, 2, 1, 1, 1]
    assert written(3, frequency_penalty=-2.0, logit_bias={2: 1.5}) == [2, 2, 2]


def test_a_bias_moves_a_token_and_the_caller_s_logits_stay_as_they_are():
    logits = LOGITS.clone()
    assert Sampler(SamplingParams(logit_bias={3: 100})).pick(logits)[0] == 3
    assert Sampler(SamplingParams(logit_bias={"1": -100})).pick(logits)[0] == 2
    sampler = Sampler(SamplingParams(frequency_penalty=2.0))
    sampler.took(sampler.pick(logits)[0])
    sampler.pick(logits)
    assert torch.equal(logits, LOGITS)


def test_a_bias_for_a_token_that_does_not_exist_is_refused_by_number():
    with pytest.raises(RequestError, match="logit_bias names token 5; use ids from 0 to 4"):
        Sampler(SamplingParams(logit_bias={5: 1})).pick(LOGITS)


def test_log_probabilities_are_those_of_the_whole_vocabulary_before_temperature():
    _, logprobs = Sampler(SamplingParams(temperature=0.3, top_k=1, seed=0)).pick(LOGITS)
    torch.testing.assert_close(logprobs, LOGITS.log_softmax(0))
    assert float(logprobs.exp().sum()) == pytest.approx(1)


def test_a_choice_is_described_with_its_alternatives_best_first():
    logprobs = torch.randn(1000, generator=torch.Generator().manual_seed(0)).log_softmax(0)
    said = describe(torch.tensor([40]), logprobs[None], [3])[0].described(str)
    assert (said.token_id, said.token) == (40, "40")
    assert said.logprob == pytest.approx(float(logprobs[40]))
    best = logprobs.topk(3)
    assert said.top == tuple((str(i), v) for v, i in zip(best.values.tolist(), best.indices.tolist(), strict=True))
    assert describe(torch.tensor([40]), logprobs[None], [0])[0].best == []


def by_sorting(probabilities, top_p):
    """What is left of probabilities, as a stable sort of all of them says."""
    ordered, places = probabilities.sort(descending=True, stable=True)
    beyond = ordered.cumsum(0) - ordered >= top_p * ordered.sum()
    beyond[0] = False
    left = probabilities.clone()
    left[places[beyond]] = 0.0
    return left


@pytest.mark.parametrize("top_p", [0.0, 1e-9, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["peaked", "flat", "equal", "coarse", "one"])
def test_top_p_leaves_what_sorting_a_whole_vocabulary_would(top_p, kind):
    noise = torch.randn(5000, generator=torch.Generator().manual_seed(3))
    logits = {"peaked": 9 * noise, "flat": noise / 9, "equal": 0 * noise, "coarse": noise.round(), "one": noise[:1]}
    probabilities = logits[kind].softmax(-1)
    assert torch.equal(_best(probabilities, _nucleus(probabilities, top_p)), by_sorting(probabilities, top_p))


def test_top_p_sorts_a_large_vocabulary_only_where_it_must():
    sorted_of = []

    class Sorts(TorchFunctionMode):
        def __torch_function__(self, called, types, args=(), kwargs=None):
            if called in (torch.Tensor.topk, torch.Tensor.sort):
                sorted_of.append(args[1] if called is torch.Tensor.topk else len(args[0]))
            return called(*args, **kwargs or {})

    logits = 5 * torch.randn(150_000, generator=torch.Generator().manual_seed(3))
    with Sorts():
        draw(1, logits=logits, top_p=0.9)
    assert sorted_of and max(sorted_of) <= 1024


@pytest.mark.parametrize("name", ["temperature", "top_p", "frequency_penalty", "logprobs"])
def test_a_number_beyond_all_floats_is_refused_as_any_other(name):
    for value in (10**400, -(10**5000)):
        with pytest.raises(RequestError, match=f"^{name} is a number of more than 60 digits; use"):
            SamplingParams(**{name: value})
