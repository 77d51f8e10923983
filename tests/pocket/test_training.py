"""Samples follow the contract, and the rules of reading find what a sentence says."""

from __future__ import annotations

import json
import lzma
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

import cribsheet_pocket
from cribsheet_pocket.quantize import load_folder, mean_of
from cribsheet_pocket_training import prompts, reading, tokenizer, verbs, worlds
from cribsheet_pocket_training.figures import BY_LENGTH, joined
from cribsheet_pocket_training.peps import pep_files, pep_set

TOKENIZER = Tokenizer.from_file(str(Path(cribsheet_pocket.__file__).parent / "data" / "tokenizer.json"))
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
            ids, classes, _ = sampler.row(length)
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
        answered = [i for i, c in zip(*sample[:2], strict=True) if c == prompts.ANSWERED]
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


def test_where_the_phrase_of_a_join_ends_the_entity_that_it_leads_to_is_marked(sampler: prompts.Sampler) -> None:
    found = 0
    for _ in range(60):
        ids, _, marks = sampler.world(900) or ([], [], [])
        for at, entity in marks:
            found += 1
            name = TOKENIZER.decode([token for token in entity if token])
            asked = TOKENIZER.decode(ids[: at + 1][-60:])
            turn = TOKENIZER.decode(ids[at + 1 :], skip_special_tokens=False)
            assert turn.partition("<|assistant|>")[0].count("<|user|>") == 0  # the mark stands in its question
            assert name.strip() and not asked.endswith(name)  # and the question does not name the entity
    assert found > 20


def test_worlds_of_training_may_draw_their_names_from_few_words() -> None:
    firsts = []
    for seed in range(40):
        world = worlds.make_world(f"few.{seed}", 900, "person", held_out=False, kinds_of_question=["direct"])
        people = {q.entity for q in world.questions if " " in q.entity}
        if len(people) > 5:
            firsts.append(len({name.split()[0] for name in people}) / len(people))
    assert min(firsts) < 0.5 < max(firsts)


@pytest.mark.slow
def test_training_runs_and_another_run_continues_it(tmp_path: Path) -> None:
    wiki = tmp_path / "wiki.txt.xz"
    with lzma.open(wiki, "wt", encoding="utf-8") as file:
        file.write("\0".join([ARTICLE.replace("Ada", f"Ada{chr(65 + i)}") for i in range(60)]))
    for more in ([], ["--resume", "--seconds", "2"]):
        words = ["--wiki", wiki, "--out", tmp_path / "run", "--seconds", "1", "--shape", "tiny", "--device", "cpu",
                 "--no-compile", "--workers", "1", "--batch-tokens", "20480", *more]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "cribsheet_pocket_training.train", *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines if line.get("event") in ("start", "end")] == ["start", "end"] * 2
    saved = load_folder(tmp_path / "run" / "weights")
    assert "model.layers.1.mlp.up_proj.weight" in saved and not any("bridges" in name for name in saved)


def test_the_weights_of_two_runs_are_packed_as_their_mean(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 3.0)):
        (tmp_path / name).mkdir()
        save_file({"norm.weight": torch.full((4,), value)}, tmp_path / name / "model.safetensors")
    mean = mean_of([tmp_path / "a", tmp_path / "b"])
    assert mean["norm.weight"].tolist() == [2.0] * 4


def test_the_fields_of_pep_headers_are_asked_for(tmp_path: Path) -> None:
    for number in range(4):
        head = (
            f"PEP: {number}\nTitle: On {number}\nAuthor: Ada Lund <ada@example.org>\nStatus: Final\nCreated: 1-Jan-2001"
        )
        (tmp_path / f"pep-{number:04d}.rst").write_text(f"{head}\n\nA line\nand another.", encoding="utf-8")
    text, asked = pep_set(pep_files(tmp_path), "0")
    assert "A line and another." in text and len(asked) == 16
    assert ("What is the title of PEP 2?", "On 2") in [(each.text, each.answer) for each in asked]
    assert {each.answer for each in asked if each.sort == "Author"} == {"Ada Lund"}


def test_parts_of_every_kind_of_world_are_joined_by_length() -> None:
    parts = [{"commands": [], kind: {length: {}}} for kind in BY_LENGTH for length in ("4000", "600")]
    whole = joined(parts)
    assert all(list(whole[kind]) == ["600", "4000"] for kind in BY_LENGTH)
