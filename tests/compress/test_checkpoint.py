"""A killed build goes on from its last finished chunk, and nothing else is taken for its checkpoint."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT, ZERO_SHOT
from safetensors.torch import save_file

from cribsheet import build_sheet
from cribsheet.errors import SheetError
from cribsheet.plan.describe import identity
from cribsheet.plan.options import BuildOptions
from cribsheet.plan.plan import plan
from cribsheet.prompt.template import ChatLayout
from cribsheet.sheet.tensors import TensorFile
from cribsheet.sheet.tensors import digest_with as digest
from cribsheet.testing import tiny_backbone

CHUNK = 40


class Killed(Exception):
    pass


def build(backbone, task=FEW_SHOT, **options):
    return build_sheet(backbone, DOCUMENTS, task, **{"rate": 3, "chunk_tokens": CHUNK, "scorer": "task", **options})


def killer(after):
    """Progress that dies when `after` chunks are read."""
    calls = []

    def progress(done, total):
        calls.append(done)
        if len(calls) > after:
            raise Killed

    return progress


def same(a, b):
    assert torch.equal(a.indices, b.indices) and torch.equal(a.origins, b.origins)
    for mine, other in zip(a.layers, b.layers, strict=True):
        assert torch.equal(mine.keys, other.keys) and torch.equal(mine.values, other.values)


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def backbone(request):
    return tiny_backbone(request.param)


def test_a_build_killed_after_any_chunk_ends_with_the_same_bits(backbone, tmp_path):
    whole = build(backbone)
    chunks = -(-whole.manifest.corpus_tokens // CHUNK)
    assert chunks > 3
    for after in range(1, chunks):
        checkpoint, read = tmp_path / f"{after}.partial", []
        with pytest.raises(Killed):
            build(backbone, checkpoint=checkpoint, progress=killer(after))
        same(build(backbone, checkpoint=checkpoint, progress=lambda done, total: read.append(done)), whole)  # noqa: B023
        assert read[0] == after * CHUNK and len(read) == chunks - after + 1


def test_what_the_print_of_a_model_says_since_then_is_no_part_of_a_builds_identity(backbone):
    """A build that a version of before began is gone on with."""
    made = plan(backbone, ChatLayout(backbone.tokenizer), DOCUMENTS, FEW_SHOT, BuildOptions(rate=3))
    told = identity(made, backbone)["fingerprint"]
    assert "weights" in told and not {"vocabulary", "rotary_scaling"} & told.keys()


def test_a_build_may_be_killed_again_and_again(backbone, tmp_path):
    whole, checkpoint = build(backbone), tmp_path / "a.partial"
    for _ in range(3):
        with pytest.raises(Killed):
            build(backbone, checkpoint=checkpoint, progress=killer(1))
    same(build(backbone, checkpoint=checkpoint), whole)


@pytest.mark.parametrize("change", [{"task": ZERO_SHOT}, {"rate": 2}, {"chunk_tokens": 30}, {"scorer": "recent"}])
def test_a_checkpoint_of_another_build_is_refused(backbone, tmp_path, change):
    checkpoint = tmp_path / "a.partial"
    with pytest.raises(Killed):
        build(backbone, checkpoint=checkpoint, progress=killer(2))
    before = checkpoint.read_bytes()
    with pytest.raises(SheetError, match="belongs to another build"):
        build(backbone, **{"checkpoint": checkpoint, **change})
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_a_truncated_checkpoint_is_refused(backbone, tmp_path, share):
    checkpoint = tmp_path / "a.partial"
    with pytest.raises(Killed):
        build(backbone, checkpoint=checkpoint, progress=killer(2))
    held = checkpoint.read_bytes()
    checkpoint.write_bytes(held[: int(len(held) * share)])
    with pytest.raises(SheetError, match=r"is damaged \(.*\); delete it"):
        build(backbone, checkpoint=checkpoint)


def test_some_other_file_is_no_checkpoint(backbone, tmp_path):
    other = tmp_path / "a.partial"
    save_file({"x": torch.zeros(1)}, other)
    with pytest.raises(SheetError, match="is another kind of file"):
        build(backbone, checkpoint=other)


@pytest.mark.parametrize("mode", ["sequential", "independent"])
def test_no_changed_bit_of_a_checkpoint_becomes_another_sheet(backbone, tmp_path, mode):
    """It is an error, or the same sheet where the bit says nothing."""
    checkpoint = tmp_path / "a.partial"
    how = {"mode": mode, "scorer": "task", "checkpoint": checkpoint}
    whole = build(backbone, **{**how, "checkpoint": None})
    with pytest.raises(Killed):  # an independent one is written when a usual chunk's worth was read, here at the end
        build(backbone, **how, progress=killer(2 if mode == "sequential" else len(DOCUMENTS)))
    held, dice, refused = checkpoint.read_bytes(), random.Random(0), 0
    (header,) = struct.unpack("<Q", held[:8])
    for number in range(24):
        flipped = bytearray(held)
        place = dice.randrange(8 + header) if number % 3 == 0 else dice.randrange(8 + header, len(held))
        flipped[place] ^= 1 << dice.randrange(8)
        checkpoint.write_bytes(flipped)
        try:
            same(build(backbone, **how), whole)
        except SheetError as error:
            refused += 1
            assert str(checkpoint) in str(error)
        assert not list(tmp_path.glob(".*.part"))
    assert refused >= 16


@pytest.mark.parametrize("done", ["-40", "0", "1000000", "9" * 400, "", "4x", "1.5"])
def test_counts_of_a_checkpoint_that_cannot_be_are_refused(backbone, tmp_path, done):
    """Also by somebody who knows how its digest is made."""
    checkpoint = tmp_path / "a.partial"
    with pytest.raises(Killed):
        build(backbone, checkpoint=checkpoint, progress=killer(2))
    file = TensorFile(checkpoint)
    metadata, tensors = {**file.metadata, "done": done}, file.read(file.entries)
    metadata["sha256"] = digest({name: text for name, text in metadata.items() if name != "sha256"}, tensors)
    save_file(tensors, checkpoint, metadata=metadata)
    with pytest.raises(SheetError, match=r"is damaged \(.*\); delete it"):
        build(backbone, checkpoint=checkpoint)


def test_a_checkpoint_of_before_there_were_digests_is_refused(backbone, tmp_path):
    checkpoint = tmp_path / "a.partial"
    with pytest.raises(Killed):
        build(backbone, checkpoint=checkpoint, progress=killer(2))
    file = TensorFile(checkpoint)
    tensors = file.read(file.entries)
    save_file(tensors, checkpoint, metadata={name: file.metadata[name] for name in ("build", "done")})
    with pytest.raises(SheetError, match="was changed after it was written"):
        build(backbone, checkpoint=checkpoint)


_LIMITED = """
import resource, signal, sys
sys.path.insert(0, sys.argv[2])
import torch
from corpus import DOCUMENTS, FEW_SHOT
from cribsheet import build_sheet
from cribsheet.errors import SheetError
from cribsheet.testing import tiny_backbone
backbone = tiny_backbone()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))
for mode in ("sequential", "independent"):
    how = {"rate": 3, "chunk_tokens": 40, "scorer": "task", "mode": mode, "checkpoint": sys.argv[1]}
    try:
        build_sheet(backbone, DOCUMENTS, FEW_SHOT, **how)
    except SheetError as error:
        print(error)
"""


def test_a_checkpoint_without_room_for_it_is_an_error_of_ours(tmp_path):
    """A limit on the size of files stands for the disk; what was there before stays."""
    checkpoint, here = tmp_path / "a.partial", Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(here.parent / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _LIMITED, str(checkpoint), str(here)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    told = done.stdout.splitlines()
    assert done.returncode == 0 and len(told) == 2, done.stderr
    assert told[0].startswith(f"The checkpoint cannot be written to {str(checkpoint)!r}: ")
    assert all("too large" in line and "what was there is as it was" in line for line in told)
    assert list(tmp_path.iterdir()) == []
