"""Sheets in vLLM beside what people do there today: all documents before the question, kept by its prefix caching.

    python -m cribsheet_bench.beside_vllm.run CORPORA --model Qwen/Qwen2.5-1.5B-Instruct --only nq/8000 --blocks 1280

Needs a vLLM of a version that sheets are fitted to, in the same environment. CORPORA are folders as `cribsheet bench
real` takes. Each corpus gets a sheet that other engines read, and our engine's answers from it. Then vLLM is started
once for each number of `--blocks` and once with as many as fit, in the model's type, and asked in both ways: whether
the words are ours, and how fast; and once in float32, where other kernels turn fewer answers around, for the words and
for a hundred requests that mix two sheets, or the only one, with plain questions. Each of these is a process, and may
take `--limit` seconds.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cribsheet.compare.journal import write_rows
from cribsheet.engines.vllm.checks import VERSIONS
from cribsheet.errors import DocumentError
from cribsheet_bench.beside_vllm.work import read_rows
from cribsheet_bench.command import tell_progress
from cribsheet_bench.real.corpora import find_corpora

logger = logging.getLogger(__name__)

_COLUMNS = {
    "same words": (
        "dtype",
        "again",
        "questions",
        "corpora",
        "same",
        "close",
        "widest",
        "ours_score",
        "score",
        "failed",
    ),
    "speed": (
        *("blocks", "limited", "corpora", "way", "warm", "questions_a_second", "first_median", "first_last", "cached"),
        *("used_blocks", "kept_bytes", "before", "tokens", "score", "failed"),
    ),
    "mixed": ("dtype", "sheets", "requests", "same", "crossed", "differ_alone", "failed", "seconds"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench from the command line."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if lacking := _lacking(arguments):
        parser.error(lacking)
    tell_progress()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(arguments.folder or made)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rows.jsonl").unlink(missing_ok=True)  # of another run
        settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "folder", "limit")}
        settings["vllm"] = json.loads(arguments.vllm)
        works = _child("prepare", folder, settings, arguments.limit)
        for served in _servers(settings) if works else ():
            _child("serve", folder, {**settings, **served}, arguments.limit)
        rows = read_rows(folder / "rows.jsonl")
    _show(rows, Console(width=200))
    if arguments.json:
        write_rows(arguments.json, {"setup": settings, "rows": rows})
    return 0 if rows else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora")
    parser.add_argument("--model", required=True)
    parser.add_argument("--device")
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of corpora's names")
    parser.add_argument("--count", type=int, default=6, help="corpora")
    parser.add_argument("--each", type=int, default=24, help="questions about each corpus")
    parser.add_argument("--rate", type=float, default=8.0)
    parser.add_argument("--questions", type=int, default=64, help="at once")
    parser.add_argument("--mixed", type=int, default=100, help="requests of the mixed part")
    parser.add_argument("--at-once", type=int, default=128, help="sequences that vLLM has at once, at most")
    parser.add_argument("--block", type=int, default=16, help="tokens of vLLM's blocks")
    parser.add_argument("--blocks", type=int, nargs="*", default=[], help="of vLLM, where memory is limited")
    parser.add_argument(
        "--dtypes", nargs="+", default=["bfloat16", "float32"], help="the first is the one that is timed"
    )
    parser.add_argument("--vllm", default="{}", help="further arguments of vLLM's LLM, as JSON")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for each process")
    parser.add_argument("--folder", help="where sheets and rows are left")
    parser.add_argument("--json", type=Path)
    return parser


def _lacking(arguments: argparse.Namespace) -> str:
    """What would be missed once sheets are built, which takes minutes; nothing if all is there."""
    for name in ("count", "each", "questions", "mixed", "at_once", "block"):
        if getattr(arguments, name) < 1:
            return f"--{name.replace('_', '-')} is {getattr(arguments, name)}; give at least 1"
    if find_spec("vllm") is None:
        return (
            f"vLLM is not in this Python, {sys.executable}; run this with one that has vLLM {' or '.join(VERSIONS)}, "
            "on a machine with a GPU if it is not built for processors"
        )
    try:
        found = find_corpora(arguments.corpora)
    except DocumentError as error:
        return str(error)
    if not any(name.startswith(tuple(arguments.only) or ("",)) for name in found):
        return f"no corpus in {arguments.corpora} has a name that begins with {' or '.join(arguments.only)}"
    return ""


def _servers(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What each vLLM is started with and asked."""
    timed, *others = settings["dtypes"]
    for blocks in settings["blocks"]:
        yield {"dtype": timed, "blocks": blocks, "parts": ["speed"]}
    for dtype in others:
        yield {"dtype": dtype, "blocks": None, "parts": ["same words", "mixed"]}
    yield {"dtype": timed, "blocks": None, "parts": ["same words", *([] if others else ["mixed"]), "speed"]}


def _child(part: str, folder: Path, settings: dict[str, Any], limit: float) -> bool:
    """Run a part in a process of its own; whether it came to its end."""
    command = [sys.executable, "-m", f"cribsheet_bench.beside_vllm.{part}", str(folder), json.dumps(settings)]
    try:
        ended = subprocess.run(command, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        logger.error("%s took more than %g s", part, limit)
        return False
    if ended:
        logger.error("%s ended with %d", part, ended)
    return not ended


def _show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    for part, columns in _COLUMNS.items():
        table = Table(*(name.replace("_", " ") for name in columns), title=part)
        for row in rows:
            if row["part"] == part:
                table.add_row(*(str(row[name]) for name in columns))
        console.print(table)


if __name__ == "__main__":
    sys.exit(main())
