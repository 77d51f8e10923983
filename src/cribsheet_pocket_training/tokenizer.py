"""A byte-level-safe BPE tokenizer in which a word has the same tokens wherever it stands.

A small model that answers by copying must not have to translate "Lisbon" after a space into "Lisbon" after
a quote, at a line start, or at the start of an answer.  So every run of letters and digits carries a word-start
mark, always.  What the mark means is settled by what stands before it: a space by default, nothing at the start
of a line or text or after explicit spaces, and nothing after punctuation that ends in the glue mark.  Digits are
single tokens.  Every text survives encoding and decoding, except one that holds the two marks themselves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

START = "▁"  # starts every word; stands for the space before it
GLUE = "⁀"  # ends punctuation that a word follows without a space

PAD, BOS, SYSTEM, USER, ASSISTANT, END = SPECIALS = (
    "<|pad|>",
    "<|bos|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
PAD_ID, BOS_ID, SYSTEM_ID, USER_ID, ASSISTANT_ID, END_ID = range(6)

_WORD = r"\p{L}\p{N}\p{M}"
_AFTER_SPECIAL = "|".join(re.escape(token) for token in SPECIALS)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{ raise_exception('The pocket model knows the roles system, user and assistant, not ' + message['role']) }}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def _blank() -> Tokenizer:
    """An untrained tokenizer with the normalisation, splitting and decoding that the module docstring describes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(r"(?<=\S) (?=\S)"), START),
            normalizers.Replace(Regex(rf"(?<=[^\s{START}{_WORD}])(?=[{_WORD}])"), GLUE + START),
            normalizers.Replace(Regex(rf"(?:(?<=\s)|\A)(?=[{_WORD}])"), START),
        ]
    )
    pieces = (
        rf"'{GLUE}{START}(?:s|t|re|ve|ll|d|m)(?![{_WORD}])"
        rf"|{START}?\p{{N}}"
        rf"|{START}?[\p{{L}}\p{{M}}]+"
        rf"|{START}?[^\s{START}{GLUE}{_WORD}]+{GLUE}?"
        r"|\n+| +|\s"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Replace(GLUE + START, ""),
            decoders.Replace(GLUE, ""),  # the word is still to come: text must not change as tokens arrive
            decoders.Replace(Regex(rf"(?:(?<=\s)|\A|(?<={_AFTER_SPECIAL})){START}"), ""),
            decoders.Replace(START, " "),
        ]
    )
    return tokenizer


def train(texts: Iterable[str], vocabulary: int = 8192) -> Tokenizer:
    """Learn `vocabulary` tokens (special and byte tokens included) from texts."""
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*SPECIALS, *byte_tokens],
        initial_alphabet=[chr(code) for code in range(33, 127)] + ["\n", " ", START, GLUE],
        limit_alphabet=320,
        show_progress=False,
    )
    tokenizer = _blank()
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer can only reserve the byte tokens as special ones; they are ordinary tokens of the fallback.
    layout = json.loads(tokenizer.to_str())
    layout["added_tokens"] = [token for token in layout["added_tokens"] if token["content"] in SPECIALS]
    return Tokenizer.from_str(json.dumps(layout))


def save(tokenizer: Tokenizer, folder: Path, max_length: int = 16384) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json, which from_pretrained reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    specials = {"bos_token": BOS, "eos_token": END, "pad_token": PAD}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
        "chat_template": CHAT_TEMPLATE,
        **specials,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(specials, indent=1) + "\n", encoding="utf-8")


class FastEncoder:
    """The same tokens as the tokenizer's, several times faster: it remembers every piece it has met.

    Training generates text as fast as a GPU reads it, so the regular expressions of the tokenizer are the
    bottleneck.  Scripts with combining marks, which Python's `re` does not know, go to the tokenizer itself.
    """

    _foreign = re.compile("[\x1c-\x1f\u0300-\u036f\u0483-\u0489\u0590-\u1dff\u2040\u20d0-\u20ff\u2c00-\U0010ffff]")
    _absorb = re.compile(r"(?<=\S) (?=\S)")
    _glue = re.compile(rf"(?:(?<=[^\s{START}\w])|(?<=_))(?=[^\W_])")
    _start = re.compile(r"(?:(?<=\s)|\A)(?=[^\W_])")
    _pieces = re.compile(
        rf"'{GLUE}{START}(?:s|t|re|ve|ll|d|m)(?![^\W_])|{START}?(?=[^\W_])[\d²³¹¼½¾]|{START}?(?:[^\W\d_²³¹¼½¾])+"
        rf"|{START}?(?:[^\s{START}{GLUE}\w]|_)+{GLUE}?|\n+| +|\s"
    )

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._model = tokenizer.model
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        if not text.isascii() and self._foreign.search(text):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
            return ids
        text = self._start.sub(START, self._glue.sub(GLUE + START, self._absorb.sub(START, text)))
        known = self._known
        out: list[int] = []
        for piece in self._pieces.findall(text):
            found = known.get(piece)
            if found is None:
                found = known[piece] = [token.id for token in self._model.tokenize(piece)]
                if len(known) > 400_000:
                    known.clear()
            out += found
        return out


def wiki_texts(articles: Iterable[str], limit: int) -> Iterator[str]:
    """The first `limit` articles, a paragraph at a time."""
    for index, article in enumerate(articles):
        if index >= limit:
            return
        yield from article.split("\n")
