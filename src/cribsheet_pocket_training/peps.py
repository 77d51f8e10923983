"""Questions that a person would ask about PEPs, which training never saw: the fields of their headers."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

from cribsheet_pocket_training.figures import Asked

_ASKED = {
    "Title": "What is the title of PEP {}?",
    "Status": "What is the status of PEP {}?",
    "Type": "What is the type of PEP {}?",
    "Created": "When was PEP {} created?",
    "Author": "Who is the author of PEP {}?",
    "Python-Version": "Which Python version is PEP {} for?",
}
_FIELD = re.compile(r"^([A-Za-z-]+): (.*)$", re.MULTILINE)
_CHARACTERS = 2600  # of each text, after its header


def pep_files(folder: Path) -> list[Path]:
    """The PEPs below a folder, in the order of their numbers."""
    return sorted(folder.rglob("pep-*.rst"))


def pep_set(files: Sequence[Path], seed: str) -> tuple[str, list[Asked]]:
    """Header and beginning of four PEPs, unwrapped, and a question for every field that has one answer."""
    texts: list[str] = []
    asked: list[Asked] = []
    for file in random.Random(f"peps:{seed}").sample(files, 4):
        head, _, body = file.read_text(encoding="utf-8").partition("\n\n")
        paragraphs = (" ".join(paragraph.split()) for paragraph in body.split("\n\n"))
        texts.append(head + "\n\n" + "\n\n".join(paragraphs)[:_CHARACTERS])
        fields = dict(_FIELD.findall(head))
        for field, form in _ASKED.items():
            value = re.sub(r"\s*<.*", "", fields.get(field, "")).strip()
            if value and not (field == "Author" and "," in fields[field]):
                asked.append(Asked(form.format(fields["PEP"]), value, field))
    return "\n\n".join(texts), asked
