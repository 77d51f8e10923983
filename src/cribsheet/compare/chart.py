"""Curves of accuracy against budget, as plain SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from cribsheet.compare.compare import CLOSED, FULL

# One colour for each method, told apart by eyes that see no red and green too; hybrid and auto stand out.
_COLOURS = {
    "start+recent": "#9a9a9a",
    "task-agnostic": "#b58900",
    "published zero-shot": "#c9b8e8",
    "published few-shot": "#8c6bb1",
    "zero-shot": "#7fb3d5",
    "few-shot": "#1f6fb4",
    "retrieval": "#d1495b",
    "hybrid": "#1a9850",
    "auto": "#7b3fa0",
    "recall": "#e08214",
}
_WIDTH, _HEIGHT = 420, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 14, 14, 40


def chart(rows: Sequence[dict[str, Any]], metric: str) -> str:
    """Curves over the budget, on a scale where each doubling is as wide; levels of full context and closed book."""
    curves = {
        name: sorted((row for row in rows if row["method"] == name), key=lambda r: r["budget"]) for name in _COLOURS
    }
    budgets = sorted({row["budget"] for own in curves.values() for row in own}) or [1]
    low, high = math.log2(budgets[0]), math.log2(budgets[-1])

    def x(budget: float) -> float:
        share = 0.5 if high == low else (math.log2(budget) - low) / (high - low)
        return _LEFT + 12 + share * (_WIDTH - _LEFT - _RIGHT - 24)

    def y(value: float) -> float:
        return _TOP + (1 - value) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{metric} against budget">']
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.0%}</text>')
    rates = {row["budget"]: row["rate"] for own in curves.values() for row in own}
    for budget in budgets:
        label = f'<tspan>{budget}</tspan><tspan class="rate" dx="4">{rates.get(budget, 0):g}×</tspan>'
        parts.append(f'<text x="{x(budget):.1f}" y="{_HEIGHT - 22}" text-anchor="middle">{label}</text>')
    parts.append(
        f'<text class="axis" x="{_WIDTH / 2}" y="{_HEIGHT - 5}" text-anchor="middle">tokens before the question</text>'
    )
    for name in (FULL, CLOSED):
        for row in (row for row in rows if row["method"] == name):
            level = y(row[metric])
            parts.append(
                f'<line class="{name.split()[0]}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{level:.1f}" '
                f'y2="{level:.1f}">'
                f"<title>{name}: {row[metric]:.0%}</title></line>"
            )
    shown = {name: own for name, own in curves.items() if own}
    for place, (name, own) in enumerate(shown.items()):
        shift = (place - (len(shown) - 1) / 2) * 3  # so that intervals at one budget stand side by side
        points = [(x(row["budget"]) + shift, y(row[metric]), row) for row in own]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py, _ in points)
        parts.append(f'<g stroke="{_COLOURS[name]}" fill="{_COLOURS[name]}"><polyline points="{line}"/>')
        for px, py, row in points:
            hint = f"{name}, {row['budget']} tokens: {row[metric]:.0%}"
            if metric == "em":  # the interval is that of exact match
                hint += f" [{row['ci_low']:.0%}, {row['ci_high']:.0%}]"
                ends = f'y1="{y(row["ci_low"]):.1f}" y2="{y(row["ci_high"]):.1f}"'
                parts.append(f'<line class="ci" x1="{px:.1f}" x2="{px:.1f}" {ends}/>')
            parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5"><title>{html.escape(hint)}</title></circle>')
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def legend(rows: Sequence[dict[str, Any]]) -> str:
    """The methods that rows are of, each with its line."""
    present = {row["method"] for row in rows}
    lines = {FULL: 'class="full"', CLOSED: 'class="closed"'}
    keys = {name: f'stroke="{colour}" stroke-width="3"' for name, colour in _COLOURS.items()} | lines
    items = (
        f'<li><svg viewBox="0 0 24 8"><line x1="0" x2="24" y1="4" y2="4" {keys[name]}/></svg>{html.escape(name)}</li>'
        for name in keys
        if name in present
    )
    return f"<ul>{''.join(items)}</ul>"
