"""The promises, on every supported family."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT, QUESTION, ZERO_SHOT
from reference import full_context_answer, full_context_logits

from cribsheet import CompressedKnowledgeLLM, load_sheet, save_sheet
from cribsheet.attention.cache import prefix_cache
from cribsheet.attention.rope import move
from cribsheet.build import build_sheet
from cribsheet.compress.loop import nothing_read
from cribsheet.engine.request import Delta, Request
from cribsheet.engine.sampling import SamplingParams
from cribsheet.model.backbone import Backbone
from cribsheet.prompt.template import ChatLayout


def whole_prompt(backbone: Backbone, task=FEW_SHOT, resident=False) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of the corpus part and of the question part, as one rendered prompt would have them."""
    layout = ChatLayout(backbone.tokenizer)
    left = layout.preamble(task.instruction) + "\n\n".join(document.text for document in DOCUMENTS) + "\n\n"
    question = layout.question([{"role": "user", "content": QUESTION}], task, resident)
    guide = layout.guide(task).resident if resident else ""
    whole = layout._render([{"role": "user", "content": left[len(layout.preamble("")) :] + QUESTION}])
    if not resident:
        assert whole == left + question
    return layout.encoder.left(left)[0], layout.encoder.after(guide + question)


@pytest.mark.parametrize("chunk_tokens", [0, 37])
@pytest.mark.parametrize("scorer", ["task", "recent"])
def test_a_sheet_that_keeps_everything_answers_as_the_full_context_does(family, chunk_tokens, scorer):
    kb = CompressedKnowledgeLLM.build(
        DOCUMENTS, FEW_SHOT, model=family, rate=1, chunk_tokens=chunk_tokens, scorer=scorer
    )
    corpus, question = whole_prompt(family)
    assert kb.sheet.tokens == len(corpus)
    cache = prefix_cache(kb.prefix.layers, kb.prefix.tokens)
    positions = torch.arange(len(corpus), len(corpus) + len(question)).unsqueeze(0)
    logits = family.step(question.unsqueeze(0), positions, cache, keep=len(question))[0]
    expected = full_context_logits(family, torch.cat([corpus, question]))[len(corpus) :]
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-3)
    answer = full_context_answer(family, torch.cat([corpus, question]), 12)
    assert kb.ask(QUESTION, max_tokens=12).text == family.tokenizer.decode(answer, skip_special_tokens=True).lstrip(" ")


def test_all_of_the_corpus_recalled_and_nothing_read_is_the_full_context(family):
    """Over no sheet at all: every layer's keys and values come from the archive, those of sliding windows too."""
    kb = CompressedKnowledgeLLM.build(
        DOCUMENTS, FEW_SHOT, model=family, rate=4, guide="dropped", scorer="recent", chunk_tokens=0, archive="float32"
    )
    corpus, question = whole_prompt(family)
    recalled = kb.desk.take([(0, 100), (100, kb.sheet.archive.tokens)])
    assert recalled.tokens == len(corpus)
    told, end = [], threading.Event()

    def hear(event):
        told.append(event)
        if not isinstance(event, Delta):
            end.set()

    params = SamplingParams(max_tokens=12)
    kb.session.loaded.engine.submit(Request(kb.session.nothing, question, params, hear, ahead=recalled))
    assert end.wait(60)
    answer = full_context_answer(family, torch.cat([corpus, question]), 12)
    said = "".join(each.text for each in told if isinstance(each, Delta))
    assert said == family.tokenizer.decode(answer, skip_special_tokens=True).lstrip(" ")
    cache = prefix_cache(kb.session.nothing.layers, 0)
    for layer, (keys, values) in zip(cache.layers, recalled.placed(0), strict=True):
        layer.update(keys.unsqueeze(0), values.unsqueeze(0))
    positions = torch.arange(len(corpus), len(corpus) + len(question)).unsqueeze(0)
    logits = family.step(question.unsqueeze(0), positions, cache, keep=len(question))[0]
    expected = full_context_logits(family, torch.cat([corpus, question]))[len(corpus) :]
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-3)


def test_moving_keys_equals_rotating_them_there_in_the_first_place(family):
    ids = torch.arange(10, 42)
    here, there = (family.read(nothing_read(family), start, ids, ids[:0]) for start in (0, 1000))
    for layer, inv_freq in enumerate(family.inv_freqs):
        moved = move(here[layer].chunk_keys, torch.arange(32), torch.arange(1000, 1032), inv_freq)
        if len(inv_freq):
            assert (here[layer].chunk_keys - there[layer].chunk_keys).abs().max() > 0.1
        torch.testing.assert_close(moved, there[layer].chunk_keys, atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "int4"])
def test_save_then_load_is_bit_equal(family, tmp_path, dtype):
    sheet = build_sheet(family, DOCUMENTS, FEW_SHOT, rate=2, guide="resident", dtype=dtype)
    loaded = load_sheet(save_sheet(sheet, tmp_path / "staff.sheet"))
    assert loaded.manifest == sheet.manifest
    assert loaded.texts == tuple(sheet.texts)
    assert torch.equal(loaded.indices, sheet.indices) and torch.equal(loaded.origins, sheet.origins)
    for mine, theirs in zip(sheet.layers, loaded.layers, strict=True):
        assert str(theirs.keys.dtype) == f"torch.{dtype.replace('int4', 'uint8')}"
        assert mine.tensors().keys() == theirs.tensors().keys()
        assert all(torch.equal(tensor, theirs.tensors()[name]) for name, tensor in mine.tensors().items())


@pytest.mark.parametrize("guide", ["resident", "dropped"])
def test_building_twice_and_asking_twice_gives_the_same(family, guide):
    sheets = [build_sheet(family, DOCUMENTS, FEW_SHOT, rate=2, guide=guide, chunk_tokens=50) for _ in range(2)]
    for first, second in zip(sheets[0].layers, sheets[1].layers, strict=True):
        assert torch.equal(first.keys, second.keys)
    kb = CompressedKnowledgeLLM(family, sheets[0])
    first = kb.ask(QUESTION, max_tokens=16)
    assert first.text == kb.ask(QUESTION, max_tokens=16).text
    assert first.usage.completion_tokens > 0


def test_questions_never_see_each_other_and_a_batch_equals_one_by_one(family):
    kb = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=family, rate=3)
    questions = [
        f"Where does {name} live?{' Say it slowly.' * n}" for n, name in enumerate(["Alice", "Bob", "Clara", "Hugo"])
    ]
    alone = [kb.ask(question, max_tokens=24, logprobs=0) for question in questions]
    together = {}
    threads = [
        threading.Thread(target=lambda n=n: together.update({n: kb.ask(questions[n], max_tokens=24, logprobs=0)}))
        for n in range(len(questions))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, expected in enumerate(alone):
        assert together[number].text == expected.text
        got, wanted = ([token.logprob for token in answer.logprobs] for answer in (together[number], expected))
        assert got == pytest.approx(wanted, abs=1e-3)
    assert len({answer.logprobs[0].logprob for answer in alone}) == len(questions)


def test_streamed_equals_whole_and_async_equals_sync(family):
    kb = CompressedKnowledgeLLM.build(DOCUMENTS, ZERO_SHOT, model=family, rate=2)
    whole = kb.ask(QUESTION, max_tokens=24)
    stream = kb.stream(QUESTION, max_tokens=24)
    pieces = list(stream)
    assert "".join(pieces) == whole.text and len(pieces) > 1
    assert stream.answer.usage == whole.usage
    assert asyncio.run(kb.aask(QUESTION, max_tokens=24)).text == whole.text


def test_a_prefix_is_never_written_to(family):
    kb = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=family, rate=2, guide="resident")
    before = [(layer.keys.clone(), layer.values.clone()) for layer in kb.prefix.layers]
    conversation = kb.conversation()
    for question in (QUESTION, "And Bob?", "And Clara?"):
        conversation.ask(question, max_tokens=20)
    for (keys, values), layer in zip(before, kb.prefix.layers, strict=True):
        assert torch.equal(keys, layer.keys) and torch.equal(values, layer.values)


def test_building_leaves_the_model_as_it_was(family):
    corpus, question = whole_prompt(family)
    ids = torch.cat([corpus, question])
    before_logits, before_answer = full_context_logits(family, ids), full_context_answer(family, ids, 8)
    state = {name: weight.clone() for name, weight in family.model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in family.model.named_modules()}
    attention = family.config._attn_implementation
    CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=family, rate=4).ask(QUESTION, max_tokens=4)
    assert family.config._attn_implementation == attention
    assert {name: set(vars(module)) for name, module in family.model.named_modules()} == attributes
    assert all(torch.equal(weight, state[name]) for name, weight in family.model.state_dict().items())
    assert torch.equal(full_context_logits(family, ids), before_logits)
    assert full_context_answer(family, ids, 8) == before_answer
