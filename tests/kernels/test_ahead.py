"""What is compiled ahead is all that a session needs, whatever its lengths and batches: `make kernels`.

Kernels are compiled for real here, for a GPU that nobody has to have; the interpreter of the other tests compiles none.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import threading
import time
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1" or not find_spec("triton"):
    pytest.skip("make kernels runs these", allow_module_level=True)

from transformers import AutoModelForCausalLM
from triton import knobs

from cribsheet.attention import dispatch
from cribsheet.attention.prefix import LayerPrefix
from cribsheet.attention.slots import Rows, SlotLayer
from cribsheet.kernels import ahead, columns, flash, keeping, packed, step_attention
from cribsheet.kernels.codes import TILE, Codes
from cribsheet.model.llama_step import LlamaStep
from cribsheet.model.llama_weights import llama_weights
from cribsheet.testing import tiny_config

SIZE, HEADS, KV_HEADS = 32, 12, 2
SHAPE = ahead.Shape(
    arch=90, dtype="bfloat16", heads=HEADS, kv_heads=KV_HEADS, head_size=SIZE, hidden=96, inner=160, vocabulary=1000
)


@pytest.fixture(scope="module", autouse=True)
def kernels(tmp_path_factory):
    """All kernels of the shape, in a cache of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield ahead.run(SHAPE, 1)


def made(*sizes, dtype=torch.bfloat16):
    return torch.empty(*sizes, dtype=dtype, device="meta")


def floats(*sizes):
    return made(*sizes, dtype=torch.float32)


@pytest.fixture(scope="module")
def step():
    sizes = {"head_dim": SIZE, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    config = tiny_config("llama", **sizes, hidden_size=96, intermediate_size=160)
    with torch.device("meta"):
        weights = llama_weights(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    turns = lambda rows, positions: (made(*positions.shape, SIZE), made(*positions.shape, SIZE))  # noqa: E731
    return LlamaStep(replace(weights, turns=turns))


def slots(batch, tokens, counts):
    """Layers of a step over a prefix of heads of different lengths, none of it in memory."""
    rows = Rows()
    rows.index, rows.count, rows.longest = made(batch, dtype=torch.int64), batch, tokens
    layers = []
    for _ in range(3):
        prefix = LayerPrefix(made(sum(counts), SIZE), made(sum(counts), SIZE), None, counts)
        prefix.__dict__["starts"] = made(KV_HEADS + 1, dtype=torch.int32)
        layer = SlotLayer(prefix, max(counts), rows)
        layer.keys = layer.values = made(batch, KV_HEADS, tokens, SIZE)
        layers.append(layer)
    return layers


def test_a_model_needs_few_kernels(kernels):
    assert 0 < len(kernels.compiled) <= 30, kernels.compiled


@pytest.mark.parametrize(("kept", "read"), [(1, 7), (35, 64), (2048, 8192), (999, 16384)])
def test_no_chunk_and_no_budget_needs_other_kernels_of_a_build(kernels, kept, read):
    before, whole = len(kernels.compiled), partial(made, dtype=torch.int64)
    for old in (0, kept):
        turn = floats(read, SIZE // 2), floats(read, SIZE // 2)
        halves = (floats(KV_HEADS, old, SIZE), made(KV_HEADS, old, SIZE)), (made(KV_HEADS, read, SIZE),) * 2
        seen = whole(KV_HEADS, old + read)
        for scores in (floats(KV_HEADS, old + read), floats(2, KV_HEADS, old + read)):
            keys, values, *_ = keeping.take(whole(KV_HEADS, kept), *halves, turn, seen, scores)
        starts = made(KV_HEADS + 1, dtype=torch.int32)
        keeping.place(keys, values, starts, KV_HEADS * kept, (floats(kept + 3, SIZE // 2),) * 2, 3)
    columns.around(made(HEADS, read, SIZE), floats(HEADS, read), made(KV_HEADS, read, SIZE), 64, 16, 0.1)
    assert kernels.compiled[before:] == []


def test_causal_attention_needs_one_kernel_for_all_lengths(kernels):
    shape = replace(SHAPE, head_size=64)
    for task in ahead.tasks(shape):
        if task.func is flash.causal:
            task()
    before = len(kernels.compiled)
    for tokens in (2048, 2049, 9000, 16384):
        flash.causal(made(1, HEADS, tokens, 64), *(made(1, KV_HEADS, tokens, 64) for _ in "kv"), 0.1)
    assert kernels.compiled[before:] == [] and kernels.compiled.count("_causal") == 1


@pytest.mark.parametrize("counts", [(9111, 3000), (24, 24), (700, 1501)])
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, 16, 32, 33, 64])
def test_no_batch_and_no_sheet_needs_another_step(kernels, step, batch, counts):
    before = len(kernels.compiled)
    for tokens in (64, 192, 256, 2048):
        layers = slots(batch, tokens, counts)
        step(made(batch, dtype=torch.int64), made(batch, dtype=torch.int64), layers)
        q, lse = made(batch, HEADS, 1, SIZE), floats(batch, HEADS, 1)
        prefix = layers[0].prefix
        dispatch.on_prefix(q, lse, prefix.keys, prefix.starts, prefix.longest, max(counts), 0.1)
        columns.newest(q, layers[0].keys, layers[0].values, layers[0].rows.index, 0.1, (q, lse))
    assert kernels.compiled[before:] == []


@pytest.mark.parametrize("rows", [3, 17, 32, 57, 60, 64, 512, 1001, 1024, 4096])
@pytest.mark.parametrize("batch", [1, 8])
def test_no_length_of_a_question_or_a_guide_needs_another_kernel(kernels, batch, rows):
    before = len(kernels.compiled)
    q, lse = made(batch, HEADS, rows, SIZE), floats(batch, HEADS, rows)
    columns.merge((q, lse), (made(batch, rows, HEADS, SIZE).transpose(1, 2), lse))
    starts = made(KV_HEADS + 1, dtype=torch.int32)
    dispatch.on_prefix(q, lse, made(12111, SIZE), starts, 9111, 9111, 0.1)
    for tokens in (63, 980, 8192):
        for peak in (False, True):
            if rows > 16 or peak:
                dispatch.columns(q[0], made(KV_HEADS, tokens, SIZE), lse[0], 0.1, None, peak=peak)
    assert kernels.compiled[before:] == []


@pytest.mark.parametrize("size", [64, 128])
def test_no_batch_and_no_sheet_in_four_bits_needs_another_kernel(size):
    kernels = ahead.run(replace(SHAPE, head_size=size, codes=True), 1)
    assert 0 < len(kernels.compiled) <= 7, kernels.compiled
    before, groups = len(kernels.compiled), -(-size // 64)
    for tiles in (1, 9, 1501):
        codes = Codes(
            made(tiles * TILE, size // 8, dtype=torch.int32),
            made(tiles, size // 2, 4, 2, TILE // 32, dtype=torch.int32),
            made(tiles, 6, size // 2, dtype=torch.float16),
            made(tiles, 2 * groups, TILE, dtype=torch.float16),
            made(tiles, 3, dtype=torch.int32),
            made(KV_HEADS, 2, dtype=torch.int32),
            floats(size // 2),
            made(TILE, 2, size // 2, dtype=torch.float16),
            tiles,
        )
        packed.unpack(codes, made(tiles * TILE, size), made(tiles * TILE, size))
        for batch in (1, 2, 3, 16, 33, 64):
            q, lse = made(batch, HEADS, 1, size), floats(KV_HEADS, batch, HEADS // KV_HEADS)
            packed.glances(codes, made(*lse.shape, size), lse, 64 * tiles, 0.1)
            for tokens in (None, 64, 2048):
                suffix = made(batch, KV_HEADS, tokens or 1, size)
                behind = suffix, suffix, made(batch, dtype=torch.int64)
                step_attention.attend(q, codes, None if tokens is None else behind, 0.1)
    assert kernels.compiled[before:] == []


def test_another_process_compiles_once_and_is_left_alone_afterwards(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    small = ahead.Shape(arch=90, dtype="float16", heads=4, kv_heads=2, head_size=16)
    with caplog.at_level(logging.INFO):
        ahead.compile_ahead(small, threading.Event())
    kept = {path.name for path in tmp_path.iterdir()}
    assert len(kept) > 5 and not caplog.records
    monkeypatch.setattr(ahead.subprocess, "Popen", lambda *given, **named: 1 / 0)
    ahead.compile_ahead(small, threading.Event())
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_a_compiler_that_fails_is_told_of_and_nothing_else_happens(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with caplog.at_level(logging.INFO):
        ahead.compile_ahead(
            ahead.Shape(arch=90, dtype="no such type", heads=4, kv_heads=2, head_size=16), threading.Event()
        )
    assert "at their first use" in caplog.text and not list(tmp_path.glob("cribsheet-*"))


def test_a_folder_that_cannot_be_looked_into_is_told_of_and_nothing_else_happens(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / ("too long" * 50)))
    with caplog.at_level(logging.INFO):
        ahead.compile_ahead(ahead.Shape(arch=90, dtype="float16", heads=4, kv_heads=2, head_size=16), threading.Event())
    assert "at their first use" in caplog.text


def test_nothing_is_imported_from_where_somebody_works(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "kernels"))
    (tmp_path / "triton.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO):
        ahead.compile_ahead(ahead.Shape(arch=90, dtype="float16", heads=4, kv_heads=2, head_size=16), threading.Event())
    assert not caplog.records and list((tmp_path / "kernels").glob("cribsheet-*"))


def of_group(group):
    """The processes of a group that are running."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = place.read_text().rpartition(")")
            state, _, own, *_ = rest.split()
            found += [name.partition("(")[2]] if int(own) == group and state != "Z" else []
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="tells processes by /proc")
def test_a_compiler_that_is_given_up_leaves_no_assembler_behind(monkeypatch, tmp_path):
    slow, began = tmp_path / "ptxas", tmp_path / "began"
    slow.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec {knobs.nvidia.ptxas.path} --version\necho >{began}\nsleep 300\n'
    )
    slow.chmod(0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(slow))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "kernels"))
    started, closing, start = [], threading.Event(), subprocess.Popen
    monkeypatch.setattr(
        ahead.subprocess, "Popen", lambda *given, **how: started.append(start(*given, **how)) or started[0]
    )
    thread = threading.Thread(target=ahead.compile_ahead, args=(SHAPE, closing))
    thread.start()
    while thread.is_alive() and not began.exists():
        time.sleep(0.01)
    assert {"python", "ptxas", "sleep"} <= {name[:6] for name in of_group(started[0].pid)}
    closing.set()
    thread.join()
    assert of_group(started[0].pid) == []


def test_who_closes_does_not_wait_for_a_compiler(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    closing = threading.Event()
    closing.set()
    with caplog.at_level(logging.INFO):
        ahead.compile_ahead(SHAPE, closing)
    assert not caplog.records and not list(tmp_path.glob("cribsheet-*"))
