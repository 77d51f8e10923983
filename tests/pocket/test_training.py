"""Samples follow the contract, and the rules of reading find what a sentence says."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from cribsheet_pocket import prompts, reading, tokenizer, verbs

TOKENIZER = Tokenizer.from_file(str(Path(tokenizer.__file__).parent / "data" / "tokenizer.json"))
ARTICLE = (
    "Ada Mill\n"
    "The Ada Mill is a water mill in the valley of Brom. It was built in 1834 by Tom Hale. "
    "The mill was sold by the town of Brom. In 1902, the great flood carried the wheel away. "
    "It is also known as the Red Mill.\n"
    "The wheel is the largest part of the mill. The gear consists of oak and iron. "
    "It is used for grinding rye and oats. Johanna Berg was born in Brom and lived there. "
    "The mill has a population of 12,345 mice in the cellar."
)


@pytest.fixture
def sampler() -> prompts.Sampler:
    return prompts.Sampler(tokenizer.FastEncoder(TOKENIZER), [ARTICLE] * 3, 3, 8192)


def test_rows_have_the_length_asked_for_and_a_class_for_every_token(sampler: prompts.Sampler) -> None:
    for length in (128, 256, 512, 1024):
        for _ in range(10):
            ids, classes = sampler.row(length)
            assert len(ids) == len(classes) == length
            assert max(ids) < 8192


def test_a_sample_has_the_form_of_the_chat_template(sampler: prompts.Sampler) -> None:
    samples = [sample for _ in range(30) if (sample := sampler.world(700)) is not None]
    assert len(samples) > 20  # now and then a world does not fit
    for sample in samples:
        text = TOKENIZER.decode(sample[0], skip_special_tokens=False)
        assert text.startswith(("<|bos|><|user|>", "<|bos|><|system|>"))
        assert text.endswith("<|end|>")
        assert text.count("<|assistant|>") <= text.count("<|user|>")
        answered = [i for i, c in zip(*sample, strict=True) if c == prompts.ANSWERED]
        assert answered and answered[-1] == tokenizer.END_ID


def test_rules_ask_what_sentences_say() -> None:
    (passages,) = reading.passages([ARTICLE])
    found = {
        q.text: q.answer for seed in range(20) for p in passages for q in reading.questions(p, random.Random(seed))
    }
    assert found["What is the Ada Mill?"] == "a water mill in the valley of Brom"
    assert found["When was Ada Mill built?"] == "1834"
    assert found["Where was Johanna Berg born?"] == "Brom"
    assert found["What is the largest part of the mill?"] == "The wheel"
    assert found["What is Ada Mill used for?"] == "grinding rye and oats"
    assert found["What does the gear consist of?"] == "oak and iron"
    assert found["When did this happen: the great flood carried the wheel away?"] == "1902"
    assert any(text.startswith("Fill in the blank: ") and "____" in text for text in found)


def test_every_reading_answer_stands_in_its_passage() -> None:
    (passages,) = reading.passages([ARTICLE])
    for passage in passages:
        for q in reading.questions(passage, random.Random(1)):
            assert q.answer.removeprefix("Because ") in passage.title + "\n" + passage.text


def test_sentences_say_what_things_do() -> None:
    asked = {
        "Fibroblasts secrete collagen and elastin.": ("What do fibroblasts secrete?", "collagen and elastin"),
        "The heart pumps blood through the body.": ("What does the heart pump?", "blood"),
        "Bile is produced by the liver.": ("What produces bile?", "the liver"),
        "Collagen is found in the skin.": ("Where is collagen found?", "the skin"),
        "The study of tissues is called histology.": ("What is the study of tissues called?", "histology"),
        "The human heart has four chambers.": ("How many chambers does the human heart have?", "four"),
        "The joint allows the arm to turn, and it is strong.": ("What does the joint allow?", "the arm to turn"),
    }
    for sentence, (question, answer) in asked.items():
        found = dict(verbs.questions(sentence, "Tissue", sentence.lower(), random.Random(1)))
        assert found.get(question) == answer, (sentence, found)


@pytest.mark.parametrize(
    "sentence",
    ["It is raining.", "Yeast extract is a food.", "This happened, as they say, in vain.", "The war took place there."],
)
def test_a_sentence_that_no_rule_is_sure_of_is_not_asked_about(sentence: str) -> None:
    found = [text for text, _ in verbs.questions(sentence, "Topic", sentence, random.Random(1))]
    assert not [text for text in found if "extract" in text or "place" in text or "say" in text]
