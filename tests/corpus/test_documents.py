"""How sources become documents: which strings are paths, which ids they get, what is refused."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cribsheet.corpus.documents import Document, read_documents
from cribsheet.errors import DocumentError

pytestmark = pytest.mark.usefixtures("an_empty_folder")


def write(**files: str) -> None:
    write_files({name.replace("__", "/") + ".txt": text for name, text in files.items()})


def write_files(files: dict[str, str]) -> None:
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")


def ids(*sources: object) -> list[str]:
    return [document.id for document in read_documents(*sources)]


def texts(*sources: object) -> list[str]:
    return [document.text for document in read_documents(*sources)]


def refusal(*sources: object) -> str:
    with pytest.raises(DocumentError) as caught:
        read_documents(*sources)
    return str(caught.value)


# ---- Document


def test_a_document_normalises_line_ends_and_outer_space_only() -> None:
    assert Document("\n a\r\nb\rc  d \n", id="x").text == "a\nb\nc  d"


def test_a_document_is_frozen_hashable_and_owns_its_metadata() -> None:
    metadata = {"year": 1}
    document = Document("a", "x", metadata)
    metadata["year"] = 2
    assert document.metadata == {"year": 1}
    assert len({document, Document("a", "x", {"year": 1})}) == 1
    with pytest.raises(FrozenInstanceError):
        document.text = "b"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "id_", "message"),
    [
        ("a", "", "a document's id is ''; give a string that names the document"),
        ("a", None, "a document's id is None"),
        (b"a", "x", "the text of document 'x' is of type bytes; give a string"),
        ("ab\udcff", "x", r"document 'x' holds half a surrogate pair, '\\udcff', at character 2"),
    ],
)
def test_a_document_refuses_what_it_cannot_hold(text: str, id_: str, message: str) -> None:
    with pytest.raises(DocumentError, match=message):
        Document(text, id_)


# ---- folders, patterns, files


def test_a_folder_is_read_recursively_in_order_without_hidden_files() -> None:
    files = {"b.md": "B", "a/z.txt": "Z", "a/y.txt": "Y", ".git/c.txt": "no", "a/.d.txt": "no"}
    write_files({f"docs/{name}": text for name, text in files.items()})
    documents = read_documents("docs")
    assert [(d.id, d.text) for d in documents] == [("a/y.txt", "Y"), ("a/z.txt", "Z"), ("b.md", "B")]
    assert documents[0].metadata == {"source": "docs/a/y.txt"}


def test_unsupported_files_in_a_folder_are_skipped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    write_files({"docs/a.txt": "A", "docs/b.PNG": "x", "docs/c.png": "x", "docs/Makefile": "x"})
    with caplog.at_level(logging.WARNING, logger="cribsheet"):
        assert ids("docs") == ["a.txt"]
    assert caplog.messages == ["skipped unsupported files (3) in the folder docs: .png (2), no suffix (1)"]


def test_a_folder_without_documents_is_an_error() -> None:
    Path("empty").mkdir()
    write_files({"images/a.png": "x"})
    assert "the folder empty holds no files; supported are .adoc, " in refusal("empty")
    assert "the folder images holds only unsupported files: .png (1)" in refusal("images")


def test_empty_files_in_a_folder_are_skipped_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    write(docs__a="A", docs__b="", docs__c="  \n")
    assert ids("docs") == ["a.txt"]
    assert caplog.messages == ["skipped documents without text (2): docs/b.txt, docs/c.txt"]


def test_a_long_list_of_empty_files_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    write(docs__full="x", **{f"docs__{number}": "" for number in range(7)})
    assert ids("docs") == ["full.txt"]
    assert caplog.messages[0].endswith("docs/3.txt, docs/4.txt and 2 more")


def test_a_folder_of_empty_files_is_an_error() -> None:
    write(docs__a="", docs__b="")
    assert "the source 'docs' has no text" in refusal("docs")


def test_a_broken_file_in_a_folder_is_an_error_not_a_gap() -> None:
    write_files({"docs/a.txt": "A", "docs/b.json": "{"})
    assert "docs/b.json is broken JSON" in refusal("docs")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("docs/*.txt", ["a.txt"]),
        ("docs/**/*.txt", ["a.txt", "sub/b.txt"]),
        ("docs/*", ["a.txt", "sub/b.txt"]),
        ("docs/**", ["a.txt", "sub/b.txt"]),
        ("*/sub/?.txt", ["docs/sub/b.txt"]),
        (Path("docs/*.txt"), ["a.txt"]),
    ],
)
def test_a_pattern_names_files_below_its_fixed_part(pattern: object, expected: list[str]) -> None:
    write(docs__a="A", docs__sub__b="B")
    assert ids(pattern) == expected


def test_the_files_of_a_pattern_come_in_order() -> None:
    names = [f"docs/{letter}.txt" for letter in "hbgdfcea"]
    write_files(dict.fromkeys(names, "x"))
    assert [d.metadata["source"] for d in read_documents("docs/*")] == sorted(names)


def test_a_file_is_named_by_its_file_name_and_keeps_its_path_as_source() -> None:
    write(docs__a="A")
    [document] = read_documents("docs/a.txt")
    assert (document.id, document.metadata["source"]) == ("a.txt", "docs/a.txt")


def test_a_file_whose_name_holds_wildcards_is_read() -> None:
    write_files({"notes [1].txt": "A"})
    assert ids("notes [1].txt") == ["notes [1].txt"]


def test_a_path_may_start_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(home__a="A")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert texts("~/a.txt") == ["A"]


# ---- which strings are paths


@pytest.mark.parametrize(
    "text",
    [
        "Ada leads the project.",
        "What is this? And that/those [two]?",
        "See README.md.",
        "line one\ndocs/a.txt",
        "/**/ int main()",
        "two words",
        "word!",
        "1,003.5",
        "no/spaces" * 50,
        "w" * 256,
        "小明住在北京",
        "猫は東京に住んでいます。",
        "Zürich",
    ],
)
def test_a_string_that_does_not_look_like_a_path_is_text(text: str) -> None:
    [document] = read_documents(text)
    assert (document.text, document.id, document.metadata) == (text, "text-1", {})


@pytest.mark.parametrize(
    "text",
    [
        *("notes.txt", "report.docx", "docs/part", "*.md", "my notes/*.md", "a?", "nodir", "Docs", "README", "3.5"),
        *("manuals/", "C:\\docs\\a", "D:", "~no-such-user/a", "a-b_c", "report 2025.pdf", "My Notes.TXT", "手册.pdf"),
    ],
)
def test_a_string_that_looks_like_a_path_but_names_nothing_is_an_error(text: str) -> None:
    message = refusal(text)
    assert "no such file" in message
    assert text.rstrip("/").replace("\\", r"\\") in message
    assert "to pass text, wrap it in Document(text, id)" in message
    assert texts(Document(text, id="x")) == [text]


def test_a_mistyped_name_in_a_list_is_an_error_too() -> None:
    assert "no such file or folder: 'nodir'" in refusal(["nodir"])
    assert r"no such file or folder: ' nodir\n'" in refusal(" nodir\n")


def test_names_that_are_like_a_mistyped_one_are_told() -> None:
    write_files({"manuals/pump.md": "A", "README.md": "A", ".manual": "A", "far.txt": "A"})
    assert "; did you mean 'manuals'?; to pass text" in refusal("manual")
    assert "; did you mean 'manuals'?; to pass text" in refusal("Manuals")
    assert "; did you mean 'manuals'?; to pass text" in refusal(Path("MANUAL"))
    assert "; did you mean 'README.md'?; to pass text" in refusal("readme")
    assert "; did you mean 'manuals/pump.md'?; to pass text" in refusal("manuals/pumps.md")
    for unlike in ("nodir", "nowhere/pump.md", "C:\\docs\\a"):
        assert "did you mean" not in refusal(unlike)


def test_a_path_object_is_always_a_path() -> None:
    assert "no such file or folder: 'word' (looked from " in refusal(Path("word"))
    assert "no such file or folder" in refusal(Path("w" * 300))


def test_an_address_is_not_fetched() -> None:
    assert "https://example.org/a is an address, and addresses are not fetched" in refusal("https://example.org/a")


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    assert "pipe.txt is neither a file nor a folder" in refusal(Path("pipe.txt"))


# ---- mappings, objects, iterables


def test_a_mapping_is_a_document() -> None:
    [document] = read_documents({"text": "A", "id": "x", "metadata": {"year": 1}, "author": "Ada"})
    assert document == Document("A", "x", {"year": 1, "author": "Ada"})


def test_a_mapping_without_text_is_refused() -> None:
    assert """a mapping needs a string under "text"; this one is {'body': 'A'}""" in refusal({"body": "A"})


class Page:
    """What LangChain's Document looks like from outside; iterable, as pydantic models are."""

    def __init__(self, page_content: str, metadata: dict[str, Any], id: str | None = None) -> None:
        self.page_content, self.metadata, self.id = page_content, metadata, id

    def __iter__(self) -> Iterator[tuple[str, object]]:
        return iter(vars(self).items())


class Node:
    """What LlamaIndex's TextNode looks like from outside."""

    def __init__(self, text: str, node_id: str) -> None:
        self.text_resource, self.node_id, self.metadata = text, node_id, {"file": "f"}

    def get_content(self) -> str:
        return self.text_resource


def test_documents_with_page_content_are_named_by_id_or_else_by_source() -> None:
    documents = read_documents(Page("A", {"source": "a.txt", "page": 0}), Page("B", {}, id="b"), Page("C", {}))
    assert [(d.id, d.text) for d in documents] == [("a.txt", "A"), ("b", "B"), ("text-1", "C")]
    assert documents[0].metadata == {"source": "a.txt", "page": 0}


def test_pages_that_share_a_source_are_numbered() -> None:
    pages = [Page("A", {"source": "a.pdf"}), Page("B", {"source": "b.pdf"}), Page("C", {"source": "a.pdf"})]
    assert ids(pages) == ["a.pdf#1", "b.pdf", "a.pdf#2"]


def test_documents_with_get_content_are_named_by_their_node() -> None:
    assert read_documents(Node("A", "node-1")) == [Document("A", "node-1", {"file": "f"})]


def test_objects_with_a_text_and_an_id_are_documents() -> None:
    assert read_documents(SimpleNamespace(text="A", doc_id="x")) == [Document("A", "x")]


def test_documents_pass_through_unchanged() -> None:
    document = Document("A", "x", {"year": 1})
    assert read_documents(document) == [document]


def test_iterables_and_generators_may_be_nested_and_mixed() -> None:
    write(docs__a="A")
    lazy = (text for text in ["B is here.", "C is here."])
    assert texts(["docs", lazy], ({"text": "D"},)) == ["A", "B is here.", "C is here.", "D"]


def test_an_empty_document_among_others_is_skipped_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert ids([Document("A", "x"), Document(" ", "y")]) == ["x"]
    assert caplog.messages == ["skipped documents without text (1): the Document 'y'"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "the text '' has no text, so there is nothing to read"),
        (Document("", "x"), "the Document 'x' has no text"),
        ([], "the source [] has no text"),
        (b"bytes", "b'bytes' is of type bytes, which is no source of documents"),
        (5, "5 is of type int"),
        (None, "None is of type NoneType"),
    ],
)
def test_a_source_that_yields_nothing_is_an_error(source: object, message: str) -> None:
    assert message in refusal(source)


def test_an_open_file_is_refused_rather_than_read_line_by_line() -> None:
    write(a="A")
    with open("a.txt", encoding="utf-8") as file:
        assert "is of type TextIOWrapper, which is no source of documents; pass a path" in refusal(file)


def test_no_source_at_all_is_an_error() -> None:
    assert refusal() == "no documents were given; name a file or folder, or pass texts or documents"


# ---- ids


def test_texts_are_numbered_past_the_ids_that_are_taken() -> None:
    assert ids("One is here.", Document("x", "text-1"), "Two is here.") == ["text-2", "text-1", "text-3"]


def test_files_of_the_same_name_are_told_apart_by_their_folders() -> None:
    write(x__docs__a="1", y__docs__a="2", x__docs__b="3")
    assert ids("x/docs", "y/docs") == ["x/docs/a.txt", "b.txt", "y/docs/a.txt"]


def test_all_rows_of_a_file_move_to_the_longer_name_together() -> None:
    write_files({"x/a.jsonl": '{"text": "1"}\n{"text": "2"}', "y/a.jsonl": '{"text": "3"}'})
    assert ids("x/a.jsonl", "y/a.jsonl") == ["x/a.jsonl#1", "x/a.jsonl#2", "y/a.jsonl#1"]


def test_a_file_gives_way_to_an_id_that_was_given() -> None:
    write(docs__a="A")
    assert ids("docs/a.txt", Document("B", "a.txt")) == ["docs/a.txt", "a.txt"]


def test_an_id_given_twice_is_an_error_that_names_both() -> None:
    write_files({"a.json": '[{"text": "1", "id": "x"}, {"text": "2", "id": "x"}]'})
    assert refusal("a.json").startswith(
        "two documents have the id 'x': a.json, row 1 and a.json, row 2; name each source once"
    )
    assert "the Document 'x' and the mapping {'text': 'A'" in refusal(Document("A", "x"), {"text": "A", "id": "x"})


@pytest.mark.parametrize("again", ["docs/sub/a.txt", "docs/sub", "docs/**/*.txt", "./docs/../docs/sub/a.txt"])
def test_the_same_file_twice_is_an_error_however_it_was_named(again: str) -> None:
    write(docs__sub__a="A")
    message = refusal("docs", again)
    assert "two documents have the id 'sub/a.txt': docs/sub/a.txt and " in message
    assert "name each source once" in message


def test_ids_are_the_same_wherever_the_corpus_lies(tmp_path: Path) -> None:
    write(docs__sub__a="A")
    assert ids("docs") == ids(tmp_path / "docs") == ids(str(tmp_path / "docs" / "**" / "*.txt")) == ["sub/a.txt"]
