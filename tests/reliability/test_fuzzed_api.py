"""Schemathesis against the server's own description: whatever fits it, and whatever does not, gets a proper answer.

All checks but one: `positive_data_acceptance` wants 2xx for whatever fits the schema, but rules between fields (a
conversation ends with a question, an answer has one form) are beyond a schema; they are refused with 400, as described.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from live import random_sheet, says, serving

pytestmark = pytest.mark.reliability


def test_schemathesis_finds_no_fault(times, tmp_path):
    sheets = {"oslo": says("Bob lives in Oslo."), "noise": random_sheet()}
    with serving(sheets, max_tokens=4, max_answers=1000, max_answers_per_caller=1000) as live:
        program = Path(sys.executable).with_name("st")
        options = [
            "--checks",
            "all",
            "--exclude-checks",
            "positive_data_acceptance",
            "--no-color",
            "--continue-on-failure",
        ]
        counts = ["--seed", os.environ.get("CRIBSHEET_SEED", "0"), "--max-examples", str(times(100))]
        command = [str(program), "run", f"{live.url}/openapi.json", *options, *counts]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
