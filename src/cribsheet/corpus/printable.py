r"""Texts of others on a terminal: names, documents and answers may hold commands to it, which are shown as escapes.

A command moves the cursor, hides text or turns its direction: control characters but for line ends and tabs, line and
paragraph separators, and the marks of direction.
"""

from __future__ import annotations

import json
import re
from typing import Any

_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    r"""A text without commands to a terminal; `\x1b` stands for one."""
    return _COMMANDS.sub(lambda found: _escaped(ord(found[0])), text)


def in_line(text: str) -> str:
    """A name or an id, which may be any text, within a line: `plain`, and its line ends and tabs are shown too."""
    return plain(text).replace("\n", "\\n").replace("\t", "\\t")


def json_text(data: Any, **options: Any) -> str:
    """JSON in which commands are JSON's own escapes; `options` are those of `json.dumps`."""
    text = json.dumps(data, ensure_ascii=False, **options)
    return _COMMANDS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _escaped(code: int) -> str:
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
