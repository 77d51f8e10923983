"""What the quality bench shows: lines by method, rate and family; a table in the terminal; a page of the docs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from cribsheet.compare.metrics import clustered_interval
from cribsheet_bench.quality.case import Row

ALL = "all"  # the family that stands for every family
STORED = (", 16-bit", ", int8", ", int4")  # how names of methods end that store in another type than they compute in
Lines = dict[tuple[str, float, str], dict[str, Any]]


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One line per method, rate and family: accuracy of all questions, and of those that full context answers.

    Families are pooled in "all". The 95 % interval is drawn by case, as its questions stand or fall together.
    """
    groups: dict[tuple[str, float, str], list[Row]] = {}
    for row in rows:
        for family in (ALL, row.family):
            groups.setdefault((row.method, row.rate, family), []).append(row)
    lines = []
    for (method, rate, family), group in groups.items():
        kept = [row for row in group if row.retained]
        low, high = clustered_interval([r.exact for r in kept], [r.case for r in kept]) if kept else (0.0, 0.0)
        lines.append(
            {
                "method": method,
                "rate": rate,
                "family": family,
                "n": len(group),
                "em": _mean(row.exact for row in group),
                "f1": _mean(row.set_f1 for row in group),
                "retained_n": len(kept),
                "retained": _mean(row.exact for row in kept),
                "ci_low": low,
                "ci_high": high,
                "tokens": _mean(row.tokens for row in kept),
                "bytes": _mean(row.nbytes for row in kept),
                "held": _mean(row.held for row in kept),
            }
        )
    return lines


def print_table(result: dict[str, Any], console: Console) -> None:
    """Methods down, rates across: the share retained over all families, with its interval."""
    lines, rates = _indexed(result), _rates(result)
    table = Table("method", *(f"{rate:g}×" for rate in rates))
    for method in _methods(result):
        table.add_row(method, *(_cell(lines.get((method, rate, ALL))) for rate in rates))
    console.print(table)
    for line in _refused(result):
        console.print(line, markup=False, highlight=False)


def page(result: dict[str, Any]) -> str:
    """The page of the docs that shows a result of this bench, setup included."""
    rates = _rates(result)
    made = result["setup"]
    parts = [
        _HEAD.format(
            rates=", ".join(f"{rate:g}" for rate in rates),
            tokens=" and ".join(map(str, made["tokens"])),
            families=_family_table(result),
            command=result["command"],
            cases=made["cases"] * len(made["seeds"]) * len(made["tokens"]),
            seeds=" ".join(map(str, made["seeds"])),
        ),
        "## All families together\n\nShare of the questions that full context answers, with its 95 % interval.\n",
        _overall(result, rates),
        _equal_bytes(result, rates),
        *(f"## At {rate:g}×\n\n{_at(result, rate)}" for rate in rates),
        _peers_part(result),
        "Setup: "
        + ", ".join(f"{key} {_short(value)}" for key, value in made.items())
        + f", seconds {result['seconds']:.0f}.\n",
        "The page is written from `quality.json`, which holds every answer's judgement.\n",
    ]
    return "\n".join(part for part in parts if part)


_HEAD = """# Quality

How much of what full context answers survives compression, at {rates} times fewer tokens. Each family of tasks has
{cases} case(s) of {tokens} tokens of documents (seeds: {seeds}); a sheet is built for each case, method and rate.
A guide's examples name other people and things than the questions do. Budgets count what is kept of the guide.
*Default* is what `build` does with a description and three or four examples; *zero-effort* has the description only;
*query-aware* is guided by the very questions and their answers, which no user can.

Rates are of tokens, and so of bytes, at 16 bits a number: *KiB* counts what is computed in 32 bits as 16, presses too.
What is stored in *int8* or *int4* keeps as many tokens as fit the bytes that the others take at that rate, so methods
compare at equal tokens without these rows and at equal bytes with them. *16-bit* is stored in bfloat16.

```sh
{command}
```

{families}
"""


_PEERS = """## The peers

The presses of kvpress run in an environment of their own ({versions}) on the same weights, token ids and questions.
With nothing dropped, {agree} of {questions} answers there are as right or wrong as ours.

- Presses that score by a window of queries read our guide (task line and examples) after the context, as that window.
  *FinchPress* keeps it, as it comes; its tokens count in the budget, and questions follow it as further turns.
  *Guide dropped* gives it the worst score instead of the best. All other presses read the context only.
- Questions stand where the pipeline of kvpress puts them: after the whole context, or, where keys are re-rotated
  (FinchPress), after the kept ones.
- AdaKV and KVzip hide tokens and drop none; *KiB* counts what is not hidden, *held* what memory holds.
"""

_FINCH = """### `finch` against FinchPress

One chunk, the guide as window, budgets of all rates. Ours is FINCH as first published: one set of tokens for all heads
of a layer, by attention summed over heads and rows. FinchPress chooses for each key/value head, and weights rows by
how many tokens they see. Told to do as we do, it keeps the very same tokens.

| FinchPress | heads whose kept tokens are ours | kept tokens shared |
|---|---|---|"""


def _family_table(result: dict[str, Any]) -> str:
    lines = _indexed(result)
    rows = ["| family | questions | full context | closed book | counted |", "|---|---|---|---|---|"]
    for family in _families(result):
        full, closed = (lines[name, 1.0, family] for name in ("full context", "closed book"))
        rows.append(f"| {family} | {full['n']} | {full['em']:.2f} | {closed['em']:.2f} | {full['retained_n']} |")
    return "\n".join(rows)


def _overall(result: dict[str, Any], rates: Sequence[float]) -> str:
    lines = _indexed(result)
    rows = [f"| method | {' | '.join(f'{rate:g}×' for rate in rates)} |", f"|---|{'---|' * len(rates)}"]
    for method in _methods(result):
        rows.append(f"| {method} | " + " | ".join(_cell(lines.get((method, rate, ALL))) for rate in rates) + " |")
    return "\n".join(rows) + "\n"


def _equal_bytes(result: dict[str, Any], rates: Sequence[float]) -> str:
    """Tokens that fit the bytes of each rate by storage type, what they retain, and the press that retains most."""
    lines, methods = _indexed(result), _methods(result)
    stored = [method for method in methods if method.endswith(STORED)]
    presses = [method for method in methods if method.startswith("kvpress")]
    if not stored:
        return ""
    shown = [*stored, *(["the best press"] if presses else [])]
    rows = ["## At equal bytes\n", "Tokens of a head that fit, and the share retained.\n"]
    rows += [f"| bytes of | {' | '.join(shown)} |", f"|---|{'---|' * len(shown)}"]
    for rate in rates:
        found = [lines.get((method, rate, ALL)) for method in stored]
        cells = [f"{line['tokens']:.0f}: {line['retained']:.2f}" if line else "–" for line in found]
        asked = [line for method in presses if (line := lines.get((method, rate, ALL)))]
        if asked:
            best = max(asked, key=lambda line: line["retained"])
            cells.append(f"{best['tokens']:.0f}: {best['retained']:.2f} ({best['method'].removeprefix('kvpress ')})")
        rows.append(f"| {rate:g}×, 16-bit | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _at(result: dict[str, Any], rate: float) -> str:
    """Sizes and families of all methods at one rate; a number in brackets says that fewer questions were asked."""
    lines = _indexed(result)
    is_wide = result["setup"]["dtype"] == "torch.float32"
    families = [name for name in _families(result)[1:] if lines["full context", 1.0, name]["retained_n"]]
    rows = [f"| method | tokens | KiB | {' | '.join(families)} |", f"|---|---|---|{'---|' * len(families)}"]
    for method in _methods(result):
        own = lines.get((method, rate, ALL))
        if own:
            half = 2048 if is_wide and not method.endswith(STORED) else 1024  # bytes of a KiB at 16 bits a number
            held = f" ({own['held'] / half:,.0f} held)" if own["held"] > 1.01 * own["bytes"] else ""
            cells = [_share(lines.get((method, rate, name)), lines["full context", 1.0, name]) for name in families]
            rows.append(f"| {method} | {own['tokens']:.0f} | {own['bytes'] / half:,.0f}{held} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _peers_part(result: dict[str, Any]) -> str:
    report = result["peers"]
    if "finch" not in report:
        return ""
    finch, build, same = report["finch"], report["build"], report["same"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        _PEERS.format(versions=versions, agree=sum(same), questions=len(same)),
        *(f"{line}\n" for line in _refused(result)),
        _FINCH,
        *(f"| {name} | {each['same']:.4f} | {each['shared']:.4f} |" for name, each in finch.items()),
        "\n### Build time\n",
        f"Median of {build['rounds']} rounds in turn, {build['tokens']} tokens, {build['rate']:g}×, one thread;",
        "each ratio is to a plain prefill in the same process.\n",
        "| | seconds | over plain prefill |",
        "|---|---|---|",
        *(f"| {name} | {each['seconds']:.3f} | {each['ratio']:.2f} |" for name, each in build["sides"].items()),
        "",
    ]
    return "\n".join(lines)


def _refused(result: dict[str, Any]) -> list[str]:
    """What each press could not do, and why."""
    found: dict[tuple[str, str], list[float]] = {}
    for each in result["peers"]["failed"]:
        found.setdefault((each["press"], each["error"]), []).append(each["rate"])
    return [
        f"{press} failed {len(rates)} times, at {', '.join(f'{rate:g}×' for rate in sorted(set(rates)))}: {error}"
        for (press, error), rates in found.items()
    ]


def _indexed(result: dict[str, Any]) -> Lines:
    return {(line["method"], line["rate"], line["family"]): line for line in result["lines"]}


def _rates(result: dict[str, Any]) -> list[float]:
    return sorted({line["rate"] for line in result["lines"] if line["rate"] > 1})


def _methods(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(line["method"] for line in result["lines"] if line["rate"] > 1))


def _families(result: dict[str, Any]) -> list[str]:
    return [ALL, *dict.fromkeys(line["family"] for line in result["lines"] if line["family"] != ALL)]


def _cell(line: dict[str, Any] | None) -> str:
    return f"{line['retained']:.2f} [{line['ci_low']:.2f}, {line['ci_high']:.2f}]" if line else "–"


def _share(line: dict[str, Any] | None, full: dict[str, Any]) -> str:
    if not line:
        return "–"
    fewer = f" ({line['retained_n']})" if line["retained_n"] < full["retained_n"] else ""
    return f"{line['retained']:.2f}{fewer}"


def _short(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0
