"""What the commands of the benches share: options that all of them have, and how a run begins."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch

from cribsheet.engine.pool import LoadedModel


def options(description: str | None, *, written: str) -> argparse.ArgumentParser:
    """The options `--model`, `--seed`, `--threads` and `--json`, where the last is `written`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help=written)
    return parser


def begin(arguments: argparse.Namespace) -> LoadedModel:
    """The model of a run that tells of its progress, with the threads it may have."""
    tell_progress()
    torch.set_num_threads(arguments.threads)
    return LoadedModel.get(arguments.model)


def tell_progress() -> None:
    """Show on stderr what benches tell of their progress, also where other libraries are to be quiet."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("cribsheet_bench").setLevel(logging.INFO)
