"""A small staff directory that the tests condense."""

from __future__ import annotations

from typing import ClassVar

import torch

from cribsheet.compress.scoring import Reads
from cribsheet.corpus.documents import Document
from cribsheet.corpus.task import Task

DOCUMENTS = [
    Document(text="Alice Moreno lives in Lisbon. She owns a dog, and on Sundays she repairs clocks.", id="alice"),
    Document(text="Bob Smith lives in Oslo.\nHe enjoys chess and works for Nordwind Labs since 1987.", id="bob"),
    Document(text="Clara Berg lives in Cairo. Clara speaks Hindi, Greek and a little Zulu.", id="clara"),
    Document(text="Hugo Ali lives in Quito. His extension number is 40213.", id="hugo"),
]
ZERO_SHOT = Task("Answer questions about where people live.")
FEW_SHOT = Task(ZERO_SHOT.description, examples=(("Where does Bob Smith live?", "Oslo"), ("Where is Eve?", "Unknown")))
QUESTION = "Where does Hugo Ali live?"


class OneHead:
    """A scorer to which only the first head of the first layer matters, and in it everything."""

    reads: ClassVar[Reads] = Reads()
    pins_preamble: ClassVar[bool] = True

    def score(self, view):
        scores = torch.zeros(view.keys.shape[:2])
        scores[0] = float(view.layer == 0)
        return scores
