"""Write `reference/models.md` from what test runs wrote into `reference/support`: `make support` does both."""

from __future__ import annotations

import json
from pathlib import Path

REFERENCE = Path(__file__).parent / "reference"
PAGE = REFERENCE / "models.md"
_TOP = """\
# Supported models

<!-- Written by `make support` from the outcome of the tests; a test fails when it is stale. -->

Each family is run as a tiny random model through every promise below, with the oldest and the newest transformers.
A family is the `model_type` of the model's `config.json`.
Some settings within a family are [refused](../how-to/use-your-own-model.md#models-that-are-refused).
"""
_LEGEND = """\
✓ all cases passed; ✗ some failed; – this transformers cannot load the family, and it is refused by name.

"""


def runs() -> dict[str, dict[str, dict[str, bool]]]:
    """{version of transformers: {family: {test: passed}}}, oldest first."""
    found = {}
    for place in (REFERENCE / "support").glob("transformers-*.json"):
        found[place.stem.removeprefix("transformers-")] = json.loads(place.read_text(encoding="utf-8"))
    return dict(sorted(found.items(), key=lambda run: [int(part) for part in run[0].split(".")]))


def render() -> str:
    """The page as it should be."""
    measured = runs()
    families = list(dict.fromkeys(family for run in reversed(measured.values()) for family in run))
    tests = sorted({test for run in measured.values() for row in run.values() for test in row})
    lines = ["| family | " + " | ".join(f"transformers {version}" for version in measured) + " |"]
    lines.append("|---" * (1 + len(measured)) + "|")
    for family in families:
        cells = [_cell(run.get(family), tests) for run in measured.values()]
        lines.append(f"| `{family}` | " + " | ".join(cells) + " |")
    promises = [f"- {test.removeprefix('test_').replace('_', ' ')}" for test in tests]
    return "\n".join([_TOP, *lines, "", _LEGEND + "The promises:", "", *promises, ""])


def _cell(row: dict[str, bool] | None, tests: list[str]) -> str:
    if row is None:
        return "–"
    missed = [test.removeprefix("test_").replace("_", " ") for test in tests if not row.get(test, False)]
    return "✗ " + ", ".join(missed) if missed else f"✓ {len(tests)} of {len(tests)}"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
