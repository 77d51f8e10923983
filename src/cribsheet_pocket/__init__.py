"""The pocket model: a small Llama that reads, and ships with cribsheet.

No model hub is needed to try the library, to run its demo, or to test against it: `path()` is a folder that any tool
loads with `from_pretrained`.  The model answers questions by looking them up in the documents of its prompt; it knows
next to nothing by heart, so what a sheet has lost shows.  Its card is `card.md`; in a clone,
`cribsheet_pocket_training.worlds` makes documents and questions it has never seen.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["INSTRUCTION", "export", "path"]

INSTRUCTION = "Answer from the documents."
"""What stood before the documents in most of the training samples."""


def path() -> Path:
    """The folder with the model's weights, configuration, tokenizer and chat template.

    The package ships weights as 8-bit numbers; the first call unpacks them to bf16 in a cache folder of the user
    (`CRIBSHEET_CACHE`, or the platform's cache folder), once for all processes.
    """
    from .quantize import unpacked

    return unpacked()


def export(folder: str | Path) -> Path:
    """Write the plain model folder to `folder`, which must not exist or be empty."""
    from .quantize import unpack

    return unpack(Path(folder))
