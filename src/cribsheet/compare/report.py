"""What a comparison shows: a table in the terminal, and one page with curves that needs nothing but itself."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from cribsheet.compare.chart import chart, legend
from cribsheet.compare.compare import ALL, Corpus, Settings
from cribsheet.compare.versions import versions
from cribsheet.corpus.printable import in_line
from cribsheet.engine.pool import LoadedModel


def setup_of(
    model: LoadedModel, corpus: Corpus, methods: Sequence[str], rates: Sequence[float], settings: Settings
) -> dict[str, Any]:
    """What a reader needs to make the same numbers."""
    task = corpus.task
    return {
        "model": model.backbone.name,
        "corpus": corpus.name,
        "documents": len(corpus.documents),
        "characters": sum(len(document.text) for document in corpus.documents),
        "questions": len(corpus.questions),
        "task": task.to_dict(),
        "methods": list(methods),
        "rates": list(rates),
        **{name: getattr(settings, name) for name in Settings.__dataclass_fields__},
        "dtype": str(model.backbone.dtype),
        "device": str(model.backbone.device),
        "threads": torch.get_num_threads(),
        **versions(),
    }


def print_table(rows: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    """One line for each method, rate and type: exact match with its interval, F1s, and what an answer takes."""
    table = Table(
        "method",
        "rate",
        "type",
        "n",
        "exact match",
        "F1",
        "set F1",
        "tokens",
        "KiB",
        Column("s", min_width=6),
        "retrieved",
    )
    for row in rows:
        table.add_row(
            row["method"],
            f"{row['rate']:g}",
            Text(in_line(row["type"])),  # whatever stands in the file of questions
            str(row["n"]),
            f"{row['em']:.2f} [{row['ci_low']:.2f}, {row['ci_high']:.2f}]",
            f"{row['f1']:.2f}",
            f"{row['set_f1']:.2f}",
            f"{row['tokens']:,.0f}",
            f"{row['bytes'] / 1024:,.0f}",
            f"{row['seconds']:.2f}",
            f"{row['retrieved']:.0%}",
        )
    (console or Console(width=120)).print(table)


def page(result: dict[str, Any], *, title: str = "Sheet, retrieval, and both", metric: str = "em") -> str:
    """The page of a result: a chart for each type of question, `metric` against the budget, and the table."""
    rows = result["rows"]
    types = sorted({row["type"] for row in rows}, key=lambda kind: (kind != ALL, kind))
    charts = "".join(_figure(kind, [row for row in rows if row["type"] == kind], metric) for kind in types)
    made = result["setup"]
    facts = ", ".join(f"{key} {_short(value)}" for key, value in made.items() if key not in ("task", "methods"))
    return _PAGE.format(
        title=html.escape(title),
        lead=html.escape(
            f"{made['questions']} questions about {made['documents']} documents, model {made['model']}. "
            "Each method may put the same number of tokens before the question."
        ),
        legend=legend(rows),
        charts=charts,
        table=_table(rows),
        setup=html.escape(facts),
    )


def _figure(kind: str, rows: Sequence[dict[str, Any]], metric: str) -> str:
    count = max(row["n"] for row in rows)
    caption = f"{'all questions' if kind == ALL else kind} <small>n = {count}</small>"
    return f"<figure><figcaption>{caption}</figcaption>{chart(rows, metric)}</figure>"


def _table(rows: Sequence[dict[str, Any]]) -> str:
    heads = (
        "method",
        "rate",
        "budget",
        "type",
        "n",
        "exact match",
        "interval",
        "F1",
        "set F1",
        "tokens",
        "KiB",
        "s",
        "retrieved",
    )
    lines = []
    for row in rows:
        cells = (
            row["method"], f"{row['rate']:g}", row["budget"], row["type"], row["n"], f"{row['em']:.2f}",
            f"{row['ci_low']:.2f} – {row['ci_high']:.2f}", f"{row['f1']:.2f}", f"{row['set_f1']:.2f}",
            f"{row['tokens']:,.0f}", f"{row['bytes'] / 1024:,.0f}", f"{row['seconds']:.2f}", f"{row['retrieved']:.0%}",
        )  # fmt: skip
        lines.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>")
    return f"<table><thead><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr></thead><tbody>{''.join(lines)}</tbody></table>"  # noqa: E501


def _short(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1c1c1c; --soft: #6b6b6b; --line: #e3e3e3; --paper: #fff; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #ececec; --soft: #a0a0a0; --line: #3a3a3a; --paper: #171717; }} }}
body {{ margin: 2rem auto; max-width: 62rem; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); }}
h1 {{ font-size: 1.6rem; margin: 0 0 .3rem; }} p, details {{ color: var(--soft); }}
ul {{ display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; list-style: none; padding: 0; margin: 1.2rem 0; }}
ul svg {{ width: 24px; height: 8px; margin-right: .4rem; vertical-align: middle; }}
main {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1.5rem; }}
figure {{ margin: 0; }} figcaption {{ font-weight: 600; }} small {{ font-weight: 400; color: var(--soft); }}
figure svg {{ width: 100%; height: auto; }} figure text {{ font-size: 11px; fill: var(--ink); }}
figure .rate, figure .axis {{ fill: var(--soft); }}
.grid {{ stroke: var(--line); }} .full {{ stroke: var(--ink); stroke-dasharray: 7 4; stroke-width: 1.5; }}
.closed {{ stroke: var(--soft); stroke-dasharray: 2 3; stroke-width: 1.5; }}
polyline {{ fill: none; stroke-width: 2.5; stroke-linejoin: round; }} .ci {{ stroke-width: 1; opacity: .55; }}
table {{ border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; margin-top: 1rem;
  width: 100%; }}
th, td {{ text-align: right; padding: .2rem .5rem; border-bottom: 1px solid var(--line); }}
th:nth-child(1), td:nth-child(1), th:nth-child(4), td:nth-child(4) {{ text-align: left; }}
div {{ overflow-x: auto; }}
</style></head>
<body><h1>{title}</h1><p>{lead}</p>{legend}<main>{charts}</main>
<details><summary>All numbers</summary><div>{table}</div></details>
<details><summary>Set-up</summary><p>{setup}</p></details>
</body></html>
"""
