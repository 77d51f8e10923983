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

    `ends` are stop strings that nobody asked for, of a layout whose model knows no end. They cannot end an answer that
    has not begun: where there are any, the text begins with its first character that is no blank, and they count from
    there on. Those of `stop` count from the first token on, blanks included.
    """

    def __init__(
        self, tokenizer: Any, stop: tuple[str, ...] = (), *, ends: tuple[str, ...] = (), exact: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._exact = exact
        self._stop = stop
        self._ends = ends
        self._longest = max(map(len, stop + ends), default=0)
        self._by_first: dict[str, list[str]] = {}
        for text in stop + ends:
            self._by_first.setdefault(text[0], []).append(text)
        self._ids: list[int] = []
        self._context = 0  # first id of the window that is decoded
        self._read = 0  # ids before this are in `_written`
        self._written = ""  # with the blanks before the text
        self._begun = 0  # where in it the text begins
        self._emitted = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """All of it so far, also what is not certain yet."""
        return self._written[self._begun :]

    def push(self, token: int) -> str:
        """Add a token; returns newly certain text, possibly none."""
        self._ids.append(token)
        before = self._decode(self._ids[self._context : self._read])
        after = self._decode(self._ids[self._context :])
        if len(after) > len(before) and not after.endswith(_BROKEN):
            self._append(after[len(before) :])
            self._context, self._read = self._read, len(self._ids)
        return self._emit(len(self._written) - self._held())

    def text_of(self, token: int) -> str:
        """What a token would add here, as it is written; a part of a character is the replacement character.

        The same token may stand for a word with the space before it and without: what is before decides.
        """
        starts = range(len(self._ids) - 1, max(-1, len(self._ids) - 1 - _LONGEST_CHARACTER), -1)
        windows = ([*self._ids[at:]] for at in starts)
        window = next((ids for ids in windows if (text := self._decode(ids)) and not text.endswith(_BROKEN)), [])
        text = self._decode([*window, token])[len(self._decode(window)) :]
        if not self.text and not self._exact:
            text = text.lstrip(None if self._ends else " ")
        return text or str(self._tokenizer.decode([token])).lstrip(" ")

    def finish(self) -> str:
        """The text that was held back, once no token will follow."""
        if not self.stopped:
            before = self._decode(self._ids[self._context : self._read])
            self._append(self._decode(self._ids[self._context :])[len(before) :])
        return self._emit(len(self._written))

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _append(self, new: str) -> None:
        if not self._written and not self._exact:  # some tokenizers give the first word a space that no one wrote
            new = new.lstrip(" ")
        before = len(self._written)
        self._written += new
        if self._ends and not self._emitted:
            self._begun = len(self._written) - len(self._written.lstrip())
        # each from where it could end in what is new, or a thousand of them would search the longest one's length
        found = [(stop, self._written.find(stop, max(0, before - len(stop) + 1))) for stop in self._stop]
        found += [(end, self._written.find(end, max(self._begun, before - len(end) + 1))) for end in self._ends]
        complete = [(at + len(stop), at) for stop, at in found if at >= 0]
        if complete:  # the one that is complete first, as if its characters had come one by one
            self._written, self.stopped = self._written[: min(complete)[1]], True

    def _held(self) -> int:
        """Length of the longest end of the text that begins some stop string."""
        if self.stopped:
            return 0
        start = max(self._emitted, len(self._written) - self._longest + 1)  # what is out cannot be held back
        for at in range(start, len(self._written)):
            candidates, rest = self._by_first.get(self._written[at]), self._written[at:]
            if candidates and any(stop.startswith(rest) for stop in candidates):
                return len(rest)
        return 0

    def _emit(self, upto: int) -> str:
        new = self._written[max(self._emitted, self._begun) : upto]
        self._emitted = max(self._emitted, upto if new else 0)
        return new
