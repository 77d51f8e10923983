"""How much is done at once, in all and for one caller, and how often one may ask."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from cribsheet.server.errors import Refusal
from cribsheet.server.settings import ServerSettings

_CALLERS = 10_000  # remembered at most; those who were quiet for a minute are forgotten first


class Gate:
    """Counts answers in flight. Belongs to one event loop."""

    def __init__(self, settings: ServerSettings, now: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._now = settings, now
        self.in_flight = 0
        self._of_caller: Counter[str] = Counter()
        self._allowance: dict[str, tuple[float, float]] = {}  # questions left, and when that was

    def enter(self, caller: str, answers: int) -> Callable[[], None]:
        """Let a request for so many answers in; returns what must be called when it is over.

        Raises `Refusal`: 400 for more answers than there ever is room for, 429 for a caller with too many, 503 for a
        full server.
        """
        limits = self._settings
        own = min(limits.max_answers, limits.max_answers_per_caller)
        if answers > own:
            raise Refusal(400, f"{answers} answers are asked for, but at most {own} are written at once.", param="n")
        if self.in_flight + answers > limits.max_answers:
            raise Refusal(503, f"{self.in_flight} answers are being written already; try again later.")
        if self._of_caller[caller] + answers > own:
            raise Refusal(
                429, f"You have {self._of_caller[caller]} answers under way and may have {own}; wait for one."
            )
        self._spend(caller)
        self.in_flight += answers
        self._of_caller[caller] += answers
        return lambda: self._leave(caller, answers)

    def _leave(self, caller: str, answers: int) -> None:
        self.in_flight -= answers
        self._of_caller[caller] -= answers
        if not self._of_caller[caller]:
            del self._of_caller[caller]

    def _spend(self, caller: str) -> None:
        """One question of the caller's allowance, which fills up again over a minute."""
        most = self._settings.requests_per_minute
        if most is None:
            return
        now = self._now()
        left, since = self._allowance.get(caller, (float(most), now))
        left = min(most, left + (now - since) * most / 60)
        if left < 1:
            raise Refusal(429, f"You may ask {most} questions a minute; wait a little.")
        if len(self._allowance) >= _CALLERS:
            self._allowance = {name: seen for name, seen in self._allowance.items() if now - seen[1] < 60}
        self._allowance[caller] = (left - 1, now)
