"""What is captured on a GPU computes what is run kernel by kernel; the computations themselves run anywhere."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace

import pytest
import torch

from cribsheet.attention.agreement import finding_out
from cribsheet.attention.cache import PrefixLayer, prefix_cache
from cribsheet.attention.captures import Captures
from cribsheet.attention.prefix import LayerPrefix, Prefix
from cribsheet.attention.recorder import Glance, question_weights
from cribsheet.attention.slots import Rows, SlotLayer, step_cache
from cribsheet.engine.graphs import _has_room, bucket, find_prefill, fixed_step, padded_prefill
from cribsheet.engine.prefill import on_passages
from cribsheet.testing import tiny_backbone

TOKENS = 40


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def backbone(request):
    return tiny_backbone(request.param)


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[(), (TOKENS, 23)], ids=["uniform", "ragged"])
def prefix(request, backbone):
    layers = []
    for number, window in enumerate(backbone.windows):
        own = request.param if window is None else ()
        size = TOKENS if window is None else min(TOKENS, window - 1)
        shape = (sum(own),) if own else (backbone.kv_heads, size)
        keys, values = (random(*shape, backbone.head_size, seed=2 * number + n) for n in range(2))
        layers.append(LayerPrefix(keys, values, window, own))
    return Prefix(layers, TOKENS)


def test_padding_behind_a_question_changes_nothing(backbone, prefix):
    question, weights = torch.arange(20, 29), question_weights(9, 2)
    cache = prefix_cache(prefix.layers, TOKENS)
    glance = Glance(cache.layers, backbone.full, [(0, 0)], [weights])
    positions = torch.arange(TOKENS, TOKENS + 9).unsqueeze(0)
    wanted = backbone.step(question.unsqueeze(0), positions, cache)[:, -1]
    inputs = torch.cat([question, torch.full((7,), 33), torch.tensor([8])])
    padded = torch.cat([weights, torch.zeros(7)])
    logits, mass, found = padded_prefill(backbone, prefix, inputs, padded, evidence=True)
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mass, glance.masses[0], atol=1e-5, rtol=1e-4)
    for mine, other in zip(found, cache.layers, strict=True):
        assert isinstance(mine, PrefixLayer)
        torch.testing.assert_close(mine.keys[:, :, :9], other.keys[:, :, :9], atol=1e-5, rtol=1e-4)


def test_a_step_that_does_not_know_lengths_is_one_that_does(backbone, prefix):
    def layers(rows):
        made = [SlotLayer(layer, TOKENS, rows) for layer in prefix.layers]
        for number, layer in enumerate(made):
            for slot, size in enumerate((5, 11)):
                layer.insert(slot, *(random(backbone.kv_heads, size, backbone.head_size, seed=number) for _ in "kv"))
        return made

    rows = Rows()
    rows.lengths = [5, 11]
    known = layers(rows)
    rows.prepare(backbone.device)
    ids, lengths = torch.tensor([21, 22]), torch.tensor([5, 11])
    glance = Glance(known, backbone.full, [(0, 0)] * 2)
    wanted = backbone.step(ids[:, None], (lengths + TOKENS)[:, None], step_cache(known))[:, -1]
    unknown = layers(free := Rows())
    for layer in unknown:
        layer.reserve(4, 64, layer.keys)
    inputs = torch.zeros(3, 4, dtype=torch.int64)  # two slots that nobody has
    inputs[:, :2] = torch.stack([ids, lengths + TOKENS, lengths])
    inputs[1, 2:] = TOKENS
    logits, masses = fixed_step(backbone, unknown, free, inputs, 64, evidence=True)
    torch.testing.assert_close(logits[:2], wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(masses[:2], glance.masses, atol=1e-5, rtol=1e-4)


def test_nothing_is_captured_on_a_cpu(backbone, prefix):
    question, weights = torch.arange(20, 29), question_weights(9)
    found = [find_prefill(backbone, prefix, question, weights, evidence=True) for _ in range(5)]
    assert found == [None] * 5 and not prefix.prefills


def test_what_cannot_be_captured_is_told_once_and_what_can_is_made_once(caplog):
    captures, made = Captures(), []
    with caplog.at_level(logging.WARNING):
        found = [captures.find("bad", 2, lambda: 1 // 0) for _ in range(5)]
    assert found == [None] * 5 and len(caplog.records) == 1 and not captures
    good = [captures.find("good", 1, lambda: made.append(1) or "it") for _ in range(4)]
    assert good == [None, "it", "it", "it"] and made == [1] and captures


def test_a_step_that_watches_whole_suffixes_sees_on_passages_what_one_that_knows_them_sees(backbone, prefix):
    told, found = [(1, 4), (3, 9)], []
    inputs = torch.tensor([[21, 22], [TOKENS + 5, TOKENS + 11], [5, 11]])
    for whole in (False, True):
        rows = Rows()
        layers = [SlotLayer(layer, TOKENS, rows) for layer in prefix.layers]
        for number, layer in enumerate(layers):
            layer.reserve(2, 64, layer.keys)
            for slot, size in enumerate((5, 11)):
                layer.insert(slot, *(random(backbone.kv_heads, size, backbone.head_size, seed=number) for _ in "kv"))
        if whole:
            logits, masses = fixed_step(backbone, layers, rows, inputs, 64, evidence=True, told=True)
            masses = [on_passages(mass, TOKENS, block) for mass, block in zip(masses, told, strict=True)]
        else:
            rows.fix(inputs[2], 64)
            glance = Glance(layers, backbone.full, told)
            logits = backbone.step(inputs[0, :, None], inputs[1, :, None], step_cache(layers))[:, -1]
            masses = glance.masses
        found.append((logits, masses))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


def test_what_was_captured_of_another_way_is_let_go():
    captures, made = Captures(), []
    for way in (False, False, True, True):
        captures.find("it", 0, lambda way=way: made.append(way) or way, way=way)
    assert made == [False, True] and captures.find("it", 0, lambda: 1 // 0, way=True) is True


def test_nothing_is_captured_while_something_is_found_out():
    captures, held, done = Captures(), threading.Event(), threading.Event()

    def find_out():
        with finding_out:
            held.set()
            done.wait(30)

    thread = threading.Thread(target=find_out)
    thread.start()
    held.wait(30)
    assert captures.find("it", 0, lambda: "made") is None
    done.set()
    thread.join()
    assert captures.find("it", 0, lambda: "made") == "made"


@pytest.mark.parametrize("rows", [0, 5, 9, 14])
def test_a_padded_question_sees_of_its_passages_what_it_sees_unpadded(backbone, prefix, rows):
    question, weights, block = torch.arange(20, 32), question_weights(12, 7), (2, 6)
    cache = prefix_cache(prefix.layers, TOKENS)
    glance = Glance(cache.layers, backbone.full, [block], [weights])
    backbone.step(question.unsqueeze(0), torch.arange(TOKENS, TOKENS + 12).unsqueeze(0), cache)
    inputs = torch.cat([question, torch.full((4,), 33), torch.tensor([11])])
    padded = torch.cat([weights, torch.zeros(4)])
    _, mass, _ = padded_prefill(backbone, prefix, inputs, padded, evidence=True, told=True, rows=rows)
    assert mass.shape[-1] == TOKENS + 16
    torch.testing.assert_close(on_passages(mass, TOKENS, block), glance.masses[0], atol=1e-5, rtol=1e-4)


def test_what_found_no_room_is_captured_once_there_is_some():
    captures, made = Captures(), []
    rooms = [False, False, False, True, False]
    found = [captures.find("a question", 1, lambda: made.append(1) or "one", has_room=room) for room in rooms]
    assert found == [None, None, None, "one", "one"] and made == [1]


def test_long_questions_find_room_as_others_are_let_go():
    held = [SimpleNamespace(tokens=tokens) for tokens in (1024, 512) * 8]
    assert _has_room(512, held) and not _has_room(1024, held) and not _has_room(2048, held)
    assert _has_room(1024, held[1:]) and _has_room(2048, held[1:])


def test_what_is_made_and_found_wrong_is_not_made_again():
    captures, tries = Captures(), []
    assert [captures.find("it", 0, lambda: tries.append(1)) for _ in range(3)] == [None] * 3
    assert tries == [1] and not captures


@pytest.mark.parametrize(
    ("tokens", "most"), [(1, 32), (32, 32), (33, 64), (512, 512), (513, 1024), (1060, 1536), (2048, 2048)]
)
def test_a_question_is_padded_to_one_of_few_lengths(tokens, most):
    assert bucket(tokens) == most
