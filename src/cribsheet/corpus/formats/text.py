"""Bytes to text, and the formats that are text as they stand."""

from __future__ import annotations

from cribsheet.corpus.formats.encoding import BYTE_ORDER_MARKS, encoding_of, in_text, known
from cribsheet.corpus.formats.record import Record, one
from cribsheet.errors import DocumentError

_SIGNATURES = {
    b"%PDF-": "a PDF (rename it to .pdf)",
    b"PK\x03\x04": "a zip archive or an office document",
    b"\xd0\xcf\x11\xe0": "an office document of the old kind",
    b"{\\rtf": "rich text",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x1f\x8b": "a gzip archive",
    b"\x7fELF": "a program",
}
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\v\f\r\b\x1b")) + b"\x7f"


def read_text(data: bytes, name: str) -> list[Record]:
    """Text as it stands, markup included; a comment at its top may declare the encoding (`coding: latin-1`)."""
    return one(decode(data, name, in_text(data)))


def decode(data: bytes, name: str, label: str = "") -> str:
    """Text from UTF-8, from the encoding of a byte order mark, or from the one that the file declares (`label`).

    Binary data and other encodings raise `DocumentError` with the file's name and the offset of the first bad
    byte.
    """
    mark = next((mark for mark in BYTE_ORDER_MARKS if data.startswith(mark)), b"")
    body = data.removeprefix(mark)
    encoding = BYTE_ORDER_MARKS[mark] if mark else encoding_of(body, label, name)
    wide = encoding.startswith(("utf-16", "utf-32"))
    if not wide:
        _refuse_binary(body, name)
    try:
        text = body.decode(encoding)
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"{name} is not {encoding.upper()}{_so_declared(label, encoding)}: byte 0x{body[error.start]:02x} at "
            f"offset {len(mark) + error.start} does not fit ({error.reason}); save it as UTF-8, for example with "
            "`iconv -f ENCODING -t utf-8`, where ENCODING is what it was written in: windows-1252 in most of the West, "
            "shift_jis in Japan, windows-1251 in Russia"
        ) from error
    if wide:
        _refuse_binary(text.encode("utf-8"), name)
    return text.lstrip("\ufeff")  # files that were put together hold the mark twice


def _so_declared(label: str, encoding: str) -> str:
    if not label:
        return ""
    return ", as it declares" if known(label) == encoding else f" (it declares {label!r}, which nobody knows)"


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
