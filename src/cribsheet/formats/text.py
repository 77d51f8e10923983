"""Bytes to text, and the formats that are text as they stand."""

from __future__ import annotations

import codecs

from cribsheet.errors import DocumentError
from cribsheet.formats.record import Record, one

# The UTF-32 mark starts with the UTF-16 one, so it has to be tried first.
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_SIGNATURES = {
    b"%PDF-": "a PDF (rename it to .pdf)",
    b"PK\x03\x04": "a zip archive or an office document",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x1f\x8b": "a gzip archive",
    b"\x7fELF": "a program",
}
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\v\f\r\b\x1b")) + b"\x7f"


def read_text(data: bytes, name: str) -> list[Record]:
    """Text as it stands, markup included."""
    return one(decode(data, name))


def decode(data: bytes, name: str) -> str:
    """Text from UTF-8, or from UTF-16 or UTF-32 with a byte order mark.

    Binary data and other encodings raise `DocumentError` with the file's name and the offset of the first bad
    byte.
    """
    mark = next((mark for mark in _BYTE_ORDER_MARKS if data.startswith(mark)), b"")
    encoding = _BYTE_ORDER_MARKS.get(mark, "utf-8")
    if not mark:
        _refuse_binary(data, name)
    try:
        text = data.removeprefix(mark).decode(encoding)
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"{name} is not {encoding.upper()}: byte 0x{error.object[error.start]:02x} at offset "
            f"{len(mark) + error.start} does not fit ({error.reason}); save it as UTF-8, for example with "
            f"`iconv -f latin1 -t utf-8`"
        ) from error
    if mark:
        _refuse_binary(text.encode("utf-8"), name)
    return text


def _refuse_binary(data: bytes, name: str) -> None:
    kind = next((kind for signature, kind in _SIGNATURES.items() if data.startswith(signature)), None)
    controls = len(data) - len(data.translate(None, _CONTROLS))
    if kind:
        evidence = f"it starts like {kind}"
    elif b"\0" in data:
        evidence = f"a NUL byte at offset {data.index(0)} (if this is UTF-16, save it with a byte order mark)"
    elif controls > max(3, len(data) // 50):  # real text may hold a stray one, but not two in a hundred
        evidence = f"{controls} control characters in {len(data)} bytes"
    else:
        return
    raise DocumentError(f"{name} is binary, not text: {evidence}; convert it to text, or leave it out")
