"""One large text in which many parts are looked for, most of which are not in it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_SIZES = (12, 5, 2)  # characters of the stretches that are noted; of a part, the longest that it holds are looked up
_FIRST = 4096  # characters of a part whose stretches are looked up
_BLOCK = 1 << 18  # characters that are noted at once
_FEWEST, _MOST = 10, 25  # notes of each size, as powers of two: at most 4 MB
_FACTOR = 0x9E3779B1


class Known:
    """A text with notes of all its short stretches, so that it is searched only for what is probably in it.

    A search takes a millisecond for each megabyte; a look at the notes, microseconds, however large the text is. What
    is found is the same: the notes may know too much, and never too little.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        bits = min(max((4 * len(text)).bit_length(), _FEWEST), _MOST)
        self._last = np.uint32((1 << bits) - 1)
        self._notes: dict[int, NDArray[np.uint8]] = {}
        for size in _SIZES:
            noted = np.zeros(1 << bits, dtype=np.bool_)
            for start in range(0, max(len(text) - size + 1, 0), _BLOCK):
                noted[self._places(text[start : start + _BLOCK + size - 1], size)] = True
            self._notes[size] = np.packbits(noted)

    def __contains__(self, part: str) -> bool:
        """Whether the text holds a part."""
        return self._may_hold(part) and part in self.text

    def find(self, part: str) -> int:
        """Where the text holds a part first; -1 if it does not."""
        return self.text.find(part) if self._may_hold(part) else -1

    def _may_hold(self, part: str) -> bool:
        size = next((size for size in _SIZES if size <= len(part)), None)
        if size is None:
            return True
        places = self._places(part[:_FIRST], size)
        return bool((self._notes[size][places >> 3] >> (7 - (places & 7)) & 1).all())

    def _places(self, text: str, size: int) -> NDArray[np.uint32]:
        """Where each stretch of `size` characters, one at least, is noted."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        count = len(codes) - size + 1
        mixed = np.zeros(count, dtype=np.uint32)
        for at in range(size):
            mixed *= np.uint32(_FACTOR)
            mixed ^= codes[at : at + count]
            mixed ^= mixed >> np.uint32(15)
        return mixed & self._last
