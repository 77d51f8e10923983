"""One thread answers many questions at once: fair, cancellable, and one caller's trouble is nobody else's."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT, ZERO_SHOT
from reference import full_context_answer, full_context_logits

from cribsheet import CompressedKnowledgeLLM
from cribsheet.attention import agreement
from cribsheet.attention.prefix import Prefix
from cribsheet.engine.engine import _QUANTUM, Engine
from cribsheet.engine.prefill import PIECE, LongPrefill, prefills
from cribsheet.engine.request import Answering, Delta, Finished, Request
from cribsheet.engine.sampling import SamplingParams
from cribsheet.errors import EngineError
from cribsheet.testing import tiny_backbone


@pytest.fixture(scope="module")
def kb():
    return CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=tiny_backbone(), rate=3, scorer="recall")


@pytest.fixture
def engine(kb):
    """An engine of its own, stepped by hand unless `submit` starts its thread."""
    made = Engine(kb.backbone)
    yield made
    made.close()


def ask(kb, question="Where does Bob live?", sink=None, prefix=None, **params):
    """A request whose events are collected in `.events`."""
    events = []
    request = Request(
        prefix or kb.prefix,
        kb.question_tokens(question),
        SamplingParams(**{"max_tokens": 8, **params}),
        sink or events.append,
    )
    return request, events


def text(events):
    return "".join(event.text for event in events if isinstance(event, Delta))


def queue(engine, *requests):
    """Let requests wait without starting the thread, so that a test can step."""
    engine._waiting.extend(requests)


def run(engine):
    steps = 0
    while engine.step():
        steps += 1
        assert steps < 2000
    return steps


def test_an_answer_is_deltas_and_then_its_end(kb, engine):
    request, events = ask(kb)
    queue(engine, request)
    run(engine)
    *deltas, end = events
    assert end == Finished("length", 8) and all(isinstance(delta, Delta) for delta in deltas)
    assert text(events) == kb.ask("Where does Bob live?", max_tokens=8).text


def test_a_batch_of_uneven_questions_equals_each_alone_whoever_joins_or_leaves(kb, engine):
    questions = [("Where does Bob live?", 5), ("Clara?" * 30, 30), ("Hugo", 2), ("Alice and Bob?", 17)]
    alone = [kb.ask(question, max_tokens=tokens).text for question, tokens in questions]
    asked = [ask(kb, question, max_tokens=tokens) for question, tokens in questions]
    for request, _ in asked:  # each joins two steps after the one before
        queue(engine, request)
        engine.step(), engine.step()
    run(engine)
    assert [text(events) for _, events in asked] == alone


def test_sheets_on_one_model_take_turns_token_by_token(kb, engine):
    other = CompressedKnowledgeLLM.build(DOCUMENTS, ZERO_SHOT, model=kb.backbone, rate=2, scorer="recall")
    order = []
    first_events, second_events = [], []
    first, _ = ask(kb, sink=lambda event: (order.append("first"), first_events.append(event)), max_tokens=12)
    second, _ = ask(other, sink=lambda event: (order.append("second"), second_events.append(event)), max_tokens=12)
    queue(engine, first, second)
    run(engine)
    assert text(first_events) == kb.ask("Where does Bob live?", max_tokens=12).text
    assert text(second_events) == other.ask("Where does Bob live?", max_tokens=12).text
    assert "".join("f" if name == "first" else "s" for name in order[:8]).count("fs") >= 3


def test_a_short_answer_does_not_wait_for_a_long_one(kb, engine):
    long, long_events = ask(kb, max_tokens=200)
    short, short_events = ask(kb, "Hugo?", max_tokens=3)
    queue(engine, long)
    for _ in range(5):
        engine.step()
    queue(engine, short)
    for _ in range(3):
        engine.step()
    assert short_events[-1] == Finished("length", 3)
    assert not isinstance(long_events[-1], Finished)
    long.cancel()
    run(engine)


def test_a_cancelled_answer_is_over_at_the_next_token(kb, engine):
    request, events = ask(kb, max_tokens=500)
    queue(engine, request)
    for _ in range(4):
        engine.step()
    before = len(text(events))
    request.cancel()
    assert not engine.step()
    assert isinstance(events[-1], Finished) and events[-1].reason == "cancelled"
    assert events[-1].completion_tokens == 5 and engine._batches == []
    assert len(text(events)) >= before


def test_a_question_that_is_cancelled_while_it_waits_leaves_the_queue_though_all_slots_are_taken(kb):
    engine = Engine(kb.backbone, max_batch=1, max_queue=1)
    running, _ = ask(kb, max_tokens=500)
    waiting, events = ask(kb)
    queue(engine, running)
    engine.step()
    queue(engine, waiting)
    engine.step()
    assert events == []
    waiting.cancel()
    engine.step()
    assert events == [Finished("cancelled", 0)] and not engine._waiting
    running.cancel()
    run(engine)


def test_a_question_cancelled_in_the_middle_of_the_queue_leaves_the_others_waiting(kb):
    engine = Engine(kb.backbone, max_batch=1)
    running, running_events = ask(kb, max_tokens=10)
    waiting = [ask(kb, f"Who is {'x' * n}?", max_tokens=2) for n in range(5)]
    queue(engine, running, *(request for request, _ in waiting))
    engine.step()
    waiting[3][0].cancel()
    engine.step()
    assert waiting[3][1] == [Finished("cancelled", 0)]
    run(engine)
    assert running_events[-1] == Finished("length", 10)
    assert [events[-1].reason for _, events in waiting] == ["length"] * 3 + ["cancelled", "length"]


def test_of_two_that_ask_the_same_the_one_that_is_cancelled_leaves_the_queue(kb):
    engine = Engine(kb.backbone, max_batch=1)
    running, _ = ask(kb, max_tokens=500)
    (first, _), (second, events) = ask(kb), ask(kb)
    queue(engine, running)
    engine.step()
    queue(engine, first, second)
    second.cancel()
    engine.step()
    assert events == [Finished("cancelled", 0)] and [each for each in engine._waiting if each is first]
    running.cancel()
    run(engine)


def test_a_question_whose_time_is_up_is_told_so_whether_it_waits_is_read_or_runs(kb, monkeypatch):
    engine = Engine(kb.backbone, max_batch=2)
    running, running_events = ask(kb, max_tokens=500)
    long, long_events = ask(kb, "Where does Bob live? " * 400, max_tokens=4)
    waiting, waiting_events = ask(kb)
    queue(engine, *(replace(request, timeout=5.0) for request in (running, long, waiting)))
    engine.step()
    assert len(engine._started()) == 2 and any(isinstance(event, Delta) for event in running_events)
    later = SimpleNamespace(monotonic=lambda: time.monotonic() + 10)
    monkeypatch.setattr("cribsheet.engine.request.time", later)
    run(engine)
    for events in (running_events, long_events, waiting_events):
        assert isinstance(events[-1], EngineError) and "timeout=5.0" in str(events[-1])
        assert sum(not isinstance(event, Delta) for event in events) == 1


def test_no_more_than_max_batch_run_at_once_and_the_rest_follow_in_order(kb):
    engine = Engine(kb.backbone, max_batch=2)
    ended = []

    def noting(number):
        return lambda event: ended.append(number) if isinstance(event, Finished) else None

    requests = [ask(kb, sink=noting(n), max_tokens=3 + n % 2)[0] for n in range(7)]
    queue(engine, *requests)
    while engine.step():
        assert sum(len(batch.running) for batch in engine._batches) <= 2
    assert sorted(ended) == list(range(7))
    assert all(abs(place - number) <= 1 for place, number in enumerate(ended))


def test_a_full_queue_refuses_with_its_numbers_and_takes_all_or_none(kb):
    engine = Engine(kb.backbone, max_queue=2)
    engine._thread = threading.current_thread()  # so that submit starts none and nothing is taken
    engine.submit(ask(kb)[0])
    with pytest.raises(EngineError, match="1 questions wait already and at most 2 may; try again later"):
        engine.submit(ask(kb)[0], ask(kb)[0])
    assert len(engine._waiting) == 1
    engine.submit(ask(kb)[0])


def test_a_closed_engine_refuses(kb):
    engine = Engine(kb.backbone)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="The engine is closed; load the model again"):
        engine.submit(ask(kb)[0])


def test_closing_cancels_what_runs_and_what_waits_and_returns_when_all_is_over(kb):
    engine = Engine(kb.backbone, max_batch=2)
    asked = [ask(kb, f"Question {n}?", max_tokens=1000) for n in range(5)]
    engine.submit(*(request for request, _ in asked))
    while not asked[0][1]:
        time.sleep(0.001)
    engine.close()
    for _, events in asked:
        assert events[-1].reason == "cancelled" and events[-1].completion_tokens < 900
    assert engine._thread is None and engine._batches == []


def test_closing_right_after_asking_cancels_also_what_is_being_read(kb):
    for delay in (0, 0.002, 0.005):
        engine = Engine(kb.backbone)
        request, events = ask(kb, max_tokens=2000)
        engine.submit(request)
        time.sleep(delay)
        engine.close()
        assert events[-1].reason == "cancelled" and events[-1].completion_tokens < 500


def test_two_threads_may_close_one_engine(kb):
    for _ in range(5):
        engine = Engine(kb.backbone)
        engine.submit(ask(kb, max_tokens=50)[0])
        failures = []

        def close(engine=engine, failures=failures):
            try:
                engine.close()
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=close) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join(30) for thread in threads]
        assert failures == [] and not any(thread.is_alive() for thread in threads)


class Deaf(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_sink_that_fails_again_and_again_harms_nobody_else(kb, engine, caplog, after):
    heard = []

    def sink(event):
        heard.append(event)
        if len(heard) > after:
            raise Deaf

    broken, _ = ask(kb, sink=sink, max_tokens=20)
    good, events = ask(kb, "Hugo?", max_tokens=20)
    queue(engine, broken, good)
    run(engine)
    assert text(events) == kb.ask("Hugo?", max_tokens=20).text and events[-1] == Finished("length", 20)
    assert len(heard) == after + 2 and isinstance(heard[-1], Deaf)


def test_a_sink_that_fails_on_its_cancellation_harms_nobody_else(kb, engine, caplog):
    def deaf(event):
        raise Deaf

    gone, _ = ask(kb, sink=deaf)
    gone.cancel()
    good, events = ask(kb)
    queue(engine, gone, good)
    run(engine)
    assert events[-1] == Finished("length", 8)
    assert "nobody could be told" in caplog.text


def test_settings_that_fail_inside_reach_their_caller_at_once_and_the_others_go_on(kb, engine):
    bad, bad_events = ask(kb, logit_bias={10**6: 1})
    good, events = ask(kb)
    queue(engine, bad, good)
    engine.step()
    assert "logit_bias names token 1000000" in str(bad_events[0]) and len(bad_events) == 1
    run(engine)
    assert events[-1] == Finished("length", 8)


def test_an_error_in_the_model_reaches_every_caller_in_the_batch_at_once_and_the_engine_goes_on(kb, engine):
    attention, failing = kb.backbone.model.model.layers[1].self_attn, threading.Event()

    def fail(module, args, kwargs):
        if failing.is_set():
            raise FloatingPointError("planted")

    hook = attention.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        asked = [ask(kb, f"Question {n}?", max_tokens=50) for n in range(3)]
        engine.submit(*(request for request, _ in asked))
        while not all(events for _, events in asked):
            time.sleep(0.001)
        failing.set()
        deadline = time.monotonic() + 10
        while not all(isinstance(events[-1], FloatingPointError) for _, events in asked):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        during, during_events = ask(kb)
        engine.submit(during)
        while not during_events:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert isinstance(during_events[0], FloatingPointError)
        failing.clear()
        after, after_events = ask(kb)
        engine.submit(after)
        while not after_events or not isinstance(after_events[-1], Finished):
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        hook.remove()
    assert text(after_events) == kb.ask("Where does Bob live?", max_tokens=8).text
    assert kb.backbone.config._attn_implementation == "sdpa"


def test_an_answer_ends_at_an_end_token_which_is_neither_written_nor_counted(kb, engine):
    end = next(iter(kb.backbone.eos_ids))
    request, events = ask(kb, logit_bias={end: 100})
    queue(engine, request)
    run(engine)
    assert events == [Finished("stop", 0)]


def test_penalties_count_what_the_answer_holds_so_far(kb, engine):
    request, events = ask(kb, max_tokens=30, presence_penalty=2.0, logit_bias={40: 100, 41: 99})
    queue(engine, request)
    run(engine)
    tokens = kb.backbone.tokenizer.decode([40, 41] + [40] * 28)
    assert text(events) == tokens.lstrip(" ")


def test_the_logits_of_every_step_are_those_of_the_whole_context(kb, engine):
    """By their log-probabilities, over a sheet that keeps everything."""
    full = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=kb.backbone, rate=1, scorer="recall")
    request, events = ask(full, prefix=full.prefix, max_tokens=6, logprobs=2)
    queue(engine, request)
    run(engine)
    said = [logprob for event in events if isinstance(event, Delta) for logprob in event.logprobs]
    layout = full.session.layout
    left = layout.preamble(FEW_SHOT.instruction) + "\n\n".join(d.text for d in DOCUMENTS) + "\n\n"
    whole = torch.cat([layout.encoder.left(left)[0], request.question])
    assert [logprob.token_id for logprob in said] == full_context_answer(kb.backbone, whole, 6)
    for logprob in said:
        expected = full_context_logits(kb.backbone, whole)[-1].log_softmax(-1)
        assert logprob.logprob == pytest.approx(float(expected[logprob.token_id]), abs=2e-3)
        assert [value for _, value in logprob.top] == pytest.approx(expected.topk(2).values.tolist(), abs=2e-3)
        whole = torch.cat([whole, torch.tensor([logprob.token_id])])


def test_questions_are_read_in_passes_of_bounded_size_over_one_prefix_each(kb):
    here, there = Prefix([], 0), Prefix([], 0)
    lengths = [1, 400, 1100, 400, 2, 400, 1024]
    asked = [
        Request(prefix, torch.zeros(n, dtype=torch.int64), SamplingParams(), print)
        for n in lengths
        for prefix in (here, there)
    ]
    found = prefills([Answering(each, kb.backbone.tokenizer, frozenset()) for each in asked])
    for prefix in (here, there):
        mine = [prefill for prefill in found if prefill.prefix is prefix]
        sizes = [[sequence.length for sequence in prefill.sequences] for prefill in mine]
        assert sizes == [[1, 2], [400, 400], [400], [1024], [1100]]
        assert [isinstance(prefill, LongPrefill) for prefill in mine] == [max(size) > PIECE for size in sizes]
        short = [size for prefill, size in zip(mine, sizes, strict=True) if not isinstance(prefill, LongPrefill)]
        assert all(len(size) * max(size) <= PIECE for size in short)
        assert all(sequence.request.prefix is prefix for prefill in mine for sequence in prefill.sequences)


def test_many_questions_at_once_do_not_hold_up_running_answers(kb, engine, monkeypatch):
    monkeypatch.setattr("cribsheet.engine.prefill.PIECE", 64)
    running, running_events = ask(kb, max_tokens=20)
    queue(engine, running)
    engine.step()
    others = [ask(kb, max_tokens=2) for _ in range(40)]
    queue(engine, *(request for request, _ in others))
    for _ in range(10):
        before = sum(bool(events) for _, events in others)
        said_before = engine._batches[0].running[0].produced
        engine.step()
        assert sum(bool(events) for _, events in others) - before <= 64 // len(running.question)
        assert engine._batches[0].running[0].produced == said_before + 1
    run(engine)
    assert all(events[-1] == Finished("length", 2) for _, events in others)
    assert running_events[-1] == Finished("length", 20)


def test_an_idle_engine_gives_its_thread_back_and_wakes_up_again(kb, monkeypatch):
    monkeypatch.setattr("cribsheet.engine.engine._IDLE_SECONDS", 0.05)
    engine = Engine(kb.backbone)
    for _ in range(2):
        done = threading.Event()
        request, _ = ask(kb, sink=lambda event, done=done: done.set() if isinstance(event, Finished) else None)
        engine.submit(request)
        thread = engine._thread
        assert done.wait(10) and thread.name == "cribsheet-engine"
        thread.join(5)
        assert not thread.is_alive() and engine._thread is None


def _in_child(kb, results):
    results.put(kb.ask("Where does Bob live?", max_tokens=8).text)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_answers_for_itself_while_its_parent_is_answering(kb):
    expected = kb.ask("Where does Bob live?", max_tokens=8).text
    context = multiprocessing.get_context("fork")
    with kb.stream("Hugo?", max_tokens=3000) as stream:
        next(stream)
        results = context.Queue()
        child = context.Process(target=_in_child, args=(kb, results))
        child.start()
        assert results.get(timeout=60) == expected
        child.join(30)
        assert child.exitcode == 0
        assert next(stream)


def _read_in_child(stream, results):
    try:
        results.put(sum(1 for _ in stream))
    except EngineError as error:
        results.put(str(error))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_that_reads_its_parent_s_answer_is_told_so_and_the_parent_goes_on(kb):
    context = multiprocessing.get_context("fork")
    with kb.stream("Hugo?", max_tokens=3000) as stream:
        next(stream)
        results = context.Queue()
        child = context.Process(target=_read_in_child, args=(stream, results))
        child.start()
        assert "before the process forked" in results.get(timeout=60)
        child.join(30)
        assert child.exitcode == 0
        assert next(stream)


def test_a_special_token_is_a_stop_string_too(kb, engine):
    """It is never written, so it cannot be found in the text."""
    (user,) = kb.backbone.tokenizer.convert_tokens_to_ids(["<|user|>"])
    for stop, end in (((), Finished("length", 6)), (("never this", "<|user|>"), Finished("stop", 0))):
        request, events = ask(kb, max_tokens=6, stop=stop, logit_bias={user: 100})
        queue(engine, request)
        run(engine)
        assert events[-1] == end and text(events) == ""


@pytest.mark.parametrize("slots", [1, 2])
def test_a_short_question_is_answered_while_long_answers_hold_all_slots(kb, slots):
    engine = Engine(kb.backbone, max_batch=slots)
    longs = [ask(kb, f"Tell all, {n}?", max_tokens=4 * _QUANTUM) for n in range(slots + 1)]
    short, short_events = ask(kb, "Hugo?", max_tokens=3)
    queue(engine, *(request for request, _ in longs), short)
    steps = 0
    while not short_events or not isinstance(short_events[-1], Finished):
        assert engine.step() and steps < 3 * _QUANTUM
        assert len(engine._started()) <= slots
        steps += 1
    assert not any(isinstance(event, Finished) for _, events in longs for event in events)
    run(engine)
    for number, (_, events) in enumerate(longs):  # parked and taken up again, token for token as if undisturbed
        assert text(events) == kb.ask(f"Tell all, {number}?", max_tokens=4 * _QUANTUM).text
        assert events[-1] == Finished("length", 4 * _QUANTUM)


def test_long_answers_over_different_sheets_share_a_single_slot(kb):
    other = CompressedKnowledgeLLM.build(DOCUMENTS, ZERO_SHOT, model=kb.backbone, rate=2, scorer="recall")
    engine, order = Engine(kb.backbone, max_batch=1), []
    events = {"first": [], "second": []}

    def noting(name):
        return lambda event: (order.append(name), events[name].append(event))

    queue(
        engine, *(ask(llm, sink=noting(name), max_tokens=200)[0] for name, llm in zip(events, (kb, other), strict=True))
    )
    run(engine)
    turns = [name for at, name in enumerate(order) if at == 0 or order[at - 1] != name]
    assert turns[:4] == ["first", "second"] * 2
    assert text(events["first"]) == kb.ask("Where does Bob live?", max_tokens=200).text
    assert text(events["second"]) == other.ask("Where does Bob live?", max_tokens=200).text


def test_a_parked_answer_keeps_its_seed_and_its_half_written_text(kb):
    engine = Engine(kb.backbone, max_batch=1)
    settings = {"max_tokens": 150, "temperature": 1.0, "seed": 5, "stop": ["never this"]}
    asked = [ask(kb, f"Question {n}?", **settings) for n in range(3)]
    queue(engine, *(request for request, _ in asked))
    run(engine)
    assert [text(events) for _, events in asked] == [kb.ask(f"Question {n}?", **settings).text for n in range(3)]


def test_a_parked_answer_can_be_cancelled_and_a_broken_sink_of_one_harms_nobody(kb, caplog):
    engine = Engine(kb.backbone, max_batch=1)
    first, first_events = ask(kb, max_tokens=500)
    second, second_events = ask(kb, "Hugo?", max_tokens=500)
    queue(engine, first, second)
    while not second_events:
        engine.step()
    assert engine._waiting[0].request is first
    first.cancel()
    engine.step()
    assert first_events[-1].reason == "cancelled" and first_events[-1].completion_tokens >= _QUANTUM
    second.cancel()
    run(engine)


def test_nobody_is_parked_while_nobody_waits(kb):
    engine = Engine(kb.backbone, max_batch=1)
    request, _ = ask(kb, max_tokens=3 * _QUANTUM)
    queue(engine, request)
    engine.step()
    batch = engine._batches[0]
    while engine.step():
        assert engine._batches == [batch] and len(batch.running) == 1


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "smollm3"])
def test_a_long_question_read_in_pieces_is_read_as_in_one_go(family, monkeypatch):
    kb = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=tiny_backbone(family), rate=3, scorer="recall")
    question = "Where does Bob live? " * 20
    whole, whole_events = ask(kb, question, max_tokens=10, logprobs=1)
    pieces, piece_events = ask(kb, question, max_tokens=10, logprobs=1)
    engine = Engine(kb.backbone)
    queue(engine, whole)
    run(engine)
    monkeypatch.setattr("cribsheet.engine.prefill.PIECE", 37)
    queue(engine, pieces)
    assert run(engine) > 10 + len(pieces.question) // 37 - 3  # a piece a step
    assert text(piece_events) == text(whole_events)
    for mine, expected in zip(said(piece_events), said(whole_events), strict=True):
        assert mine.logprob == pytest.approx(expected.logprob, abs=2e-3)


def said(events):
    return [logprob for event in events if isinstance(event, Delta) for logprob in event.logprobs]


def test_a_long_question_does_not_hold_up_running_answers(kb, engine, monkeypatch):
    monkeypatch.setattr("cribsheet.engine.prefill.PIECE", 20)
    running, running_events = ask(kb, max_tokens=30)
    queue(engine, running)
    engine.step()
    long, long_events = ask(kb, "Where does Bob live? " * 60, max_tokens=4)
    queue(engine, long)
    before = running.params.max_tokens
    while not any(isinstance(event, Finished) for event in running_events):
        engine.step()
        before -= 1
    assert before >= 0 and long_events == []
    gone, gone_events = ask(kb, "Where does Bob live? " * 20)
    queue(engine, gone)
    engine.step()
    gone.cancel()
    run(engine)
    assert gone_events == [Finished("cancelled", 0)] and long_events[-1] == Finished("length", 4)


def test_who_finds_out_in_the_background_sees_when_somebody_is_answered(kb, engine, monkeypatch):
    seen, step, over = [], engine.step, threading.Event()

    def watched():
        seen.append(len(agreement._answering))
        if len(seen) == 3:
            raise FloatingPointError("planted")
        return step()

    def sink(event):
        if not isinstance(event, Delta):
            over.set()

    monkeypatch.setattr(engine, "step", watched)
    for _ in range(2):  # the first of them fails
        over.clear()
        engine.submit(ask(kb, sink=sink)[0])
        assert over.wait(60)
    engine.close()
    assert len(seen) > 5 and set(seen) == {1} and not agreement._answering


def test_an_error_comes_to_every_caller_as_an_object_of_its_own(kb, engine):
    def fail(module, args, kwargs):
        raise FloatingPointError("planted")

    asked = [ask(kb, f"Question {n}?") for n in range(3)]
    hook = kb.backbone.model.model.layers[1].self_attn.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        queue(engine, *(request for request, _ in asked))
        engine.step()
    finally:
        hook.remove()
    errors = [events[-1] for _, events in asked]
    assert all(str(error) == "planted" for error in errors) and len({id(error) for error in errors}) == 3


class Ahead:
    """Keys and values of tokens that were read somewhere else."""

    def __init__(self, kb, ids, start):
        layers = kb.backbone.read(kb.prefix.layers, start, ids, ids[:0])
        self.tokens, self.read_at = len(ids), start
        self._layers = [(layer.chunk_keys, layer.chunk_values) for layer in layers]

    def placed(self, start):
        assert start == self.read_at
        return self._layers


@pytest.mark.parametrize("piece", [PIECE, 16])
def test_what_stands_ahead_of_a_question_is_as_if_it_had_been_read_with_it_also_among_others(
    kb, engine, monkeypatch, piece
):
    """In passes of several, in pieces, beside questions that have nothing ahead, and parked."""
    monkeypatch.setattr("cribsheet.engine.prefill.PIECE", piece)
    ids, start = kb.question_tokens("Where do Hugo, Alice and Bob live, and since when do they?"), kb.prefix.tokens
    asked = []
    for cut, begin in ((3, 0), (9, 2), (1, 5), (0, 0), (12, 1)):
        events, whole = [], []
        ahead = Ahead(kb, ids[begin : begin + cut], start) if cut else None
        told = ((0, cut),) if cut else ()
        params, question = SamplingParams(max_tokens=8, logprobs=0), ids[begin + cut :]
        request = Request(kb.prefix, question, params, events.append, evidence=True, ahead=ahead, told=told)
        plain = Request(kb.prefix, ids[begin:], params, whole.append, evidence=True, told=told, lead=cut)
        asked.append((request, events, plain, whole))
    for _, _, plain, _ in asked:
        queue(engine, plain)
        run(engine)
    queue(engine, *(request for request, *_ in asked))
    for _ in range(3):
        engine.step()
    for batch in engine._batches:
        for each in list(batch.running)[:2]:
            batch.park(each)
            engine._waiting.append(each)
    run(engine)
    for _, events, _, whole in asked:
        assert text(events) == text(whole)
        mine, its = (
            [x.logprob for each in told if isinstance(each, Delta) for x in each.logprobs] for told in (events, whole)
        )
        assert mine == pytest.approx(its, abs=1e-4)
        torch.testing.assert_close(events[-1].looked, whole[-1].looked, atol=1e-4, rtol=1e-3)


def test_questions_behind_much_that_was_recalled_are_read_in_passes_of_bounded_size(kb, monkeypatch):
    monkeypatch.setattr("cribsheet.engine.prefill._MOST_BEFORE", 30)
    ids = kb.question_tokens("Where?")
    sizes = [8, 8, 8, 8, 25, 0, 0]
    made = [Ahead(kb, ids[:1].repeat(size), kb.prefix.tokens) if size else None for size in sizes]
    asked = [Request(kb.prefix, ids, SamplingParams(), print, ahead=ahead) for ahead in made]
    passes = prefills([Answering(each, kb.backbone.tokenizer, frozenset()) for each in asked])
    before = [[each.request.before for each in one.sequences] for one in passes]
    assert before == [[0, 0], [8, 8, 8], [8], [25]]


def test_a_small_model_answers_on_one_thread_and_askers_and_sinks_keep_theirs():
    backbone = tiny_backbone()
    kb = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=backbone, rate=3)
    wanted = kb.ask("Where does Bob live?", max_tokens=8).text
    kb.close()
    inside, told = set(), set()
    backbone.model.register_forward_pre_hook(lambda *_: inside.add(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        kb = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=backbone, rate=3)
        inside.clear()
        assert kb.ask("Where does Bob live?", max_tokens=8).text == wanted
        engine = Engine(backbone)
        over = threading.Event()

        def sink(event):
            told.add(torch.get_num_threads())
            if isinstance(event, Finished):
                over.set()

        engine.submit(ask(kb, sink=sink)[0])
        assert over.wait(60)
        engine.close()
        assert inside == {1} and told == {2} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
