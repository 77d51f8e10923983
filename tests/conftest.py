"""Shared fixtures: one thread, no network, tiny real models of every family."""

from __future__ import annotations

import io
import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from engine_sheets import engine_family, qwen3, qwen3_gguf, qwen3_sheet  # noqa: F401
from no_network import no_network  # noqa: F401
from support import SupportTable
from vllm_interface import interface as vllm_interface  # noqa: F401

from cribsheet.cli import run
from cribsheet.compress import progress
from cribsheet.model.backbone import Backbone
from cribsheet.model.support import FAMILIES
from cribsheet.testing import tiny_backbone

torch.set_num_threads(1)


class Result(NamedTuple):
    """What a command came to."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """stdout as JSON, which it must be as a whole."""
        return json.loads(self.out)


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job: programs that tests
        signal.signal(signal.SIGINT, signal.default_int_handler)  # start and interrupt would inherit it
    folder = os.environ.get("CRIBSHEET_SUPPORT")
    if folder:
        config.pluginmanager.register(SupportTable(Path(folder)))


@pytest.fixture(autouse=True)
def _whole_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build tells of whole chunks, however slow the machine is; tests of progress within them ask for that."""
    monkeypatch.setattr(progress, "WITHIN_SECONDS", math.inf)


@pytest.fixture(scope="session")
def tiny() -> Backbone:
    """A tiny Llama; nothing may change it."""
    return tiny_backbone()


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Backbone:
    """A tiny model of each supported family."""
    return tiny_backbone(request.param)


@pytest.fixture
def an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder in which a test works."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Of this process and of threads that start in it."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command line in this process: exit code and what it wrote to the two streams."""

    def call(*arguments: object, stdin: str = "") -> Result:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        return Result(code, *capfd.readouterr())

    return call
