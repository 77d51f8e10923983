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

from cribsheet.attention import backends, dispatch
from cribsheet.attention.agreement import relative_error
from cribsheet.attention.attend import attend, attend_shared
from cribsheet.attention.cache import PrefixLayer, prefix_cache
from cribsheet.attention.plain import attend_plain
from cribsheet.attention.prefix import LayerPrefix, Prefix
from cribsheet.attention.recorder import question_weights
from cribsheet.attention.slots import Rows, SlotLayer
from cribsheet.corpus.documents import Document
from cribsheet.engine import graphs
from cribsheet.llm import CompressedKnowledgeLLM
from cribsheet.model.backbone import Backbone
from cribsheet.testing import tiny_backbone
from cribsheet_bench.speed.parts import Report
from cribsheet_bench.speed.setting import Setting

FAMILIES = ("llama", "qwen3", "phi3", "gemma2", "gemma3_text", "mixtral")
BOUND = {torch.float32: 1e-4, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
REPLAY_BOUND = 1e-2
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
                note(f"cudnn {causal} {size}", backends.cudnn_cuda(q, k, v, scale, causal), wanted)
        for batch, rows in ((1, 1), (3, 1), (1, 37), (2, 700)):
            q, k, v = random(batch, 8, rows, size), random(2, 5000, size), random(2, 5000, size)
            shared = attend_shared(q, k.unsqueeze(0), v.unsqueeze(0), scale=scale)
            whole = [each.float().expand(batch, -1, -1, -1) for each in (k, v)]
            note(f"shared {batch}x{rows} {size}", shared, attend_plain(q.float(), *whole, scale=scale))
            absent = torch.arange(5000, device=device) < torch.tensor([[0], [3100]], device=device)
            ragged = LayerPrefix.of(k, v, (~absent).sum(-1).tolist())
            mask = ~absent.repeat_interleave(4, 0)[None, :, None]
            wanted = attend_plain(q.float(), *whole, scale=scale, mask=mask)
            note(f"ragged {batch}x{rows} {size}", ragged.attend(q, scale), wanted)
    return found


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """No fused attention inside."""
    with patch.object(backends, "on_cuda", lambda q: False), patch.object(backends, "on_cpu", lambda q: False):
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
            found[f"{family} {allocation}"] = relative_error(got, wanted)
    return found


def _logits(kb: CompressedKnowledgeLLM) -> Tensor:
    """Logits (T, V) in float32 of a question of several dozen tokens."""
    ids, prefix = kb.question_tokens(_QUESTION), kb.prefix
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


def kernel_errors(device: str) -> dict[str, float]:
    """Errors of our own kernels, by head size, type and case; those above the library's bound are not used by it."""
    found: dict[str, float] = {}
    for size, group, dtype in ((128, 4, torch.bfloat16), (64, 3, torch.bfloat16), (96, 1, torch.float16)):
        errors = dispatch.check(torch.device(device), dtype, size, group)
        found |= {f"{dtype} {size}/{group} {case}": error for case, error in errors.items()}
    return found


def steps_agree(setting: Setting, report: Report) -> None:
    """Relative L2 differences of questions and steps that are replayed from those that are run kernel by kernel.

    Logits of a deep random model say little, because rounding grows from layer to layer: what the same computation
    gives when it is not captured is the measure, and it must be met to the last bit but for the order of sums.
    """
    backbone, prefixes = setting.backbone, {ragged: setting.prefix(2048, ragged=ragged) for ragged in (False, True)}
    for ragged, prefix in prefixes.items():
        label = "ragged" if ragged else "uniform"
        question, weights = setting.ids(40), question_weights(40)
        inputs = torch.cat([question, torch.zeros(24, dtype=torch.int64), torch.tensor([39])]).to(setting.device)
        padded = torch.cat([weights, torch.zeros(24)]).to(setting.device)
        slow = graphs.padded_prefill(backbone, prefix, inputs, padded, evidence=True)
        rows = Rows()
        layers = [SlotLayer(layer, prefix.tokens, rows) for layer in prefix.layers]
        for mine, read in zip(layers, slow[2], strict=True):
            assert isinstance(read, PrefixLayer)
            mine.reserve(4, 256, read.keys)
            for slot in range(4):
                mine.insert(slot, read.keys[0, :, :40].clone(), read.values[0, :, :40].clone())
        given = torch.tensor([[25, 26, 27, 28], [prefix.tokens + 40] * 4, [40] * 4])
        step = graphs.fixed_step(backbone, layers, rows, given.to(setting.device), 256, evidence=True)
        wanted = [*_found(*slow[:2]), *_found(*step)]
        plainly = _by_tokens(setting, prefix, question)
        report.fact(f"question padded against alone, {label}", relative_error(slow[0], plainly))
        if setting.device.type != "cuda":
            continue
        prefill_graph = graphs.PrefillGraph(backbone, prefix, 64, evidence=True)
        step_graph = graphs.StepGraph(backbone, layers, rows, 4, evidence=True)
        for turn in range(3):  # the later ones must not be harmed by the earlier
            logits, mass, _ = prefill_graph.replay(question, weights)
            got = [*_found(logits, mass), *_found(*step_graph.replay(*given.tolist()))]
            errors = [relative_error(one, other) for one, other in zip(got, wanted, strict=True)]
            report.fact(f"replayed, {label}, turn {turn}: question, its glance, step, its glance", errors)
            if not max(errors) <= REPLAY_BOUND:
                raise RuntimeError(f"replaying differs from running kernel by kernel: {label}, {errors}")


def _by_tokens(setting: Setting, prefix: Prefix, question: Tensor) -> Tensor:
    """Logits (1, V) after a question, read without padding."""
    cache = prefix_cache(prefix.layers, prefix.tokens)
    positions = torch.arange(prefix.tokens, prefix.tokens + len(question)).unsqueeze(0)
    return setting.backbone.step(question.unsqueeze(0), positions, cache)[:, -1]


def _found(logits: Tensor, masses: Tensor | list[Tensor] | None) -> list[Tensor]:
    """Copies of what a captured computation leaves in its own tensors."""
    assert masses is not None
    return [logits.clone(), torch.stack(list(masses)).clone()]
