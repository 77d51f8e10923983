"""What four bits a number lose, by which numbers share a range, and what restoring them costs at opening.

    python -m cribsheet_bench.quality.packing --json packing.json

Keys and values are those of sheets by the default; heads keep what they need, so that short blocks count as they come.
Errors are relative (L2), bits are those of codes, ranges and sizes of blocks. Opening is from a file to layers that
attention reads, storage types in turns; beside it stands what one token's attention to these layers takes.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from cribsheet.attention.prefix import turned_back
from cribsheet.build import build_sheet
from cribsheet.compare.journal import write_rows
from cribsheet.engine.pool import LoadedModel
from cribsheet.living.segments import sheet_layers
from cribsheet.model.backbone import Backbone
from cribsheet.sheet.file import load, save
from cribsheet.sheet.int4 import Packed, block_sizes, pack_blocks, pack_groups, unpack_blocks, unpack_groups
from cribsheet.vocabulary import StorageDtype
from cribsheet_bench.quality.families import Wanted, make_cases
from cribsheet_bench.quality.run import setup
from cribsheet_bench.quality.several import Sheets

Half = tuple[list[int], Tensor]  # how many tokens each head has, and their keys or values (N, D)
_TYPES: tuple[StorageDtype, ...] = ("float32", "bfloat16", "int8", "int4")


def main() -> None:
    """Measure, print tables, and write setup and lines to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--family", nargs="+", default=["worlds", "variables", "multi-key", "reading"])
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--rate", nargs="+", type=float, default=[3.0, 9.0])
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--opened", type=int, default=4000, help="tokens of the sheet that is opened, at rate 1")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = LoadedModel.get(options.model)
    lines = [
        line
        for rate in options.rate
        for half, layers in halves(model.backbone, options, rate).items()
        for line in errors(layers, {"half": half, "rate": rate})
    ]
    opening = opened(model.backbone, options.opened, options.rounds)
    sys.stdout.write(table(lines) + "\n" + table(opening) + "\n")
    if options.json:
        write_rows(options.json, {"setup": setup(model, options), "errors": lines, "opening": opening})


def halves(backbone: Backbone, options: argparse.Namespace, rate: float) -> dict[str, list[Half]]:
    """Keys before and after rotation, and values, of all layers of the sheets of some cases."""
    found: dict[str, list[Half]] = {"keys": [], "keys, rotated": [], "values": []}
    for seed in options.seed:
        for case in make_cases(options.family, 1, Wanted(options.tokens, seed)):
            sheet = Sheets(backbone, case.documents).build(case.task, rate=rate)
            for stored, inv_freq in zip(sheet.layers, backbone.inv_freqs, strict=True):
                layer = stored.restored(torch.device("cpu"), torch.float32)
                plain = turned_back(layer, sheet.length, inv_freq.cpu())
                counts = list(layer.counts) or [layer.longest] * layer.heads
                for name, rows in zip(found, (plain.keys, layer.keys, layer.values), strict=True):
                    found[name].append((counts, rows.flatten(0, -2)))
    return found


def errors(layers: Sequence[Half], told: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Bits and error of each way to share ranges."""
    head = layers[0][1].shape[1]
    ways = [("a token's channels", size) for size in (16, 32, 64, 128) if size <= head]
    ways += [("a channel's tokens", size) for size in (16, 32, 64, 128, 255)]
    for shared, size in ways:
        yield told | _loss(layers, shared, size, torch.float16)
    for scale in (torch.float32, torch.bfloat16):
        for shared, size in (("a token's channels", head), ("a channel's tokens", 128)):
            yield told | _loss(layers, shared, size, scale)


def _loss(layers: Sequence[Half], shared: str, size: int, scale: torch.dtype) -> dict[str, Any]:
    wrong = whole = stored = numbers = 0.0
    for counts, wanted in layers:
        if shared == "a channel's tokens":
            sizes = block_sizes(counts, size)
            packed = pack_blocks(wanted, sizes, scale)
            got, extra = unpack_blocks(packed, sizes), sizes.nbytes
        else:
            packed, extra = pack_groups(wanted, size, scale), 0
            got = unpack_groups(packed)
        wrong, whole = wrong + float((got - wanted).square().sum()), whole + float(wanted.square().sum())
        stored, numbers = stored + _bytes(packed) + extra, numbers + wanted.numel()
    return {
        "a range for": f"{size} of {shared}",
        "ranges in": str(scale).removeprefix("torch."),
        "bits": round(8 * stored / numbers, 2),
        "error": round((wrong / whole) ** 0.5, 4),
    }


def _bytes(packed: Packed) -> int:
    return sum(getattr(packed, part.name).nbytes for part in dataclasses.fields(packed))


def opened(backbone: Backbone, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds from a file to layers that attention reads, by storage type, and of one token's attention."""
    (case,) = make_cases(["worlds"], 1, Wanted(tokens, 0))
    with tempfile.TemporaryDirectory() as folder:
        files: dict[StorageDtype, Path] = {}
        for dtype in _TYPES:
            sheet = build_sheet(
                backbone, case.documents, case.task, rate=1, scorer="recent", guide="dropped", dtype=dtype
            )
            files[dtype] = save(sheet, Path(folder, f"{dtype}.sheet"))
        times: dict[StorageDtype, list[float]] = {dtype: [] for dtype in files}
        attending: dict[StorageDtype, list[float]] = {dtype: [] for dtype in files}
        query = torch.randn(1, backbone.num_heads, 1, backbone.head_size)
        for _ in range(rounds + 1):  # the first is to read the files
            for dtype, file in files.items():
                began = time.perf_counter()
                layers = sheet_layers(backbone, load(file))
                times[dtype].append(time.perf_counter() - began)
                began = time.perf_counter()
                for layer in layers:
                    layer.attend(query, backbone.head_size**-0.5)
                attending[dtype].append(time.perf_counter() - began)
        return [
            {
                "stored in": dtype,
                "tokens": load(file).tokens,
                "KiB": round(load(file).nbytes / 1024),
                "opening, ms": round(1000 * median(times[dtype][1:]), 1),
                "attention of a token, ms": round(1000 * median(attending[dtype][1:]), 1),
            }
            for dtype, file in files.items()
        ]


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Lines as a table of Markdown."""
    shown = [f"| {' | '.join(lines[0])} |", "|---" * len(lines[0]) + "|"]
    return "\n".join([*shown, *(f"| {' | '.join(str(cell) for cell in line.values())} |" for line in lines)])


if __name__ == "__main__":
    main()
