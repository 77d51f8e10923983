"""Which encoding a file is in: by its byte order mark, by what it declares, by its escapes. UTF-8 is the rest."""

from __future__ import annotations

import codecs
import contextlib
import json
import logging
import re
from html.parser import HTMLParser

logger = logging.getLogger(__name__)

# The UTF-32 mark starts with the UTF-16 one, so it has to be tried first.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    b"\x84\x31\x95\x33": "gb18030",
}
# What is declared by the name of a standard is nearly always in the vendor's superset of it; browsers read it so, too.
_SUPERSETS = {
    "utf-8-sig": "utf-8",
    "ascii": "cp1252",
    "iso8859-1": "cp1252",
    "iso8859-9": "cp1254",
    "iso8859-11": "cp874",
    "tis-620": "cp874",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "big5": "big5hkscs",
    "iso2022_jp": "iso2022_jp_ext",
}
_MANY_BYTES = {"cp932", "cp949", "gb18030", "big5hkscs", "euc_jp", "johab"}
# All others are no encodings of text (rot13), no ASCII in their first half (EBCDIC), or need no declaration.
_KNOWN = re.compile(
    r"utf-8|utf-(?:16|32)(?:-[lb]e)?|cp(?:125\d|437|720|737|775|8[56]\d|874|932|949|950)|iso8859-\d+|koi8-[rtu]|kz1048|ptcp154|mac-[a-z]+|"
    r"gb18030|big5hkscs|euc_\w+|shift_jis\w+|iso2022_\w+|hz|johab"
)
_NICKNAMES = {
    "ansinew": "cp1252",
    "windows-31j": "cp932",
    "applemac": "mac-roman",
    "iso-latin-1": "latin-1",
    "iso-8859-8-i": "iso-8859-8",
}
_LABEL = rb"([\w.:-]{1,40})"
_XML = re.compile(rb"\s*<\?xml\b[^>]*?\sencoding\s*=\s*[\"']\s*" + _LABEL)
_CONTENT = re.compile(r"charset\s*=\s*[\"']?\s*([\w.:-]{1,40})", re.I)
# Python, Ruby and Emacs say "coding", Vim "fenc"; AsciiDoc ":encoding:"; TeX has a package for it.
_COMMENT = re.compile(rb"(?:coding|fenc)(?:[:=]|system:)[ \t]*" + _LABEL)
_TEX = re.compile(rb"^[^%\n]*\\(?:usepackage\[" + _LABEL + rb"\]\{inputenc\}|inputencoding\{" + _LABEL + rb"\})", re.M)
_FIRST = 1 << 16  # bytes among which a declaration is looked for
_NO_CHANCE = 4  # characters that look like UTF-8 in a file of two-byte characters: fewer may do so by chance


def in_text(data: bytes) -> str:
    """The label in a comment at the top of a text, as editors and some languages read it; "" if there is none.

    It may also be spoken of, so it counts only where the text is not in UTF-8.
    """
    if not data.isascii() and _is_utf8(data):
        return ""
    found = _COMMENT.search(data[:1024]) or _TEX.search(data[:_FIRST])
    return next(filter(None, found.groups()), b"").decode() if found else ""


def in_html(data: bytes) -> str:
    """The label that an XML declaration or the first `meta` element gives; "" if there is none."""
    if data[:4] in (b"<\0?\0", b"\0<\0?"):
        return "utf-16-le" if data[0] else "utf-16-be"
    if found := _XML.match(data[:_FIRST]):
        return found[1].decode()
    page = _Declaration()
    with contextlib.suppress(AssertionError):  # html.parser gives up on an unknown `<![...[`
        page.feed(data[:_FIRST].decode("latin-1"))
    return page.label


def in_json(data: bytes) -> str:
    """UTF-16 or UTF-32, which JSON needs no mark for: its first character is ASCII; else ""."""
    return json.detect_encoding(data) if b"\0" in data[:4] else ""


def known(label: str) -> str:
    """Python's name for the encoding of a label; "" for none and for what is none."""
    name = label.strip().lower()
    whole = re.sub(r"^iso8859(?=\d)", "iso-8859-", name)
    for wanted in (_NICKNAMES.get(name, whole), name.removeprefix("x-"), name.replace("windows-", "cp")):
        try:
            found = codecs.lookup(wanted).name if wanted else ""
        except LookupError:
            continue
        found = _SUPERSETS.get(found, found)
        return found if _KNOWN.fullmatch(found) else ""
    return ""


def encoding_of(data: bytes, label: str, name: str) -> str:
    """The encoding of bytes without a byte order mark, in a file that declares `label`, which may be "".

    Many files were converted to UTF-8 and still declare what they were in; what is UTF-8 all through is no accident.
    """
    declared = known(label)
    if not declared:
        return _by_escapes(data)
    if declared.startswith("utf-"):
        return (
            declared if b"\0" in data[:4] else "utf-8"
        )  # what can be read as ASCII is not in UTF-16, as browsers know
    if data.isascii() or not _is_utf8(data):
        return declared
    characters = len(data.translate(None, bytes(range(0xC0))))
    if declared in _MANY_BYTES and characters < _NO_CHANCE and _reads(data, declared):
        return declared
    logger.warning("%s declares the encoding %s, but it is in UTF-8; read as that", name, label)
    return "utf-8"


def _by_escapes(data: bytes) -> str:
    """The encodings of Japanese and Korean mail look like ASCII, with escapes that nothing else has."""
    found = [each for each in ("iso2022_jp_ext", "iso2022_kr") if b"\x1b$" in data and _reads(data, each)]
    return found[0] if found else "utf-8"


def _is_utf8(data: bytes) -> bool:
    return _reads(data, "utf-8")


def _reads(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


class _Declaration(HTMLParser):
    """Finds the first `meta` element that names an encoding, outside comments and scripts."""

    label = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.label or tag != "meta":
            return
        values = {name: value or "" for name, value in reversed(attrs)}  # of two, the first counts
        if "charset" in values:
            self.label = values["charset"].strip()[:40]
        elif values.get("http-equiv", "").strip().lower() == "content-type":
            found = _CONTENT.search(values.get("content", ""))
            self.label = found[1] if found else ""
