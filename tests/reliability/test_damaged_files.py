"""Whatever is in a file: an error of ours or the right content, never a crash, a hang or what it asks to allocate."""

from __future__ import annotations

import contextlib
import json
import resource
import struct
import time

import pytest
import torch

from cribsheet import load_sheet
from cribsheet.errors import SheetError
from cribsheet.sheet.file import read_manifest, verify
from cribsheet.sheet.manifest import Manifest

pytestmark = pytest.mark.reliability
MEGABYTE = 1 << 20


def header_of(data):
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header, rest):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + rest


def with_manifest(data, change):
    """The file with its manifest's text changed."""
    header, rest = header_of(data)
    header["__metadata__"]["cribsheet"] = change(header["__metadata__"]["cribsheet"])
    return with_header(header, rest)


def cut(raw, dice, size):
    del raw[dice.randrange(len(raw)) :]


def lengthened(raw, dice, size):
    raw += dice.randbytes(dice.randrange(1, 100))


def flipped(raw, dice, size):
    for _ in range(dice.randrange(1, 20)):
        raw[dice.randrange(len(raw))] = dice.randrange(256)


def flipped_in_the_header(raw, dice, size):
    for _ in range(dice.randrange(1, 8)):
        raw[dice.randrange(8 + size)] = dice.randrange(256)


def miscounted(raw, dice, size):
    """Digits of the header: shapes, offsets, counts."""
    places = [at for at in range(8, 8 + size) if chr(raw[at]).isdigit()]
    for _ in range(dice.randrange(1, 4)):
        raw[dice.choice(places)] = ord(dice.choice("0123456789-e"))


def missized(raw, dice, size):
    wrong = [0, 1, size - 1, size + 1, 1 << 31, (1 << 63) - 1, (1 << 64) - 1]
    raw[:8] = struct.pack("<Q", dice.choice(wrong))


def holed(raw, dice, size):
    at = dice.randrange(len(raw))
    del raw[at : at + dice.randrange(1, 200)]


def copied(raw, dice, size):
    at, length, to = dice.randrange(len(raw)), dice.randrange(1, 200), dice.randrange(len(raw))
    raw[to : to + length] = raw[at : at + length]


MUTATIONS = (cut, lengthened, flipped, flipped_in_the_header, miscounted, missized, holed, copied)


def mutated(data, dice):
    """The file with one of the things that disks, networks and strangers do to files."""
    raw = bytearray(data)
    dice.choice(MUTATIONS)(raw, dice, struct.unpack("<Q", data[:8])[0])
    return bytes(raw)


def same(found, wanted):
    return all(
        torch.equal(getattr(a, part), getattr(b, part))
        for a, b in zip(found.layers, wanted.layers, strict=True)
        for part in ("keys", "values")
    ) and torch.equal(found.indices, wanted.indices)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_mutated_file_is_refused_or_right(sheet_file, made, dice, times, tmp_path):
    data, file = sheet_file.read_bytes(), tmp_path / "mutated.sheet"
    file.write_bytes(data)
    verify(file)
    loaded = refused = 0
    before, slowest = peak(), 0.0
    for _ in range(times(10_000)):
        file.write_bytes(mutated(data, dice))
        began = time.perf_counter()
        try:
            sheet = load_sheet(file)
            sheet.spans(), sheet.kept_share, sheet.places, sheet.documents, sheet.task
            loaded += 1
        except SheetError:
            refused += 1
        try:
            verify(file)
        except SheetError:
            pass
        else:
            assert same(load_sheet(file), made)
        slowest = max(slowest, time.perf_counter() - began)
    assert loaded + refused == times(10_000) and refused > 0
    assert peak() - before < 300 * MEGABYTE
    assert slowest < 20


def huge(text):
    return text.replace('"corpus_tokens":', '"corpus_tokens":9999999999999999999')


HOSTILE = {
    "deep": lambda text: '{"format":1,"task":' + "[" * 100_000 + "]" * 100_000 + "}",
    "no mapping": lambda text: "[]",
    "a number": lambda text: "1" * 5000,
    "not a number": lambda text: text.replace('"seed":', '"seed":NaN,"x":'),
    "duplicate keys": lambda text: text[:-1] + ',"scorer":"evil"}',
    "unknown key": lambda text: text[:-1] + ',"run":"rm"}',
    "many layers": lambda text: text.replace('"layers":3', '"layers":3000000'),
    "many heads": lambda text: text.replace('"kv_heads":2', '"kv_heads":2000000000'),
    "huge heads": lambda text: text.replace('"head_size":16', '"head_size":16000000000'),
    "another type": lambda text: text.replace('"dtype":"float32"', '"dtype":"os.system"'),
    "negative sizes": lambda text: text.replace('"characters":', '"characters":-'),
    "another format": lambda text: text.replace('"format":1', '"format":99'),
    "half a surrogate": lambda text: text.replace('"alice"', '"\\ud800"'),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_manifest_is_refused(kind, sheet_file, tmp_path):
    file = tmp_path / "hostile.sheet"
    changed = with_manifest(sheet_file.read_bytes(), HOSTILE[kind])
    assert changed != sheet_file.read_bytes()
    file.write_bytes(changed)
    before = peak()
    with pytest.raises(SheetError):
        load_sheet(file)
    assert peak() - before < 100 * MEGABYTE


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4 << 40]},
        {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
    ],
)
def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(entry, sheet_file, tmp_path):
    header, rest = header_of(sheet_file.read_bytes())
    name = next(name for name in header if name.endswith("keys"))
    file = tmp_path / "huge.sheet"
    file.write_bytes(with_header({**header, name: entry}, rest))
    before = peak()
    with pytest.raises(SheetError):
        load_sheet(file)
    assert peak() - before < 100 * MEGABYTE


def test_names_in_a_manifest_are_never_paths(sheet_file, tmp_path):
    """Ids are texts: nothing is opened or written by them."""
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret")
    file = tmp_path / "tricky.sheet"
    file.write_bytes(
        with_manifest(sheet_file.read_bytes(), lambda text: text.replace('"alice"', json.dumps(str(secret))))
    )
    sheet = load_sheet(file)
    assert sheet.documents[0].id == str(secret) and "the secret" not in sheet.documents[0].text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret.txt", "tricky.sheet"]


def test_every_field_of_a_manifest_may_be_missing_or_of_another_type(sheet_file, tmp_path):
    file = tmp_path / "field.sheet"
    for name in Manifest.model_fields:
        for value in (None, [], {}, "x" * 10, -1, 1e300, True, [[[]]]):

            def change(text, name=name, value=value):
                return json.dumps({**json.loads(text), name: value})

            file.write_bytes(with_manifest(sheet_file.read_bytes(), change))
            with contextlib.suppress(SheetError):
                read_manifest(file), load_sheet(file).task
