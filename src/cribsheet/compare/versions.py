"""What software made a bench's numbers."""

from __future__ import annotations

import platform

import torch
import transformers

from cribsheet import __version__


def versions() -> dict[str, str]:
    """Ours, torch's, transformers' and Python's, as every setup tells them."""
    return {
        "cribsheet": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
