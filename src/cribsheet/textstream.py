"""Token ids to text as they arrive: whole characters only, and stop strings found across token borders."""

from __future__ import annotations

from typing import Any

_BROKEN = "\ufffd"  # what an unfinished UTF-8 sequence decodes to
_LONGEST_CHARACTER = 4  # tokens of a character whose bytes are a token each


class TextStream:
    """The growing text of one answer.

    `push` returns the text that is certain: never half a character, never the beginning of what may become a stop
    string. `stopped` turns true when a stop string is complete; it and everything after it are cut off. Unless the
    text must be `exact`, it begins without spaces.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = (), *, exact: bool = False) -> None:
        self._tokenizer = tokenizer
        self._exact = exact
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._by_first: dict[str, list[str]] = {}
        for text in stop:
            self._by_first.setdefault(text[0], []).append(text)
        self._ids: list[int] = []
        self._context = 0  # first id of the window that is decoded
        self._read = 0  # ids before this are in `text`
        self._emitted = 0
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; returns newly certain text, possibly none."""
        self._ids.append(token)
        before = self._decode(self._ids[self._context : self._read])
        after = self._decode(self._ids[self._context :])
        if len(after) > len(before) and not after.endswith(_BROKEN):
            self._append(after[len(before) :])
            self._context, self._read = self._read, len(self._ids)
        return self._emit(len(self.text) - self._held())

    def text_of(self, token: int) -> str:
        """What a token would add here, as it is written; a part of a character is the replacement character.

        The same token may stand for a word with the space before it and without: what is before decides.
        """
        starts = range(len(self._ids) - 1, max(-1, len(self._ids) - 1 - _LONGEST_CHARACTER), -1)
        windows = ([*self._ids[at:]] for at in starts)
        window = next((ids for ids in windows if (text := self._decode(ids)) and not text.endswith(_BROKEN)), [])
        text = self._decode([*window, token])[len(self._decode(window)) :]
        if not self.text and not self._exact:
            text = text.lstrip(" ")
        return text or str(self._tokenizer.decode([token])).lstrip(" ")

    def finish(self) -> str:
        """The text that was held back, once no token will follow."""
        if not self.stopped:
            before = self._decode(self._ids[self._context : self._read])
            self._append(self._decode(self._ids[self._context :])[len(before) :])
        return self._emit(len(self.text))

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _append(self, new: str) -> None:
        if not self.text and not self._exact:  # some tokenizers give the first word a space that no one wrote
            new = new.lstrip(" ")
        searched = max(0, len(self.text) - self._longest + 1)
        self.text += new
        found = [(at + len(stop), at) for stop in self._stop if (at := self.text.find(stop, searched)) >= 0]
        if found:  # the one that is complete first, as if its characters had come one by one
            self.text, self.stopped = self.text[: min(found)[1]], True

    def _held(self) -> int:
        """Length of the longest end of the text that begins some stop string."""
        if self.stopped:
            return 0
        start = max(self._emitted, len(self.text) - self._longest + 1)  # what is out cannot be held back
        for at in range(start, len(self.text)):
            candidates = self._by_first.get(self.text[at])
            if candidates and any(stop.startswith(self.text[at:]) for stop in candidates):
                return len(self.text) - at
        return 0

    def _emit(self, upto: int) -> str:
        new = self.text[self._emitted : upto]
        self._emitted = max(self._emitted, upto)
        return new
