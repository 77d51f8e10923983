"""What the reliability tests share: a seed, how much of them to run, and a sheet file.

`CRIBSHEET_SEED` changes what is tried, `CRIBSHEET_SHARE` how much of it: 1 is the whole, 0.01 a smoke test.
"""

from __future__ import annotations

import os
import random

import pytest

from cribsheet import build_sheet, read_documents, save_sheet
from cribsheet.corpus.task import Task
from cribsheet.testing import tiny_backbone

STAFF = [
    {"id": "alice", "text": "Alice Moreno lives in Lisbon and works for Nordwind Labs. " * 3, "metadata": {"page": 1}},
    {"id": "bob", "text": "Bob Smith lives in Oslo and works for Karst Foods. " * 3},
]


@pytest.fixture(scope="session")
def dice():
    return random.Random(int(os.environ.get("CRIBSHEET_SEED", "0")))


@pytest.fixture(scope="session")
def times():
    """How often, of so many times."""
    share = float(os.environ.get("CRIBSHEET_SHARE", "1"))
    return lambda number: max(1, round(number * share))


@pytest.fixture(scope="session")
def made():
    return build_sheet(tiny_backbone(), read_documents(STAFF), Task.of("Who lives where?"), rate=4, scorer="recent")


@pytest.fixture(scope="session")
def sheet_file(made, tmp_path_factory):
    return save_sheet(made, tmp_path_factory.mktemp("sheets") / "staff.sheet")
