"""Peak memory of a build against the length of its corpus: chunk and budget bound it, the corpus does not.

    python -m cribsheet_bench.memory --tokens 4096 65536

Each length is measured in a process of its own, on one thread; the figure is the peak resident memory of the whole
process. The C allocator is told to return freed memory at once, so that the peak shows what is alive rather than what
is fragmented.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from cribsheet.build import build_sheet
from cribsheet.corpus.documents import Document
from cribsheet.corpus.task import Task
from cribsheet.engine.pool import LoadedModel
from cribsheet.testing import tiny_backbone

_SENTENCE = "Person {n} lives in house {n} of street {m} and keeps {m} goats, as everybody knows. "


def peak_bytes() -> int:
    """Peak resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def build_once(tokens: int, budget: int, chunk_tokens: int, model: str) -> dict[str, int]:
    """Build one sheet of a generated corpus and report the peak."""
    torch.set_num_threads(1)
    backbone = (
        tiny_backbone(max_position_embeddings=1 << 20, hidden_size=256, num_hidden_layers=8, num_attention_heads=8,
                      num_key_value_heads=4, head_dim=64)
        if model == "tiny"
        else LoadedModel.get(model).backbone
    )  # fmt: skip
    one = len(backbone.tokenizer(_SENTENCE.format(n=123, m=45))["input_ids"])
    text = "".join(_SENTENCE.format(n=n, m=n % 97) for n in range(tokens // one))
    sheet = build_sheet(
        backbone, [Document(text=text, id="street")], Task("Who lives where?"), budget=budget, chunk_tokens=chunk_tokens
    )
    return {"tokens": sheet.manifest.corpus_tokens, "peak": peak_bytes(), "sheet": sheet.nbytes}


def measure(lengths: Sequence[int], budget: int, chunk_tokens: int, model: str) -> list[dict[str, int]]:
    """`build_once` for each length, in fresh processes."""
    results = []
    for tokens in lengths:
        command = [sys.executable, "-m", "cribsheet_bench.memory", "--one", str(tokens), "--budget", str(budget)]
        command += ["--chunk-tokens", str(chunk_tokens), "--model", model]
        environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """Run the bench from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 65536])
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--chunk-tokens", type=int, default=1024)
    parser.add_argument("--model", default="tiny", help="a model, or 'tiny' for random weights")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one:
        one = build_once(arguments.one, arguments.budget, arguments.chunk_tokens, arguments.model)
        sys.stdout.write(json.dumps(one) + "\n")
        return
    results = measure(arguments.tokens, arguments.budget, arguments.chunk_tokens, arguments.model)
    table = Table("corpus tokens", "peak MiB", "above the short build", "sheet MiB")
    for result in results:
        above = (result["peak"] - results[0]["peak"]) / results[0]["peak"]
        table.add_row(
            str(result["tokens"]), f"{result['peak'] / 2**20:.1f}", f"{above:+.1%}", f"{result['sheet'] / 2**20:.1f}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
