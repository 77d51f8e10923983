"""What of a page a browser does not show: by its kind, by attributes, and by the page's own style sheets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from justhtml import Node

# What a page holds for scripts, for programs that lack something, or for later.
_KINDS = frozenset(
    (
        *("annotation", "annotation-xml", "audio", "canvas", "datalist", "iframe", "meter", "noembed", "noframes"),
        *("noscript", "object", "progress", "script", "style", "template", "video"),
    )
)
_IN_PICTURES = frozenset({"defs", "desc", "metadata", "script", "style", "symbol", "title"})
_COMMENT = re.compile(r"/\*.*?(?:\*/|\Z)", re.S)  # one that never ends hides the rest
_CONDITIONAL = re.compile(r"@[^@{};]*(?:;|\{(?:[^{}]*\{[^{}]*\})*[^{}]*\})")  # for printers, for small screens
_RULE = re.compile(r"(?<![^{}])([^{}]++)\{([^{}]*)\}")
_DISPLAY = re.compile(r"(?:^|;)\s*display\s*:\s*([a-z-]+)", re.I)
_INVISIBLE = re.compile(r"(?:^|;)\s*visibility\s*:\s*(?:hidden|collapse)\b", re.I)
_NAMES = re.compile(r"[.#]([\w-]+)")
_RULES = 200  # of those that could fit a page: each is a walk through all of it


class Hidden:
    """Knows of every element of a page whether it is hidden by something of its own, before any script has run.

    What is in a hidden element is hidden with it. Of two rules that fit an element the later one counts, as they
    mostly are written; conditions (`@media`) are never met.
    """

    def __init__(self, root: Node) -> None:
        self._by_sheets: dict[int, bool] = {}
        rules = list(_display_rules(root))
        if any(hides for _, hides in rules):
            for selector, hides in rules:
                self._by_sheets.update((id(node), hides) for node in _matching(root, selector))

    def __contains__(self, node: Node) -> bool:
        name, attributes = node.name, node.attrs or {}
        if name in _KINDS or (node.namespace == "svg" and name in _IN_PICTURES):
            return True
        if "hidden" in attributes and (attributes["hidden"] or "").strip().lower() != "until-found":
            return True
        if "popover" in attributes or (name == "dialog" and "open" not in attributes):
            return True
        style = _COMMENT.sub("", attributes.get("style") or "")
        own = _hides(style)
        return bool(_INVISIBLE.search(style)) or (self._by_sheets.get(id(node), False) if own is None else own)


def _display_rules(root: Node) -> Iterator[tuple[str, bool]]:
    """Selectors whose rules say something of `display`, and whether that is to hide."""
    sheets = [
        node for node in _matching(root, "style") if (node.attrs or {}).get("media") in (None, "", "all", "screen")
    ]
    text = "\n".join(str(child.data or "") for sheet in sheets for child in sheet.children or [])
    rules = _RULE.findall(_CONDITIONAL.sub("", _COMMENT.sub("", text)))
    said = ((selector.strip(), _hides(body)) for selector, body in rules)
    found = [(selector, hides) for selector, hides in said if hides is not None]
    names = _names_in(root) if found else set()
    yield from [(selector, hides) for selector, hides in found if _may_fit(selector, names)][:_RULES]


def _names_in(root: Node) -> set[str]:
    """Classes and ids of a page."""
    names: set[str] = set()
    for node in _matching(root, "[class], [id]"):
        attributes = node.attrs or {}
        names.update((attributes.get("class") or "").split(), (attributes.get("id") or "").split())
    return names


def _may_fit(selector: str, names: set[str]) -> bool:
    """Whether the page has the names of one of a rule's alternatives, which most rules of a framework find nowhere."""
    return "(" in selector or any(names.issuperset(_NAMES.findall(part)) for part in selector.split(","))


def _hides(declarations: str) -> bool | None:
    """Whether the last of them hides by `display`; None if they say nothing of it."""
    said = _DISPLAY.findall(declarations)
    return said[-1].lower() == "none" if said else None


def _matching(root: Node, selector: str) -> list[Node]:
    from justhtml import SelectorError

    try:
        return list(root.query(selector))
    except (SelectorError, RecursionError):  # a state, such as :hover, in which no page begins
        return []
