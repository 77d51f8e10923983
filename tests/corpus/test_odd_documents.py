"""Documents of odd kinds, made here: each is read as it was meant, or refused by name; none is garbled in silence."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import random
import socket
import threading
import time
from pathlib import Path

import pytest
from reading import read, text_of

from cribsheet.corpus.documents import Document, read_documents
from cribsheet.errors import DocumentError

SEED = 20261129


pytestmark = pytest.mark.usefixtures("an_empty_folder")


def refusal(name: str, content: str | bytes) -> str:
    with pytest.raises(DocumentError) as caught:
        read(name, content)
    assert name in str(caught.value)
    return str(caught.value)


# ---- encodings: what pages say, the encoding they mean by it, and words that it can write

WORDS = {
    "west": "Zoë naïve Ærø façade Straße “quoted” – 5 €",
    "east": "Łódź žluťoučký kůň Šárka Győr",
    "russian": "Пётр живёт в Орле, Ёлка",
    "greek": "Αθήνα είναι πόλη",
    "turkish": "İstanbul ışık şeker ğ",
    "hebrew": "שלום עולם",
    "arabic": "مرحبا بالعالم",
    "thai": "สวัสดี ไทย",
    "japanese": "日本語①テスト髙ｱｲｳ",
    "simplified": "中文镕测试毛",
    "traditional": "繁體中文測試",
    "korean": "한국어 똠방각하",
}
LABELS = [
    *(
        ("iso-8859-1", "cp1252", "west"),
        ("ISO_8859-1", "cp1252", "west"),
        ("latin1", "cp1252", "west"),
        ("iso88591", "cp1252", "west"),
    ),
    *(("windows-1252", "cp1252", "west"), ("us-ascii", "cp1252", "west"), ("iso-8859-2", "iso8859-2", "east")),
    *(("windows-1250", "cp1250", "east"), ("windows-1251", "cp1251", "russian"), ("koi8-r", "koi8-r", "russian")),
    *(
        ("iso-8859-5", "iso8859-5", "russian"),
        ("ibm866", "cp866", "russian"),
        ("x-mac-cyrillic", "mac-cyrillic", "russian"),
    ),
    *(("windows-1253", "cp1253", "greek"), ("iso-8859-7", "iso8859-7", "greek"), ("iso-8859-9", "cp1254", "turkish")),
    *(
        ("windows-1254", "cp1254", "turkish"),
        ("windows-1255", "cp1255", "hebrew"),
        ("iso-8859-8-i", "iso8859-8", "hebrew"),
    ),
    *(("windows-1256", "cp1256", "arabic"), ("windows-874", "cp874", "thai"), ("tis-620", "cp874", "thai")),
    *(("Shift_JIS", "cp932", "japanese"), ("x-sjis", "cp932", "japanese"), ("windows-31j", "cp932", "japanese")),
    *(("gb2312", "gb18030", "simplified"), ("GBK", "gb18030", "simplified"), ("gb18030", "gb18030", "simplified")),
    *(("big5", "big5", "traditional"), ("euc-kr", "cp949", "korean"), ("ks_c_5601-1987", "cp949", "korean")),
]
WAYS = {
    "page.html": '<html><head><meta charset="{}"><title>{}</title></head><body><p>{}</p>',
    "late.html": "<!--<meta charset=utf-8>--><META content='text/html; CHARSET={}' Http-Equiv=Content-Type><p>{}<p>{}",
    "bare.htm": "<meta charset={}><p>{}<p>{}",
    "sheet.xhtml": '<?xml version="1.0" encoding="{}"?><html><title>{}</title><body><p>{}</p></body></html>',
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("label", "encoding", "script"), LABELS)
def test_a_page_is_read_in_the_encoding_that_it_declares(label: str, encoding: str, script: str, way: str) -> None:
    words = WORDS[script].split()
    random.Random(f"{SEED} {label} {way}").shuffle(words)
    said = " ".join(words)
    assert text_of(way, WAYS[way].format(label, said, said).encode(encoding)).endswith(said)


@pytest.mark.parametrize(
    ("label", "script"), [("euc-jp", "日本語テスト"), ("iso-2022-jp", "日本語テスト"), ("macintosh", "Zoë")]
)
def test_so_are_encodings_of_fewer_signs(label: str, script: str) -> None:
    encoding = {"macintosh": "mac-roman"}.get(label, label)
    assert text_of("a.html", f"<meta charset={label}><p>{script}".encode(encoding)) == script


@pytest.mark.parametrize(
    "label", ["iso-8859-1", "windows-1251", "Shift_JIS", "gbk", "utf-16", "klingon", "rot13", "cp037", ""]
)
def test_what_is_utf_8_all_through_is_read_as_that(label: str, caplog: pytest.LogCaptureFixture) -> None:
    said = "Zoë 日本語 Пётр – “all”"
    assert text_of("a.html", f"<meta charset={label}><p>{said}") == said
    warned = label in ("iso-8859-1", "windows-1251", "Shift_JIS", "gbk")
    assert caplog.messages == (
        [f"a.html declares the encoding {label}, but it is in UTF-8; read as that"] if warned else []
    )


@pytest.mark.parametrize("label", ["gbk", "euc-jp"])
def test_a_few_signs_that_could_be_utf_8_are_what_was_declared(label: str) -> None:
    sign = b"\xc3\xab"  # ë in UTF-8
    assert text_of("a.html", b"<meta charset=" + label.encode() + b"><p>" + sign) == sign.decode(label) != "ë"


@pytest.mark.parametrize(
    ("label", "said"),
    [("utf-8", "not UTF-8, as it declares"), ("klingon", "it declares 'klingon', which nobody knows")],
)
def test_a_page_that_is_not_in_its_encoding_is_refused(label: str, said: str) -> None:
    assert said in refusal("a.html", f"<meta charset={label}><p>Zoë".encode("latin-1"))
    assert "is not CP932, as it declares: byte 0x85 at offset 27" in refusal(
        "b.html", b"<meta charset=shift_jis><p>\x85"
    )


@pytest.mark.parametrize("page", ["<script>'<meta charset=koi8-r>'</script>", "<meta name=x content='charset=koi8-r'>"])
def test_what_only_looks_like_a_declaration_is_none(page: str) -> None:
    assert text_of("a.html", f"{page}<p>Zoë") == "Zoë"
    assert "is not UTF-8" in refusal("b.html", f"{page}<p>Zoë".encode("latin-1"))


@pytest.mark.parametrize(
    ("name", "text", "encoding"),
    [
        ("a.py", "# -*- coding: latin-1 -*-\nname = 'Zoë'", "latin-1"),
        ("b.py", "#!/usr/bin/python\n# vim: set fileencoding=euc-jp :\nname = '日本'", "euc-jp"),
        ("c.rb", "# encoding: shift_jis\nname = 'テスト'", "shift_jis"),
        ("d.tex", "\\documentclass{article}\n\\usepackage[latin1]{inputenc}\nZoë", "latin-1"),
        ("e.adoc", "= Title\n:encoding: ISO-8859-15\n\n5 €", "iso8859-15"),
        ("f.txt", "日本語です。", "iso2022_jp"),
        ("g.txt", "Zoë 日本語", "utf-16"),
        ("h.txt", "Zoë 日本語", "utf-32"),
        ("i.csv", "name\nZoë 日本語", "utf-16"),
        ("j.html", "<p>Zoë 日本語", "utf-16"),
        ("k.jsonl", '{"name": "Zoë"}', "utf-16-le"),
        ("l.json", '{"text": "Zoë"}', "utf-32-be"),
        ("m.xhtml", '<?xml version="1.0" encoding="UTF-16"?><p>Zoë</p>', "utf-16-be"),
        ("n.txt", "\ufeff\ufeffZoë", "utf-8"),
        ("o.txt", "\ufeffZoë 中文", "gb18030"),
    ],
)
def test_other_files_tell_their_encoding_in_their_own_ways(name: str, text: str, encoding: str) -> None:
    found = text_of(name, text.encode(encoding))
    last = text.lstrip("\ufeff").split("\n")[-1]
    assert found.split("\n")[-1] in (last, f"name: {last}", "name: Zoë", "Zoë", "Zoë 日本語")
    assert "ë" in found or "日" in found or last in found


def test_a_comment_that_speaks_of_an_encoding_changes_no_utf_8() -> None:
    assert text_of("a.md", "Write `coding: shift_jis` – “so”") == "Write `coding: shift_jis` – “so”"
    assert text_of("b.tex", "% \\usepackage[latin1]{inputenc}\nZoë").endswith("Zoë")


@pytest.mark.parametrize("encoding", ["cp1252", "cp1251", "shift_jis", "gb18030", "euc-kr", "big5"])
def test_text_that_declares_nothing_is_refused_and_nobody_is_told_to_garble_it(encoding: str) -> None:
    text = {
        "cp1252": "Zoë x",
        "cp1251": "Пётр",
        "shift_jis": "テスト",
        "gb18030": "中文测试",
        "euc-kr": "한국어",
        "big5": "繁體",
    }
    message = refusal("a.txt", text[encoding].encode(encoding))
    assert "save it as UTF-8" in message
    assert "-f ENCODING" in message
    assert "latin1" not in message


# ---- tables


def table(rows: list[list[str]], separator: str, *, quoting: int = csv.QUOTE_MINIMAL) -> str:
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=separator, quoting=quoting, lineterminator="\n").writerows(rows)
    return file.getvalue()


CELLS = [
    *("Ada", "London, UK", "36", "3,50", "1.234,56", "a; b", "two words", 'says "hi"', "x | y", "€ 5", "2026-11-29"),
    *("Zoë", "-1,5", "https://example.org/a", "(none)", "10 %", "O'Brien", "Name, first"),
]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("separator", list(",;|\t"))
def test_a_table_of_any_separator_comes_out_as_it_went_in(separator: str, quoting: int, name: str) -> None:
    chance = random.Random(f"{SEED} {separator} {quoting} {name}")
    for _ in range(20):
        columns = chance.randint(2, 5)
        header = chance.sample(["name", "Age, years", "city", "price in EUR", "note", "from"], columns)
        rows = [[chance.choice(CELLS) for _ in range(columns)] for _ in range(chance.randint(3, 8))]
        meant = "\n".join("; ".join(f"{key}: {cell}" for key, cell in zip(header, row, strict=True)) for row in rows)
        assert text_of(name, table([header, *rows], separator, quoting=quoting)) == meant


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("Name;Age, years;City\nAda;36;London", "Name: Ada; Age, years: 36; City: London"),
        ("name;price\nAda;3,50\nBob;4,20", "name: Ada; price: 3,50\nname: Bob; price: 4,20"),
        ("Price, EUR;Weight, kg\n3,50;1,20", "Price, EUR: 3,50; Weight, kg: 1,20"),
        ("id,lat;lon,name\n1,52.1;4.2,Delft", "id: 1; lat;lon: 52.1;4.2; name: Delft"),
        ("a|b\n1|2", "a: 1; b: 2"),
        ("sep=;\na,b;c\n1;2", "a,b: 1; c: 2"),
        ("sep=\t\r\na\tb\r\n1\t2", "a: 1; b: 2"),
        ('"SEP=|"\na|b;c\n1|2', "a: 1; b;c: 2"),
        ("sep=,,,\na,b\n1,2", "a: 1; b: 2"),
        ("a,b\r1,2\r3,4", "a: 1; b: 2\na: 3; b: 4"),
        ('name, note\nAda, "x, y"', "name: Ada; note: x, y"),
        ("Hello, world\nfoo", "Hello, world: foo"),
        ("a,a\n1,2", "a: 1; a 2: 2"),
    ],
)
def test_the_separator_is_the_one_by_which_rows_come_out_even(content: str, text: str) -> None:
    assert text_of("a.csv", content) == text


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('name\tnote\nAda\t"quoted" start\nBob\t5" pipe', 'name: Ada; note: "quoted" start\nname: Bob; note: 5" pipe'),
        ('name\tnote\nAda\t"open\nBob\tclose"', 'name: Ada; note: "open\nname: Bob; note: close"'),
        ('name\tnote\nAda\t"never closed', 'name: Ada; note: "never closed'),
        ('name\tnote\nAda\t"He said ""hi"""', 'name: Ada; note: He said "hi"'),
        ('name\tnote\nAda\t"two\nlines"\nBob\tone', "name: Ada; note: two lines\nname: Bob; note: one"),
        ("name,room\nAda,12", "name: Ada; room: 12"),
    ],
)
def test_quotation_marks_in_tabs_are_text_unless_they_enclose_cells(content: str, text: str) -> None:
    assert text_of("a.tsv", content) == text
    assert text_of("a.csv", content) == text


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_cell_may_be_of_any_size_and_nobody_elses_limit_changes(name: str) -> None:
    before, long = csv.field_size_limit(), "word " * 60_000
    mark = "," if name == "a.csv" else "\t"
    threads = [
        threading.Thread(target=text_of, args=(f"{number}{name}", f"text{mark}n\n{long}{mark}1")) for number in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert text_of(name, f'text{mark}n\n"{long}"{mark}1') == long.strip()
    assert csv.field_size_limit() == before


def test_a_text_that_an_unquoted_separator_would_cut_is_refused() -> None:
    assert "row 2 has 3 cells, but the header names 2" in refusal("a.csv", "id,text\n1,Hi\n2,Hello, world\n")
    assert text_of("b.csv", "text\nAda, who leads it; and Bob") == "Ada, who leads it; and Bob"


def test_columns_of_the_same_name_lose_nothing() -> None:
    [document] = read("a.csv", "text,note,note,metadata,text\none,x,y,z,two\n")
    assert document.text == "one"
    kept = {key: document.metadata[key] for key in ("note", "note 2", "metadata", "text 2")}
    assert kept == {"note": "x", "note 2": "y", "metadata": "z", "text 2": "two"}


# ---- empty records

EMPTY = [{"id": 1, "text": None}, {"id": 1, "text": ""}, {"id": 1, "text": " \n"}, {"id": 1}, {}, None, [], ""]
EMPTY += [
    {"id": 1, "metadata": {"year": 1}},
    {"text": None, "title": "x"},
    {"id": "a", "note": None},
    {"text": float("nan")},
]


@pytest.mark.parametrize("empty", EMPTY, ids=json.dumps)
def test_an_empty_record_is_skipped_with_a_warning(empty: object, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": "one", "id": "x"}, empty, {"text": "two", "id": "y"}]
    for name, content in (("a.jsonl", "\n".join(map(json.dumps, rows))), ("a.json", json.dumps(rows))):
        caplog.clear()
        assert [(document.id, document.text) for document in read(name, content)] == [("x", "one"), ("y", "two")]
        assert caplog.messages == [f"skipped documents without text (1): {name}, row 2"]


def test_rows_and_mappings_without_text_are_skipped_too(caplog: pytest.LogCaptureFixture) -> None:
    assert [document.id for document in read("a.csv", "id,text\n1,\n2,hi\n3, \n")] == ["2"]
    mappings = [{"text": None, "id": "n"}, {"text": "x", "id": "y"}, {"text": float("nan")}]
    assert [document.id for document in read_documents(mappings)] == ["y"]
    assert [message[:36] for message in caplog.messages] == ["skipped documents without text (2): "] * 2


@pytest.mark.parametrize("content", ['{"text": null, "id": 1}', '[{"text": null}]', '[{"id": 1, "text": ""}]'])
def test_a_file_of_nothing_but_empty_records_is_refused(content: str) -> None:
    assert "has no text" in refusal("a.json", content)
    assert "has no text" in refusal("a.jsonl", content.strip("[]"))


def test_numbers_stand_as_they_were_written() -> None:
    content = '{"version": 1.10, "n": 12345678901234567890.5, "e": 1e5, "f": 0.5}'
    assert text_of("a.jsonl", content) == "version: 1.10\nn: 12345678901234567890.5\ne: 1e5\nf: 0.5"
    assert '"version": "1.10"' in text_of("a.json", content)
    [document] = read("b.json", '{"text": "x", "price": 3.50}')
    assert document.metadata["price"] == 3.5


def test_a_name_that_stands_twice_is_refused() -> None:
    assert "the name 'text' stands twice" in refusal("a.json", '{"text": "a", "text": "b"}')
    assert "line 2" in refusal("a.jsonl", '{"text": "a"}\n{"b": {"c": 1, "c": 2}}')


# ---- hidden HTML

HIDDEN = [
    *("<p hidden>SECRET", "<p HIDDEN=''>SECRET</p>", "<div hidden><p>SECRET</div>", "<ul><li hidden>SECRET<li>v</ul>"),
    *("<p style='display:none'>SECRET</p>", "<p style='color: red; DISPLAY : None !important'>SECRET</p>"),
    *("<p style='/*x*/display:/**/none'>SECRET</p>", "<p style='visibility: hidden'>SECRET</p>"),
    *("<table><tr hidden><td>SECRET<tr><td>v</table>", "<table><tr><td>v<td hidden>SECRET</table>"),
    *(
        "<template>SECRET<p>SECRET</template>",
        "<head><noscript>SECRET</noscript></head>",
        "<noscript><p>SECRET</noscript>",
    ),
    *("<script>SECRET</script>", "<style>SECRET</style>", "<!-- SECRET -->", "<!-- SECRET --!>", "v<!-- SECRET"),
    *("<svg><title>SECRET</title><defs><text>SECRET</text></defs></svg>", "<iframe>SECRET</iframe>"),
    *(
        "<video>SECRET</video>",
        "<dialog>SECRET</dialog>",
        "<div popover>SECRET</div>",
        "<input type=hidden value=SECRET>",
    ),
    *(
        "<b><div hidden></b>SECRET</div>",
        "<meta name=description content=SECRET>",
        "<math><annotation>SECRET</annotation></math>",
    ),
    *(
        "<style>.x, p.y {color: red; display: none}</style><p class=x>SECRET",
        "<style>#a{display:none}</style><i id=a>SECRET</i>",
    ),
    *(
        "<datalist><option>SECRET</datalist>",
        "<object>SECRET</object>",
        "<canvas>SECRET</canvas>",
        "<![CDATA[SECRET]]>",
    ),
]


@pytest.mark.parametrize("hidden", HIDDEN)
def test_what_a_browser_hides_is_hidden(hidden: str) -> None:
    text = text_of(
        "a.html", f"<title>T</title><p>before</p>{hidden}" + ("" if hidden.endswith("<!-- SECRET") else "<p>after")
    )
    assert "before" in text
    assert "SECRET" not in text
    assert hidden.endswith("<!-- SECRET") or text.endswith("after")


SHOWN = [
    *("<p aria-hidden=true>SHOWN", "<details><summary>s</summary>SHOWN</details>", "<p hidden=until-found>SHOWN"),
    *("<dialog open>SHOWN</dialog>", "<svg><text>SHOWN</text></svg>", "<p style='display:block'>SHOWN"),
    *("<p style=\"content:'display:none'\">SHOWN", "<textarea>SHOWN</textarea>", "<select><option>SHOWN</select>"),
    *("<style>@media print {p {display: none}} a:hover {display: none}</style><p>SHOWN", "<p hidden>x<p>SHOWN"),
    *("<style>.tab {display: none} .tab.on {display: block}</style><p class='tab on'>SHOWN", "<pre>SHOWN</pre>"),
    *("<style media=print>p {display: none}</style><p>SHOWN", "<![if !IE]><p>SHOWN<![endif]>", "<xmp>SHOWN</xmp>"),
    *("<style>p {display: none}</style><p style='display: block'>SHOWN", "<td>SHOWN", "<p class=hidden>SHOWN"),
]


@pytest.mark.parametrize("shown", SHOWN)
def test_what_a_browser_shows_is_shown(shown: str) -> None:
    assert "SHOWN" in text_of("a.html", f"<p>before</p>{shown}")


def test_rows_of_a_table_stay_rows() -> None:
    page = """<table><tr><th></th><th><p>Room</p></th><th>Since</th></tr>
    <tr><td><p>Ada</p></td><td></td><td><p>2019</p><p>or so</p></td></tr></table>"""
    assert text_of("a.html", f"<p>Staff{page}") == "Staff\n\n\tRoom\tSince\nAda\t\t2019 or so"
    assert text_of("b.html", "<table><tr><td><h1>A</h1><p>b<p>c<td>d</table>") == "A\n\nb\n\nc\n\n\td"


def test_what_stands_above_and_below_the_line_is_told_from_what_stands_on_it() -> None:
    page = "10<sup>6</sup> H<sub>2</sub>O 1<sup>st</sup> x<sup>n+1</sup>, said<sup><a href=#1>12</a></sup>"
    assert text_of("a.html", page) == "10⁶ H₂O 1st xⁿ⁺¹, said¹²"


def test_short_forms_of_xml_swallow_nothing() -> None:
    body = '<div hidden=""/><p>a <i/>b<br/>c</p><![CDATA[x < y & z]]>'
    page = f'<html><head><title/><script src="x"/></head><body>{body}</body></html>'
    assert text_of("a.xhtml", page) == "a b\nc\n\nx < y & z"


def test_a_page_that_nests_without_end_is_read() -> None:
    assert text_of("a.html", "<div>" * 20_000 + "deep") == "deep"


# ---- strings beside the text

HALVES = [
    r'{"text": "ab\ud83d"}',
    r'{"text": "x", "id": "\udc00"}',
    r'{"text": "x", "m": [{"k": "\ud800"}]}',
    r'{"\ud800": 1, "text": "x"}',
]


@pytest.mark.parametrize("content", HALVES)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_half_a_surrogate_pair_in_json_is_refused_with_advice_that_helps(name: str, content: str) -> None:
    message = refusal(name, content)
    assert "half a surrogate pair" in message
    assert r"an escape without its other half, as \ud83d\ude00 has one; complete or remove it" in message
    half = next(part for part in (r"\ud83d", r"\udc00", r"\ud800") if part in content)
    assert len(read(name, content.replace(half, r"\ud83d\ude00"))) == len(read(name, content.replace(half, ""))) == 1


@pytest.mark.parametrize("half", ["\ud83d", "\udc00", "\udce9"])
def test_it_is_refused_wherever_it_stands_beside_a_text(half: str) -> None:
    for where, fields in {
        "the id of document": {"id": f"x{half}"},
        "the metadata of document": {"metadata": {"a": [{"b": f"x{half}"}]}},
        "metadata of document 'x'": {"metadata": {f"a{half}": 1}},
        "metadata of document": {"metadata": {"path": Path(f"x{half}")}},
    }.items():
        with pytest.raises(DocumentError, match="half a surrogate pair") as caught:
            Document(**{"text": "x", "id": "x", **fields})
        assert where in str(caught.value)
        assert str(caught.value).isprintable()


def test_the_advice_for_texts_can_be_followed() -> None:
    pair, bytes_ = "a\ud83d\ude00", b"caf\xe9".decode("utf-8", "surrogateescape")
    with pytest.raises(DocumentError) as caught:
        Document(pair, "x")
    assert "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')" in str(caught.value)
    assert Document(pair.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), "x").text == "a😀"
    with pytest.raises(DocumentError, match="decode its bytes in the encoding that they are in"):
        Document(bytes_, "x")


def test_metadata_that_holds_itself_is_no_endless_walk() -> None:
    loop: dict[str, object] = {}
    loop["me"] = [loop]
    assert Document("a", "x", loop).text == "a"


@pytest.mark.parametrize("source", ["files", "files/*.txt", "files/caf\udce9.txt"])
def test_a_file_name_that_is_no_utf_8_is_refused(source: str) -> None:
    Path("files").mkdir()
    try:
        Path("files/caf\udce9.txt").write_text("x")
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    with pytest.raises(DocumentError, match=r"the file name 'files/caf.udce9.txt' is not in UTF-8.*; rename the file"):
        read_documents(source if "*" in source else Path(source))


# ---- only regular files


@pytest.mark.parametrize("source", [Path("docs"), Path("docs/odd.txt"), "docs/*", "docs/odd.txt"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "broken link", "loop", "link to a pipe"])
def test_what_is_no_regular_file_is_named_and_nobody_waits(kind: str, source: str | Path) -> None:
    Path("docs").mkdir()
    Path("docs/a.txt").write_text("A")
    odd = "docs/odd.txt"
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(odd)
    elif kind == "pipe":
        os.mkfifo(odd)
    else:
        os.mkfifo("pipe")
        os.symlink({"device": "/dev/zero", "broken link": "nowhere", "loop": "odd.txt"}.get(kind, "../pipe"), odd)
    with pytest.raises(DocumentError, match=r"docs/odd\.txt"):
        read_documents(source)


def test_a_file_that_turns_into_a_pipe_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.txt").write_text("A")
    regular = os.stat("a.txt")
    Path("a.txt").unlink()
    os.mkfifo("a.txt")
    monkeypatch.setattr(Path, "stat", lambda self, **_: regular)
    monkeypatch.setattr(os.path, "isfile", lambda path: True)
    with pytest.raises(DocumentError, match=r"a\.txt has no text"):
        read_documents(Path("a.txt"))


def test_links_to_folders_are_named(caplog: pytest.LogCaptureFixture) -> None:
    Path("docs").mkdir()
    Path("docs/a.txt").write_text("A")
    Path("docs/more").symlink_to("..")
    with caplog.at_level(logging.WARNING, logger="cribsheet"):
        assert [document.id for document in read_documents("docs")] == ["a.txt"]
    assert caplog.messages == ["did not follow links to folders (1), such as 'docs/more'; name what they lead to"]


@pytest.mark.parametrize(
    "page",
    [
        "<style>" + "a" * 100_000 + "</style>",
        "<style>" + "@" * 100_000 + "</style>",
        "<style>" + "/*" * 50_000 + "</style>",
        "<title " * 20_000,
        "<?xml version='1.0'?>" + "<![CDATA[" * 20_000,
    ],
    ids=["rule", "condition", "comment", "title", "cdata"],
)
def test_what_begins_and_never_ends_takes_no_time(page: str, tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(f"<p>Said.</p>{page}")
    began = time.process_time()
    read_documents(tmp_path)
    assert time.process_time() - began < 5
