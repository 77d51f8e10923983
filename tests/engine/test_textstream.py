"""Tokens become text that is certain: whole characters, and never the beginning of a stop string."""

from __future__ import annotations

import random
import time

import pytest
from test_tokens import TOKENIZERS
from transformers import AutoTokenizer

import cribsheet_pocket
from cribsheet.engine.detokenizer import TextStream
from cribsheet.testing import tiny_tokenizer

TEXTS = [
    "Alice lives in Lisbon.",
    "naïve café — 漢字 👩‍👩‍👧 e\u0301!",
    "lines\nand\n\nparagraphs ",
    "🇵🇹🇵🇹",
    "  two spaces",
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def stream(tokenizer, text, stop=(), ends=()):
    """(pieces, whether stopped, tokens pushed) of a text written token by token."""
    here = TextStream(tokenizer, tuple(stop), ends=tuple(ends))
    pieces, pushed = [], 0
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        pieces.append(here.push(token))
        pushed += 1
        if here.stopped:
            break
    pieces.append(here.finish())
    assert "".join(pieces) == here.text
    return pieces, here.stopped, pushed


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_that_the_tokenizer_decodes(name, text):
    tokenizer = TOKENIZERS[name]()
    pieces, stopped, _ = stream(tokenizer, text)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True).lstrip(" ")
    assert not stopped


@pytest.mark.parametrize("name", [*TOKENIZERS, "pocket"])
def test_the_texts_of_tokens_in_their_places_are_the_text(name):
    tokenizer = TOKENIZERS[name]() if name in TOKENIZERS else AutoTokenizer.from_pretrained(cribsheet_pocket.path())
    for text in ("Alice lives in Lisbon (Bob's): 12 x 3.\n\nYes", "one 🙂 two three"):
        known = set(tokenizer(text, add_special_tokens=False)["input_ids"]) - set(tokenizer.all_special_ids)
        ids = [token for token in tokenizer(text, add_special_tokens=False)["input_ids"] if token in known]
        written = tokenizer.decode(ids, skip_special_tokens=True).lstrip(" ")
        here, told = TextStream(tokenizer), []
        for token in ids:
            told.append(here.text_of(token))
            here.push(token)
        if any("\ufffd" in each for each in told):  # a character of several tokens
            assert "".join(told).replace("\ufffd", "") == written.replace("🙂", "")
        else:
            assert "".join(told) == written


@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_holds_half_a_character(tokenizer, text):
    pieces, _, pushed = stream(tokenizer, text)
    assert pushed > 1
    assert all("\ufffd" not in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 1 or len(text) < 6


def test_text_comes_as_soon_as_it_is_certain(tokenizer):
    pieces, _, _ = stream(tokenizer, "Alice lives in Lisbon.")
    assert all(pieces[:-1]) and pieces[-1] == ""


def test_bytes_that_never_become_a_character_come_out_at_the_end(tokenizer):
    here = TextStream(tokenizer)
    broken = tokenizer("é", add_special_tokens=False)["input_ids"][:1]
    assert here.push(broken[0]) == ""
    assert here.finish() == "\ufffd"


def test_special_tokens_are_not_written(tokenizer):
    assert "".join(stream(tokenizer, "Alice<|user|>Bob")[0]) == "AliceBob"


def test_the_space_that_a_first_word_brings_is_not_written(tokenizer):
    assert "".join(stream(tokenizer, " Alice lives")[0]) == "Alice lives"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("Alice lives in Lisbon.", ["in"], "Alice lives "),
        ("Alice lives in Lisbon.", ["s in L"], "Alice live"),
        ("Alice lives in Lisbon.", ["."], "Alice lives in Lisbon"),
        ("Alice lives in Lisbon.", ["Lis", "lives"], "Alice "),
        ("Alice lives in Lisbon.", ["Alice"], ""),
        ("one\n\ntwo", ["\n\n"], "one"),
        ("ends here, é and more", ["é"], "ends here, "),
        ("a family 👩‍👩‍👧 here", ["👩‍👧"], "a family 👩‍"),
        ("ababac and on", ["abac"], "ab"),
        ("aaaaab and on", ["aab"], "aaa"),
        ("abc and on", ["abcd", "bc"], "a"),
        ("Alice lives in Lisbon.", ["lives", "live"], "Alice "),
        ("abc and on", ["bcx", "c a"], "ab"),
    ],
)
def test_an_answer_ends_before_its_stop_string_wherever_tokens_begin(tokenizer, text, stop, expected):
    pieces, stopped, _ = stream(tokenizer, text, stop)
    assert ("".join(pieces), stopped) == (expected, True)


@pytest.mark.parametrize(
    ("text", "stop", "expected", "stops"),
    [
        ("\n\nAlice lives.\n\nBob", [], "Alice lives.", True),
        ("\n \n\t\n\n Alice", [], "Alice", False),
        ("\nAlice\nBob\n\n", [], "Alice\nBob", True),
        ("Alice lives.\n\nBob", [], "Alice lives.", True),
        ("\n\n\n", [], "", False),
        ("", [], "", False),
        ("\n\nAlice", ["\n"], "", True),
        ("\n\nAlice", ["\n\n"], "", True),
        ("\n\nAlice lives.\n\nBob", ["lives"], "Alice ", True),
        ("\n\nAlice", ["\nAl"], "", True),
        ("\n\nAlice", ["\nBo"], "Alice", False),
    ],
)
def test_an_end_that_nobody_asked_for_ends_no_answer_that_has_not_begun(tokenizer, text, stop, expected, stops):
    pieces, stopped, pushed = stream(tokenizer, text, stop, ends=["\n\n"])
    assert ("".join(pieces), stopped) == (expected, stops)
    here, told = TextStream(tokenizer, tuple(stop), ends=("\n\n",)), []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"][:pushed]:
        told.append(here.text_of(token))
        here.push(token)
    assert "".join(told).strip().startswith(expected.strip())


def test_without_ends_of_its_own_an_answer_keeps_the_lines_it_begins_with(tokenizer):
    assert "".join(stream(tokenizer, "\n\nAlice")[0]) == "\n\nAlice"


def test_a_stop_string_is_found_as_soon_as_it_is_complete(tokenizer):
    ids = tokenizer("Alice lives in Lisbon. Bob lives in Oslo.", add_special_tokens=False)["input_ids"]
    _, stopped, pushed = stream(tokenizer, "Alice lives in Lisbon. Bob lives in Oslo.", ["Lisbon"])
    assert stopped and pushed < len(ids)
    assert "Lisbon" in tokenizer.decode(ids[:pushed]) and "Lisbon" not in tokenizer.decode(ids[: pushed - 1])


class OneToken:
    """A tokenizer whose only token is a whole text."""

    def __init__(self, text):
        self.text = text

    def decode(self, ids, **_):
        return self.text * len(ids)


def test_of_two_stop_strings_the_one_that_is_complete_first_ends_the_text_also_within_one_token():
    here = TextStream(OneToken("xabcdy"), ("abcd", "bc"))
    assert here.push(0) == "xa" and here.stopped


def test_a_text_that_must_be_exact_keeps_the_space_it_begins_with(tokenizer):
    ids = tokenizer(" yes", add_special_tokens=False)["input_ids"]
    for exact, expected in ((True, " yes"), (False, "yes")):
        here = TextStream(tokenizer, exact=exact)
        assert "".join([*map(here.push, ids), here.finish()]) == expected


def test_what_only_looked_like_a_stop_string_is_written_after_all(tokenizer):
    pieces, stopped, _ = stream(tokenizer, "Alice lives in Lisb", ["Lisbon", "Lisbet"])
    assert "".join(pieces) == "Alice lives in Lisb" and not stopped
    assert pieces[-1] == "Lisb"
    assert "".join(stream(tokenizer, "Alice lives in Lisba.", ["Lisbon"])[0]) == "Alice lives in Lisba."


def test_any_stop_in_any_text_cuts_at_the_first_place(tokenizer):
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("ab é\n漢") for _ in range(rng.randint(1, 25))).strip(" ")
        stop = ["".join(rng.choice("ab é\n漢") for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        found = [at for s in stop if (at := text.find(s)) >= 0]
        pieces, stopped, _ = stream(tokenizer, text, stop)
        assert stopped == bool(found), (text, stop)
        complete = min((text.find(s) + len(s) for s in stop if s in text), default=0)
        first = [text.find(s) for s in stop if s in text and text.find(s) + len(s) == complete]
        assert "".join(pieces) == text[: min(first)] if found else text == "".join(pieces), (text, stop)


def test_ends_in_any_text_cut_at_the_first_place_after_its_beginning(tokenizer):
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choice("ab \n") for _ in range(rng.randint(0, 20))).lstrip(" ")
        pieces, stopped, _ = stream(tokenizer, text, ends=["\n\n"])
        expected, end, _ = text.lstrip().partition("\n\n")
        assert ("".join(pieces), stopped) == (expected, bool(end)), text


def test_a_thousand_long_stop_strings_do_not_slow_a_stream_down(tokenizer):
    stop = tuple(f"{number:04d}" + "z" * 5000 for number in range(1000))
    here = TextStream(tokenizer, stop)
    ids = tokenizer("Alice lives in Lisbon since 1987. " * 40, add_special_tokens=False)["input_ids"]
    began = time.process_time()
    for token in ids:
        here.push(token)
    assert (time.process_time() - began) / len(ids) < 0.02


class Searched(str):
    """A text that counts the characters which are looked through."""

    seen = 0

    def __add__(self, more):
        return Searched(str(self) + more)

    def find(self, sought, start):
        Searched.seen += max(0, len(self) - start)
        return super().find(sought, start)


def test_a_short_stop_string_is_looked_for_in_what_is_new_however_long_another_is(tokenizer):
    stops = ["z" * 1000, *(f"z{n}" for n in range(100))]
    here = TextStream(tokenizer, tuple(stops))
    here._written = Searched("b" * 1000)
    ids = tokenizer("abc abc", add_special_tokens=False)["input_ids"]
    Searched.seen = 0
    pieces = "".join(map(here.push, ids)) + here.finish()
    assert pieces.endswith("abc abc")
    assert Searched.seen < len(ids) * 3000  # 101,000 for each token when the longest decided for all
