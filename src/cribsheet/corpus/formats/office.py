"""Word and PowerPoint files to text, by mammoth and python-pptx: the extra `[office]` (decisions/0025)."""

from __future__ import annotations

import io
import logging
import re
import zipfile
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from cribsheet.corpus.formats.html import read_page
from cribsheet.corpus.formats.record import Record, normalise
from cribsheet.errors import DocumentError

if TYPE_CHECKING:
    from pptx.slide import Slide

logger = logging.getLogger(__name__)

_LARGEST = 1 << 31  # bytes of a file unpacked; a few kilobytes can say that they are more
_DIAGRAM = "/diagramData"  # a drawing made of words, kept apart from its slide


def read_docx(data: bytes, name: str) -> list[Record]:
    """The text as Word shows it, with tables, notes and text boxes, without comments, headers and what was deleted.

    What the library cannot read, such as formulas, is named in a warning.
    """
    return _opened(data, name, _docx)


def read_pptx(data: bytes, name: str) -> list[Record]:
    """The text of all slides, a blank line between two, with tables, charts' numbers and the speaker's notes.

    Metadata has `pages`, where each slide starts in the text, and `title`.
    """
    return _opened(data, name, _pptx)


def _opened(data: bytes, name: str, read: Callable[[bytes, str], list[Record]]) -> list[Record]:
    """What a reader gives; `DocumentError` without the extra, and for whatever the file leads it into."""
    _refuse_others(data, name)
    try:
        return read(data, name)
    except ImportError as error:
        raise DocumentError(
            f"{name} is read by the extra [office], which is not installed ({error}); pip install 'cribsheet[office]', "
            "save it as PDF, or leave it out"
        ) from error
    except Exception as error:  # the libraries raise whatever the broken bytes lead them into
        raise DocumentError(
            f"{name} is a broken office document ({type(error).__name__}: {error}); open it and save it anew, or leave "
            "it out"
        ) from error


def _refuse_others(data: bytes, name: str) -> None:
    if data.startswith(b"\xd0\xcf\x11\xe0"):
        raise DocumentError(
            f"{name} is encrypted, or an office document of the old kind; save it in today's form without a password"
        )
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as zipped:
            size = sum(entry.file_size for entry in zipped.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise DocumentError(
            f"{name} is no office document ({error}); open it and save it anew, or leave it out"
        ) from error
    if size > _LARGEST:
        raise DocumentError(f"{name} unpacks to {size:,} bytes, of which {_LARGEST:,} are read; divide it")


def _docx(data: bytes, name: str) -> list[Record]:
    import mammoth

    result = mammoth.convert_to_html(io.BytesIO(data), convert_image=mammoth.images.img_element(lambda image: {}))
    unread = {found[1] for each in result.messages if (found := re.search(r"ignored: (?:\{.*\})?(\S+)", each.message))}
    if unread:
        logger.warning("%s: nothing was read of these elements: %s", name, ", ".join(sorted(unread)))
    return read_page(result.value)


def _pptx(data: bytes, name: str) -> list[Record]:
    import pptx

    deck = pptx.Presentation(io.BytesIO(data))
    text, starts = "", []
    for slide in deck.slides:
        said = normalise("\n\n".join(filter(None, map(normalise, _parts(slide)))))
        text += "\n\n" if text and said else ""
        starts.append(len(text))
        text += said
    title = " ".join((deck.core_properties.title or "").split())
    return [Record(text, {"pages": starts} | ({"title": title} if title else {}))]


def _parts(slide: Slide) -> Iterator[str]:
    """The texts of a slide: its shapes as they stand in the file, diagrams, notes."""
    yield from _shape_texts(slide.shapes)
    for relation in slide.part.rels.values():
        if relation.reltype.endswith(_DIAGRAM) and not relation.is_external:
            yield _diagram(relation.target_part.blob)
    if slide.has_notes_slide and slide.notes_slide.notes_text_frame is not None:
        yield slide.notes_slide.notes_text_frame.text


def _shape_texts(shapes: Any) -> Iterator[str]:
    for shape in shapes:
        if hasattr(shape, "shapes"):  # a group
            yield from _shape_texts(shape.shapes)
        elif shape.has_text_frame:
            yield shape.text_frame.text.replace("\v", "\n")
        elif shape.has_table:
            yield "\n".join("\t".join(" ".join(cell.text.split()) for cell in row.cells) for row in shape.table.rows)
        elif shape.has_chart:
            yield _chart(shape.chart)


def _chart(chart: Any) -> str:
    """A chart's title and a line a series, with the value of each category."""
    lines = [chart.chart_title.text_frame.text] if chart.has_title and chart.chart_title.has_text_frame else []
    for plot in chart.plots:
        names = [str(category) for category in plot.categories]
        for series in plot.series:
            pairs = zip_longest(names, series.values, fillvalue="")
            lines.append(
                f"{series.name}: {'; '.join(f'{name}: {value}' if name else str(value) for name, value in pairs)}"
            )
    return "\n".join(lines)


def _diagram(xml: bytes) -> str:
    from lxml import etree

    root = etree.fromstring(xml, etree.XMLParser(resolve_entities=False))
    drawing = "{http://schemas.openxmlformats.org/drawingml/2006/main}"
    lines = ("".join(piece.text or "" for piece in line.iter(f"{drawing}t")) for line in root.iter(f"{drawing}p"))
    return "\n".join(filter(None, lines))
