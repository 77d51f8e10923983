"""A sheet for other engines that has studied: what it learnt is what they read, and they say what we say."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT, QUESTION
from safetensors.torch import load_file
from tiny_vllm import Request, TinyVllm

from cribsheet import CompressedKnowledgeLLM
from cribsheet.engines.placeholders import placeholders
from cribsheet.engines.vllm.file import ExportedSheet
from cribsheet.study.exercises import Exercise, Practice, practice_of

QUESTIONS = [QUESTION, "Where is Alice?", "Who speaks Greek?", "What is 40213?"]


def exercises(kb, count):
    """Questions of random tokens to which one token is the answer, again and again: that is soon learnt."""
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        ids = torch.randint(5, kb.backbone.config.vocab_size, (14 + number % 5,), generator=generator)
        answered = len(ids) - 8
        yield Exercise(ids, 8, torch.full((answered, 1), 300), torch.full((answered, 1), 0.9))


@pytest.fixture(scope="module")
def kbs(qwen3):
    """A knowledge base as it was built, and one that has studied."""
    before, kb = (
        CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=qwen3, budget=96, for_engines=True) for _ in range(2)
    )
    rows = list(exercises(kb, 24))
    practice = Practice(rows[:20], rows[20:], 24, Counter(), practice_of(kb.sheet), 0.0)
    came = kb.study(steps=12, learning_rate=0.3, practice=practice)
    assert came.learnt
    return before, kb


def changed(before, kb):
    """Where a study changed something, of all keys and values."""
    pairs = zip(before.sheet.layers, kb.sheet.layers, strict=True)
    return [bool((old.keys != new.keys).any() and (old.values != new.values).any()) for old, new in pairs]


def test_every_engines_file_holds_what_was_learnt(kbs, tmp_path):
    before, kb = kbs
    assert all(changed(before, kb)) and kb.sheet.length == before.sheet.length == 96
    assert kb.sheet.manifest.dtype == "float16"
    vllm = load_file(kb.sheet.export(tmp_path / "a.vllm", to="vllm"))
    mlx = load_file(kb.sheet.export(tmp_path / "a.safetensors", to="mlx"))
    state = kb.sheet.export(tmp_path / "a.state", to="llama.cpp").read_bytes()
    for number, layer in enumerate(kb.sheet.layers):
        for part, name in enumerate(("keys", "values")):
            learnt = getattr(layer, name)
            assert learnt.dtype == torch.float16
            assert torch.equal(vllm[f"{name}.{number}"], learnt) and torch.equal(mlx[f"{number}.{part}"][0], learnt)
            assert learnt.transpose(0, 1).flatten(1).contiguous().numpy().tobytes() in state
    digests = {each.sheet.manifest.digest for each in kbs}
    assert len(digests) == 2  # so no engine takes one for the other, by the ids that stand for them


def test_vllm_says_what_we_say_of_both_and_mixes_them_up_nowhere(vllm_interface, qwen3, kbs, tmp_path):
    files = {name: kb.sheet.export(tmp_path / name, to="vllm") for name, kb in zip(("old", "new"), kbs, strict=True)}
    assert len({ExportedSheet.open(path).ids for path in files.values()}) == 2
    server = TinyVllm(vllm_interface, qwen3, files, blocks=60)
    asked = []
    for question in QUESTIONS:
        for name, kb in zip(files, kbs, strict=True):
            ids = [*placeholders(kb.sheet.manifest.digest, 96), *kb.question_tokens(question).tolist()]
            asked.append((kb, question, Request(f"{name}: {question}", ids, 16, 6, {"cribsheet": name})))
            server.add(asked[-1][2])
    server.run()
    said = [qwen3.tokenizer.decode(request.written, skip_special_tokens=True).lstrip(" ") for *_, request in asked]
    assert said == [kb.ask(question, max_tokens=6, evidence=False).text for kb, question, _ in asked]
    assert said[::2] != said[1::2]


def test_llama_cpp_says_what_we_say(qwen3_gguf, kbs):
    pytest.importorskip("xllamacpp", reason="the extra llama-cpp is not installed")
    with kbs[1].in_llama_cpp(qwen3_gguf, room=256, threads=1) as llama:
        for question in QUESTIONS:
            ours = kbs[1].ask(question, max_tokens=6, evidence=False).text
            assert llama.ask(question, max_tokens=6).text.rstrip("\ufffd") == ours.rstrip("\ufffd")


def test_a_saved_one_is_the_same_to_engines(kbs, tmp_path):
    path = kbs[1].save(tmp_path / "learnt.sheet")
    with CompressedKnowledgeLLM.load(path, model=kbs[1].backbone) as again:
        assert again.sheet.manifest.digest == kbs[1].sheet.manifest.digest
        files = [kb.sheet.export(tmp_path / name, to="vllm") for kb, name in ((kbs[1], "a"), (again, "b"))]
    assert files[0].read_bytes() == files[1].read_bytes()
