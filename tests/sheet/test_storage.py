"""Sheets on disk: one file, written whole or not at all, and nothing but a sound sheet is opened."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import struct
import sys
import zipfile
from dataclasses import replace

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT, QUESTION
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cribsheet import CompressedKnowledgeLLM, build_sheet, load_sheet, save_sheet
from cribsheet.errors import SheetError
from cribsheet.sheet.file import read_manifest, verify
from cribsheet.sheet.layers import FloatLayer
from cribsheet.sheet.sheet import Sheet
from cribsheet.testing import tiny_backbone


@pytest.fixture(scope="module")
def sheet():
    return build_sheet(tiny_backbone(), DOCUMENTS, FEW_SHOT, rate=3)


@pytest.fixture
def file(sheet, tmp_path):
    return save_sheet(sheet, tmp_path / "staff.sheet")


def parts(file):
    with safe_open(file, "pt") as opened:
        return load_file(file), dict(opened.metadata())


def rewritten(file, change_manifest=None, **tensors):
    """The file again with some tensors replaced (or, if None, left out) and its manifest changed."""
    held, metadata = parts(file)
    held = {name: tensor.clone() for name, tensor in {**held, **tensors}.items() if tensor is not None}
    manifest = json.loads(metadata["cribsheet"])
    if change_manifest:
        manifest = change_manifest(manifest) or manifest
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    save_file(held, file, metadata={**metadata, "cribsheet": text})
    return file


def test_a_sheet_is_as_readable_as_any_other_file_of_the_user(tiny, tmp_path):
    sheet = build_sheet(tiny, DOCUMENTS, FEW_SHOT, rate=2, scorer="task")
    (tmp_path / "plain").write_text("")
    assert save_sheet(sheet, tmp_path / "a.sheet").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_file_holds_what_the_format_says(sheet, file):
    tensors, metadata = parts(file)
    layers = [f"layers.{number}.{half}" for number in range(3) for half in ("keys", "values")]
    assert set(tensors) == {"indices", "origins", "texts", *layers}
    assert set(metadata) == {"format", "cribsheet", "sha256"} and metadata["format"] == "pt"
    assert tensors["indices"].dtype == tensors["origins"].dtype == torch.int32
    assert tensors["texts"].dtype == torch.uint8
    assert json.loads(bytes(tensors["texts"])) == [document.text for document in DOCUMENTS]
    manifest = json.loads(metadata["cribsheet"])
    assert set(manifest) == {
        "format", "cribsheet", "created", "fingerprint", "system", "template_options", "head", "task", "guide",
        "guide_tokens", "corpus_digest", "corpus_tokens", "head_tokens", "documents", "scorer", "seed", "budget",
        "chunk_tokens", "dtype", "build", "mode", "allocation", "correction", "document_rate",
        "document_most", "segments", "history", "cut_from", "retention", "form", "archive",
    }  # fmt: skip
    assert manifest["format"] == 1
    assert set(manifest["fingerprint"]) == {
        "model", "revision", "family", "layers", "heads", "kv_heads", "head_size", "rotary", "weights",
        "weights_dtype", "weights_probe", "tokenizer", "template", "windows", "vocabulary", "rotary_scaling",
    }  # fmt: skip
    assert manifest["documents"][0] == {
        "id": "alice", "characters": 80, "tokens": sheet.manifest.documents[0].tokens, "metadata": {},
        "digest": sheet.manifest.documents[0].digest,
    }  # fmt: skip


def test_the_file_begins_as_safetensors_and_holds_no_pickle(file):
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    assert json.loads(data[8 : 8 + size])["indices"]["dtype"] == "I32"
    assert not zipfile.is_zipfile(file) and b"pickle" not in data


def test_texts_may_be_left_out(sheet, tmp_path):
    loaded = load_sheet(save_sheet(sheet, tmp_path / "a.sheet", texts=False))
    assert loaded.texts == ()
    assert [document.text for document in loaded.documents] == [""] * 4
    assert loaded.spans() == sheet.spans()
    assert b"Lisbon" not in (tmp_path / "a.sheet").read_bytes()


def test_the_manifest_is_read_without_the_tensors(sheet, file):
    assert read_manifest(file) == sheet.manifest


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, 0.2, 0.5, 0.9, -1000, -1])
def test_a_truncated_file_is_refused_by_name(file, keep):
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    for opened in (load_sheet, read_manifest):
        with pytest.raises(
            SheetError, match=r"staff\.sheet' is not a readable sheet .* it is truncated or something else"
        ):
            opened(file)


def test_a_flipped_bit_in_the_header_never_gets_past_as_anything_but_a_sheet_error(file):
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    refused = 0
    for place in [*range(8), *range(8, 8 + size, 41)]:
        flipped = bytearray(data)
        flipped[place] ^= 1 << (place % 7)
        file.write_bytes(flipped)
        try:
            load_sheet(file)
        except SheetError:
            refused += 1
    assert refused > 20


def foreign_files(folder):
    (folder / "text.sheet").write_text("A text that calls itself a sheet.\n" * 100)
    (folder / "pickle.sheet").write_bytes(pickle.dumps({"layers": [1, 2, 3]}))
    torch.save({"keys": torch.zeros(2)}, folder / "torch.sheet")
    with zipfile.ZipFile(folder / "zip.sheet", "w") as archive:
        archive.writestr("manifest.json", "{}")
    (folder / "huge.sheet").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    claim = json.dumps({"keys": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (folder / "claims.sheet").write_bytes(struct.pack("<Q", len(claim)) + claim)
    (folder / "zeros.sheet").write_bytes(bytes(1000))
    return sorted(folder.glob("*.sheet"))


def test_foreign_files_are_refused_and_never_executed(tmp_path):
    files = foreign_files(tmp_path)
    assert len(files) == 7
    for file in files:
        said = "is not a readable sheet" if file.stem == "claims" else "is no sheet: it does not begin as a safetensors"
        with pytest.raises(SheetError, match=said):
            load_sheet(file)


def test_a_foreign_safetensors_file_is_refused_as_such(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "a.sheet")
    with pytest.raises(SheetError, match="is a safetensors file but not a sheet: it has no cribsheet manifest"):
        load_sheet(tmp_path / "a.sheet")


def test_a_missing_file_and_a_folder_are_refused_with_the_way_out(tmp_path):
    with pytest.raises(SheetError, match=r"There is no sheet .*; build one with `CompressedKnowledgeLLM.build`"):
        load_sheet(tmp_path / "none.sheet")
    with pytest.raises(SheetError, match=r"is a folder, and a sheet is a file; name a file in it, or .*#NAME\.$"):
        load_sheet(tmp_path)


@pytest.mark.parametrize("version", [0, 3, "1", None])
def test_another_format_version_is_refused_with_both_numbers(file, version):
    rewritten(file, lambda manifest: {**manifest, "format": version, "cribsheet": "9.9"})
    with pytest.raises(
        SheetError, match=rf"has sheet format {version!r}, but this version reads format 1 and 2; .*\(9\.9\)"
    ):
        load_sheet(file)


DAMAGES = {
    "a list": lambda manifest: [manifest],
    "not json": lambda manifest: "{" + json.dumps(manifest),
    "too deep": lambda manifest: '{"format": 1, "build": ' + "[" * 100_000,
    "a number too long": lambda manifest: '{"format": 1, "seed": ' + "9" * 5000 + "}",
    "a missing field": lambda manifest: {name: value for name, value in manifest.items() if name != "head"},
    "an unknown field": lambda manifest: {**manifest, "extra": 1},
    "a foreign type": lambda manifest: {**manifest, "documents": "none"},
    "a foreign dtype": lambda manifest: {**manifest, "dtype": "int3"},
    "four bits in the format before them": lambda manifest: {**manifest, "dtype": "int4"},
    "eight bits in the format of four": lambda manifest: {**manifest, "format": 2, "dtype": "int8"},
    "a missing print": lambda manifest: {**manifest, "fingerprint": {}},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_is_refused(file, damage):
    with pytest.raises(SheetError, match=r"damaged manifest|has sheet format"):
        load_sheet(rewritten(file, DAMAGES[damage]))


def with_print(**changes):
    return lambda manifest: {**manifest, "fingerprint": {**manifest["fingerprint"], **changes}}


LIES = {
    "more layers": (with_print(layers=4), {}),
    "endless layers": (with_print(layers=10**9), {}),
    "fewer layers": (with_print(layers=2), {}),
    "no layers": (with_print(layers=0), {}),
    "more heads": (with_print(kv_heads=4), {}),
    "larger heads": (with_print(head_size=32), {}),
    "fewer documents": (lambda manifest: {**manifest, "documents": manifest["documents"][:1]}, {"texts": None}),
    "another dtype": (lambda manifest: {**manifest, "dtype": "float16"}, {}),
    "no indices": (None, {"indices": None}),
    "no keys": (None, {"layers.1.keys": None}),
    "short keys": (None, {"layers.1.keys": torch.zeros(2, 3, 16)}),
    "flat keys": (None, {"layers.1.keys": torch.zeros(7)}),
    "scalar indices": (None, {"indices": torch.tensor(3, dtype=torch.int32)}),
    "flat indices": (None, {"indices": torch.zeros(3, dtype=torch.int32)}),
    "float indices": (None, {"indices": torch.zeros(3, 2, 76)}),
    "narrow origins": (None, {"origins": torch.zeros(5, 3, dtype=torch.int32)}),
    "no origins": (None, {"origins": torch.zeros(0, 4, dtype=torch.int32)}),
    "whole keys": (None, {"layers.0.keys": torch.zeros(2, 76, 16, dtype=torch.int64)}),
    "texts that are no json": (None, {"texts": torch.tensor([123, 255, 0], dtype=torch.uint8)}),
    "texts of others": (None, {"texts": torch.tensor(list(b'["a","b"]'), dtype=torch.uint8)}),
    "texts that are none": (None, {"texts": torch.tensor(list(b"[1,2,3,4]"), dtype=torch.uint8)}),
    "texts that are a number": (None, {"texts": torch.tensor(list(b"7"), dtype=torch.uint8)}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lies_about_its_tensors_is_refused(file, lie):
    change, tensors = LIES[lie]
    with pytest.raises(SheetError, match=r"staff\.sheet'"):
        load_sheet(rewritten(file, change, **tensors))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(sheet, file, tmp_path, monkeypatch):
    before = file.read_bytes()

    class Interrupted(BaseException):
        pass

    def broken(*args, **options):
        (tmp_path / f".probe-{len(os.listdir(tmp_path))}").unlink(missing_ok=True)
        raise Interrupted

    for step in ("replace",):
        monkeypatch.setattr(os, step, broken)
        with pytest.raises(Interrupted):
            save_sheet(sheet, file)
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["staff.sheet"]


def test_the_file_appears_whole_or_not_at_all_also_beside_others(sheet, tmp_path, monkeypatch):
    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(load_sheet(a).tokens), replace(a, b)))
    save_sheet(sheet, tmp_path / "a.sheet")
    assert seen == [sheet.tokens] and os.listdir(tmp_path) == ["a.sheet"]


def test_a_folder_that_is_missing_or_cannot_be_written_is_refused(sheet, tmp_path):
    with pytest.raises(SheetError, match=r"The folder .*nowhere' does not exist; create it first"):
        save_sheet(sheet, tmp_path / "nowhere" / "a.sheet")
    (tmp_path / "taken.sheet").mkdir()
    with pytest.raises(SheetError, match=r"cannot be written to .*taken\.sheet"):
        save_sheet(sheet, tmp_path / "taken.sheet")
    assert os.listdir(tmp_path) == ["taken.sheet"]
    if sys.platform == "linux":
        with pytest.raises(SheetError, match="cannot be written"):
            save_sheet(sheet, "/proc/a.sheet")


def test_saving_over_an_open_sheet_leaves_the_open_one_as_it_was(sheet, file):
    opened = load_sheet(file)
    halved = [FloatLayer(layer.keys / 2, layer.values / 2) for layer in sheet.layers]
    save_sheet(Sheet(halved, sheet.indices, sheet.origins, sheet.manifest, sheet.texts), file)
    assert torch.equal(opened.layers[0].keys, sheet.layers[0].keys)
    assert torch.equal(load_sheet(file).layers[0].keys, halved[0].keys)


def rss() -> int:
    with open("/proc/self/statm") as status:
        return int(status.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_sheet_opens_without_being_read_into_memory(sheet, tmp_path):
    tokens = (64 << 20) // (3 * 2 * 2 * 16 * 4)
    layers = [FloatLayer(torch.zeros(2, tokens, 16), torch.zeros(2, tokens, 16)) for _ in range(3)]
    indices = torch.zeros(3, 2, tokens, dtype=torch.int32)
    path = save_sheet(Sheet(layers, indices, sheet.origins, sheet.manifest, sheet.texts), tmp_path / "a.sheet")
    del layers
    before = rss()
    loaded = load_sheet(path)
    grown = rss() - before
    assert path.stat().st_size > 64 << 20
    assert grown < 8 << 20
    assert float(loaded.layers[2].values[1, -1, -1]) == 0.0


def _killed_while_saving(folder):
    backbone = tiny_backbone()
    made = build_sheet(backbone, DOCUMENTS, FEW_SHOT, rate=3)
    os.replace = lambda a, b: os._exit(9)
    save_sheet(made, folder / "staff.sheet")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_process_killed_while_it_writes_leaves_the_old_sheet(file, tmp_path):
    before = file.read_bytes()
    process = multiprocessing.get_context("fork").Process(target=_killed_while_saving, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert file.read_bytes() == before
    assert load_sheet(file).tokens > 0


def test_a_single_changed_bit_is_found_by_verify(file):
    verify(file)
    damaged = bytearray(file.read_bytes())
    damaged[-5] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(SheetError, match="was changed after it was saved: its tensors have the digest"):
        verify(file)


def test_verify_needs_a_digest_to_compare_with(file):
    held, metadata = parts(file)
    held = {name: tensor.clone() for name, tensor in held.items()}
    save_file(held, file, metadata={key: value for key, value in metadata.items() if key != "sha256"})
    load_sheet(file)
    with pytest.raises(SheetError, match="holds no digest of its tensors; save it again"):
        verify(file)


@pytest.mark.parametrize("dtype", ["int4", "int8", "bfloat16"])
def test_verify_reads_every_storage_type(tmp_path, dtype):
    built = build_sheet(tiny_backbone(), DOCUMENTS, FEW_SHOT, rate=3, dtype=dtype)
    verify(save_sheet(built, tmp_path / "a.sheet", texts=False))


FOUR_BITS = {
    "no blocks": {"layers.1.key_blocks": None},
    "no offsets": {"layers.1.value_offsets": None},
    "a block of nothing": {"layers.1.key_blocks": torch.tensor([76, 0, 76], dtype=torch.uint8)},
    "a block across heads": {"layers.1.key_blocks": torch.tensor([75, 77], dtype=torch.uint8)},
    "blocks of fewer tokens": {"layers.1.key_blocks": torch.tensor([76, 70], dtype=torch.uint8)},
    "blocks of another type": {"layers.1.key_blocks": torch.tensor([76, 76])},
    "flat blocks": {"layers.1.key_blocks": torch.tensor(76, dtype=torch.uint8)},
    "wide scales": {"layers.1.key_scales": torch.ones(2, 16)},
    "more ranges": {"layers.1.key_offsets": torch.ones(3, 16, dtype=torch.float16)},
    "whole keys": {"layers.1.keys": torch.zeros(2, 76, 16, dtype=torch.uint8)},
    "signed values": {"layers.1.values": torch.zeros(2, 76, 8, dtype=torch.int8)},
}


@pytest.mark.parametrize("lie", FOUR_BITS)
def test_four_bits_that_are_not_as_the_format_says_are_refused(tmp_path, lie):
    built = build_sheet(tiny_backbone(), DOCUMENTS, FEW_SHOT, rate=3, dtype="int4", scorer="task", guide="dropped")
    assert built.layers[1].key_blocks.tolist() == [built.tokens] * 2 == [76, 76]
    path = save_sheet(built, tmp_path / "staff.sheet")
    load_sheet(path)
    with pytest.raises(SheetError, match=r"staff\.sheet"):
        load_sheet(rewritten(path, None, **FOUR_BITS[lie]))


def test_a_sheet_made_before_there_were_segments_still_opens(sheet, file):
    tensors, metadata = parts(file)
    manifest = json.loads(metadata["cribsheet"])
    for later in ("mode", "document_rate", "segments", "history"):
        del manifest[later]
    for document in manifest["documents"]:
        del document["digest"]
    save_file(tensors, file, metadata={**metadata, "cribsheet": json.dumps(manifest)})
    assert load_sheet(file).manifest.mode == "sequential" and load_sheet(file).manifest.segments == []


@pytest.mark.parametrize("change", [("kept", 1), ("read", 1), ("documents", 1), ("kept", -(10**6))])
def test_segments_that_do_not_add_up_are_refused(tiny, tmp_path, change):
    made = build_sheet(tiny, DOCUMENTS, FEW_SHOT, rate=2, scorer="task", mode="independent")
    tensors, metadata = parts(save_sheet(made, tmp_path / "a.sheet"))
    manifest = json.loads(metadata["cribsheet"])
    manifest["segments"][0][change[0]] += change[1]
    save_file(tensors, tmp_path / "b.sheet", metadata={**metadata, "cribsheet": json.dumps(manifest)})
    with pytest.raises(SheetError, match=r"do not fit its manifest|damaged manifest"):
        load_sheet(tmp_path / "b.sheet")


@pytest.mark.parametrize("scorer", ["notes", "recall-notes", "key-norm", "task-peak"])
def test_a_sheet_of_a_scorer_that_is_no_more_opens_and_answers(tmp_path, scorer):
    backbone = tiny_backbone()
    sheet = build_sheet(backbone, DOCUMENTS, FEW_SHOT, rate=3)
    old = replace(sheet, manifest=sheet.manifest.model_copy(update={"scorer": scorer, "chunk_tokens": 1024}))
    kept = load_sheet(save_sheet(old, tmp_path / "old.sheet"))
    with CompressedKnowledgeLLM(backbone, sheet) as new, CompressedKnowledgeLLM(backbone, kept) as kb:
        assert kb.ask(QUESTION, max_tokens=6).text == new.ask(QUESTION, max_tokens=6).text
    assert kept.manifest.scorer == scorer
