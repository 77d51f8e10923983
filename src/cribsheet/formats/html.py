"""HTML to the text that a browser would show."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from cribsheet.errors import DocumentError
from cribsheet.formats.record import Record, one
from cribsheet.formats.text import decode

_HIDDEN = frozenset({"script", "style", "template", "svg"})
_LINES = ("body", "caption", "dd", "div", "dt", "figcaption", "li", "option", "summary", "tr")
_BLOCKS = (
    *("article", "aside", "blockquote", "dl", "fieldset", "figure", "footer", "form", "header", "hr", "main"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "nav", "ol", "p", "pre", "section", "table", "ul"),
)
_LINE_ENDS_AROUND = dict.fromkeys(_LINES, 1) | dict.fromkeys(_BLOCKS, 2)


def read_html(data: bytes, name: str) -> list[Record]:
    """The visible text: blank lines around blocks, tabs between cells; metadata has `title`."""
    page = _VisibleText()
    try:
        page.feed(decode(data, name))
        page.close()
    except AssertionError as error:  # html.parser's only way to give up, on an unknown `<![...[`
        raise DocumentError(f"{name} is broken HTML ({error}); repair it, or save it as text") from error
    return one("".join(page.pieces), {"title": page.title} if page.title else {})


class _VisibleText(HTMLParser):
    """Collects visible text in `pieces`, none of them empty, and the page's title in `title`."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self.title = ""
        self._hidden = self._preformatted = 0
        self._in_title = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in _HIDDEN
        self._preformatted += tag == "pre"
        self._in_title = tag == "title" and not self._hidden
        self._end_line(_LINE_ENDS_AROUND.get(tag, 0))
        if tag == "br":
            self.pieces.append("\n")
        elif tag in ("td", "th") and self.pieces and not self.pieces[-1].endswith("\n"):
            self.pieces[-1] = self.pieces[-1].rstrip(" ") + "\t"

    def handle_endtag(self, tag: str) -> None:
        self._hidden = max(0, self._hidden - (tag in _HIDDEN))
        self._preformatted = max(0, self._preformatted - (tag == "pre"))
        self._in_title = False
        self._end_line(_LINE_ENDS_AROUND.get(tag, 0))

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        if self._in_title:
            self.title = self.title or " ".join(data.split())
            return
        if not self._preformatted:
            data = re.sub(r"\s+", " ", data)
            if not self.pieces or self.pieces[-1][-1].isspace():
                data = data.lstrip()
        if data:
            self.pieces.append(data)

    def _end_line(self, line_ends: int) -> None:
        """Make the text so far end in at least that many line ends."""
        if line_ends and self.pieces:
            last = self.pieces[-1].rstrip(" \t")
            present = len(last) - len(last.rstrip("\n"))
            self.pieces[-1] = last + "\n" * (line_ends - present)
