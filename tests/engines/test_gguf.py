"""The header of a GGUF file: all of it or refused, whatever the bytes."""

from __future__ import annotations

import struct

import pytest
import torch
from gguf_files import settings_of, tensors_of, write_gguf

from cribsheet.engines.gguf import Gguf
from cribsheet.errors import ModelError


def test_settings_and_plain_tensors_are_read_as_they_were_written(qwen3, tmp_path):
    told, tensors = settings_of(qwen3), tensors_of(qwen3, torch.float16)
    read = Gguf.open(write_gguf(tmp_path / "model.gguf", told, tensors))
    assert read.architecture == "qwen3" and read.of_model("block_count") == 3 and read.of_model("nothing", 7) == 7
    assert read.vocabulary == len(qwen3.tokenizer)
    plain = {name: value for name, value in told.items() if not isinstance(value, list)}
    assert {name: read.values[name] for name in plain} == pytest.approx(plain)
    assert set(read.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert read.tensors[name].is_plain and torch.equal(read.read(name), tensor.float()), name


def test_a_file_that_ends_early_is_refused_wherever_it_ends(qwen3, qwen3_gguf, tmp_path):
    whole, cut = qwen3_gguf.read_bytes(), tmp_path / "cut.gguf"
    tensors = Gguf.open(qwen3_gguf).tensors
    header = min(tensor.start for tensor in tensors.values())
    for end in {0, 3, 4, 12, 23, 24, *range(30, header - 40, 997)}:
        cut.write_bytes(whole[:end])
        with pytest.raises(ModelError, match=r"no readable GGUF file: it .*; download or convert it again"):
            Gguf.open(cut)
    cut.write_bytes(whole[:-40])
    last = max(tensors, key=lambda name: tensors[name].start)
    with pytest.raises(ModelError, match=f"ends before its tensor '{last}'"):
        Gguf.open(cut).read(last)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (b"PK\3\4" + bytes(40), "it does not begin with GGUF"),
        (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0), "its version is 1, and 2 and 3 are read"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "little-endian"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 1 << 40, 0), "1099511627776 entries are announced"),
        (struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 1 << 60), "a text of 1152921504606846976 bytes"),
        (struct.pack("<4sIQQQ1sI", b"GGUF", 3, 0, 1, 1, b"a", 77), "of the type 77, which there is not"),
        (struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"a", 9, 4, 1 << 20), "within its header"),
        (struct.pack("<4sIQQQ1sI", b"GGUF", 3, 0, 1, 1, b"a", 9) + struct.pack("<IQ", 9, 1) * 5000, "recursion depth"),
        (struct.pack("<4sIQQQ17sII", b"GGUF", 3, 0, 1, 17, b"general.alignment", 4, 0), "its alignment is 0"),
        (struct.pack("<4sIQQQ1sIQIQ", b"GGUF", 3, 1, 0, 1, b"a", 1, 0, 0, 0), r"its tensor 'a' has the shape \[0\]"),
        (struct.pack("<4sIQQQ1sIQIQ", b"GGUF", 3, 1, 0, 1, b"a", 1, 1 << 60, 0, 0), r"its tensor 'a' has the shape"),
    ],
    ids=[
        "another file",
        "version",
        "endian",
        "tensors",
        "text",
        "type",
        "list",
        "nested",
        "alignment",
        "empty",
        "huge",
    ],
)
def test_damage_is_named(written, said, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(written)
    with pytest.raises(ModelError, match=said):
        Gguf.open(tmp_path / "bad.gguf")


def test_a_tensor_that_is_said_to_be_larger_than_the_file_takes_no_memory(tmp_path):
    head = struct.pack("<4sIQQQ1sIQIQ", b"GGUF", 3, 1, 0, 1, b"a", 1, 1 << 47, 0, 0)
    (tmp_path / "large.gguf").write_bytes(head + bytes(64))
    with pytest.raises(ModelError, match="ends before its tensor 'a'"):
        Gguf.open(tmp_path / "large.gguf").read("a")


def test_settings_of_another_kind_count_as_not_there(qwen3, tmp_path):
    told = settings_of(qwen3) | {"qwen3.block_count": "three", "qwen3.attention.head_count": [4, 4, 4]}
    read = Gguf.open(write_gguf(tmp_path / "odd.gguf", told, {}))
    assert read.count("attention.head_count", 9) == 9 and read.vocabulary == len(qwen3.tokenizer)
    assert read.count("block_count", 7) == 7 and read.of_model("block_count") == "three"


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"There is no GGUF file .*nothing"):
        Gguf.open(tmp_path / "nothing.gguf")
