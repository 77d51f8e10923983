"""That what is timed is right: fused attention against plain, models with it and without, whole answers.

Each check returns its errors; the bench reports them, and fails where one is above its bound.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from cribsheet import flash
from cribsheet.attention import attend, attend_plain, attend_shared
from cribsheet.backbone import Backbone
from cribsheet.bench.speed_setting import Setting
from cribsheet.documents import Document
from cribsheet.llm import CompressedKnowledgeLLM
from cribsheet.prefix import LayerPrefix
from cribsheet.testing import tiny_backbone

FAMILIES = ("llama", "qwen3", "phi3", "gemma2", "gemma3_text", "mixtral")
BOUND = {torch.float32: 1e-4, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
_TEXT = " ".join(f"Person {n} lives in house {n * 7 % 31} and keeps {n % 9} goats." for n in range(60))
_QUESTION = "Where does person 17 live, and how many goats are there?"


def attention_errors(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Relative L2 error of outputs, or largest error of log-sum-exps, by case."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    found: dict[str, float] = {}

    def note(name: str, got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
        assert got[0].shape == wanted[0].shape and got[1].shape == wanted[1].shape, (name, got[1].shape)
        error = float((got[0].float() - wanted[0].float()).norm() / wanted[0].float().norm())
        found[name] = max(error, float((got[1].float() - wanted[1].float()).abs().max()) / 4)

    for size in (64, 128):
        q, k, v = random(2, 8, 300, size), random(2, 2, 300, size), random(2, 2, 300, size)
        scale = size**-0.5
        for causal in (False, True):
            wanted = attend_plain(q.float(), k.float(), v.float(), scale=scale, causal=causal)
            note(f"{'causal' if causal else 'whole'} {size}", attend(q, k, v, scale=scale, causal=causal), wanted)
            if device == "cuda" and dtype != torch.float32:
                note(f"cudnn {causal} {size}", flash.cudnn_cuda(q, k, v, scale, causal), wanted)
        for batch, rows in ((1, 1), (3, 1), (1, 37), (2, 700)):
            q, k, v = random(batch, 8, rows, size), random(2, 5000, size), random(2, 5000, size)
            shared = attend_shared(q, k.unsqueeze(0), v.unsqueeze(0), scale=scale)
            whole = [each.float().expand(batch, -1, -1, -1) for each in (k, v)]
            note(f"shared {batch}x{rows} {size}", shared, attend_plain(q.float(), *whole, scale=scale))
            absent = torch.arange(5000, device=device) < torch.tensor([[0], [3100]], device=device)
            ragged = LayerPrefix.of(k, v, absent)
            mask = ~absent.repeat_interleave(4, 0)[None, :, None]
            wanted = attend_plain(q.float(), *whole, scale=scale, mask=mask)
            note(f"ragged {batch}x{rows} {size}", ragged.attend(q, scale), wanted)
    return found


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """No fused attention inside."""
    with patch.object(flash, "on_cuda", lambda q: False), patch.object(flash, "on_cpu", lambda q: False):
        yield


def model_errors(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Relative L2 error of an answer's logits with fused attention against plain, by model family and allocation."""
    found: dict[str, float] = {}
    for family in FAMILIES:
        made = tiny_backbone(family, head_dim=32, dtype=dtype)
        backbone = Backbone(made.model.to(device), made.tokenizer)
        for allocation, scorer in (("uniform", "task"), ("adaptive", "reconstruction")):
            options: dict[str, Any] = {"rate": 4, "allocation": allocation, "scorer": scorer, "chunk_tokens": 256}
            with plain():  # one sheet: what is kept may hang on the last bit of a score
                kb = CompressedKnowledgeLLM.build([Document(text=_TEXT, id="a")], "Who?", model=backbone, **options)
                wanted = _logits(kb)
            got = _logits(kb)
            kb.close()
            found[f"{family} {allocation}"] = float((got - wanted).norm() / wanted.norm())
    return found


def _logits(kb: CompressedKnowledgeLLM) -> Tensor:
    """Logits (T, V) in float32 of a question of several dozen tokens."""
    from cribsheet.prefix import prefix_cache

    ids, prefix = kb._question_ids(_QUESTION), kb.prefix
    positions = torch.arange(prefix.tokens, prefix.tokens + len(ids)).unsqueeze(0)
    cache = prefix_cache(prefix.layers, prefix.tokens)
    return kb.backbone.step(ids.unsqueeze(0), positions, cache, len(ids))[0].float()


def whole_answers(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Answers of the pocket model in float32 on a CPU, on this device, and fast; in a batch and one by one."""
    questions = ["Where does person 17 live?", "Where does person 4 live?", "How many goats has person 30?"]
    documents = [Document(text=_TEXT, id="street")]
    answers = {}
    for name, place, kind in (
        ("reference", "cpu", torch.float32),
        ("here", device, torch.float32),
        ("fast", device, dtype),
    ):
        backbone = Backbone.load("pocket", device=place, dtype=kind)
        kb = CompressedKnowledgeLLM.build(documents, "Who lives where?", model=backbone, rate=4)
        streams = [kb.stream(question, max_tokens=24) for question in questions]
        answers[name] = ["".join(stream) for stream in streams]
        again = [str(kb.ask(question, max_tokens=24)) for question in questions]
        answers[f"{name}, one by one"] = again
        kb.close()
    return {"answers": answers, "same as reference": answers["here"] == answers["reference"]}


def steps_agree(setting: Setting) -> dict[str, float]:
    """Relative L2 difference of decoding steps that are replayed as a graph from those that are not (CUDA)."""
    from cribsheet.answering import Answering, Request
    from cribsheet.group import Group
    from cribsheet.sampling import SamplingParams

    found: dict[str, float] = {}
    for ragged in (False, True):
        prefix = setting.prefix(2048, ragged=ragged)
        question, logits = setting.ids(40), []
        for graphs in (False, True):
            group = Group(prefix)
            keys = [
                torch.randn(
                    setting.backbone.kv_heads,
                    40,
                    setting.backbone.head_size,
                    generator=torch.Generator().manual_seed(n),
                )
                for n in range(2)
            ]
            suffix = [tuple(each.to(setting.device, setting.backbone.dtype) for each in keys)] * len(prefix.layers)
            for _ in range(3):
                sequence = Answering(
                    Request(prefix, question, SamplingParams(), print, evidence=True),
                    setting.backbone.tokenizer,
                    frozenset(),
                )
                group.insert(sequence, suffix)  # type: ignore[arg-type]
                sequence.last = 25 + len(group.running)
            if not graphs:
                group._graphs.find = lambda *given: None  # type: ignore[method-assign]
            for _ in range(6):
                last = group.decode(setting.backbone)
            logits.append(last.float().clone())
        found["ragged" if ragged else "uniform"] = float((logits[1] - logits[0]).norm() / logits[0].norm())
    return found
