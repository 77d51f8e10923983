"""Writes down, for the support table of the docs, which family of models kept which promise in this test run.

CRIBSHEET_SUPPORT=docs/reference/support pytest tests/test_truths.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers


class SupportTable:
    """Collects the outcome of every test that runs for each family: a promise holds if all of its cases passed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kept: dict[str, dict[str, bool]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        family = getattr(item, "callspec", None) and item.callspec.params.get("family")
        if family and (report.when == "call" or report.failed):
            row = self.kept.setdefault(family, {})
            row[item.originalname] = row.get(item.originalname, True) and report.passed
        return report

    def pytest_sessionfinish(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        place = self.folder / f"transformers-{transformers.__version__}.json"
        place.write_text(json.dumps(self.kept, indent=1) + "\n", encoding="utf-8")
