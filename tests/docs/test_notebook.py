"""The notebook runs offline from top to bottom, shows what it promises, and is kept without what it printed."""

from __future__ import annotations

import ast
import contextlib
import html
import io
import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
NOTEBOOKS = sorted(each for each in DOCS.rglob("*.ipynb") if "_build" not in each.relative_to(DOCS).parts)


def cells_of(notebook):
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def run_cell(source, names):
    """What a cell prints, and the value that a notebook would show below it."""
    *body, last = ast.parse(source).body
    is_value = isinstance(last, ast.Expr)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body if is_value else [*body, last], []), "<cell>", "exec"), names)
        value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names) if is_value else None
    return printed.getvalue(), value


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(notebook):
    whole = json.loads(notebook.read_text(encoding="utf-8"))
    assert whole["nbformat"] == 4 and whole["metadata"]["language_info"] == {"name": "python"}
    assert len({cell["id"] for cell in whole["cells"]}) == len(whole["cells"])
    code = [cell for cell in whole["cells"] if cell["cell_type"] == "code"]
    assert [(cell["outputs"], cell["execution_count"]) for cell in code] == [([], None)] * len(code)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_a_notebook_lead_somewhere(notebook):
    for cell in cells_of(notebook):
        if cell["cell_type"] == "markdown":
            links = [part.partition(")")[0] for part in "".join(cell["source"]).split("](")[1:]]
            assert [link for link in links if not (notebook.parent / link).exists()] == []


def test_the_first_sheet_is_built_asked_drawn_and_compared(capfd):
    (notebook,) = [path for path in NOTEBOOKS if path.stem == "first-sheet"]
    names, printed, shown = {"__name__": "__main__"}, [], {}
    for cell in cells_of(notebook):
        if cell["cell_type"] == "code":
            text, value = run_cell("".join(cell["source"]), names)
            printed.append(text)
            if value is not None:
                shown[type(value).__name__] = value._repr_html_()
    assert names["answer"].text == "28-Jun-2011"
    assert "pep-0628.rst" in shown["CompressedKnowledgeLLM"] and "28-Jun-2011" in shown["Answer"]
    heat = shown["HeatMap"]
    text = html.unescape(re.sub("<[^>]+>", "", heat))
    assert text == names["documents"][0].text and heat.count("<span") > 100
    assert len(set(re.findall(r"140, 0, ([\d.]+)", heat))) > 10
    told = "".join(printed)
    assert "full context  rate 1: 100% right" in told and "few-shot      rate 4:" in told and "retrieval" in told
    assert told.rstrip().endswith("Standards Track")
