"""One reader per format: what text comes out of a file, and what is refused by name."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from pypdf import PdfReader, PdfWriter
from reading import read, text_of

from cribsheet.corpus.documents import read_documents
from cribsheet.errors import DocumentError

pytestmark = pytest.mark.usefixtures("an_empty_folder")


def refused(name: str, content: str | bytes, *parts: str) -> None:
    with pytest.raises(DocumentError) as caught:
        read(name, content)
    for part in (name, *parts):
        assert part in str(caught.value)


# ---- text and encodings


@pytest.mark.parametrize("suffix", [".txt", ".md", ".rst", ".py", ".MD"])
def test_prose_and_source_code_are_read_as_they_stand(suffix: str) -> None:
    assert text_of(f"a{suffix}", "# One\n\n  two *three*\n") == "# One\n\n  two *three*"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_unicode_is_read_with_its_byte_order_mark_removed(encoding: str) -> None:
    assert text_of("a.txt", "Zoë\r\nlives".encode(encoding)) == "Zoë\nlives"


def test_big_endian_utf_16_is_told_by_its_mark() -> None:
    assert text_of("a.txt", b"\xfe\xff" + "Zoë".encode("utf-16-be")) == "Zoë"


def test_another_encoding_is_refused_with_the_byte_the_offset_and_a_command() -> None:
    refused(
        "a.txt",
        "Zoë".encode("latin-1"),
        "not UTF-8",
        "byte 0xeb at offset 2",
        "iconv -f ENCODING -t utf-8",
        "shift_jis in Japan",
    )


def test_offsets_in_marked_files_count_the_mark() -> None:
    refused("a.txt", b"\xef\xbb\xbfab\xff", "byte 0xff at offset 5")


@pytest.mark.parametrize(
    ("content", "evidence"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "it starts like a PNG image"),
        (b"%PDF-1.4\n1 0 obj", "rename it to .pdf"),
        (b"PK\x03\x04 report", "an office document"),
        (b"abc\0def", "a NUL byte at offset 3"),
        ("Zoë".encode("utf-16-le"), "save it with a byte order mark"),
        (b"word \x01\x02\x03\x04\x05\x06 word", "6 control characters in 16 bytes"),
        (b"\xff\xfe" + "a\0b".encode("utf-16-le"), "a NUL byte at offset 1"),
    ],
)
def test_binary_that_pretends_to_be_text_is_refused_by_name(content: bytes, evidence: str) -> None:
    refused("notes.txt", content, "is binary, not text", evidence, "or leave it out")


def test_a_stray_form_feed_or_bell_is_still_text() -> None:
    assert text_of("a.txt", "page one\fpage two\a") == "page one\fpage two\a"


# ---- HTML


def test_html_becomes_its_visible_text_with_blocks_on_their_own_lines() -> None:
    page = """<!doctype html><html><head><title> The
      staff </title><style>p {color: red}</style></head><body><h1>Staff</h1>
      <p>Ada &amp; <b>Zoë</b>
         work here.<br>Since 2019.</p><script>alert("no")</script>
      <ul><li>one<li>two</ul><svg><title>icon</title></svg>
      <table><tr><th>name<th>room</tr><tr><td>Ada</td> <td>12</td></tr></table>
      <pre>a = 1
  b = 2</pre>end</body></html>"""
    [document] = read("staff.html", page)
    assert document.text == (
        "Staff\n\nAda & Zoë work here.\nSince 2019.\n\none\ntwo\n\nname\troom\nAda\t12\n\na = 1\n  b = 2\n\nend"
    )
    assert document.metadata == {"source": "staff.html", "title": "The staff"}


def test_the_title_of_an_icon_is_not_the_title_of_the_page() -> None:
    [document] = read("a.html", "<body><svg><title>icon</title></svg>Staff")
    assert (document.text, document.metadata) == ("Staff", {"source": "a.html"})


def test_html_that_leaves_a_title_open_keeps_its_body() -> None:
    assert text_of("a.htm", "<title>T<body><p>kept") == "kept"


@pytest.mark.parametrize("page", ["<![zz>q", "<!>q", "<!-->q", "<!-- a --!>q", "</ p>q", "<?x?>q", "<p <b>>q</p"])
def test_broken_html_is_read_as_browsers_do(page: str) -> None:
    assert text_of("a.html", page).endswith("q")


# ---- PDF


def pdf(*pages: str, title: str = "") -> bytes:
    """A PDF by hand: a catalog, a font, and a page with one line of text for each of `pages`."""
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, text in enumerate(pages):
        drawing = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET" if text else ""
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * number} 0 R "
            f"/Resources << /Font << /F1 3 0 R >> >> >>"
        )
        objects.append(f"<< /Length {len(drawing)} >>\nstream\n{drawing}\nendstream")
    objects.append(f"<< /Title ({title}) >>")
    out, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    size = len(objects) + 1
    trailer = f"<< /Size {size} /Root 1 0 R /Info {size - 1} 0 R >>\nstartxref\n{len(out)}\n%%EOF\n"
    return out + f"xref\n0 {size}\n0000000000 65535 f \n{table}trailer\n{trailer}".encode()


def encrypted(plain: bytes, password: str) -> bytes:
    writer, out = PdfWriter(clone_from=PdfReader(io.BytesIO(plain))), io.BytesIO()
    writer.encrypt(user_password=password, owner_password="owner", algorithm="RC4-128")
    writer.write(out)
    return out.getvalue()


def test_a_pdf_gives_its_text_its_title_and_where_each_page_starts() -> None:
    [document] = read("plan.pdf", pdf("Ada leads it.", "", "Zoe pays.", title="The plan"))
    assert document.text == "Ada leads it.\n\nZoe pays."
    assert document.metadata == {"source": "plan.pdf", "pages": [0, 13, 15], "title": "The plan"}
    assert document.text[15:] == "Zoe pays."


def test_pages_count_right_behind_an_empty_first_page() -> None:
    [document] = read("plan.pdf", pdf("", "Ada leads it."))
    assert (document.text, document.metadata["pages"]) == ("Ada leads it.", [0, 0])


def test_a_scanned_pdf_is_refused_with_the_command_that_adds_text() -> None:
    refused("scan.pdf", pdf("", ""), "no text on its pages (2)", "ocrmypdf")


@pytest.mark.parametrize("content", [b"%PDF-1.4\nrubbish", b"no pdf at all", b"", pdf("Ada")[:150]])
def test_a_broken_pdf_is_refused_by_name(content: bytes) -> None:
    refused("broken.pdf", content, "is a broken PDF", "or leave it out")


def test_an_encrypted_pdf_is_refused_with_the_command_that_opens_it() -> None:
    refused("secret.pdf", encrypted(pdf("Ada"), "sesame"), "is encrypted", "qpdf --decrypt")


def test_a_pdf_that_only_forbids_printing_is_read() -> None:
    assert text_of("open.pdf", encrypted(pdf("Ada leads it."), "")) == "Ada leads it."


# ---- JSON and JSON lines


def test_a_json_list_of_texts_becomes_a_document_each() -> None:
    items = [
        {"text": "one", "id": "first", "metadata": {"year": 1}},
        {"text": "two", "id": 7},
        {"text": "three", "id": None, "author": "Ada"},
    ]
    documents = read("a.json", json.dumps(items))
    assert [(d.id, d.text) for d in documents] == [("first", "one"), ("7", "two"), ("a.json#3", "three")]
    assert documents[0].metadata == {"source": "a.json", "row": 1, "year": 1}
    assert documents[2].metadata == {"source": "a.json", "row": 3, "author": "Ada"}


def test_one_json_object_with_a_text_is_one_document() -> None:
    [document] = read("a.json", '{"text": "one"}')
    assert (document.id, document.text, document.metadata) == ("a.json", "one", {"source": "a.json"})


def test_other_json_is_one_document_of_indented_text() -> None:
    assert text_of("a.json", '{"name":"Zoë","rooms":[1]}') == ('{\n  "name": "Zoë",\n  "rooms": [\n    1\n  ]\n}')


def test_broken_json_is_refused_with_its_line() -> None:
    refused("a.json", '{"text":\n oops}', "broken JSON", "line 2 column 2")
    refused("deep.json", "[" * 100_000, "broken JSON")


def test_a_metadata_or_an_id_that_makes_no_sense_is_refused_with_its_place() -> None:
    refused("a.json", '[{"text": "x", "metadata": "y"}]', "a.json, item 1: metadata is 'y'")
    refused("a.json", '{"text": "x", "id": 1.5}', "the id is 1.5")


def test_json_lines_become_a_document_each_named_by_their_line() -> None:
    lines = '\n{"text": "one\u2028more"}\r\n{"name": "Ada", "room": 12, "left": null, "tags": ["x"]}\n"bare"\n'
    documents = read("a.jsonl", lines)
    assert [(d.id, d.text) for d in documents] == [
        ("a.jsonl#2", "one\u2028more"),
        ("a.jsonl#3", 'name: Ada\nroom: 12\ntags: ["x"]'),
        ("a.jsonl#4", "bare"),
    ]
    assert documents[0].metadata == {"source": "a.jsonl", "row": 2}


def test_a_broken_json_line_is_refused_with_file_and_line() -> None:
    refused("a.jsonl", '{"text": "one"}\n{"text": tw\n', "a.jsonl, line 2: broken JSON", '{"text": tw')


def test_half_a_surrogate_pair_is_refused_where_it_stands() -> None:
    refused("a.json", r'{"text": "ab\ud800"}', "half a surrogate pair", "'\\ud800', at character 2")


# ---- tables


def test_a_table_becomes_one_document_with_a_line_a_row() -> None:
    table = 'name,room,note\nAda,12,"two\nlines"\n\nZoë,,likes; tea\n'
    assert text_of("a.csv", table) == "name: Ada; room: 12; note: two lines\nname: Zoë; note: likes; tea"


@pytest.mark.parametrize(("name", "mark"), [("a.tsv", "\t"), ("a.csv", ";"), ("a.csv", "\t")])
def test_tabs_and_semicolons_separate_too(name: str, mark: str) -> None:
    assert text_of(name, f"name{mark}room\nAda, B.{mark}12") == "name: Ada, B.; room: 12"


def test_a_table_with_a_text_column_becomes_a_document_a_row() -> None:
    documents = read("a.csv", "id,text,year\nfirst,one,1999\n,two,\n")
    assert [(d.id, d.text) for d in documents] == [("first", "one"), ("a.csv#2", "two")]
    assert documents[0].metadata == {"source": "a.csv", "row": 1, "year": "1999"}


def test_cells_without_a_header_are_named_by_their_column() -> None:
    assert text_of("a.csv", "name,\nAda,12,extra") == "name: Ada; column 2: 12; column 3: extra"


def test_a_quote_that_never_closes_is_refused_with_its_line() -> None:
    refused("a.csv", 'name,room\n"Ada,12\nZoë,13\n', "a.csv, line 3: broken table", "repair the quotes")


@pytest.mark.parametrize("name", ["a.txt", "a.html", "a.json", "a.jsonl", "a.csv"])
@pytest.mark.parametrize("content", ["", " \n\n"])
def test_an_empty_file_named_alone_is_an_error(name: str, content: str) -> None:
    refused(name, content, f"{name} has no text, so there is nothing to read")


@pytest.mark.parametrize("content", ["[]", "{}", "null"])
def test_json_that_holds_nothing_is_empty(content: str) -> None:
    refused("a.json", content, "a.json has no text")


def test_an_unsupported_type_named_alone_is_an_error_that_lists_the_supported() -> None:
    refused("a.odt", b"PK", "a.odt is of an unsupported type (.odt)", ".pdf, ", "Document(text, id)")
    refused("README", "hello", "unsupported type (no suffix)")


def test_an_unreadable_file_is_refused_with_the_reason() -> None:
    Path("corpus").mkdir()
    Path("corpus/a.txt").symlink_to("nowhere.txt")
    with pytest.raises(DocumentError, match=re.escape("cannot read corpus/a.txt: No such file or directory")):
        read_documents("corpus")
