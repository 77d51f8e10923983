"""The documentation tells the truth: its code runs and prints what it shows, and what is generated is fresh.

`CRIBSHEET_UPDATE_DOCS=1 pytest tests/docs` writes the true outputs into the pages.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from blocks import Session, Step, run_page

from cribsheet import errors
from cribsheet.model.support import FAMILIES
from cribsheet.sheet.manifest import Manifest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    page
    for page in sorted([ROOT / "README.md", *ROOT.glob("integrations/*/README.md"), *DOCS.rglob("*.md")])
    if "_build" not in page.parts
]
RUN = [page for page in PAGES if re.search(r"^```(python|console)$", page.read_text(encoding="utf-8"), re.M)]
UPDATE = bool(os.environ.get("CRIBSHEET_UPDATE_DOCS"))


@pytest.fixture(autouse=True)
def _event_loop() -> Iterator[None]:
    """A loop that is closed in the end: LlamaIndex's sync forms take what they find, or leave one open."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()


@pytest.mark.parametrize("page", RUN, ids=[str(page.relative_to(ROOT)) for page in RUN])
def test_the_code_on_a_page_prints_what_the_page_shows(page, tmp_path):
    text = updated = page.read_text(encoding="utf-8")
    wrong: list[Step] = []
    for body, steps in run_page(text, Session(tmp_path)):
        wrong += [step for step in steps if not step.is_right]
        updated = updated.replace(body, "".join(step.updated for step in steps))
    if UPDATE:
        page.write_text(updated, encoding="utf-8")
    else:
        assert [(step.source, step.printed) for step in wrong] == []


def test_the_runner_sees_a_wrong_output(tmp_path):
    page = (
        "```python\n>>> 1 + 1\n3\n>>> x = 'a'\n>>> x\n'a'\n```\n\n```console\n$ echo hello\nhel...\n$ echo a\nb\n```\n"
    )
    steps = [step for _, steps in run_page(page, Session(tmp_path)) for step in steps]
    assert [step.is_right for step in steps] == [False, True, True, True, False]
    assert steps[0].updated == ">>> 1 + 1\n2\n"


def test_the_runner_reads_what_a_plain_block_prints_behind_it(tmp_path):
    page = "```python\nx = 2\nprint(x)\n```\n\n```text\n3\n```\n\n```python\ny = x\n```\n\n```python\ny / 0\n```\n"
    blocks = list(run_page(page, Session(tmp_path)))
    steps = [step for _, steps in blocks for step in steps]
    assert [step.is_right for step in steps] == [False, True, False]
    for shown, mine in blocks:
        assert shown in page
        page = page.replace(shown, "".join(step.updated for step in mine))
    assert "print(x)\n```\n\n```text\n2\n```\n" in page and "ZeroDivisionError: division by zero\n```" in page


def test_the_command_line_reference_is_fresh(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    from cli_reference import PAGE, render

    assert PAGE.read_text(encoding="utf-8") == render(), "run `python docs/cli_reference.py`"


def test_the_table_of_models_is_fresh_and_names_every_family_and_promise(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    from support_table import PAGE, render, runs

    assert PAGE.read_text(encoding="utf-8") == render(), "run `make support`"
    truths = (ROOT / "tests" / "test_truths.py").read_text(encoding="utf-8")
    promises = set(re.findall(r"^def (test_\w+)\(family", truths, re.M))
    (oldest_version, oldest), *_, (newest_version, newest) = runs().items()
    assert list(newest) == list(FAMILIES) and set(oldest) < set(newest)
    assert all(
        row == dict.fromkeys(row, True) and set(row) == promises for run in runs().values() for row in run.values()
    )
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"transformers=={newest_version}" in constraints and oldest_version.startswith("5.4.")


def test_every_error_is_on_the_errors_page():
    page = (DOCS / "reference" / "errors.md").read_text(encoding="utf-8")
    missing = [name for name in vars(errors) if name.endswith("Error") and f"`{name}`" not in page]
    assert missing == []


def test_every_field_of_the_manifest_is_on_the_format_page():
    page = (DOCS / "reference" / "sheet-format.md").read_text(encoding="utf-8")
    fields = [*Manifest.model_fields, *Manifest.model_fields["fingerprint"].annotation.model_fields]
    assert [name for name in fields if f"`{name}`" not in page] == []


def test_every_file_of_the_library_is_on_the_map():
    page = (DOCS / "explanation" / "architecture.md").read_text(encoding="utf-8")
    source = ROOT / "src" / "cribsheet"
    names = {
        x.name for x in source.iterdir() if x.name not in ("__init__.py", "__main__.py", "py.typed", "__pycache__")
    }
    assert sorted(name for name in names if name not in page) == []


def test_pages_name_only_make_targets_that_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+):", makefile, re.M))
    named = {name for page in PAGES for name in re.findall(r"`make (\w+)`|^make (\w+)$", page.read_text(), re.M)}
    assert {a or b for a, b in named} <= targets


def test_links_between_pages_lead_somewhere():
    broken = []
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in link and not (page.parent / link).exists():
                broken.append((page.name, link))
    assert broken == []
