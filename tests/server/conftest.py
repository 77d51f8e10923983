"""A server for all tests that need no special one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from live import Live, random_sheet, says, serving


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    """Two sheets without keys: `oslo` always says the same, `noise` goes on until it is stopped."""
    with serving({"oslo": says("Bob lives in Oslo."), "noise": random_sheet()}, max_answers=200) as server:
        yield server


@pytest.fixture
def client(live):
    made = live.openai()
    yield made
    made.close()
