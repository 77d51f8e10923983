"""The sides that the speed bench times: ours, and its peers at their best."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, StaticCache

from cribsheet.attention.prefix import Prefix
from cribsheet.compress.kept import State
from cribsheet.compress.loop import Reading, compress
from cribsheet.compress.scoring import make_scorer
from cribsheet.engine.engine import Engine
from cribsheet.engine.request import Delta, Event, Request, Sink
from cribsheet.engine.sampling import SamplingParams
from cribsheet.plan.window import usual_chunk
from cribsheet.prompt.chunks import TokenizedCorpus
from cribsheet.vocabulary import Allocation
from cribsheet_bench.speed.setting import Setting

GUIDE, REPEAT = 64, 8  # tokens of the guide, and before a repetition


def build(
    setting: Setting,
    corpus: TokenizedCorpus,
    rate: float,
    *,
    scorer: str = "task",
    allocation: Allocation = "uniform",
    chunk_tokens: int | None = None,
) -> State:
    """Condense a corpus: everything a build does between tokens and the sheet's tensors."""
    found = make_scorer(scorer)[1]
    budget = int(len(corpus) / rate)
    how = Reading(
        scorer=found,
        guide=setting.ids(GUIDE if found.reads.task else 0),
        repeat=setting.ids(REPEAT if found.reads.repetition else 0),
        budget=budget,
        chunk_tokens=min(len(corpus), chunk_tokens or usual_chunk(setting.backbone)),
        preamble_tokens=0,
        pinned=1,
        allocation=allocation,
        most=len(corpus),
    )
    *_, state = compress(setting.backbone, corpus, how)
    return state


@torch.no_grad()
def plain_prefill(setting: Setting, corpus: TokenizedCorpus, backends: Sequence[SDPBackend] = ()) -> DynamicCache:
    """Stock transformers reading a corpus in one pass without the language-model head."""
    cache = DynamicCache(config=setting.backbone.config)
    ids = corpus.ids.unsqueeze(0).to(setting.device)
    if backends:
        with sdpa_kernel(list(backends), set_priority=True):
            setting.backbone.model.model(input_ids=ids, use_cache=True, **setting.backbone.cached(cache))
    else:
        setting.backbone.model.model(input_ids=ids, use_cache=True, **setting.backbone.cached(cache))
    return cache


def copied(setting: Setting, prefix: Prefix, batch: int = 1) -> DynamicCache:
    """A stock cache that holds a uniform prefix, once for each sequence."""
    cache = DynamicCache(config=setting.backbone.config)
    for number, layer in enumerate(prefix.layers):
        cache.update(
            layer.keys.unsqueeze(0).repeat(batch, 1, 1, 1), layer.values.unsqueeze(0).repeat(batch, 1, 1, 1), number
        )
    return cache


@torch.no_grad()
def stock(setting: Setting, cache: DynamicCache, questions: Sequence[Tensor], new_tokens: int) -> list[list[int]]:
    """Greedy answers by stock transformers over a cache, which is afterwards as it was: cache-augmented generation.

    The loop is ours and leaner than `generate`. All questions are equally long, so there is no padding.
    """
    ids = torch.stack(list(questions)).to(setting.device)
    before, found = cache.get_seq_length(), []
    for _ in range(new_tokens):
        given = setting.backbone.cached(cache)
        logits = setting.backbone.model(ids, use_cache=True, logits_to_keep=1, **given).logits
        ids = logits[:, -1].argmax(-1, keepdim=True)
        found.append(ids[:, 0].tolist())
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :before], layer.values[:, :, :before]
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = before
    return [list(tokens) for tokens in zip(*found, strict=True)]


def fresh(setting: Setting, prompt: Tensor, new_tokens: int, times: int = 1) -> list[int]:
    """A greedy answer of stock transformers to a prompt that it reads whole, so many times at once.

    That is retrieval-augmented generation, if the prompt holds what was retrieved.
    """
    return stock(setting, DynamicCache(config=setting.backbone.config), [prompt] * times, new_tokens)[0]


class Compiled:
    """A step of stock transformers over a static cache that holds a uniform prefix, compiled into CUDA graphs."""

    def __init__(self, setting: Setting, prefix: Prefix, room: int) -> None:
        self.cache = StaticCache(config=setting.backbone.config, max_cache_len=room)
        for number, layer in enumerate(prefix.layers):
            self.cache.update(layer.keys.unsqueeze(0), layer.values.unsqueeze(0), number)
        self._given = setting.backbone.cached(self.cache)
        self.ids = setting.ids(1).unsqueeze(0).to(setting.device)
        self.positions = torch.full((1, 1), prefix.tokens, device=setting.device)
        self.step: Any = torch.compile(setting.backbone.model, mode="reduce-overhead", fullgraph=False)

    @torch.no_grad()
    def __call__(self) -> list[int]:
        """The greedy next token; the cache grows by one."""
        logits = self.step(input_ids=self.ids, position_ids=self.positions, use_cache=True, **self._given).logits
        found: list[int] = logits[:, -1].argmax(-1).tolist()
        return found


class Asker:
    """Questions in tokens to one engine of ours."""

    def __init__(self, setting: Setting, *, evidence: bool = True) -> None:
        self.engine = Engine(setting.backbone)
        self.evidence = evidence  # answers carry their sources by default

    def ask(self, prefix: Prefix, questions: Sequence[Tensor], new_tokens: int) -> list[str]:
        """Greedy answers of `new_tokens` tokens to all questions at once."""
        done, errors = threading.Semaphore(0), []
        texts = [""] * len(questions)

        def sink_of(number: int) -> Sink:
            def sink(event: Event) -> None:
                if isinstance(event, Delta):
                    texts[number] += event.text
                else:
                    if isinstance(event, BaseException):
                        errors.append(event)
                    done.release()

            return sink

        params = SamplingParams(max_tokens=new_tokens)
        asked = [
            Request(prefix, question, params, sink_of(number), evidence=self.evidence)
            for number, question in enumerate(questions)
        ]
        self.engine.submit(*asked)
        for _ in asked:
            done.acquire()
        if errors:
            raise errors[0]
        return texts

    def close(self) -> None:
        """End its thread."""
        self.engine.close()
