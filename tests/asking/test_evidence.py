"""Where an answer looked, traced back to the documents."""

from __future__ import annotations

import asyncio
import queue
from itertools import pairwise

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT, QUESTION
from reference import attention_weights

from cribsheet import CompressedKnowledgeLLM
from cribsheet.asking.evidence import looked_at
from cribsheet.asking.sources import find_sources, of_sheet
from cribsheet.engine import prefill
from cribsheet.engine.request import Finished, Request
from cribsheet.engine.sampling import SamplingParams
from cribsheet.errors import RequestError
from cribsheet.retrieval.retriever import Passage
from cribsheet.testing import tiny_backbone
from cribsheet_bench.evidence import demo_case


@pytest.fixture(scope="module", params=["resident", "dropped"])
def kb(request, tiny):
    return CompressedKnowledgeLLM.build(
        DOCUMENTS, FEW_SHOT, model=tiny, rate=1.3, guide=request.param, allocation="uniform"
    )


ANSWER = "in Quito"


def ids(kb):
    return kb.session.render(QUESTION), kb.session.layout.encoder.plain(ANSWER)


def by_the_formula(kb, prefix, asked, answered):
    """Attention weights of the rows that count, layer by layer, from `reference.attention_weights`."""
    backbone, size = kb.backbone, prefix.tokens
    rows = torch.cat([asked.ids, answered[:-1]])
    read = backbone.read(prefix.layers, size, rows[:0], rows)
    found = []
    for number in backbone.full[len(backbone.full) // 2 :]:
        layer = read[number]
        keys = torch.cat([prefix.layers[number].keys, layer.guide_keys], 1)
        first, last = (asked.places[0][0], asked.places[-1][1]) if asked.places else (0, 0)
        weights = attention_weights(layer.guide_queries, keys, backbone.scale, size + 1)
        weights = torch.cat([weights[..., :size], weights[..., size + first : size + last]], -1)
        question, answer = weights[:, asked.lead : len(asked.ids)].mean(1), weights[:, len(asked.ids) - 1 :].sum(1)
        found.append((3 * question + answer).reshape(backbone.kv_heads, -1, weights.shape[-1]).sum(1))
    return torch.stack(found).float()


def test_what_is_looked_at_is_the_attention_of_question_and_answer_in_the_upper_layers(kb):
    asked, answered = ids(kb)
    found = looked_at(kb.backbone, kb.prefix, asked, answered)
    torch.testing.assert_close(found, by_the_formula(kb, kb.prefix, asked, answered), atol=1e-3, rtol=1e-3)


def test_what_is_looked_at_in_passages_is_the_attention_of_what_is_asked_after_them(kb):
    passages = [Passage("Hugo moved to Lima."), Passage("Bob stayed.")]
    asked, prefix = kb.session.render(QUESTION, passages=passages), kb.session.prefix_for(passages)
    answered = kb.session.layout.encoder.plain(ANSWER)
    texts = [kb.backbone.tokenizer.decode(asked.ids[first:last]).strip() for first, last in asked.places]
    assert texts == ["Hugo moved to Lima.", "Bob stayed."]
    assert len(asked.ids) - asked.lead == kb.count_tokens(QUESTION)
    found = looked_at(kb.backbone, prefix, asked, answered)
    torch.testing.assert_close(found, by_the_formula(kb, prefix, asked, answered), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("piece", [1024, 16], ids=["in one piece", "in pieces"])
@pytest.mark.parametrize("scorer", ["task", "recall"])  # all heads keep equally many tokens, or not
@pytest.mark.parametrize("told", [(), (Passage("Hugo moved to Lima."), Passage("Bob stayed."))], ids=["", "told"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_engine_notes_while_it_writes_what_reading_again_would_find(name, told, piece, scorer, monkeypatch):
    monkeypatch.setattr(prefill, "PIECE", piece)
    kb = CompressedKnowledgeLLM.build(
        DOCUMENTS, FEW_SHOT, model=tiny_backbone(name), rate=1.3, scorer=scorer, guide="resident"
    )
    asked = kb.session.render(QUESTION, passages=told)
    prefix = kb.session.prefix_for(told)
    tokens, looked = answered(kb, prefix, asked)
    torch.testing.assert_close(looked, looked_at(kb.backbone, prefix, asked, tokens), atol=2e-3, rtol=2e-3)


def answered(kb, prefix, asked):
    """Tokens of an answer and what the engine saw it look at, others asking at the same time."""
    streams = [
        kb.stream(text, max_tokens=9, evidence=number != 1) for number, text in enumerate(("Alice?", "Hugo? Oslo?"))
    ]
    events = queue.SimpleQueue()
    params = SamplingParams(max_tokens=6, logprobs=0)
    request = Request(prefix, asked.ids, params, events.put, evidence=True, told=asked.places, lead=asked.lead)
    kb.session.loaded.engine.submit(request)
    tokens = []
    while not isinstance(event := events.get(timeout=60), Finished):
        tokens += [each.token_id for each in event.logprobs]
    for stream in streams:
        list(stream)
    return torch.tensor(tokens), event.looked


def test_an_answer_carries_its_sources_whoever_else_asks_and_however_it_is_asked(kb):
    alone = kb.ask(QUESTION, max_tokens=8, logprobs=0)
    assert len(alone.sources) == 3 and sum(each.weight for each in alone.sources) <= 1 + 1e-6
    bare = kb.ask(QUESTION, max_tokens=8, logprobs=0, evidence=False)
    assert bare.sources == () and bare.text == alone.text and bare.logprobs == alone.logprobs
    streams = [
        kb.stream(text, max_tokens=8, evidence=text != "Bob?") for text in (QUESTION, "Bob?", "Clara Berg?", QUESTION)
    ]
    answers = [("".join(stream), stream.answer)[1] for stream in streams]
    assert answers[1].sources == ()
    for answer in (answers[0], answers[3], asyncio.run(kb.aask(QUESTION, max_tokens=8))):
        assert [each.document_id for each in answer.sources] == [each.document_id for each in alone.sources]
        assert [each.weight for each in answer.sources] == pytest.approx(
            [each.weight for each in alone.sources], abs=1e-3
        )


def test_a_document_counts_by_its_most_attended_token_of_each_head_not_by_its_length(kb):
    looked = torch.zeros(2, *kb.sheet.indices.shape[1:])
    number = kb.sheet.origins[:, 1][kb.sheet.places[-2:]].where(kb.sheet.indices[-2:] >= 0, torch.tensor(-1))
    looked[number == 0] = 0.1  # every token of one document a little
    looked.view(-1)[(number == 3).flatten().nonzero()[0]] = 5.0
    assert [source.document_id for source in find_sources(kb.sheet, looked, 2)] == ["hugo", "alice"]


def test_what_is_looked_at_in_passages_is_not_taken_for_the_sheet_s_where_its_guide_is_read_behind_them(kb):
    told, sheet = [Passage("Hugo moved to Lima."), Passage("Bob stayed.")], kb.sheet
    places, prefix = kb.session.render(QUESTION, passages=told).places, kb.session.prefix_for(told)
    assert prefix.tokens == sheet.length - sheet.manifest.guide_tokens
    looked = torch.zeros(2, sheet.indices.shape[1], prefix.tokens + places[-1][1] - places[0][0])
    looked[1, 0, (sheet.origins[:, 1][sheet.places[-1, 0]] == 2).nonzero()[-1]] = 2.0
    looked[1, 0, prefix.tokens] = 1.0  # the first passage's first token
    looked[0, 0, -1] = 3.0  # the last one's last
    found = find_sources(sheet, looked, passages=told, places=places)
    assert [(each.text, each.weight) for each in found if each.retrieved] == [
        (told[1].text, pytest.approx(0.5)), (told[0].text, pytest.approx(1 / 6))
    ]  # fmt: skip
    assert [(each.document_id, each.weight) for each in found if not each.retrieved] == [
        ("clara", pytest.approx(1 / 3))
    ]
    assert of_sheet(sheet, looked, places).shape[2] == sheet.length


def test_sources_are_documents_in_order_of_weight_with_the_text_around_the_place(kb):
    sources = kb.sources(QUESTION, ANSWER, limit=3)
    texts = {document.id: document.text for document in DOCUMENTS}
    weights = [source.weight for source in sources]
    assert len(sources) == 3 and weights == sorted(weights, reverse=True)
    assert 0 < sum(weights) <= 1 + 1e-6
    for source in sources:
        assert source.text == texts[source.document_id][source.start : source.stop] != ""
        assert source.start == 0 or texts[source.document_id][source.start - 1].isspace()
    assert sum(source.weight for source in kb.sources(QUESTION, ANSWER, limit=99)) == pytest.approx(1, abs=1e-5)


def test_the_place_is_the_most_attended_token_of_its_document(kb):
    looked = torch.full((1, *kb.sheet.indices.shape[1:]), 1e-3)
    kept = kb.sheet.places[-1][kb.sheet.indices[-1] >= 0]
    row = int(kept[kb.sheet.origins[kept, 1] == 3][4])
    looked[(kb.sheet.places[-1:] == row) & (kb.sheet.indices[-1:] >= 0)] = 1.0
    (source,) = find_sources(kb.sheet, looked, 1)
    start, stop = kb.sheet.origins[row, 2:].tolist()
    assert source.document_id == "hugo" and source.start <= start < stop <= source.stop
    assert source.weight > 0.8


def test_an_empty_answer_is_traced_from_the_end_of_the_question(kb):
    assert len(kb.sources(QUESTION, "")) == 3


def test_a_sheet_without_texts_still_names_documents_and_places(kb, tmp_path):
    loaded = CompressedKnowledgeLLM.load(kb.save(tmp_path / "a.sheet", texts=False), model=kb.backbone)
    pairs = zip(loaded.sources(QUESTION, ANSWER), kb.sources(QUESTION, ANSWER), strict=True)
    for bare, full in pairs:
        assert (bare.document_id, bare.text) == (full.document_id, "")
        assert full.start <= bare.start < bare.stop <= full.stop
        assert bare.weight == pytest.approx(full.weight)


def test_passages_grow_around_the_places_that_were_looked_at_and_do_not_overlap(kb):
    text = next(document.text for document in DOCUMENTS if document.id == "hugo")
    (whole,) = [each for each in kb.passages(QUESTION, ANSWER, limit=9) if each.document_id == "hugo"]
    assert (whole.start, whole.stop, whole.text) == (0, len(text), text)
    parts = kb.passages(QUESTION, ANSWER, limit=50, characters=25)
    assert sum(part.weight for part in parts) == pytest.approx(1, abs=1e-5)
    assert [part.weight for part in parts] == sorted((part.weight for part in parts), reverse=True)
    places = sorted((part.document_id, part.start, part.stop) for part in parts)
    assert all(a[0] != b[0] or a[2] <= b[1] for a, b in pairwise(places)) and len(places) > 5
    with pytest.raises(RequestError, match="characters is 0"):
        kb.passages(QUESTION, characters=0)
    with pytest.raises(RequestError, match="leaves"):
        kb.passages("x " * 5000)


def test_every_question_of_the_demo_has_one_document_that_answers_it():
    case = demo_case()
    assert len(case.asked) > 6 and all(len(each.gold) == 1 for each in case.asked)
    assert {name for each in case.asked for name in each.gold} == {document.id for document in case.documents}
