"""What options may be, and the one mark that layers of the library share: words and numbers, nothing else."""

from __future__ import annotations

from typing import Literal

Allocation = Literal["uniform", "profiled", "adaptive"]
"""How heads share a budget: all keep equally many tokens; half of it goes where the model's profile says
(`compress/profile.py`) and half where scores are higher; or all of it where scores are higher."""

SheetKind = Literal["sequential", "independent"]
"""What a build makes: a sheet of documents that were read each on top of those before, or each alone."""

Correction = Literal["none", "refit"]
"""Whether what is kept is made to stand for what was dropped."""

GuideKept = Literal["auto", "resident", "form", "dropped"]
"""What of the guide stays in the sheet."""

Mode = Literal["sheet", "retrieval", "hybrid", "auto", "recall"]
"""What a question is answered from."""

NoArchive = Literal["error", "sheet"]
"""What is done about a question that recalls, where there is no archive or it cannot be read."""

StorageDtype = Literal["float32", "bfloat16", "float16", "int8", "int4"]
"""How keys and values are stored."""

SEEDS = range(-(1 << 63), 1 << 64)  # those that torch takes
MOST_MINUTES = 525_600  # of a study: a year
ABSENT = -2  # in `Sheet.indices`, where a head has no token because another one keeps more
