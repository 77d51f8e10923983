"""Where an answer looked, traced back to the documents."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT, QUESTION
from reference import attention_weights

from cribsheet import CompressedKnowledgeLLM
from cribsheet.errors import RequestError
from cribsheet.evidence import attention_per_origin, find_sources


@pytest.fixture(scope="module", params=["resident", "dropped"])
def kb(request, tiny):
    return CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=tiny, rate=1.3, guide=request.param)


ANSWER = "in Quito"


def ids(kb):
    return kb._question_ids(QUESTION), kb._layout.encoder.plain(ANSWER)


def test_mass_is_the_attention_of_the_answer_s_rows_summed_over_layers_and_heads(kb):
    backbone, (asked, answered) = kb.backbone, ids(kb)
    found = attention_per_origin(backbone, kb.prefix, kb.sheet, asked, answered)
    expected = torch.zeros(len(kb.sheet.origins), dtype=torch.float64)
    place = {index: row for row, index in enumerate(kb.sheet.origins[:, 0].tolist())}
    read = backbone.read(kb.prefix.layers, kb.prefix.tokens, asked, answered)
    for number, (layer, prefix) in enumerate(zip(read, kb.prefix.layers, strict=True)):
        keys = torch.cat([prefix.keys, layer.chunk_keys, layer.guide_keys], 1)
        seen = kb.prefix.tokens + len(asked) + 1
        weights = attention_weights(layer.guide_queries, keys, backbone.scale, seen).sum(1)
        for head in range(backbone.num_heads):
            kv_head = head * backbone.kv_heads // backbone.num_heads
            for token, index in enumerate(kb.sheet.indices[number, kv_head].tolist()):
                if index >= 0:
                    expected[place[index]] += weights[head, token]
    torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=1e-3)


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
    mass = torch.full((len(kb.sheet.origins),), 1e-3)
    hugo = [row for row, origin in enumerate(kb.sheet.origins.tolist()) if origin[1] == 3]
    mass[hugo[4]] = 1.0
    (source,) = find_sources(kb.sheet, mass, 1)
    start, stop = kb.sheet.origins[hugo[4], 2:].tolist()
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
