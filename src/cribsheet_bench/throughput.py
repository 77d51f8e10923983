"""Many questions at once over one sheet: our engine against stock `generate` of transformers.

Stock comes in two forms: in one batch, with the prefix copied for every question; and one question after the other,
with a fresh copy of the prefix for each.

    python -m cribsheet_bench.throughput --questions 16 --prefix 1024

Same model, same prefix, same questions, greedy, same number of new tokens; the two take turns in one process on one
thread, and the best of several rounds counts. Random weights: this times, it judges no answers, but both must give
the same tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache

from cribsheet.compare.journal import write_rows
from cribsheet.corpus.documents import Document
from cribsheet.llm import CompressedKnowledgeLLM
from cribsheet.model.backbone import Backbone
from cribsheet.testing import tiny_backbone

_QUESTION = "What does person number {n} keep in house {m}?"


def make_model(dtype: str) -> Backbone:
    """A random Llama of 8 layers, 512 wide, that is large enough for matrix products to dominate."""
    backbone = tiny_backbone(
        dtype=getattr(torch, dtype),
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=16384,
        eos_token_id=None,  # answers of equal length on both sides
    )
    backbone.tokenizer.eos_token = None
    return backbone


def stock_generate(kb: CompressedKnowledgeLLM, questions: Sequence[Tensor], new_tokens: int) -> list[str]:
    """Answers by transformers' own `generate`: the prefix copied for every question, questions padded on the left."""
    model, batch, start = kb.backbone.model, len(questions), kb.prefix.tokens
    cache = DynamicCache(config=model.config)
    for number, layer in enumerate(kb.prefix.layers):
        keys, values = (half.unsqueeze(0).repeat(batch, 1, 1, 1) for half in (layer.keys, layer.values))
        cache.update(keys, values, number)
    longest = max(len(question) for question in questions)
    ids = torch.zeros(batch, longest, dtype=torch.int64)
    mask = torch.ones(batch, start + longest, dtype=torch.int64)
    for row, question in enumerate(questions):
        ids[row, longest - len(question) :] = question
        mask[row, start : start + longest - len(question)] = 0
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=mask,
            **kb.backbone.cached(cache),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    answers: list[str] = kb.backbone.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    return answers


def stock_one_by_one(kb: CompressedKnowledgeLLM, questions: Sequence[Tensor], new_tokens: int) -> list[str]:
    """The same answers, one question after the other."""
    return [stock_generate(kb, [question], new_tokens)[0] for question in questions]


def engine(kb: CompressedKnowledgeLLM, questions: Sequence[str], new_tokens: int) -> list[str]:
    """The same answers by our engine, as that many callers would get them."""
    streams = [kb.stream(question, max_tokens=new_tokens) for question in questions]
    return ["".join(stream) for stream in streams]


def compare(prefix: int, count: int, new_tokens: int, rounds: int, dtype: str) -> dict[str, Any]:
    """Seconds of both, best of `rounds`, and whether they agree."""
    backbone = make_model(dtype)
    text = " ".join(f"Person number {n} keeps {n % 97} goats in house {n}." for n in range(prefix))
    ids = backbone.tokenizer(text)["input_ids"][: prefix - 20]
    document = Document(text=backbone.tokenizer.decode(ids), id="street")
    kb = CompressedKnowledgeLLM.build([document], "Who keeps what?", model=backbone, rate=1, guide="dropped")
    asked = [_QUESTION.format(n=n, m=n * n * n) for n in range(count)]
    tokens = [kb.question_tokens(question) for question in asked]
    runs: dict[str, Callable[[], list[str]]] = {
        "batch": lambda: stock_generate(kb, tokens, new_tokens),
        "one_by_one": lambda: stock_one_by_one(kb, tokens, new_tokens),
        "engine": lambda: engine(kb, asked, new_tokens),
    }
    best = dict.fromkeys(runs, float("inf"))
    answers: dict[str, list[str]] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            answers[name] = run()
            best[name] = min(best[name], time.perf_counter() - began)
    same = sum(a.strip() == b.strip() == c.strip() for a, b, c in zip(*answers.values(), strict=True))
    gains = {f"gain_over_{name}": best[name] / best["engine"] for name in ("batch", "one_by_one")}
    return {"prefix_tokens": kb.prefix.tokens, **best, **gains, "same": same}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the bench from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--prefix", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    table = Table("prefix tokens", "one by one s", "batch s", "engine s", "gain", "over batch", "same answers")
    results = []
    for prefix in arguments.prefix:
        result = compare(prefix, arguments.questions, arguments.new_tokens, arguments.rounds, arguments.dtype)
        results.append(result)
        cells = [f"{result[name]:.2f}" for name in ("one_by_one", "batch", "engine")]
        cells += [f"{result[f'gain_over_{name}']:.2f}×" for name in ("one_by_one", "batch")]
        table.add_row(str(result["prefix_tokens"]), *cells, f"{result['same']} of {arguments.questions}")
    Console().print(table)
    if arguments.json:
        setup = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": 1}
        settings = {key: value for key, value in vars(arguments).items() if key != "json"}
        write_rows(arguments.json, {"setup": {**setup, **settings}, "rows": results})


if __name__ == "__main__":
    main()
