"""Word and PowerPoint files, made here: what text comes out, and what is refused. Needs the extra `[office]`."""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path

import pytest

from cribsheet.corpus.documents import Document, read_documents
from cribsheet.errors import DocumentError

NEEDS = "the extra [office] is not installed: pip install 'cribsheet[office]'"
WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
MATH = "http://schemas.openxmlformats.org/officeDocument/2006/math"
PACKAGE = "http://schemas.openxmlformats.org/package/2006"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
MAIN = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"


pytestmark = pytest.mark.usefixtures("an_empty_folder")


def read(name: str, content: bytes) -> Document:
    Path(name).write_bytes(content)
    [document] = read_documents(Path(name))
    return document


def refused(name: str, content: bytes, *parts: str) -> None:
    with pytest.raises(DocumentError) as caught:
        read(name, content)
    for part in (name, *parts):
        assert part in str(caught.value)


def packed(**files: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def docx(body: str) -> bytes:
    """A Word file by hand: the types, one relation, and the body's XML."""
    types = (
        f'<Types xmlns="{PACKAGE}/content-types"><Default Extension="rels" ContentType="application/vnd.'
        'openxmlformats-package.relationships+xml"/><Default Extension="xml" ContentType="application/xml"/>'
        f'<Override PartName="/word/document.xml" ContentType="{MAIN}"/></Types>'
    )
    relation = f'<Relationship Id="r1" Type="{OFFICE}/officeDocument" Target="word/document.xml"/>'
    relations = f'<Relationships xmlns="{PACKAGE}/relationships">{relation}</Relationships>'
    document = f'<w:document xmlns:w="{WORD}" xmlns:m="{MATH}"><w:body>{body}</w:body></w:document>'
    return packed(**{"[Content_Types].xml": types, "_rels/.rels": relations, "word/document.xml": document})


def paragraph(*runs: str) -> str:
    return f"<w:p>{''.join(runs)}</w:p>"


def run(text: str, *, settings: str = "") -> str:
    return f'<w:r><w:rPr>{settings}</w:rPr><w:t xml:space="preserve">{text}</w:t></w:r>'


def cell(*paragraphs: str) -> str:
    return f"<w:tc>{''.join(map(paragraph, map(run, paragraphs)))}</w:tc>"


def test_a_word_file_gives_its_paragraphs_and_tables() -> None:
    pytest.importorskip("mammoth", reason=NEEDS)
    rows = f"<w:tr>{cell('name')}{cell('room')}</w:tr><w:tr>{cell('Zoë')}{cell('12', 'or 13')}</w:tr>"
    raised = run("6", settings='<w:vertAlign w:val="superscript"/>')
    body = paragraph(run("Ada &amp; "), run("Zoë")) + f"<w:tbl>{rows}</w:tbl>" + paragraph(run("10"), raised, run(" €"))
    document = read("a.docx", docx(body))
    assert document.text == "Ada & Zoë\n\nname\troom\nZoë\t12 or 13\n\n10⁶ €"
    assert document.metadata == {"source": "a.docx"}


def test_what_was_inserted_or_stands_in_a_control_is_read_and_what_was_deleted_is_not() -> None:
    pytest.importorskip("mammoth", reason=NEEDS)
    inserted = f'<w:ins w:id="1">{run("added ")}</w:ins>'
    deleted = "<w:del><w:r><w:delText>gone</w:delText></w:r></w:del>"
    control = f"<w:sdt><w:sdtContent>{run('filled in')}</w:sdtContent></w:sdt>"
    assert read("a.docx", docx(paragraph(inserted, deleted, control))).text == "added filled in"


def test_what_of_a_word_file_cannot_be_read_is_named(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("mammoth", reason=NEEDS)
    formula = "<m:oMath><m:r><m:t>x=1</m:t></m:r></m:oMath>"
    assert read("a.docx", docx(paragraph(run("where "), formula))).text == "where"
    assert caplog.messages == ["a.docx: nothing was read of these elements: oMath"]


def test_a_deck_gives_its_slides_tables_charts_and_notes() -> None:
    pptx = pytest.importorskip("pptx", reason=NEEDS)
    from pptx.chart.data import CategoryChartData
    from pptx.enum.chart import XL_CHART_TYPE

    deck = pptx.Presentation()
    first = deck.slides.add_slide(deck.slide_layouts[1])
    first.shapes.title.text, first.placeholders[1].text = "Staff", "Ada leads.\vZoë pays."
    first.notes_slide.notes_text_frame.text = "Say it slowly."
    deck.slides.add_slide(deck.slide_layouts[6])
    second = deck.slides.add_slide(deck.slide_layouts[6])
    table = second.shapes.add_table(2, 2, 0, 0, 99, 99).table
    for row, texts in enumerate([("name", "room"), ("", "12")]):
        for column, text in enumerate(texts):
            table.cell(row, column).text = text
    second.shapes.add_group_shape().shapes.add_textbox(0, 0, 9, 9).text_frame.text = "In a group."
    numbers = CategoryChartData()
    numbers.categories = ["East", "West"]
    numbers.add_series("Sales", (1.5, 2))
    second.shapes.add_chart(XL_CHART_TYPE.PIE, 0, 0, 99, 99, numbers)
    deck.core_properties.title = "The deck"
    out = io.BytesIO()
    deck.save(out)
    document = read("a.pptx", out.getvalue())
    slides = [
        "Staff\n\nAda leads.\nZoë pays.\n\nSay it slowly.",
        "name\troom\n\t12\n\nIn a group.\n\nSales: East: 1.5; West: 2.0",
    ]
    assert document.text == "\n\n".join(slides)
    end = len(slides[0])
    assert document.metadata == {"source": "a.pptx", "pages": [0, end, end + 2], "title": "The deck"}


@pytest.mark.parametrize("name", ["a.docx", "a.pptx"])
def test_what_is_no_office_document_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mammoth", reason=NEEDS)
    pytest.importorskip("pptx", reason=NEEDS)
    refused(name, b"", "is no office document")
    refused(name, b"PK\x03\x04 junk", "is no office document")
    refused(name, packed(a="b"), "is a broken office document")
    refused(name, docx("<w:p>")[:-40], "office document")
    refused(name, b"\xd0\xcf\x11\xe0 old", "is encrypted, or an office document of the old kind")
    monkeypatch.setattr("cribsheet.corpus.formats.office._LARGEST", 1000)
    refused(name, packed(a="b" * 2000), "unpacks to 2,000 bytes, of which 1,000 are read")


def test_a_word_file_without_text_is_refused() -> None:
    pytest.importorskip("mammoth", reason=NEEDS)
    refused("a.docx", docx(paragraph()), "has no text")


@pytest.mark.parametrize(("name", "library"), [("a.docx", "mammoth"), ("a.pptx", "pptx")])
def test_without_the_extra_it_is_named(name: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    refused(
        name, docx(paragraph(run("x"))), "the extra [office], which is not installed", "pip install 'cribsheet[office]'"
    )
