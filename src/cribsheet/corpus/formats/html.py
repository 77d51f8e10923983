"""HTML to the text that a browser would show, by justhtml, which reads it as browsers do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from cribsheet.corpus.formats.encoding import in_html
from cribsheet.corpus.formats.hidden import Hidden
from cribsheet.corpus.formats.record import Record, one
from cribsheet.corpus.formats.text import decode

if TYPE_CHECKING:
    from justhtml import Node

_LINES = ("body", "caption", "dd", "div", "dt", "figcaption", "li", "option", "summary", "text", "tr")
_BLOCKS = (
    *("article", "aside", "blockquote", "dl", "fieldset", "figure", "footer", "form", "header", "hr", "main"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "nav", "ol", "p", "pre", "section", "svg", "table", "textarea", "ul"),
)
_LINE_ENDS_AROUND = dict.fromkeys(_LINES, 1) | dict.fromkeys(_BLOCKS, 2)
_CELLS = frozenset({"td", "th"})
# Cells that hold these hold a page, not a value.
_LONG = frozenset(
    ("article", "blockquote", "dl", "h1", "h2", "h3", "h4", "h5", "h6", "ol", "pre", "section", "table", "ul")
)
_PREFORMATTED = frozenset({"pre", "textarea"})
# 10 to the 6th is not 106.
_SHIFTED = {
    "sup": str.maketrans("0123456789+-−=()n", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁼⁽⁾ⁿ"),
    "sub": str.maketrans("0123456789+-−=()", "₀₁₂₃₄₅₆₇₈₉₊₋₋₌₍₎"),
}
_SELF_CLOSED = re.compile(r"<([A-Za-z][\w.:-]*)((?:\s+[^\s<>=/]+(?:\s*=\s*(?:\"[^\"]*\"|'[^']*'))?)*)\s*/>")
_VOID = frozenset(
    ["area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track", "wbr"]
)
_TITLE = re.compile(r"<title\b[^<>]*>[^<]*", re.I)
_CDATA = re.compile(r"<!\[CDATA\[(.*?)\]\]>", re.S)


def read_html(data: bytes, name: str) -> list[Record]:
    """The visible text: blank lines around blocks, tabs between cells; metadata has `title`.

    An XML declaration or a `meta` element tells the encoding if it is not UTF-8. Hidden is what a browser hides before
    any script has run: by its kind, by `hidden`, and by `display` or `visibility` in its `style` or, for `display`, in
    the page's own style sheets. What a reader unfolds (`details`) or searches for (`hidden="until-found"`) is text.
    """
    text = decode(data, name, in_html(data))
    if name.lower().endswith(".xhtml") or text.lstrip().startswith("<?xml"):
        text = _as_html(text)
    return read_page(text)


def read_page(text: str) -> list[Record]:
    """The visible text of HTML that was decoded already."""
    from justhtml import JustHTML  # here because most corpora hold none

    if "</title" not in text.lower():  # browsers show nothing of a page whose title never ends
        text = _TITLE.sub(r"\g<0></title>", text, count=1)
    root = JustHTML(text, sanitize=False).root
    page = _VisibleText(Hidden(root))
    page.read([root])
    return one("".join(page.pieces), {"title": page.title} if page.title else {})


def _as_html(text: str) -> str:
    """XML's short forms, which mean something else in HTML, written out."""
    whole, end, rest = text.rpartition("]]>")  # behind the last end nothing is looked for
    text = _CDATA.sub(lambda found: found[1].replace("&", "&amp;").replace("<", "&lt;"), whole + end) + rest
    return _SELF_CLOSED.sub(
        lambda found: found[0] if found[1].lower() in _VOID else f"<{found[1]}{found[2]}></{found[1]}>", text
    )


class _VisibleText:
    """Collects visible text in `pieces`, none of them empty, and the page's title in `title`."""

    def __init__(self, hidden: Hidden) -> None:
        self.pieces: list[str] = []
        self.title = ""
        self._hidden = hidden
        self._first_cell = True

    def read(self, nodes: Sequence[Node]) -> None:
        """Go through nodes and all in them; not by recursion, because pages may nest without end."""
        left = [(node, False, False) for node in reversed(nodes)]  # preformatted or not, begun or ended
        while left:
            node, preformatted, ended = left.pop()
            if ended:
                self._end_line(_LINE_ENDS_AROUND.get(node.name, 0))
            elif node.name == "#text":
                self._add(str(node.data or ""), preformatted)
            elif node.name in ("#document", "#document-fragment") or self._begin(node):
                preformatted = preformatted or node.name in _PREFORMATTED
                left.append((node, preformatted, True))
                left += [(child, preformatted, False) for child in reversed(node.children or [])]

    def _begin(self, node: Node) -> bool:
        """Begin an element; whether its children are to be read."""
        name = node.name
        if name.startswith(("#", "!")) or node in self._hidden:
            return False
        if name == "title":
            self.title = self.title or " ".join(_text_of(node).split())
            return False
        self._end_line(_LINE_ENDS_AROUND.get(name, 0))
        if name == "br":
            self.pieces.append("\n")
        elif name == "tr":
            self._first_cell = True
        elif name in _CELLS:
            return not self._add_cell(node)
        elif name in _SHIFTED:
            return not self._shift(_text_of(node), _SHIFTED[name])
        return True

    def _add_cell(self, node: Node) -> bool:
        """Begin a cell behind the one before; also write one that says a thing or two, in one line, as its row is."""
        if not self._first_cell:
            before = self.pieces.pop().rstrip(" ") if self.pieces else ""
            self.pieces.append(before + "\t")
        self._first_cell = False
        if any(inner.name in _LONG for inner in _below(node)):
            return False
        cell = _VisibleText(self._hidden)
        cell.read(node.children or [])
        if line := " ".join("".join(cell.pieces).split()):
            self.pieces.append(line)
        return True

    def _shift(self, text: str, signs: Mapping[int, int]) -> bool:
        """Add what stands above or below the line by its own signs, if there are such."""
        if not text.strip() or not all(ord(sign) in signs for sign in text.strip()):
            return False
        self.pieces.append(text.strip().translate(signs))
        return True

    def _add(self, text: str, preformatted: bool) -> None:
        if not preformatted:
            text = re.sub(r"\s+", " ", text)
            if not self.pieces or self.pieces[-1][-1].isspace():
                text = text.lstrip()
        if text:
            self.pieces.append(text)

    def _end_line(self, line_ends: int) -> None:
        """Make the text so far end in at least that many line ends."""
        if line_ends and self.pieces:
            last = self.pieces[-1].rstrip(" \t")
            present = len(last) - len(last.rstrip("\n"))
            self.pieces[-1] = last + "\n" * (line_ends - present)


def _text_of(node: Node) -> str:
    return "".join(str(inner.data or "") for inner in _below(node) if inner.name == "#text")


def _below(node: Node) -> Iterator[Node]:
    """All in a node, as it stands in the text."""
    left = list(reversed(node.children or []))
    while left:
        inner = left.pop()
        yield inner
        left += reversed(inner.children or [])
