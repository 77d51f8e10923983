"""A killed build goes on from its last finished chunk, and nothing else is taken for its checkpoint."""

from __future__ import annotations

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT, ZERO_SHOT
from safetensors.torch import save_file

from cribsheet import build_sheet
from cribsheet.errors import SheetError
from cribsheet.testing import tiny_backbone

CHUNK = 40


class Killed(Exception):
    pass


def build(backbone, task=FEW_SHOT, **options):
    return build_sheet(
        backbone, DOCUMENTS, task, **{"rate": 3, "chunk_tokens": CHUNK, "scorer": "task-peak", **options}
    )


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
    with pytest.raises(SheetError, match="belongs to another build"):
        build(backbone, checkpoint=other)
