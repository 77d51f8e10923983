"""Answers with a form are complete within their token limit, whatever the model would rather say."""

from __future__ import annotations

import json
import re
from copy import deepcopy

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT, QUESTION
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from cribsheet import CompressedKnowledgeLLM
from cribsheet.engine.detokenizer import TextStream
from cribsheet.errors import RequestError
from cribsheet.structured.grammar import Constraint, Grammar
from cribsheet.structured.grammar_tokens import GrammarTokens
from cribsheet.testing import tiny_backbone, tiny_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
REGEX = r"[A-Z][a-z]{2,40}(, [A-Z][a-z]+)*\."
ENDLESS = {
    "$defs": {"a": {"type": "object", "properties": {"b": {"$ref": "#/$defs/a"}}, "required": ["b"]}},
    "$ref": "#/$defs/a",
}
CHOICES = ["yes", "no", "maybe so", "maybe not, who knows?"]


@pytest.fixture(scope="module", params=["tiny", "pocket"])  # a plain tokenizer, and one whose words carry marks
def kb(request):
    model = "pocket" if request.param == "pocket" else tiny_backbone()
    return CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=model, rate=3, scorer="recent")


@pytest.fixture(scope="module")
def tokens(kb):
    return GrammarTokens.of(kb.backbone.tokenizer, kb.backbone.eos_ids, kb.backbone.config.vocab_size)


def written(constraint, backbone, seed):
    """What a model that says anything at random would write."""
    generator, ids = torch.Generator().manual_seed(seed), []
    while True:
        noise = torch.randn(backbone.config.vocab_size, generator=generator) * 5
        token, _ = constraint.choose(noise, lambda logits: (int(logits.argmax()), logits))
        if token in backbone.eos_ids:
            return backbone.tokenizer.decode(ids), len(ids)
        ids.append(token)


@pytest.mark.parametrize("limit", [40, 45, 60, 90])
@pytest.mark.parametrize("seed", range(6))
def test_json_is_complete_and_fits_its_schema_within_any_limit(kb, tokens, seed, limit):
    text, count = written(Constraint(Grammar.json_schema(SCHEMA), tokens, limit), kb.backbone, seed)
    value = json.loads(text)
    assert count <= limit and list(value) == ["name", "age", "tags"]
    assert isinstance(value["name"], str) and value["age"] >= 0 and set(value["tags"]) <= {"a", "b"}


@pytest.mark.parametrize("limit", [4, 7, 30])
@pytest.mark.parametrize("seed", range(8))
def test_text_matches_its_expression_as_a_whole_within_any_limit(kb, tokens, seed, limit):
    text, count = written(Constraint(Grammar.regex(REGEX), tokens, limit), kb.backbone, seed)
    assert re.fullmatch(REGEX, text) and count <= limit


@pytest.mark.parametrize("seed", range(8))
def test_a_choice_is_one_of_the_choices(kb, tokens, seed):
    assert written(Constraint(Grammar.choices(CHOICES), tokens, 30), kb.backbone, seed)[0] in CHOICES


@pytest.mark.parametrize(
    "choices",
    [
        ["a", "ab", "abc"],
        [" yes", "no "],
        ["a\n\nb"],
        ["\x00\x01\x7f\x85", '\\ " / { } [ ] | ( ) . *'],
        ["Zoë", "漢字", "👩‍👩‍👧"],
        [f"option number {n} of very many, all of them long" for n in range(2000)] + ["zz"],
    ],
)
def test_whatever_the_choices_hold_the_answer_is_one_of_them(kb, choices):
    bias = {number: -50.0 for number in kb.backbone.eos_ids}
    for seed in range(2):
        answer = kb.ask(QUESTION, choices=choices, max_tokens=60, temperature=2.0, seed=seed, logit_bias=bias)
        assert answer.text in choices and answer.finish_reason == "stop"


def test_a_form_is_not_cut_where_a_model_without_a_template_would_stop():
    backbone = tiny_backbone()
    backbone.tokenizer.chat_template = None
    plain = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=backbone, rate=3, scorer="recent")
    assert plain.ask(QUESTION, choices=["one\n\ntwo"]).text == "one\n\ntwo"


@pytest.mark.parametrize(
    ("grammar", "limit"),
    [
        (Grammar.choices([f"a long option {n}" for n in range(500)] + ["zz"]), 2),
        (Grammar.json_schema({"type": "string", "format": "email"}), 20),
        (Grammar.regex(r"[^@]*@{3}[^#]*#"), 8),
        (Grammar.regex(r"[a-z]+@[a-z]+\.com"), 12),
    ],
)
def test_a_way_out_is_found_that_no_fixed_order_of_tokens_would_find(kb, tokens, grammar, limit):
    for seed in range(3):
        assert written(Constraint(grammar, tokens, limit), kb.backbone, seed)[1] <= limit


def test_a_form_needs_an_end_token_within_the_vocabulary(kb):
    backbone = kb.backbone
    vocabulary = backbone.config.vocab_size
    assert GrammarTokens(backbone.tokenizer, backbone.eos_ids | {vocabulary + 7}, vocabulary).eos == backbone.eos_ids
    with pytest.raises(RequestError, match="The model has no end token"):
        GrammarTokens(backbone.tokenizer, frozenset({vocabulary + 7}), vocabulary)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"json_schema": {"type": "nothing"}}, "The JSON schema cannot be used"),
        ({"json_schema": "{"}, "The JSON schema cannot be used"),
        ({"json_schema": {"type": "object", "properties": {"a": False}, "required": ["a"]}}, "JSON schema"),
        ({"regex": "(unclosed"}, "The regular expression cannot be used"),
        ({"choices": []}, r"The choices are \[\]; give a list"),
        ({"choices": "yes"}, "give a list of non-empty texts"),
        ({"choices": ["yes", ""]}, "give a list of non-empty texts"),
        ({"json_schema": SCHEMA, "max_tokens": 5}, "was found within max_tokens=5; allow more tokens"),
        ({"regex": "[a-z]{400}", "max_tokens": 20}, "was found within max_tokens=20"),
        ({"regex": r"[^\s\S]"}, "No answer that fits the regular expression was found"),
        ({"regex": 5}, "The regular expression is 5; give a text"),
        ({"regex": "\ud800"}, "The regular expression cannot be used"),
        ({"choices": ["\ud800"]}, "The list of choices cannot be used"),
        ({"choices": 5}, "give a list of non-empty texts"),
        ({"json_schema": ENDLESS, "max_tokens": 60}, "No answer that fits the JSON schema was found"),
        ({"regex": "a", "choices": ["a"]}, "An answer has one form, but regex and choices were given"),
    ],
)
def test_a_form_that_cannot_be_met_is_refused_before_any_work(kb, settings, message):
    steps = []
    hook = kb.backbone.model.register_forward_pre_hook(lambda *_: steps.append(1))
    try:
        with pytest.raises(RequestError, match=message):
            kb.ask(QUESTION, **settings)
    finally:
        hook.remove()
    assert steps == [] and kb.ask(QUESTION, max_tokens=2).text


def test_answers_with_and_without_a_form_share_a_batch_and_do_not_touch_each_other(kb):
    settings = [
        {"json_schema": SCHEMA, "max_tokens": 60},
        {"max_tokens": 20},
        {"regex": REGEX, "temperature": 1.5, "seed": 3, "max_tokens": 30},
        {"choices": CHOICES},
        {"max_tokens": 20, "temperature": 1.0, "seed": 1},
    ]
    alone = [kb.ask(QUESTION, **each).text for each in settings]
    streams = [kb.stream(QUESTION, **each) for each in settings]
    assert ["".join(stream) for stream in streams] == alone
    assert json.loads(alone[0]) and re.fullmatch(REGEX, alone[2]) and alone[3] in CHOICES
    assert [streams[n].answer.finish_reason for n in (0, 2, 3)] == ["stop"] * 3


def test_an_answer_with_a_form_has_log_probabilities_for_every_token(kb):
    answer = kb.ask(QUESTION, choices=CHOICES, logprobs=2)
    assert len(answer.logprobs) == answer.usage.completion_tokens > 0
    assert kb.backbone.tokenizer.decode([said.token_id for said in answer.logprobs]) == answer.text


def test_a_number_above_an_open_bound_finds_its_end(kb):
    schema = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
    assert 0 < json.loads(kb.ask(QUESTION, json_schema=schema, max_tokens=30).text) < 1


NORMALISERS = {
    "NFC": normalizers.NFC(),
    "NFD": normalizers.NFD(),
    "NFKC": normalizers.NFKC(),
    "NFKD": normalizers.NFKD(),
    "lower case": normalizers.Lowercase(),
    "no accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]),
    "other quotes": normalizers.Replace("``", '"'),
}
CHANGED = ["a\u0301", "\u212b", "\ufb01ne", "\u1112\u1161\u11ab", "caf\u00e9", "Yes", "\u2460", "``a''"]


def normalising(normaliser):
    tokenizer = deepcopy(tiny_tokenizer())
    tokenizer.backend_tokenizer.normalizer = normaliser
    return tokenizer


def with_marks(normaliser, *, bytes_too=True, decoder=None):
    """A tokenizer as Llama's: words carry a mark for the space before them, and what it lacks is spelt in bytes."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=bytes_too, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normaliser, normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoder or decoders.Sequence(parts)
    raw = [f"<0x{byte:02X}>" for byte in range(256)] if bytes_too else []
    names = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[*names, *raw], show_progress=False)
    made.train_from_iterator(['yes and no and the rest {"a": [true, 1]}'] * 9, trainer)
    spec = json.loads(made.to_str())
    spec["added_tokens"] = [each for each in spec["added_tokens"] if each["content"] in names]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def said_at_random(grammar, tokenizer, limit=60):
    """What an answer is read as, token by token, that is bound by a grammar and random otherwise."""
    size, end = len(tokenizer), tokenizer.eos_token_id
    constraint = Constraint(grammar, GrammarTokens.of(tokenizer, frozenset({end}), size), limit)
    stream, noise = TextStream(constraint, exact=True), torch.Generator().manual_seed(0)
    while True:
        logits = torch.randn(size, generator=noise) * 5
        token, _ = constraint.choose(logits, lambda logits: (int(logits.argmax()), logits))
        if token == end:
            return stream.text + stream.finish()
        stream.push(token)


@pytest.mark.parametrize("make", [normalising, with_marks])
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_a_form_holds_letter_by_letter_whatever_the_tokenizer_makes_of_questions(make, normaliser):
    tokenizer = make(NORMALISERS[normaliser])
    for text in CHANGED:
        assert said_at_random(Grammar.choices([text]), tokenizer) == text
        schema = {"type": "object", "properties": {text: {"const": text}}, "required": [text]}
        made = said_at_random(Grammar.json_schema({**schema, "additionalProperties": False}), tokenizer, 90)
        assert json.loads(made) == {text: text}


def test_a_space_that_an_answer_begins_with_is_part_of_its_form():
    metaspace = with_marks(normalizers.NFC(), bytes_too=False, decoder=decoders.Metaspace())
    for tokenizer in (metaspace, with_marks(normalizers.NFC())):
        assert said_at_random(Grammar.choices([" yes"]), tokenizer) == " yes"
        assert said_at_random(Grammar.choices(["yes"]), tokenizer) == "yes"


def test_what_a_vocabulary_cannot_write_is_refused_as_such():
    tokenizer = with_marks(normalizers.NFC(), bytes_too=False)
    assert said_at_random(Grammar.choices(["yes", "\ufb01ne"]), tokenizer) == "yes"
    with pytest.raises(RequestError, match="The model's tokenizer cannot write '\ufb01ne'"):
        said_at_random(Grammar.choices(["\ufb01ne"]), tokenizer)
    with pytest.raises(RequestError, match="within max_tokens=1; allow more"):
        said_at_random(Grammar.choices(["yes and no"]), tokenizer, 1)
