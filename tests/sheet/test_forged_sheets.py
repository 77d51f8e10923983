"""Whatever stands in a sheet's manifest and header: it is refused as a `SheetError`, or the sheet can be used."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import struct

import httpx
import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT

from cribsheet import CompressedKnowledgeLLM, build_sheet, load_sheet, save_sheet
from cribsheet.cli import run
from cribsheet.errors import SheetError
from cribsheet.server import Shelf, create_app
from cribsheet.server.sheets import created
from cribsheet.sheet.file import verify
from cribsheet.testing import tiny_backbone

KINDS = {
    "profiled": {},
    "uniform": {"scorer": "recent"},
    "packed": {"scorer": "task", "dtype": "int4", "guide": "dropped"},
    "independent": {"scorer": "task", "dtype": "int8", "mode": "independent"},
}
ODD = [
    None, True, False, 0, -1, 1, 2, 7, 2**31 - 1, 2**31, 2**63, 2**64, 10**400, -(10**400), 0.5, -0.0, 1e308,
    float("nan"), float("inf"), -float("inf"), "", "x", "\x1b[31m", "0" * 50, "\u202e", "\ud800", "9999-12-31T23:59:59",
    "0001-01-01T00:00:00", [], [1], [None], [[]], {}, {"x": 1}, {"seconds": "x"},
    {"seconds": 10**400, "window": -1}, ["a"],
]  # fmt: skip
TYPES = ["F64", "F32", "BF16", "F16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "C64", "", "f32", None]
TRIES = int(os.environ.get("CRIBSHEET_FORGERIES", "150"))


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


@pytest.fixture(scope="module", params=KINDS)
def data(request, backbone, tmp_path_factory):
    """The bytes of a sheet of each kind."""
    made = build_sheet(backbone, DOCUMENTS, FEW_SHOT, **{"rate": 2, **KINDS[request.param]})
    return save_sheet(made, tmp_path_factory.mktemp("sound") / "a.sheet").read_bytes()


def taken_apart(data):
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def put_together(header, rest):
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + rest


def places(value, at=()):
    """Every place in JSON data, of lists the first two items."""
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for name, each in inner:
        yield from places(each, (*at, name))


def changed(value, at, new):
    """The data with another value at a place; with `...`, without one."""
    if not at:
        return new
    copy = value.copy()
    if len(at) == 1 and new is ...:
        del copy[at[0]]
    else:
        copy[at[0]] = changed(value[at[0]], at[1:], new)
    return copy


def use(file, backbone):
    """Everything that is done with a sheet; whether it could be used."""
    try:
        sheet = load_sheet(file)
        verify(file)
    except SheetError:
        return False
    sheet.spans(), sheet.kept_per_document(), sheet.documents, sheet.task, sheet.window, created(sheet.manifest)
    assert 0 < sheet.rate < 2**31 and 0 < float(sheet.manifest.budget) < 2**32 and sheet.nbytes
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert run(["inspect", str(file)]) == 0
    assert not any(mark in shown.getvalue() for mark in "\x1b\u202e")
    with contextlib.suppress(SheetError), CompressedKnowledgeLLM(backbone, sheet) as kb:
        assert kb.ask("Who?", max_tokens=2).usage.completion_tokens
    return True


def attempts(data, dice):
    """Files that were changed in one place of the manifest, or of the header of one tensor."""
    header, rest = taken_apart(data)
    manifest = json.loads(header["__metadata__"]["cribsheet"])
    tensors = [name for name in header if name != "__metadata__"]
    for number in range(TRIES):
        if number % 3:
            at = dice.choice(list(places(manifest)))
            new = ... if at and dice.random() < 0.1 else dice.choice(ODD)
            told = {**header["__metadata__"], "cribsheet": json.dumps(changed(manifest, at, new))}
            yield (at, new), put_together({**header, "__metadata__": told}, rest)
            continue
        name = dice.choice(tensors)
        entry = header[name]
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        other = {**entry, "dtype": dice.choice(TYPES)}
        if dice.random() < 0.5:
            other["shape"] = [size // _width(other["dtype"])]
        else:
            other[dice.choice(list(entry))] = dice.choice(ODD)
        yield (name, other), put_together({**header, name: other}, rest)


def _width(name):
    digits = "".join(filter(str.isdigit, name or "")) or "8"
    return max(1, int(digits[:2]) // 8)


def test_a_forged_sheet_is_refused_as_such_or_can_be_used(data, backbone, tmp_path):
    dice, file, used = random.Random(int(os.environ.get("CRIBSHEET_SEED", "0"))), tmp_path / "forged.sheet", 0
    for what, forged in attempts(data, dice):
        file.write_bytes(forged)
        try:
            used += use(file, backbone)
        except Exception as error:  # which change it was is what one wants to know
            raise AssertionError(f"{what} gave {error!r}") from error
    assert 0 < used < TRIES


def forged(data, at, new):
    header, rest = taken_apart(data)
    manifest = changed(json.loads(header["__metadata__"]["cribsheet"]), at, new)
    return put_together({**header, "__metadata__": {**header["__metadata__"], "cribsheet": json.dumps(manifest)}}, rest)


@pytest.mark.parametrize(
    ("at", "new"),
    [
        (("budget",), 10**400), (("budget",), 10**9), (("corpus_tokens",), 10**400), (("corpus_tokens",), 1),
        (("documents", 0, "characters"), -1), (("documents", 0, "tokens"), 10**6), (("documents",), []),
        (("fingerprint", "kv_heads"), 0), (("fingerprint", "heads"), 3), (("fingerprint", "windows"), []),
        (("guide_tokens",), 10**6), (("head_tokens",), -1), (("seed",), 10**400), (("chunk_tokens",), -1),
        (("document_rate",), float("inf")), (("document_most",), float("nan")), (("build",), {"seconds": 1e999}),
        (("seed",), True), (("budget",), "7"), (("format",), True), (("retention",), {"bound": float("nan")}),
    ],
)  # fmt: skip
def test_counts_that_cannot_be_are_refused(data, at, new, tmp_path):
    file = tmp_path / "forged.sheet"
    file.write_bytes(forged(data, at, new))
    with pytest.raises(SheetError, match=r"forged\.sheet"):
        load_sheet(file)


def test_a_sequential_sheet_was_read_in_chunks_of_something(data, tmp_path):
    file = tmp_path / "forged.sheet"
    file.write_bytes(forged(data, ("chunk_tokens",), 0))
    if (
        json.loads(taken_apart(data)[0]["__metadata__"]["cribsheet"])["mode"] == "independent"
    ):  # there it is a document, however long
        assert load_sheet(file).manifest.chunk_tokens == 0
    else:
        with pytest.raises(SheetError, match="chunks of nothing"):
            load_sheet(file)


def test_what_is_for_people_may_be_missing(data, tmp_path, capsys):
    file = tmp_path / "forged.sheet"
    file.write_bytes(forged(data, ("build",), {}))
    assert load_sheet(file).window is None
    assert run(["inspect", str(file)]) == 0 and "by cribsheet" in capsys.readouterr().out


def tensors_of(data):
    header, rest = taken_apart(data)
    return {
        name: (entry["dtype"], len(data) - len(rest) + entry["data_offsets"][0], entry["data_offsets"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_numbers_that_are_not_finite_are_refused_wherever_they_are(data, odd, tmp_path):
    file, tried = tmp_path / "forged.sheet", 0
    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for name, (kind, start, (first, last)) in tensors_of(data).items():
        if kind not in types:
            continue
        raw = bytes(torch.tensor([odd], dtype=types[kind]).view(torch.uint8).numpy())
        for at in (start, start + last - first - len(raw)):  # the first number and the last
            file.write_bytes(data[:at] + raw + data[at + len(raw) :])
            with pytest.raises(SheetError, match=rf"{name}' that are not finite"):
                load_sheet(file)
            tried += 1
    assert tried >= 12


def test_a_sheet_with_numbers_that_are_not_finite_is_not_saved(backbone, tmp_path):
    made = build_sheet(backbone, DOCUMENTS, FEW_SHOT, rate=2)
    made.layers[1].values[..., 0] = float("inf")
    with pytest.raises(SheetError, match=r"in 'layers\.1\.values' that are not finite.*bfloat16"):
        save_sheet(made, tmp_path / "a.sheet")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [-3, 2**30, -(2**31)])
def test_origins_and_indices_outside_the_corpus_are_refused(data, value, tmp_path):
    file, raw = tmp_path / "forged.sheet", struct.pack("<i", value)
    for name, offset in (("indices", 0), ("origins", 0), ("origins", 4), ("origins", 8), ("origins", 12)):
        _, start, (first, last) = tensors_of(data)[name]
        at = start + offset + (0 if name == "indices" else last - first - 16)
        file.write_bytes(data[:at] + raw + data[at + 4 :])
        with pytest.raises(SheetError, match="do not fit its manifest"):
            load_sheet(file)


def test_a_tensor_that_no_sheet_has_is_refused(data, tmp_path):
    header, rest = taken_apart(data)
    more = {"dtype": "U8", "shape": [3], "data_offsets": [len(rest), len(rest) + 3]}
    (tmp_path / "a.sheet").write_bytes(put_together({**header, "more": more}, rest + b"abc"))
    with pytest.raises(SheetError, match="has the tensor 'more'"):
        load_sheet(tmp_path / "a.sheet")


@pytest.mark.parametrize("year", ["0001-01-01T00:00:00", "9999-12-31T23:59:59", "0000-00-00", "x"])
async def test_one_odd_sheet_takes_nothing_from_the_others(backbone, data, tmp_path, year):
    """What cannot be is not opened, by its name; what is only odd is listed beside the others."""
    places = {name: tmp_path / f"{name}.sheet" for name in ("good", "odd", "huge")}
    places["good"].write_bytes(data)
    places["odd"].write_bytes(forged(data, ("created",), year))
    places["huge"].write_bytes(forged(data, ("budget",), 10**400))
    with pytest.raises(SheetError, match=r"huge\.sheet"):
        Shelf.open(list(places.values()), model=backbone)
    app = create_app(Shelf.open([places["good"], places["odd"]], model=backbone))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        metrics, models = await client.get("/metrics"), await client.get("/v1/models")
        assert (metrics.status_code, models.status_code) == (200, 200)
        assert 'cribsheet_sheet_tokens{sheet="odd"}' in metrics.text
        assert [each["id"] for each in models.json()["data"]] == ["good", "odd"]
        assert (await client.get("/v1/sheets/odd")).status_code == 200
    app.state.service.close()
