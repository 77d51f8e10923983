"""Worlds are the same every time, fit the size asked for, and hold their answers."""

from __future__ import annotations

import random
import zlib

import pytest

from cribsheet_pocket_training import names
from cribsheet_pocket_training.schemas import KINDS
from cribsheet_pocket_training.worlds import ABSENT, STYLES, make_world


def test_a_seed_gives_the_same_world_every_time() -> None:
    assert make_world(5, 500) == make_world(5, 500)
    assert make_world(5, 500) != make_world(6, 500)


def test_a_world_is_what_it_was_when_the_model_was_measured() -> None:
    """A change here makes the figures of the card void: evaluate again and update both."""
    texts = "".join(make_world(seed, 300, kind="person").text for seed in range(3))
    assert zlib.crc32(texts.encode()) == GOLDEN


GOLDEN = 3564482448


def test_training_never_sees_a_held_out_world() -> None:
    assert make_world(5, 500, held_out=False).text != make_world(5, 500).text
    for words in (names._FIRST, names._LAST, names._CITY, names._ADJ, names._NOUN):
        training, held_out = set(names._part(words, False)), set(names._part(words, True))
        assert training and held_out and not training & held_out


@pytest.mark.parametrize("kind", [*KINDS, "needles", "connected"])
def test_answers_stand_in_the_documents_that_hold_them(kind: str) -> None:
    for seed in range(3):
        world = make_world(seed, 400, kind=kind, questions=60)
        by_id = {d.id: d.text for d in world.documents}
        assert world.questions
        for q in world.questions:
            if q.kind in ("yesno", "count"):
                continue
            if q.kind == "absent":
                assert q.answer == ABSENT and not q.documents
                continue
            assert q.answer == ", ".join(q.answers)
            text = "\n".join(by_id[d] for d in q.documents).lower()
            for part in q.answers:
                digits = part.rpartition(" ")[2]  # fields may name a numbered document by its number alone
                assert part.lower() in text or (kind == "spec" and digits in text), (q, text)


def test_lists_are_in_order_of_appearance() -> None:
    lists = 0
    for seed in range(30):
        world = make_world(seed, 500, kind="person", style="header", questions=80)
        for q in world.questions:
            if q.family.endswith((".list", ".inverse")) and len(q.answers) > 1:
                titles = [document.title for document in world.documents]
                places = [titles.index(name) for name in q.answers]
                assert places == sorted(places)
                lists += 1
    assert lists > 20


def test_joins_name_neither_their_steps_nor_their_answer() -> None:
    joins = [
        q for seed in range(30) for q in make_world(seed, 500, kind="person").questions if q.kind in ("join2", "join3")
    ]
    assert len(joins) > 50
    assert all(q.entity in q.text for q in joins)
    assert all(len(q.documents) >= 1 for q in joins)


@pytest.mark.parametrize("style", STYLES)
def test_every_style_writes_every_fact(style: str) -> None:
    world = make_world(3, 500, kind="company", style=style, questions=60)
    for q in world.questions:
        if q.kind == "direct":
            assert q.answer in world.text and q.entity in world.text


def test_a_task_covers_its_questions_and_notes_its_facts() -> None:
    for seed in range(10):
        world = make_world(seed, 400)
        for task in world.tasks:
            assert task.description[0].isupper() and task.description.endswith(".")
            assert world.questions_of(task) or task.families == ()
            assert len(task.notes) <= 20


def test_filler_is_strewn_and_sizes_are_kept() -> None:
    world = make_world(1, 2000, filler=lambda r: "Nothing to see here. " * r.randint(5, 20))
    assert "Nothing to see here." in world.text
    for tokens in (300, 1000, 4000):
        sizes = [len(make_world(seed, tokens).text) / 2.7 / tokens for seed in range(10)]
        assert 0.7 < sum(sizes) / len(sizes) < 1.2


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no world of kind 'dragon'; the kinds are person, company"):
        make_world(1, kind="dragon")


def test_in_training_filler_may_stand_beneath_what_documents_state() -> None:
    def filler(r: random.Random) -> str:
        return "Nothing to see here. " * r.randint(5, 20)

    worlds = [
        make_world(n, 900, kind, filler=filler, held_out=False) for n in range(20) for kind in ("spec", "variables")
    ]
    beneath = [d for w in worlds for d in w.documents if "\n\n" in d.text and d.text.rstrip().endswith("here.")]
    assert any(d.text.startswith(("PEP: ", "RFC: ")) for d in beneath)
    assert all(set(q.documents) <= {d.id for d in w.documents} for w in worlds for q in w.questions)
