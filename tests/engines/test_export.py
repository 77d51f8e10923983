"""Files of other engines: what stands in them, byte by byte, and sheets that cannot go there."""

from __future__ import annotations

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT
from gguf_files import plain_backbone, save_gguf
from safetensors import safe_open

from cribsheet import CompressedKnowledgeLLM, Sheet
from cribsheet.build import build_sheet
from cribsheet.cli import run
from cribsheet.engines.placeholders import placeholders
from cribsheet.errors import BudgetError, MismatchError, SheetError
from cribsheet.sheet.file import load, save
from cribsheet.testing import tiny_backbone


def state_of(path):
    """A state file taken apart: version, ids, cells, keys and values (layers, P, K * D) as float32."""
    held = path.read_bytes()
    place = 0

    def take(form):
        nonlocal place
        found = struct.unpack_from(f"<{form}", held, place)
        place += struct.calcsize(f"<{form}")
        return found

    magic, version, count = take("III")
    ids, (streams, cells) = take(f"{count}i"), take("II")
    where = [take("iIi") for _ in range(cells)]
    transposed, layers, *rest = take("IIII")
    assert (magic, streams, cells, transposed, rest) == (0x67677371, 1, count, 0, [0, 0])
    halves = []
    for _ in range(2 * layers):
        kind, size = take("iQ")
        assert kind == 1
        halves.append(np.frombuffer(held, np.float16, cells * size // 2, place).reshape(cells, -1).astype(np.float32))
        place += cells * size
    assert place == len(held)
    return version, ids, where, np.stack(halves[:layers]), np.stack(halves[layers:])


def expected(sheet, part):
    """Keys or values of a sheet by plain loops: a row of all heads for each token."""
    layers = [getattr(layer, part).float().numpy() for layer in sheet.layers]
    rows = [[np.concatenate([head[token] for head in layer]) for token in range(sheet.length)] for layer in layers]
    return np.array(rows).astype(np.float16).astype(np.float32)


def test_a_state_holds_every_number_where_llama_cpp_reads_it(qwen3_sheet, tmp_path):
    made = qwen3_sheet.export(tmp_path / "a.state", to="llama.cpp")
    version, ids, where, keys, values = state_of(made)
    assert version == 4 and where == [(position, 1, 0) for position in range(96)]
    assert list(ids) == placeholders(qwen3_sheet.manifest.digest, 96)
    assert np.array_equal(keys, expected(qwen3_sheet, "keys"))
    assert np.array_equal(values, expected(qwen3_sheet, "values"))


def test_llamas_keys_have_the_channels_that_turn_together_side_by_side(tmp_path):
    sheet = build_sheet(plain_backbone("llama"), DOCUMENTS, FEW_SHOT, budget=96, for_engines=True)
    _, _, _, keys, values = state_of(sheet.export(tmp_path / "a.state"))
    assert np.array_equal(values, expected(sheet, "values"))
    heads = expected(sheet, "keys").reshape(3, 96, 2, 16)
    order = [channel for pair in range(8) for channel in (pair, pair + 8)]
    assert np.array_equal(keys.reshape(3, 96, 2, 16), heads[..., order])


def test_two_sheets_begin_with_other_ids_which_all_vocabularies_have(qwen3, qwen3_sheet):
    other = build_sheet(qwen3, DOCUMENTS[:2], FEW_SHOT, budget=96, for_engines=True).manifest.digest
    ours, theirs = placeholders(qwen3_sheet.manifest.digest, 96), placeholders(other, 96)
    assert max(ours + theirs) < 256 and ours[:8] != theirs[:8]
    assert placeholders(other, 32) == theirs[:32]


def test_int8_goes_there_restored(qwen3, tmp_path):
    sheet = build_sheet(qwen3, DOCUMENTS, FEW_SHOT, budget=96, for_engines=True, dtype="int8")
    keys = state_of(sheet.export(tmp_path / "a.state"))[3]
    restored = [layer.restored(torch.device("cpu"), torch.float32) for layer in sheet.layers]
    assert np.array_equal(keys, expected(replace(sheet, layers=restored), "keys"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rate": 2}, "different numbers of tokens .allocation 'profiled'.*build it again with for_engines=True"),
        ({"rate": 2, "allocation": "adaptive"}, "allocation 'adaptive'"),
        ({"rate": 2, "allocation": "uniform", "dtype": "int4"}, "Keys of int4 are stored before rotation"),
        ({"rate": 2, "mode": "independent", "allocation": "uniform"}, "Keys of an independent sheet are stored before"),
    ],
    ids=["profiled", "adaptive", "int4", "independent"],
)
@pytest.mark.parametrize("engine", ["llama.cpp", "mlx", "vllm"])
def test_a_sheet_of_another_form_is_refused_with_the_way_out(qwen3, options, said, engine, tmp_path):
    sheet = build_sheet(qwen3, DOCUMENTS, FEW_SHOT, **options)
    with pytest.raises(SheetError, match=said):
        sheet.export(tmp_path / "a.state", to=engine)
    assert not list(tmp_path.iterdir())


def test_what_was_not_tested_is_refused_by_name(qwen3_sheet, tmp_path):
    for version in (3, 5, True, 0, 4.0):
        with pytest.raises(SheetError, match=f"of version {version!r} were not tested; use version 4"):
            qwen3_sheet.export(tmp_path / "a.state", version=version)
    with pytest.raises(SheetError, match=r"no engine 'ollama'; use llama.cpp, mlx, vllm"):
        qwen3_sheet.export(tmp_path / "a.state", to="ollama")
    with pytest.raises(SheetError, match=r"version and gguf are llama.cpp's"):
        qwen3_sheet.export(tmp_path / "a.state", to="mlx", version=4)
    slides = build_sheet(tiny_backbone("qwen2"), DOCUMENTS, FEW_SHOT, budget=96, for_engines=True)
    with pytest.raises(SheetError, match="Some layers of tiny-qwen2 see only the last tokens"):
        slides.export(tmp_path / "a.state")
    granite = build_sheet(tiny_backbone("granite"), DOCUMENTS, FEW_SHOT, budget=96, for_engines=True)
    with pytest.raises(SheetError, match="from sheets of 'granite' models; use one of llama, mistral"):
        granite.export(tmp_path / "a.state", to="mlx")
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    stretched = build_sheet(
        tiny_backbone("llama", rope_parameters=scaled), DOCUMENTS, FEW_SHOT, budget=96, for_engines=True
    )
    with pytest.raises(SheetError, match=r"Rotary embeddings of tiny-llama are scaled \(linear\)"):
        stretched.export(tmp_path / "a.state")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_gemmas_two_caches_are_refused_by_name(name, qwen3_gguf, tmp_path):
    kb = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=tiny_backbone(name), budget=96, for_engines=True)
    for engine in ("llama.cpp", "mlx", "vllm"):
        with pytest.raises(SheetError, match=f"{engine} was not seen to answer from sheets of '{name}' models; use"):
            kb.sheet.export(tmp_path / "a.state", to=engine)
    with pytest.raises(SheetError, match=f"of '{name}' models"):
        kb.in_llama_cpp(qwen3_gguf)
    assert not list(tmp_path.iterdir())


def test_another_models_file_is_refused_before_anything_is_written(qwen3_sheet, qwen3_gguf, tmp_path):
    other = save_gguf(plain_backbone("qwen3", seed=1), tmp_path / "other.gguf")
    with pytest.raises(MismatchError, match="by its weights"):
        qwen3_sheet.export(tmp_path / "a.state", gguf=other)
    assert [path.name for path in tmp_path.iterdir()] == ["other.gguf"]
    assert qwen3_sheet.export(tmp_path / "a.state", gguf=qwen3_gguf).exists()


@pytest.mark.parametrize("engine", ["llama.cpp", "mlx"])
def test_numbers_beyond_float16_are_refused(qwen3_sheet, engine, tmp_path):
    layers = [replace(layer, values=layer.values.float() * 1e6) for layer in qwen3_sheet.layers]
    with pytest.raises(SheetError, match=rf"caches of {engine} are float16, which holds 65,504"):
        replace(qwen3_sheet, layers=layers).export(tmp_path / "a.state", to=engine)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_named(qwen3_sheet, tmp_path):
    with pytest.raises(SheetError, match=r"The folder .*nowhere' does not exist"):
        qwen3_sheet.export(tmp_path / "nowhere" / "a.state")


def test_a_prompt_cache_of_mlx_has_the_tensors_and_names_of_its_format(qwen3_sheet, tmp_path):
    with safe_open(qwen3_sheet.export(tmp_path / "a.safetensors", to="mlx"), "np") as file:
        assert sorted(file.keys()) == sorted(f"{layer}.{part}" for layer in range(3) for part in (0, 1, 2))
        told = file.metadata()
        assert told.pop("0.sheet") == qwen3_sheet.manifest.digest and told.pop("2.0") == ""
        assert [told.pop(f"1.{layer}") for layer in range(3)] == ["KVCache"] * 3
        assert told == {f"2.{n + 1}.{k}": (f"{n}.2", "scalar")[k] for n in range(3) for k in (0, 1)}
        for number, layer in enumerate(qwen3_sheet.layers):
            assert int(file.get_tensor(f"{number}.2")) == 96
            for part, half in enumerate((layer.keys, layer.values)):
                found = file.get_tensor(f"{number}.{part}")
                assert found.dtype == np.float16 and found.shape == (1, 2, 96, 16)
                assert np.array_equal(found[0], half.half().numpy())


def test_for_engines_keeps_a_multiple_of_sixteen_in_float16_alike_in_all_heads(qwen3, qwen3_sheet):
    assert (qwen3_sheet.manifest.allocation, qwen3_sheet.manifest.dtype) == ("uniform", "float16")
    for options in ({}, {"rate": 3.3}, {"dtype": "bfloat16"}):
        sheet = build_sheet(qwen3, DOCUMENTS, FEW_SHOT, for_engines=True, **options)
        assert sheet.length == sheet.tokens and sheet.length % 16 == 0
        assert sheet.length == int(sheet.manifest.corpus_tokens / options.get("rate", 4)) // 16 * 16
        assert sheet.manifest.dtype == options.get("dtype", "float16")
    with pytest.raises(BudgetError, match=r"at this rate leaves less than the 16 tokens .*; pass a lower rate"):
        build_sheet(qwen3, DOCUMENTS, FEW_SHOT, for_engines=True, rate=100)


def test_the_command_writes_the_file_that_the_method_writes(qwen3_sheet, qwen3_gguf, tmp_path, capsys):
    sheet, state = save(qwen3_sheet, tmp_path / "a.sheet"), tmp_path / "a.state"
    assert run(["export", str(sheet), "--to", "llama.cpp", "--gguf", str(qwen3_gguf), "-o", str(state), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"file": str(state), "engine": "llama.cpp", "tokens": 96, "bytes": state.stat().st_size}
    assert state.read_bytes() == load(sheet).export(tmp_path / "b.state").read_bytes()
    assert run(["export", str(sheet), "--to", "llama.cpp", "-o", str(state)]) == 2
    assert "exists; pass --force" in capsys.readouterr().err
    assert run(["export", str(sheet), "--to", "llama.cpp", "-o", str(state), "--force", "--version", "3"]) == 1
    assert "of version 3 were not tested" in capsys.readouterr().err
    assert state_of(state)[0] == 4


def test_the_command_says_the_way_out_in_flags(qwen3, tmp_path, capsys):
    sheet = save(build_sheet(qwen3, DOCUMENTS, FEW_SHOT, rate=2), tmp_path / "a.sheet")
    assert isinstance(load(sheet), Sheet)
    assert run(["export", str(sheet), "--to", "mlx", "-o", str(tmp_path / "a.cache")]) == 1
    assert "build it again with --for-engines" in capsys.readouterr().err
