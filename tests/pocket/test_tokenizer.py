"""A word has the same tokens wherever it stands, and every text survives."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

import cribsheet_pocket
from cribsheet_pocket_training import tokenizer as pocket
from cribsheet_pocket_training.worlds import make_world

TOKENIZER = Tokenizer.from_file(str(Path(cribsheet_pocket.__file__).parent / "data" / "tokenizer.json"))

TEXTS = [
    "",
    " ",
    " leading, trailing ",
    "two  spaces\n\n    four\tand a tab\r\n",
    "The \"big\" one (ok) isn't Alice's — it's 3.12, at 25 °C.",
    '{"city": "Lisbon", "codes": ["a1b2c3", -5.0e7]}',
    "PEP: 257\nTitle: Docstring Conventions\nAuthor: D. G. <d@python.org>,\n        G. v. R. <g@python.org>\n\n=====\n",
    "def __init__(self, x_y: int = 0) -> None:\n    return f'{x}' #!\n",
    "ÅÄÖ naïve 東京 日本語 🙂 Ελλάδα नमस्ते e\u0301 \u00a0 nbsp",
    "a|>b <|x <|users|> |",
]


def ids(text: str) -> list[int]:
    found: list[int] = TOKENIZER.encode(text, add_special_tokens=False).ids
    return found


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back(text: str) -> None:
    assert TOKENIZER.decode(ids(text), skip_special_tokens=False) == text


def test_worlds_in_every_style_survive() -> None:
    for seed in range(12):
        text = make_world(seed, 300).text
        assert TOKENIZER.decode(ids(text)) == text


@pytest.mark.parametrize("word", ["tennis", "Salzburg", "Nordwind", "1987", "x12", "Élan"])
@pytest.mark.parametrize(
    "before", ["", " ", "\n", "\n\n", '"', ": ", "(", "- ", "    ", "<|assistant|>", "he said: '", "[1] ", "/", "_"]
)
def test_a_word_has_the_same_tokens_wherever_it_stands(word: str, before: str) -> None:
    alone = ids(word)
    assert ids(before + word)[-len(alone) :] == alone
    assert ids(f"{before}{word}, and on")[: len(ids(before + word))] == ids(before + word)


def test_text_may_be_cut_after_a_newline() -> None:
    for left, right in (("One.\n\n", "Two?"), ("a:\n", "  b"), ("x = 1\n\n", '"y"')):
        assert ids(left) + ids(right) == ids(left + right)


def test_offsets_cover_the_text_in_order() -> None:
    text = "The \"big\" one (ok) isn't Alice's.\nNext: line."
    encoding = TOKENIZER.encode(text, add_special_tokens=False)
    assert encoding.offsets[0][0] == 0 and encoding.offsets[-1][1] == len(text)
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in zip(encoding.offsets, encoding.offsets[1:], strict=False))


def test_the_fast_encoder_agrees_with_the_tokenizer() -> None:
    fast = pocket.FastEncoder(TOKENIZER)
    for text in [*TEXTS, *(make_world(seed, 400).text for seed in range(12))]:
        assert fast(text) == ids(text)


def test_special_tokens_are_one_token_each() -> None:
    assert [ids(token) for token in pocket.SPECIALS] == [[i] for i in range(6)]
