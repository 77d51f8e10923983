"""Tiny models as llama.cpp has them, and sheets of them that it can read."""

from __future__ import annotations

import pytest
from corpus import DOCUMENTS, FEW_SHOT
from gguf_files import plain_backbone, save_gguf

from cribsheet.build import build_sheet


@pytest.fixture(scope="session", params=["llama", "mistral", "qwen2", "qwen3"])
def engine_family(request):
    """A tiny model of each family that llama.cpp takes."""
    return plain_backbone(request.param)


@pytest.fixture(scope="session")
def qwen3():
    return plain_backbone("qwen3")


@pytest.fixture(scope="session")
def qwen3_gguf(qwen3, tmp_path_factory):
    return save_gguf(qwen3, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="session")
def qwen3_sheet(qwen3):
    return build_sheet(qwen3, DOCUMENTS, FEW_SHOT, budget=96, for_engines=True)
