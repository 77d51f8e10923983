"""`CompressedKnowledgeLLM` as its users meet it: ask, stream, chat, cancel, many at once."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT, QUESTION, ZERO_SHOT
from reference import full_context_answer

from cribsheet import Answer, CompressedKnowledgeLLM
from cribsheet.engine.pool import LoadedModel
from cribsheet.errors import CribsheetError, EngineError, ModelError, RequestError
from cribsheet.model.backbone import Backbone
from cribsheet.prompt.encoder import Encoder
from cribsheet.testing import echo_backbone, save_tiny_model, tiny_backbone


@pytest.fixture(scope="module")
def kb():
    return CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=tiny_backbone(), rate=3, guide="dropped")


def running(kb):
    engine = kb.session.loaded.engine
    return sum(len(batch.running) for batch in engine._batches) + len(engine._waiting)


def settle(kb, seconds=5.0):
    """Wait until the engine has nothing left to do."""
    deadline = time.monotonic() + seconds
    while running(kb) and time.monotonic() < deadline:
        time.sleep(0.002)
    assert running(kb) == 0


def test_a_prepared_question_is_asked_once_by_any_form(kb):
    expected = kb.ask(QUESTION, max_tokens=7).text
    assert kb.ask(kb.prepare(QUESTION, max_tokens=7)).text == expected
    assert asyncio.run(kb.aask(kb.prepare(QUESTION, max_tokens=7))).text == expected
    prepared = kb.prepare(QUESTION, max_tokens=7)
    with pytest.raises(RequestError, match="so max_tokens can no longer be set"):
        kb.ask(prepared, max_tokens=3)
    assert list(kb.stream(prepared))
    with pytest.raises(RequestError, match="asked already"):
        kb.ask(prepared)


def test_of_many_who_ask_one_prepared_question_at_once_one_is_answered(kb):
    prepared, results = kb.prepare(QUESTION, max_tokens=4), []

    def ask():
        try:
            results.append(kb.ask(prepared).text)
        except RequestError as error:
            results.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join(20) for thread in threads]
    expected = kb.ask(QUESTION, max_tokens=4).text
    assert results.count(expected) == 1
    assert sum("asked already" in result for result in results) == 7


def test_a_sheet_that_takes_another_s_place_leaves_running_answers_theirs_and_closing_ends_them_all():
    kb = CompressedKnowledgeLLM.build(DOCUMENTS[:2], ZERO_SHOT, model=tiny_backbone(), rate=2, mode="independent")
    before, stream = kb.session, kb.stream(QUESTION, max_tokens=3000)
    next(stream)
    kb.extend(DOCUMENTS[2:])
    assert kb.session is not before and kb.session.running is before.running
    assert kb.prefix.tokens == kb.sheet.length > before.prefix.tokens
    kb.close()
    assert "".join(stream) and stream.answer.finish_reason == "cancelled"
    assert stream.answer.usage.cached_tokens == before.sheet.length
    for session in (before, kb.session):
        with pytest.raises(EngineError, match="This sheet is closed"):
            session.prefix_for(())
    assert before.loaded.engine.closed


def test_an_answer_says_how_it_came_about(kb):
    answer = kb.ask(QUESTION, max_tokens=7)
    assert isinstance(answer, Answer) and str(answer) == answer.text != ""
    assert answer.finish_reason == "length"
    asked = len(kb.question_tokens(QUESTION))
    usage = answer.usage
    assert (usage.cached_tokens, usage.prompt_tokens) == (kb.sheet.length, kb.sheet.length + asked)
    assert usage.completion_tokens == 7 and usage.total_tokens == kb.sheet.length + asked + 7
    assert 0 < answer.first_token_seconds <= answer.seconds
    assert answer.logprobs is None


def test_the_longest_answer_is_what_was_asked_or_what_the_window_leaves():
    small = tiny_backbone(max_position_embeddings=220)
    kb = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=small, rate=3, guide="dropped", scorer="task")
    left = kb.room - len(kb.question_tokens(QUESTION))
    assert kb.room == 220 - kb.sheet.length
    answer = kb.ask(QUESTION, max_tokens=10_000)
    assert answer.finish_reason == "length" and answer.usage.completion_tokens == left
    assert answer.usage.total_tokens == 220


def test_a_question_longer_than_the_window_left_is_refused_with_all_its_numbers(kb):
    with pytest.raises(RequestError) as refused:
        kb.ask("Where? " * 4000)
    asked = len(kb.question_tokens("Where? " * 4000))
    assert str(refused.value) == (
        f"The question takes {asked} tokens, but the model's window of 4096 leaves {kb.room} for question and answer "
        f"beside the sheet of {kb.sheet.length}; ask a shorter question or raise the rate."
    )


@pytest.mark.parametrize("word", ["Where? ", "a", "\n", "日本", "🎻 "])
def test_what_cannot_fit_by_far_is_refused_after_little_of_it_is_in_tokens(kb, monkeypatch, word):
    read, encode = [], Encoder._encode

    def counting(self, text):
        read.append(len(text))
        return encode(self, text)

    monkeypatch.setattr(Encoder, "_encode", counting)
    with pytest.raises(RequestError, match=f"takes at least {kb.room + 1} tokens, but the model's window of 4096"):
        kb.ask(f"Where?{word * 500_000}?")
    assert sum(read) < 200_000
    with pytest.raises(RequestError, match="takes at least"):
        kb.sources(f"Where?{word * 500_000}?", "Rome.")
    assert kb.count_tokens("Where? " * 20_000) > 20_000


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("", "The question is empty; ask something"),
        (" \n\t", "The question is empty"),
        ([], "The question is empty"),
        ([{"role": "user", "content": "  "}], "The question is empty"),
        ([{"role": "user"}], "give a mapping with the texts 'role' and 'content'"),
        ([{"content": "Where?"}], "give a mapping with the texts 'role' and 'content'"),
        ([{"role": "user", "content": None}], "The question is empty"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "the model reads text only"),
        (["Where?"], "give a mapping with the texts"),
        (
            [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Oslo."}],
            "The last turn is the assistant's",
        ),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(kb, question, message):
    with pytest.raises(RequestError, match=message):
        kb.ask(question)


def test_unknown_settings_are_refused_by_name_with_those_that_exist(kb):
    with pytest.raises(RequestError, match=r"Unknown sampling settings beams, tempreature; use .*temperature"):
        kb.ask(QUESTION, tempreature=1, beams=2)


@pytest.mark.parametrize(
    "settings", [{"seed": "lucky"}, {"top_k": 1.5}, {"logit_bias": [1]}, {"stop": [""]}, {"max_tokens": 0}]
)
def test_bad_settings_are_refused_before_they_are_queued(kb, settings):
    with pytest.raises(RequestError):
        kb.ask(QUESTION, **{"temperature": 1.0, **settings})
    assert kb.ask(QUESTION, max_tokens=2).usage.completion_tokens == 2


def test_a_timeout_is_an_error_and_the_next_question_is_answered(kb):
    with pytest.raises(EngineError, match=r"timeout=0\.0001 seconds"):
        kb.ask(QUESTION, max_tokens=3000, timeout=0.0001)
    for timeout in (0, -1, "soon", float("nan")):
        with pytest.raises(RequestError, match=f"timeout is {timeout!r}"):
            kb.ask(QUESTION, timeout=timeout)
    assert kb.ask(QUESTION, max_tokens=3, timeout=600).usage.completion_tokens == 3


def test_tokens_are_counted_as_they_are_read(kb):
    counted = kb.count_tokens(QUESTION)
    assert kb.ask(QUESTION, max_tokens=1).usage.prompt_tokens == counted + kb.sheet.length
    assert kb.count_tokens(QUESTION, tools=[{"name": "clock"}]) > counted


def test_a_setting_of_none_is_a_setting_not_given(kb):
    asked = {"stop": None, "temperature": None, "max_tokens": 9, "seed": None, "logit_bias": None}
    assert kb.ask(QUESTION, **asked).text == kb.ask(QUESTION, max_tokens=9).text


def test_stop_strings_are_trimmed_whole_and_streamed(kb):
    whole = kb.ask(QUESTION, max_tokens=30).text
    assert len(whole) > 12
    stop = whole[7:10]
    answer = kb.ask(QUESTION, max_tokens=30, stop=stop)
    assert answer.text == whole[: whole.index(stop)] and answer.finish_reason == "stop"
    with kb.stream(QUESTION, max_tokens=30, stop=[stop, "never this"]) as stream:
        assert "".join(stream) == answer.text
    thousand = [f"never {number}" for number in range(999)] + [stop]
    assert kb.ask(QUESTION, max_tokens=30, stop=thousand).text == answer.text


def test_log_probabilities_come_with_their_tokens(kb):
    answer = kb.ask(QUESTION, max_tokens=10, logprobs=3)
    assert len(answer.logprobs) == answer.usage.completion_tokens == 10
    assert all(len(said.top) == 3 and said.logprob == said.top[0][1] <= 0 for said in answer.logprobs)
    ids = torch.tensor([said.token_id for said in answer.logprobs])
    assert kb.backbone.tokenizer.decode(ids, skip_special_tokens=True).lstrip(" ") == answer.text
    sampled = kb.ask(QUESTION, max_tokens=10, logprobs=0, temperature=1.0, seed=1)
    assert len(sampled.logprobs) == sampled.usage.completion_tokens > 0 and all(
        said.top == () for said in sampled.logprobs
    )


def test_a_seed_repeats_an_answer_alone_and_in_company(kb):
    settings = {"max_tokens": 20, "temperature": 1.2, "top_p": 0.9, "top_k": 50}
    alone = {seed: kb.ask(QUESTION, seed=seed, **settings).text for seed in range(6)}
    assert len(set(alone.values())) > 3
    together = {}
    threads = [
        threading.Thread(target=lambda s=seed: together.update({s: kb.ask(QUESTION, seed=s, **settings).text}))
        for seed in alone
    ]
    threads += [threading.Thread(target=lambda: kb.ask("Clara?", max_tokens=30)) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert together == alone


def test_a_stream_has_no_empty_pieces_and_its_answer_only_at_its_end(kb):
    stream = kb.stream(QUESTION, max_tokens=12)
    with pytest.raises(RequestError, match="The answer is not finished; read the stream to its end first"):
        stream.answer  # noqa: B018
    pieces = list(stream)
    assert all(pieces) and "".join(pieces) == stream.answer.text
    assert list(stream) == []


def test_leaving_a_stream_stops_its_work(kb):
    with kb.stream(QUESTION, max_tokens=3000) as stream:
        next(stream)
    settle(kb)
    assert "".join(stream) is not None and stream.answer.finish_reason == "cancelled"
    assert stream.answer.usage.completion_tokens < 1000


def test_a_stream_that_nobody_holds_any_more_stops_its_work(kb):
    question = kb.stream(QUESTION, max_tokens=3000).question
    gc.collect()
    assert question.cancelled.is_set()
    settle(kb)


def test_a_stream_may_be_closed_by_many_threads_and_twice(kb):
    stream = kb.stream(QUESTION, max_tokens=3000)
    next(stream)
    threads = [threading.Thread(target=stream.close) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    stream.close()
    list(stream)
    assert stream.answer.finish_reason == "cancelled"
    stream.close()
    settle(kb)


def test_closing_wakes_a_reader_in_another_thread(kb):
    stream = kb.stream(QUESTION, max_tokens=3000)
    reader = threading.Thread(target=lambda: list(stream))
    reader.start()
    time.sleep(0.02)
    stream.close()
    reader.join(5)
    assert not reader.is_alive() and stream.answer.finish_reason == "cancelled"


def test_an_error_inside_reaches_the_one_who_asked(kb):
    with pytest.raises(CribsheetError, match="logit_bias names token 5000"):
        kb.ask(QUESTION, logit_bias={5000: 1})
    with pytest.raises(CribsheetError, match="logit_bias names token 5000"):
        asyncio.run(kb.aask(QUESTION, logit_bias={5000: 1}))
    assert kb.ask(QUESTION, max_tokens=2).text


def test_a_conversation_remembers_its_turns(kb):
    conversation = kb.conversation()
    first = conversation.ask("Where does Bob live?", max_tokens=8)
    second = conversation.ask("And Clara?", max_tokens=8)
    turns = [
        {"role": "user", "content": "Where does Bob live?"},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "And Clara?"},
    ]
    assert conversation.messages == [*turns, {"role": "assistant", "content": second.text}]
    assert second.text == kb.ask(turns, max_tokens=8).text
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_a_conversation_goes_on_after_an_answer_of_nothing_and_after_a_call(kb):
    conversation, (end,) = kb.conversation(), kb.backbone.eos_ids
    assert conversation.ask("Anything?", logit_bias={end: 100}).text == ""
    called = conversation.ask("What time is it?", tools=[{"name": "clock"}], tool_choice="any", max_tokens=60)
    assert conversation.ask("And now?", max_tokens=3).usage.completion_tokens == 3
    assert conversation.messages[3]["tool_calls"] == called.tool_calls != ()


@pytest.mark.parametrize("n", [0, -1, 1.5, "2", None])
def test_a_number_of_answers_that_makes_no_sense_is_refused(kb, n):
    with pytest.raises(RequestError, match=f"n is {n!r}; ask for at least 1 answer"):
        kb.ask_many(QUESTION, n)
    with pytest.raises(RequestError, match=f"n is {n!r}; ask for at least 1 answer"):
        asyncio.run(kb.aask_many(QUESTION, n))


def test_answers_side_by_side_are_the_same_in_both_forms_and_end_together(kb):
    settings = {"max_tokens": 12, "temperature": 1.0, "seed": 3}
    answers = [answer.text for answer in kb.ask_many(QUESTION, 3, **settings)]
    assert [answer.text for answer in asyncio.run(kb.aask_many(QUESTION, 3, **settings))] == answers
    assert len(set(answers)) == 3 and answers[0] == kb.ask(QUESTION, **settings).text
    with pytest.raises(EngineError, match=r"timeout=0\.05") as kept:  # keeps what hangs on its traceback
        kb.ask_many(QUESTION, 3, max_tokens=3500, timeout=0.05)
    assert kept.value is not None
    settle(kb)


def test_a_conversation_in_a_task_is_the_same_conversation(kb):
    turns = [{"role": "user", "content": QUESTION}]
    assert asyncio.run(kb.aask(turns, max_tokens=5)).text == kb.ask(turns, max_tokens=5).text


def test_a_question_of_all_but_one_token_of_the_room_is_answered_and_one_more_is_refused():
    small = tiny_backbone(max_position_embeddings=220)
    kb = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=small, rate=3, guide="dropped", scorer="task")
    digits = "7" * (kb.room - kb.count_tokens("7"))
    assert kb.count_tokens(digits) == kb.room - 1
    assert kb.ask(digits).usage.total_tokens == 220
    with pytest.raises(RequestError, match=f"The question takes {kb.room} tokens"):
        kb.ask(digits + "7")


def test_a_conversation_forgets_a_question_that_failed(kb):
    conversation = kb.conversation()
    with pytest.raises(RequestError):
        conversation.ask("Where?", max_tokens=0)
    assert conversation.messages == []


def test_sheets_on_one_model_share_it_and_answer_side_by_side(kb):
    other = CompressedKnowledgeLLM.build(DOCUMENTS[:2], ZERO_SHOT, model=kb.backbone, rate=2)
    assert other.session.loaded is kb.session.loaded
    alone = kb.ask(QUESTION, max_tokens=30).text, other.ask(QUESTION, max_tokens=30).text
    answers = {}
    threads = [
        threading.Thread(target=lambda n=n, x=x: answers.update({n: x.ask(QUESTION, max_tokens=30).text}))
        for n, x in enumerate((kb, other) * 3)
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert [answers[n] for n in range(6)] == list(alone) * 3


def test_sixty_four_callers_with_random_cancels_each_get_their_own_answer(kb):
    """Each question carries its own canary; an answer equals the one to the same question alone."""
    rng = random.Random(0)
    questions = [f"Where is {name}-{number}?" for number, name in enumerate(["Ana", "Bo", "Cy", "Di"] * 4)]
    alone = [kb.ask(question, max_tokens=12).text for question in questions]
    assert len(set(alone)) > 4
    plan = [(rng.randrange(16), rng.random() < 0.3, rng.random() * 0.05) for _ in range(64)]
    wrong = []

    def caller(which, cancels, wait):
        time.sleep(wait)
        stream = kb.stream(questions[which], max_tokens=12)
        got = ""
        for piece in stream:
            got += piece
            if cancels and len(got) > 5:
                stream.close()
        reason = stream.answer.finish_reason
        whole = got == alone[which] if reason != "cancelled" else alone[which].startswith(got)
        if not whole:
            wrong.append((which, got, alone[which]))

    threads = [threading.Thread(target=caller, args=each) for each in plan]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert wrong == [] and not any(thread.is_alive() for thread in threads)
    settle(kb)


@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_threads_and_memory_are_flat_over_many_questions(kb, count):
    def resident():
        pages = Path("/proc/self/statm").read_text().split()[1] if Path("/proc/self/statm").exists() else 0
        return int(pages) * 4096

    def tensors():
        gc.collect()
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    def ask_all(count):
        for start in range(0, count, 25):
            streams = [kb.stream(f"Question {start + n}?", max_tokens=2) for n in range(25)]
            for number, stream in enumerate(streams):
                stream.close() if number % 5 == 0 else list(stream)
        settle(kb)

    ask_all(50)
    threads, held, bytes_held = threading.active_count(), tensors(), resident()
    ask_all(count)
    assert threading.active_count() <= threads
    assert tensors() <= held + 5
    assert resident() <= bytes_held + (16 << 20)


def test_stock_generate_gives_its_own_answer_before_during_and_after(kb):
    backbone, ids = kb.backbone, torch.arange(100, 150)
    before = full_context_answer(backbone, ids, 12)
    with kb.stream(QUESTION, max_tokens=3000) as stream:
        next(stream)
        during = [full_context_answer(backbone, ids, 12) for _ in range(3)]
        assert next(stream)
    settle(kb)
    assert during == [before] * 3 == [full_context_answer(backbone, ids, 12)] * 3
    assert backbone.config._attn_implementation == "sdpa"


def test_a_cancelled_task_stops_its_work(kb):
    async def cancel():
        task = asyncio.create_task(kb.aask(QUESTION, max_tokens=3000))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return running(kb)

    asyncio.run(cancel())
    settle(kb)


def test_an_async_stream_that_is_closed_or_dropped_stops_its_work(kb):
    async def leave():
        stream = kb.astream(QUESTION, max_tokens=3000)
        async for _ in stream:
            break
        await stream.aclose()
        async for _ in stream:
            pass
        assert stream.answer.finish_reason == "cancelled"
        dropped = kb.astream(QUESTION, max_tokens=3000)
        async for _ in dropped:
            break
        question = dropped.question
        del dropped
        gc.collect()
        assert question.cancelled.is_set()

    asyncio.run(leave())
    settle(kb)


def test_a_loop_that_is_gone_is_nobody_s_trouble(kb):
    async def abandon():
        return kb.astream(QUESTION, max_tokens=40)

    stream = asyncio.run(abandon())
    assert kb.ask(QUESTION, max_tokens=3).usage.completion_tokens == 3
    stream.cancel()
    settle(kb)


def test_the_event_loop_goes_on_while_answers_are_written(kb):
    async def both():
        ticks, gaps = 0, []
        task = asyncio.gather(*(kb.aask(f"Question {n}?", max_tokens=60) for n in range(4)))
        last = time.monotonic()
        while not task.done():
            await asyncio.sleep(0.001)
            now = time.monotonic()
            gaps.append(now - last)
            last, ticks = now, ticks + 1
        answers = await task
        return answers, ticks, sorted(gaps)

    answers, ticks, gaps = asyncio.run(both())
    assert [answer.usage.completion_tokens for answer in answers] == [60] * 4
    assert ticks > 20 and gaps[len(gaps) * 9 // 10] < 0.1


def test_asking_in_many_tasks_equals_asking_one_by_one(kb):
    questions = [f"Where is {n}?" for n in range(8)]

    async def together():
        return [answer.text for answer in await asyncio.gather(*(kb.aask(q, max_tokens=10) for q in questions))]

    assert asyncio.run(together()) == [kb.ask(q, max_tokens=10).text for q in questions]


def test_a_sheet_file_is_enough_to_ask_again(tmp_path, kb):
    folder = save_tiny_model(tmp_path / "model")
    built = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=folder, model_options={"device": "cpu"}, rate=3)
    path = built.save(tmp_path / "staff.sheet")
    loaded = CompressedKnowledgeLLM.load(path)
    assert loaded.ask(QUESTION, max_tokens=9).text == built.ask(QUESTION, max_tokens=9).text
    assert loaded.sheet.documents == built.sheet.documents


def test_weights_are_loaded_once_while_somebody_uses_them_and_freed_after(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    first, second = LoadedModel.get(folder, device="cpu"), LoadedModel.get(str(folder), device="cpu")
    assert first is second
    assert LoadedModel.get(folder, device="cpu", dtype="bfloat16") is not first
    assert LoadedModel.get(first) is first and LoadedModel.get(first.backbone).backbone is first.backbone
    gone = weakref.ref(first.backbone)
    del first, second
    gc.collect()
    assert gone() is None


def test_asking_concurrently_for_the_first_time_makes_one_prefix(kb):
    fresh = CompressedKnowledgeLLM(kb.backbone, kb.sheet)
    seen = []
    threads = [threading.Thread(target=lambda: seen.append(fresh.prefix)) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len({id(prefix) for prefix in seen}) == 1


def test_a_float32_sheet_on_the_cpu_is_used_where_it_lies(kb):
    assert kb.prefix.layers[0].keys.data_ptr() == kb.sheet.layers[0].keys.data_ptr()


def test_a_model_is_loaded_once_however_its_options_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr("cribsheet.model.support._best_device", lambda: torch.device("cpu"))
    folder = save_tiny_model(tmp_path / "model")
    first = LoadedModel.get(folder)
    assert LoadedModel.get(folder, device="cpu") is LoadedModel.get(folder, dtype="float32") is first
    assert LoadedModel.get(folder, device=torch.device("cpu"), dtype=torch.float32) is first
    assert LoadedModel.get(str(folder), dtype=None, revision=None) is first
    half = LoadedModel.get(folder, dtype="bfloat16")
    assert LoadedModel.get(folder, dtype=torch.bfloat16) is half is not first


def test_a_backbone_has_one_engine_whether_it_comes_by_name_or_by_hand(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    first = LoadedModel.get(folder)
    assert LoadedModel.get(first.backbone) is first
    backbone = tiny_backbone()
    second = LoadedModel.get(backbone)
    assert LoadedModel.get(backbone) is second is not first


def test_options_for_a_model_that_is_loaded_already_are_refused(kb):
    with pytest.raises(ModelError, match="The model is loaded already, so device, dtype can no longer be set"):
        CompressedKnowledgeLLM.build(
            DOCUMENTS, ZERO_SHOT, model=kb.backbone, model_options={"dtype": "bfloat16", "device": "cpu"}
        )
    with pytest.raises(ModelError, match="so dtype can no longer be set"):
        LoadedModel.get(kb.session.loaded, dtype="float32")


def test_a_thousand_stop_strings_are_taken_whatever_the_template_adds(kb):
    assert kb.session.layout.stop is not None
    stops = [f"never {n}" for n in range(1000)]
    assert kb.ask(QUESTION, max_tokens=5, stop=stops).text == kb.ask(QUESTION, max_tokens=5).text
    with pytest.raises(RequestError, match="the number of stop strings is 1001"):
        kb.ask(QUESTION, stop=[*stops, "x"])


def test_closing_a_sheet_cancels_its_answers_and_leaves_the_model_to_others():
    backbone = tiny_backbone()
    kept = CompressedKnowledgeLLM.build(DOCUMENTS, ZERO_SHOT, model=backbone, rate=2)
    with CompressedKnowledgeLLM(backbone, kept.sheet) as gone:
        stream = gone.stream(QUESTION, max_tokens=3000)
        next(stream)
    list(stream)
    assert stream.answer.finish_reason == "cancelled"
    with pytest.raises(EngineError, match="This sheet is closed; load it again"):
        gone.ask(QUESTION)
    assert kept.ask(QUESTION, max_tokens=3).usage.completion_tokens == 3
    gone.close()
    kept.close()
    assert kept.session.loaded.engine.closed
    again = CompressedKnowledgeLLM(backbone, kept.sheet)
    assert again.ask(QUESTION, max_tokens=3).usage.completion_tokens == 3


def test_two_readers_of_one_stream_share_its_pieces_and_both_see_the_end(kb):
    stream, got = kb.stream(QUESTION, max_tokens=60), []
    readers = [threading.Thread(target=lambda: got.extend(stream)) for _ in range(3)]
    [reader.start() for reader in readers]
    [reader.join(20) for reader in readers]
    assert not any(reader.is_alive() for reader in readers)
    assert sorted("".join(got)) == sorted(stream.answer.text)


def test_the_first_async_question_leaves_the_event_loop_free_while_the_sheet_is_placed(kb, monkeypatch):
    fresh = CompressedKnowledgeLLM(kb.backbone, kb.sheet)
    places = []
    restored = type(kb.sheet.layers[0]).restored

    def watched(self, *args):
        places.append(threading.current_thread() is threading.main_thread())
        return restored(self, *args)

    monkeypatch.setattr(type(kb.sheet.layers[0]), "restored", watched)

    async def ask():
        async with fresh.astream(QUESTION, max_tokens=5) as stream:
            async for _ in stream:
                pass
        return stream.answer.text

    assert asyncio.run(ask()) == kb.ask(QUESTION, max_tokens=5).text
    assert places == [False] * len(kb.sheet.layers)


def test_leaving_an_async_stream_stops_its_work(kb):
    async def leave():
        async with kb.astream(QUESTION, max_tokens=3000) as stream:
            async for _ in stream:
                break
        async for _ in stream:
            pass
        return stream.answer.finish_reason

    assert asyncio.run(leave()) == "cancelled"
    settle(kb)


def test_a_sheet_closed_before_its_first_async_answer_says_so(kb):
    fresh = CompressedKnowledgeLLM(kb.backbone, kb.sheet)

    async def ask():
        stream = fresh.astream(QUESTION)
        fresh.close()
        async for _ in stream:
            pass
        return stream.answer.finish_reason

    try:
        assert asyncio.run(ask()) == "cancelled"
    except EngineError as error:
        assert "This sheet is closed" in str(error)


def base_model(answer):
    """An echo model without a chat template: what leads to the answer is the last token of "Answer:"."""
    echo = echo_backbone(answer)
    tokenizer, weights = echo.tokenizer, echo.model.base_model.embed_tokens.weight
    last = tokenizer("Answer:", add_special_tokens=False)["input_ids"][-1]
    with torch.no_grad():
        weights[last] = weights[tokenizer.convert_tokens_to_ids("<|assistant|>")]
    tokenizer.chat_template = None
    return CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=Backbone(echo.model, tokenizer, name="base"), rate=1)


@pytest.mark.parametrize(
    ("says", "settings", "expected"),
    [
        ("\n\nLisbon is it.\n\nQuestion: Where?", {}, "Lisbon is it."),
        ("\nLisbon is it.\n\nMore", {}, "Lisbon is it."),
        ("Lisbon is it.\n\nMore", {}, "Lisbon is it."),
        ("\n\nLisbon is it.", {"stop": ["bon"]}, "Lis"),
        ("\n\nLisbon is it.", {"stop": ["\n"]}, ""),
        ("\n\nLisbon is it.", {"choices": ["Lisbon", "Oslo"]}, "Lisbon"),
    ],
)
def test_a_model_without_a_chat_template_answers_though_it_begins_with_a_blank_line(says, settings, expected):
    kb = base_model(says)
    answer = kb.ask(QUESTION, max_tokens=20, **settings)
    assert (answer.text, answer.finish_reason) == (expected, "stop")
    with kb.stream(QUESTION, max_tokens=20, **settings) as pieces:
        assert "".join(pieces) == expected and pieces.answer.text == expected


def test_a_model_with_a_chat_template_keeps_the_lines_it_begins_with():
    kb = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=echo_backbone("\n\nLisbon."), rate=1)
    assert kb.ask(QUESTION).text == "\n\nLisbon."
