"""PDF to text, by pypdf."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from cribsheet.corpus.formats.record import Record, normalise
from cribsheet.errors import DocumentError

if TYPE_CHECKING:
    from pypdf import PdfReader

_BETWEEN_PAGES = "\n\n"


def read_pdf(data: bytes, name: str) -> list[Record]:
    """The text of all pages, a blank line between two; metadata has `pages`, where each starts in the text.

    Broken, encrypted and text-free (scanned) files raise `DocumentError`.
    """
    try:
        pages, title = _pages_and_title(data, name)
    except DocumentError:
        raise
    except Exception as error:  # pypdf raises whatever the broken bytes lead it into
        raise DocumentError(
            f"{name} is a broken PDF ({type(error).__name__}: {error}); open it in a viewer and print it to "
            "a new PDF, or leave it out"
        ) from error
    if not any(pages):
        raise DocumentError(
            f"{name} has no text on its pages ({len(pages)}), so it is probably a scan; add a text layer "
            "first, for example with `ocrmypdf in.pdf out.pdf`"
        )
    text, starts = _joined(pages)
    return [Record(text, {"pages": starts} | ({"title": title} if title else {}))]


def _pages_and_title(data: bytes, name: str) -> tuple[list[str], str]:
    from pypdf import PdfReader  # here because it takes 0.2 s to import and most corpora hold no PDF

    pdf = PdfReader(io.BytesIO(data))
    if pdf.is_encrypted and not _opens_without_password(pdf):
        raise DocumentError(
            f"{name} is encrypted; save a copy without the password, for example with "
            f"`qpdf --decrypt --password=... in.pdf out.pdf`"
        )
    title = (pdf.metadata and pdf.metadata.title) or ""
    return [_mended(page.extract_text()) for page in pdf.pages], _mended(title)


def _opens_without_password(pdf: PdfReader) -> bool:
    """Many PDFs are encrypted with an empty password, only to forbid printing."""
    from pypdf.errors import DependencyError

    try:
        return bool(pdf.decrypt(""))
    except DependencyError:  # AES, which pypdf decrypts only where a cryptography package is installed
        return False


def _mended(text: str) -> str:
    """Half a surrogate pair, to which broken fonts map, becomes the replacement character."""
    return normalise(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


def _joined(pages: list[str]) -> tuple[str, list[int]]:
    """Pages as one text, and where each starts; an empty page starts where the text before it ends."""
    starts: list[int] = []
    length = 0
    for page in pages:
        if page and length:
            length += len(_BETWEEN_PAGES)
        starts.append(length)
        length += len(page)
    return _BETWEEN_PAGES.join(filter(None, pages)), starts
