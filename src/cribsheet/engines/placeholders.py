"""Token ids that stand for a sheet in prompts of other engines.

A cell of a sheet holds tokens that differ from head to head, so no id is the id of a cell. Engines only compare ids, to
see what a prompt and their caches share; these are derived from the sheet's digest, so that sheets share nothing.
"""

from __future__ import annotations

import hashlib


def placeholders(digest: str, tokens: int) -> list[int]:
    """Token ids of a sheet's cells: below 256, which all vocabularies have, and other ones for another sheet."""
    return list(hashlib.shake_256(digest.encode()).digest(tokens))
