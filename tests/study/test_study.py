"""A sheet that studies: what it practises on, that it learns, what stays as it is, and how it goes on after a kill."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import asdict, replace
from itertools import product

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT

from cribsheet import CompressedKnowledgeLLM, Task
from cribsheet.attention.cache import cache_of, prefix_cache
from cribsheet.compress.loop import nothing_read
from cribsheet.corpus.documents import Document
from cribsheet.errors import BudgetError, DocumentError, RequestError, SheetError
from cribsheet.living.segments import cut, sheet_layers
from cribsheet.sheet import file
from cribsheet.study import practice as practice_module
from cribsheet.study import study as study_module
from cribsheet.study.exercises import Exercise, Practice, practice_of
from cribsheet.study.forecast import peak_bytes
from cribsheet.study.layer import Learnt, StudiedLayer
from cribsheet.study.learner import free_places, with_layers
from cribsheet.study.notebook import Notebook, read_practice, write_practice
from cribsheet.study.practice import make_practice
from cribsheet.study.study import USUAL_STEPS, Study, practice_seconds, practise, study, usual_seconds
from cribsheet.study.trainer import Pace, State, Trainer, weights_fixed
from cribsheet.testing import save_tiny_model
from cribsheet.vocabulary import ABSENT

NAMES = (
    "Alice Moreno",
    "Bob Smith",
    "Clara Berg",
    "Hugo Ali",
    "Nina Sato",
    "Ivan Petrov",
    "Maria Lopez",
    "Omar Haddad",
)
TOWNS = ("Lisbon", "Oslo", "Cairo", "Quito", "Kyoto", "Riga", "Madrid", "Tunis")
STAFF = [
    Document(text=f"{name} lives in {town}. The extension of {name} is {4000 + 37 * number}.", id=f"s{number}")
    for number, (name, town) in enumerate(zip(NAMES, TOWNS, strict=True))
]
TASK = Task("Answer questions about people.", examples=(("Where does Eva Stone live?", "Paris"),))


def built(backbone, **options):
    return CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=backbone, **{"budget": 40, **options})


def exercises(kb, count=8, seed=0):
    """Random questions and answers, with what the model would write over all of the documents."""
    generator = torch.Generator().manual_seed(seed)
    full = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=kb.session.loaded, rate=1)
    made = []
    for number in range(count):
        ids = torch.randint(5, kb.backbone.config.vocab_size, (12 + number,), generator=generator)
        positions = torch.arange(full.sheet.length, full.sheet.length + len(ids))[None]
        logits = kb.backbone.step(ids[None], positions, prefix_cache(full.prefix.layers, full.sheet.length), len(ids))
        best = logits[0, 7:-1].float().softmax(-1).topk(16)
        made.append(Exercise(ids, 8, best.indices, best.values))
    return made


def trainer_of(kb, found, seed=0, rounded=False):
    layers, free = sheet_layers(kb.backbone, kb.sheet, torch.float32), free_places(kb.backbone, kb.sheet)
    return Trainer(kb.backbone, layers, kb.sheet.length, free, found[:4], found[4:6], found[6:], seed, rounded)


@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
def test_a_studied_layer_attends_as_any_other(family, allocation):
    kb = built(family, allocation=allocation)
    layers, free = sheet_layers(family, kb.sheet, torch.float32), free_places(family, kb.sheet)
    ids = torch.arange(7, 29).view(2, 11)
    positions = torch.arange(kb.sheet.length, kb.sheet.length + 11).expand(2, -1)
    wanted = family.step(ids, positions, prefix_cache(kb.prefix.layers, kb.sheet.length), 11)
    learnt = [None if places is None else Learnt(layer, places) for layer, places in zip(layers, free, strict=True)]
    studied = [StudiedLayer(layer, kb.sheet.length, own) for layer, own in zip(layers, learnt, strict=True)]
    torch.testing.assert_close(family.step(ids, positions, cache_of(studied), 11), wanted, atol=2e-4, rtol=1e-3)


def test_gradients_are_those_of_the_divergence(tiny):
    kb = built(tiny)
    trainer = trainer_of(kb, exercises(kb))
    state = trainer.begin()
    before = trainer.run(state, Pace(1, learning_rate=1e-3)).shifts
    generator = torch.Generator().manual_seed(1)
    ways = [torch.randn(shift.shape, generator=generator) for shift in before]
    held = trainer.held
    gradients = trainer.gradients(held)
    slope = sum(float((gradient * way).sum()) for gradient, way in zip(gradients, ways, strict=True))

    def at(step):
        with torch.no_grad():
            for shift, way in zip(trainer.shifts, ways, strict=True):
                shift.add_(way, alpha=step)
        return trainer.divergence(held)

    up, down = at(1e-2), at(-2e-2)
    assert slope == pytest.approx((up - down) / 2e-2, rel=0.05)


INDEPENDENT = {"mode": "independent", "budget": None, "rate": 3}


@pytest.mark.parametrize("options", [{"allocation": "uniform"}, {}, {"dtype": "int4"}, INDEPENDENT])
def test_the_divergence_falls_and_what_may_not_change_stays(tiny, options):
    kb = built(tiny, **options)
    trainer = trainer_of(kb, exercises(kb))
    state = trainer.run(trainer.begin(), Pace(60))
    assert state.lowest < 0.9 * state.curve[0][1] and state.best_step > 0
    free = free_places(tiny, kb.sheet)
    for old, new, places in zip(
        sheet_layers(tiny, kb.sheet, torch.float32), trainer.best_layers(state), free, strict=True
    ):
        size = old.keys.shape[-1]
        for was, is_now in ((old.keys, new.keys), (old.values, new.values)):
            changed = (was != is_now).reshape(-1, size).any(-1)
            assert changed[places].any() and not changed[~places].any()


@pytest.mark.parametrize("options", [{"allocation": "uniform"}, {"budget": 200}, INDEPENDENT])
def test_what_is_learnt_in_four_bits_is_what_is_stored(tiny, options):
    kb = built(tiny, dtype="int4", **options)
    for rounded in (True, False):
        trainer = trainer_of(kb, exercises(kb), rounded=rounded)
        state = trainer.run(trainer.begin(), Pace(25))
        assert state.best_step > 0 and state.lowest < state.curve[0][1]
        stored = with_layers(tiny, kb.sheet, trainer.best_layers(state))
        layers, free = sheet_layers(tiny, stored, torch.float32), free_places(tiny, stored)
        as_stored = Trainer(tiny, layers, stored.length, free, [], [], trainer.held).divergence(trainer.held)
        # what learnt without it is rounded afterwards, and is another
        assert (as_stored == pytest.approx(state.lowest, rel=1e-3)) is rounded


def test_an_empty_layer_is_attended_like_any_other(tiny):
    ids = torch.arange(7, 29).view(2, 11)
    positions = torch.arange(11).expand(2, -1)
    for window in (None, 4):
        nothing = [replace(layer, window=window) for layer in nothing_read(tiny)]
        wanted = tiny.step(ids, positions, prefix_cache(nothing, 0), 11)
        found = tiny.step(ids, positions, cache_of([StudiedLayer(layer, 0) for layer in nothing]), 11)
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-3)


def test_it_ends_where_what_is_held_out_becomes_no_better(tiny):
    kb = built(tiny)
    trainer = trainer_of(kb, exercises(kb))
    state = trainer.begin()
    state.curve[0] = 0, 0.0  # better than that it cannot become
    trainer.run(state, Pace(1000, learning_rate=1e-3))
    assert state.step == 150 and state.best_step == 0 and len(state.curve) == 7


def test_the_preamble_the_first_tokens_and_the_guide_may_not_change(tiny):
    kb = built(tiny, guide="resident", budget=120)
    for places, indices in zip(free_places(tiny, kb.sheet), kb.sheet.indices, strict=True):
        held = indices[indices != ABSENT]
        assert places[held >= max(4, kb.sheet.manifest.head_tokens)].all()
        assert not places[held < max(4, kb.sheet.manifest.head_tokens)].any()
        assert int((held == -1).sum()) == kb.sheet.manifest.guide_tokens * tiny.kv_heads


def test_a_study_goes_on_from_its_notebook_to_the_same_bits(tiny, tmp_path):
    kb = built(tiny)
    found = exercises(kb)
    whole = trainer_of(kb, found)
    straight = whole.run(whole.begin(), Pace(30))
    first = trainer_of(kb, found)
    notebook = Notebook(tmp_path / "a.study", {"seed": 0})

    class Killed(Exception):
        pass

    def kill(state):
        if state.step == 27:
            notebook.write_state(state)
            raise Killed

    with pytest.raises(Killed):
        first.run(first.begin(), Pace(30), kill)
    second = trainer_of(kb, found)
    resumed = second.run(notebook.state(second.shifts), Pace(30))
    assert resumed.curve == straight.curve and resumed.best_step == straight.best_step
    for one, other in zip(resumed.best, straight.best, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(second.shifts, whole.shifts, strict=True):
        assert torch.equal(one, other)


def test_a_notebook_of_another_study_or_a_damaged_one_is_refused(tiny, tmp_path):
    kb = built(tiny)
    trainer = trainer_of(kb, exercises(kb))
    path = tmp_path / "a.study"
    Notebook(path, {"seed": 0}).write_state(trainer.begin())
    with pytest.raises(SheetError, match=r"The notebook .* belongs to another study"):
        Notebook(path, {"seed": 1}).state(trainer.shifts)
    held = bytearray(path.read_bytes())
    held[-3] ^= 1
    path.write_bytes(bytes(held))
    with pytest.raises(SheetError, match="changed after it was written"):
        Notebook(path, {"seed": 0}).state(trainer.shifts)
    path.write_bytes(bytes(held[:50]))
    with pytest.raises(SheetError, match="damaged"):
        Notebook(path, {"seed": 0}).state(trainer.shifts)


@pytest.fixture(scope="module")
def staff():
    with_staff = CompressedKnowledgeLLM.build(STAFF, TASK, model="pocket", rate=4)
    yield with_staff
    with_staff.close()


@pytest.fixture(scope="module")
def practice(staff):
    return make_practice(staff.session.loaded, staff.session.layout, staff.sheet)


def test_practice_asks_what_the_documents_answer(staff, practice):
    told = " ".join(document.text for document in STAFF).lower()
    assert len(practice.questions) >= 8
    for each in practice.questions:
        assert each.answer and each.answer.strip(".").lower().split()[-1] in told
        assert each.question.endswith("?") and each.question != TASK.examples[0][0]
        written = staff.backbone.tokenizer.decode(each.ids[each.asked :], skip_special_tokens=True)
        assert written.strip() == each.answer
        assert len(each.ids) - each.asked == len(each.tops) == len(each.weights)
        assert (each.weights.sum(1) <= 1.001).all() and (each.weights[:, 0] > 0).all()
    assert practice.tried >= len(practice.questions) and all(practice.left_out.values())


def test_texts_to_go_on_with_are_the_documents(staff, practice):
    told = "\n\n".join(document.text for document in STAFF)  # neighbours stand in a stretch together
    assert practice.texts
    for each in practice.texts:
        assert staff.backbone.tokenizer.decode(each.ids[each.asked :]).strip()[:20] in told
        assert torch.equal(each.tops[:, 0], each.ids[each.asked :])


def test_practice_is_the_same_every_time_and_comes_back_from_its_file(staff, practice, tmp_path):
    again = make_practice(staff.session.loaded, staff.session.layout, staff.sheet)
    assert [each.question for each in again.questions] == [each.question for each in practice.questions]
    path = tmp_path / "a.practice"
    assert read_practice(path) is None
    write_practice(path, practice)
    read = read_practice(path)
    for part in ("tried", "left_out", "of", "seconds", "digest"):
        assert getattr(read, part) == getattr(practice, part), part
    for one, other in zip([*read.questions, *read.texts], [*practice.questions, *practice.texts], strict=True):
        assert (one.asked, one.question, one.answer) == (other.asked, other.question, other.answer)
        assert all(torch.equal(getattr(one, part), getattr(other, part)) for part in ("ids", "tops", "weights"))


def test_stretches_that_are_asked_about_together_give_what_they_give_one_by_one(staff, practice, monkeypatch):
    monkeypatch.setattr(practice_module, "_STRETCH", 120)  # or there would be one
    one_by_one = make_practice(staff.session.loaded, staff.session.layout, staff.sheet)
    monkeypatch.setattr(practice_module, "_TOGETHER", 3)
    rounds = []
    monkeypatch.setattr(practice_module._Maker, "_asked", counting(practice_module._Maker._asked, rounds))
    together = make_practice(staff.session.loaded, staff.session.layout, staff.sheet)
    stretches = len(practice_module._stretches(staff.sheet.documents))
    assert stretches >= 4 and len(rounds) == practice_module.ROUNDS * -(-stretches // 3)
    assert [(each.question, each.answer) for each in together.questions] == [
        (each.question, each.answer) for each in one_by_one.questions
    ]
    assert (together.tried, together.left_out) == (one_by_one.tried, one_by_one.left_out)


def test_questions_that_the_window_has_no_room_to_answer_are_told_of(staff, monkeypatch):
    monkeypatch.setattr(staff.backbone, "window", 8)
    practice = make_practice(staff.session.loaded, staff.session.layout, staff.sheet)
    assert not practice.questions and practice.left_out["unended"] > 0


def test_with_time_left_rounds_go_on_until_they_give_hardly_anything_and_ask_nothing_twice():
    with CompressedKnowledgeLLM.build(STAFF[:2], TASK, model="pocket", rate=4) as kb:
        usual = make_practice(kb.session.loaded, kb.session.layout, kb.sheet, seed=3)
        late = time.monotonic() + 600
        more = make_practice(kb.session.loaded, kb.session.layout, kb.sheet, seed=3, until=late, latest=late)
    assert more.tried > usual.tried and len(more.questions) > len(usual.questions)
    assert [each.question for each in more.questions[: len(usual.questions)]] == [e.question for e in usual.questions]
    assert len({each.question.lower() for each in more.questions}) == len(more.questions)
    assert more.seconds < 500


def practice_for(kb):
    found = exercises(kb, 24)
    return Practice(found[:20], found[20:], 24, Counter(), practice_of(kb.sheet), 7.0)


def test_a_practice_of_before_a_print_said_more_serves_a_sheet_of_now(tiny):
    sheet = built(tiny).sheet
    before = sheet.manifest.fingerprint.model_copy(update={"vocabulary": 0, "rotary_scaling": {}})
    old = replace(sheet, manifest=sheet.manifest.model_copy(update={"fingerprint": before}))
    assert old.manifest.fingerprint != sheet.manifest.fingerprint and practice_of(old) == practice_of(sheet)


def test_one_practice_serves_sheets_of_any_size_and_storage_and_no_others(tiny, tmp_path):
    kb, path = built(tiny, guide="resident", budget=120), tmp_path / "night.practice"
    write_practice(path, practice_for(kb))
    before = path.read_bytes()
    for options in ({"budget": 140}, {"budget": 140, "dtype": "int4"}, INDEPENDENT):
        other = built(tiny, guide="resident", **options)
        came = other.study(steps=2, practice=path)
        assert came.questions + came.held_out == 20 and came.tried == 24
        assert came.seconds < 7.0  # of training alone
    assert path.read_bytes() == before
    for changed in ({"system": "Be brief."}, {"guide": "dropped"}):
        with pytest.raises(SheetError, match=r"night\.practice' is of other documents than the sheet's, or of another"):
            built(tiny, **changed).study(steps=2, practice=path)
    others = CompressedKnowledgeLLM.build(STAFF, FEW_SHOT, model=tiny, budget=60)
    with pytest.raises(SheetError, match=r"^The practice is of other documents"):
        others.study(steps=2, practice=practice_for(kb))
    path.write_bytes(before[:-9])
    with pytest.raises(SheetError, match="damaged"):
        kb.study(steps=2, practice=path)


@pytest.mark.parametrize("options", [{"dtype": "int4"}, {"dtype": "bfloat16"}, {"guide": "resident"}])
def test_a_document_that_was_replaced_studies_alone_and_all_others_stay_bit_for_bit(tiny, options):
    kb = built(tiny, **INDEPENDENT, **options)
    changed, new = DOCUMENTS[1].id, DOCUMENTS[1].text + " Hugo Ali lives in Quito."
    kb.replace(changed, Document(text=new, id="x"))
    before = kb.sheet
    found = exercises(kb, 24)
    practice = Practice(found[:20], found[20:], 24, Counter(), practice_of(before, [changed]), 7.0)
    with pytest.raises(SheetError, match="The practice is of other documents"):
        kb.study(steps=2, practice=practice)
    came = kb.study(steps=25, practice=practice, documents=[changed])
    assert came.learnt and came.documents == 1
    (preamble, olds), (other, news) = cut(tiny, before), cut(tiny, kb.sheet)
    assert same(preamble, other)
    for old, fresh in zip(olds, news, strict=True):
        assert same(old, fresh) is (old.documents[0].id != changed)
    with pytest.raises(DocumentError, match="no document 'gone' in the sheet"):
        kb.study(steps=2, documents=[changed, "gone"])


def same(one, other):
    pairs = zip(one.layers, other.layers, strict=True)
    return all(torch.equal(a, b[name]) for x, y in pairs for b in [y.tensors()] for name, a in x.tensors().items())


def test_of_a_sequential_sheet_only_the_tokens_of_a_document_may_change(tiny):
    kb = built(tiny, budget=120)
    chosen = DOCUMENTS[2].id
    places = free_places(tiny, kb.sheet, [chosen])
    whole = free_places(tiny, kb.sheet)
    number = [entry.id for entry in kb.sheet.manifest.documents].index(chosen)
    first = kb.sheet.manifest.head_tokens + sum(entry.tokens for entry in kb.sheet.manifest.documents[:number])
    last = first + kb.sheet.manifest.documents[number].tokens
    for own, every, indices in zip(places, whole, kb.sheet.indices, strict=True):
        held = indices[indices != ABSENT]
        assert own.any() and (every | ~own).all()
        assert ((held[own] >= first - 8) & (held[own] < last + 8)).all() and not own[held >= last + 8].any()


def test_where_all_is_held_and_nothing_can_be_learnt_nothing_is_taken(tiny):
    kb = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=tiny, rate=1)
    before, practice = kb.sheet, practice_for(kb)
    for each in practice.questions:
        each.weights.mul_(0.5)  # what is left out of the best continuations: the divergence is below zero
    came = kb.study(steps=1, learning_rate=1e-6, practice=practice)
    assert came.before < 0 and not came.learnt and kb.sheet is before


def test_what_changes_during_a_study_is_not_undone_by_it(tiny):
    kb = built(tiny, **INDEPENDENT)
    gone, practice = DOCUMENTS[0].id, practice_for(kb)

    def take_away(what, share):
        if gone in [document.id for document in kb.sheet.documents]:
            kb.remove(gone)

    with pytest.raises(SheetError, match="was changed while it studied"):
        kb.study(steps=25, practice=practice, progress=take_away)
    assert gone not in [document.id for document in kb.sheet.documents]


def test_files_that_could_not_be_written_or_are_others_are_refused_before_any_work(tiny, tmp_path):
    kb = built(tiny)
    for options in (
        {"practice": tmp_path / "no" / "a"},
        {"practice": practice_for(kb), "resume": tmp_path / "no" / "a"},
    ):
        with pytest.raises(SheetError, match=r"The folder .*no' does not exist"):
            kb.study(steps=1, **options)
    path = kb.save(tmp_path / "a.sheet")
    for other in (path, tmp_path):
        with pytest.raises(SheetError, match=r"is another kind of file; name another"):
            kb.study(steps=1, practice=other)
    with pytest.raises(SheetError, match=r"The notebook .* is another kind of file"):
        kb.study(steps=1, practice=practice_for(kb), resume=path)


def test_one_document_may_be_named_alone_or_twice(tiny):
    kb = built(tiny)
    chosen, found = DOCUMENTS[1].id, exercises(kb, 24)
    practice = Practice(found[:20], found[20:], 24, Counter(), practice_of(kb.sheet, [chosen]), 7.0)
    for documents in (chosen, [chosen, chosen]):
        assert kb.study(steps=1, learning_rate=1e-6, practice=practice, documents=documents).documents == 1


def test_a_notebook_remembers_its_practice_beside_it_and_takes_both_away(tiny, tmp_path):
    kb, path = built(tiny), tmp_path / "a.study"
    write_practice(tmp_path / "a.study.practice", practice_for(kb))
    came = kb.study(steps=2, resume=path)
    assert came.tried == 24 and came.seconds > 7.0  # those of practice are its own
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give minutes"),
        ({"minutes": 0}, "minutes is 0"),
        ({"minutes": float("nan")}, "minutes is nan"),
        ({"minutes": 1e308}, r"minutes is 1e\+308; give a number above 0 and at most 525600"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"steps": 3, "learning_rate": 0}, "learning_rate is 0"),
        ({"steps": 3, "learning_rate": 2}, "learning_rate is 2"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tiny, options, message):
    with pytest.raises(BudgetError, match=message):
        study(built(tiny).session, **options)


def test_a_sheet_without_texts_or_with_too_few_questions_stays_as_it_is(tiny, tmp_path):
    kb = built(tiny)
    bare = file.load(kb.save(tmp_path / "bare.sheet", texts=False))
    with CompressedKnowledgeLLM(tiny, bare) as without, pytest.raises(RequestError, match="without its documents"):
        without.study(steps=1)
    before = kb.sheet
    with pytest.raises(RequestError, match="may serve, and a study needs 16"):
        kb.study(steps=1)
    assert kb.sheet is before


def test_the_command_refuses_in_its_own_words_and_leaves_the_file(cli, tiny, tmp_path):
    save_tiny_model(tmp_path / "model")
    (tmp_path / "a.txt").write_text("Hugo Ali lives in Quito. His extension is 40213.")
    path = tmp_path / "a.sheet"
    made = cli("build", tmp_path / "a.txt", "-o", path, "--task", "Answer.", "--rate", 2, "--model", tmp_path / "model")
    assert made.code == 0, made.err
    before = path.read_bytes()
    for options, words in (
        ((), "give --minutes, or --steps"),
        (("--minutes", 0), "above 0"),
        (("--steps", 0), "at least 1"),
        (("--steps", 1, "--learning-rate", 2), "--learning-rate is 2"),
        (("--steps", 1), "may serve, and a study needs 16"),
        (("--steps", 1, "-o", tmp_path / "nowhere" / "b.sheet"), "does not exist"),
        (("--steps", 1, "--dry-run", "--document", "a.txt"), "leave --document and --practice out"),
    ):
        refused = cli("study", path, *options)
        assert refused.code == 2 and words in refused.err and not refused.out, (options, refused)
    assert path.read_bytes() == before


def test_a_sheet_studied_when_the_learning_rate_was_called_rate_opens_and_answers_the_same(tiny, tmp_path):
    kb = built(tiny)
    before = {"questions": 40, "before": 0.8, "after": 0.4, "steps": 50, "rate": 0.02, "seed": 0, "seconds": 9.5}
    manifest = kb.sheet.manifest.model_copy(update={"build": {**kb.sheet.manifest.build, "study": before}})
    path = file.save(replace(kb.sheet, manifest=manifest), tmp_path / "before.sheet")
    with CompressedKnowledgeLLM.load(path, model=tiny) as opened:
        assert opened.sheet.manifest.build["study"] == before and opened.sheet.manifest.digest == manifest.digest
        assert opened.ask("Where?", max_tokens=4).text == kb.ask("Where?", max_tokens=4).text


def test_a_forecast_is_counted_from_a_few_questions_and_exercises(staff):
    before, weights = staff.sheet, [weight.requires_grad for weight in staff.backbone.model.parameters()]
    by_steps = staff.forecast_study(steps=10)
    assert by_steps.steps == 10 and by_steps.step_seconds > 0
    assert by_steps.seconds == pytest.approx(by_steps.practice_seconds + 10 * by_steps.step_seconds)
    assert by_steps.tried == 3 * 2 * 2 * len(STAFF)  # rounds, openings, sentences
    by_time = staff.forecast_study(minutes=2)
    assert 42 < by_time.practice_seconds < 120 and 1 <= by_time.steps <= 1000
    assert by_time.seconds <= 120 + by_time.step_seconds and by_time.tried > 0
    held = sum(weight.nbytes for weight in staff.backbone.model.parameters())
    assert held < by_time.peak_bytes < 40 * held
    assert "estimated from a few questions" in str(by_time)
    short = replace(by_time, steps=22, usual_seconds=1400.0)
    few = "too few steps (22, where some 150 are usual): give minutes=24 or so for those"
    assert short.is_short and str(short).endswith(f"\n{few}")
    assert not replace(by_time, steps=75).is_short and "too few" not in str(replace(by_time, steps=75))
    assert by_steps.is_short and by_steps.usual_seconds > by_steps.seconds
    assert staff.sheet is before and [w.requires_grad for w in staff.backbone.model.parameters()] == weights
    with pytest.raises(BudgetError, match="give minutes"):
        staff.forecast_study()


@pytest.mark.parametrize("enough", [0.0, 40.0, 90.0, 1000.0])
def test_in_the_usual_minutes_there_is_time_for_the_usual_steps_beside_practice(enough):
    seconds = usual_seconds(2.0, enough)
    assert seconds - practice_seconds(seconds, enough) == pytest.approx(USUAL_STEPS * 2.0)
    assert 0.35 * seconds <= practice_seconds(seconds, enough) <= 0.6 * seconds + 1e-9


def test_a_forecast_gives_practice_the_time_that_too_few_questions_give_it(staff, monkeypatch):
    monkeypatch.setattr(study_module, "LEAST_QUESTIONS", 10**6)
    told = staff.forecast_study(minutes=2)
    assert told.practice_seconds > 0.59 * 120 and told.steps * told.step_seconds < 0.41 * 120 + told.step_seconds


def test_a_study_warns_once_where_its_time_is_over_before_the_steps_are_enough(caplog):
    def heard(pace, step):
        caplog.clear()
        tell = study_module._teller(pace, lambda what, share: None, None, 36.0)
        for number in range(1, 6):
            tell(State([], [], [], step=number, seconds=5 + number * step))
        return [record.getMessage() for record in caplog.records]

    few = "a step takes 10.0 s: too few steps (7, where some 150 are usual): give minutes=39 or so for those"
    assert heard(Pace(1000, 80.0), 10.0) == [few]
    assert heard(Pace(1000, 80.0), 0.5) == heard(Pace(5, 80.0), 10.0) == heard(Pace(1000), 10.0) == []


def test_where_nothing_was_learnt_it_says_what_would_be_enough_and_that_the_sheet_stays():
    came = Study(84, 80, 9, 8, 160, 0.146, 0.146, 7, 0, 0.02, 0, 188.0, usual_minutes=24.2)
    assert str(came) == (
        "nothing learnt (84 questions, 7 steps, 188 s): divergence on held-out questions stayed at 0.146, and the "
        "sheet is as it was; too few steps (7, where some 150 are usual): give minutes=25 or so for those"
    )
    assert str(replace(came, steps=300)).endswith("stayed at 0.146, and the sheet is as it was")
    assert str(replace(came, steps=0, usual_minutes=0.0)).endswith("give more minutes for those")


def test_a_study_counts_what_the_usual_steps_would_take_with_the_first_look_at_what_is_held_out(tiny):
    kb = built(tiny)
    assert trainer_of(kb, exercises(kb)).begin().seconds > 0
    came = kb.study(steps=2, practice=practice_for(kb))
    assert came.usual_minutes == pytest.approx(USUAL_STEPS * came.seconds / 2 / 60)


def test_the_command_says_that_what_it_wrote_is_the_same_sheet(cli, staff, practice, tmp_path):
    path, new = staff.save(tmp_path / "a.sheet"), tmp_path / "b.sheet"
    write_practice(tmp_path / "practice", practice)
    asked = ("study", path, "--practice", tmp_path / "practice", "--steps", 1, "--learning-rate", "0.000001")
    before = path.read_bytes()
    told = cli(*asked)
    assert told.code == 0 and "nothing learnt" in told.out and "written" not in told.out
    assert path.read_bytes() == before and "and the sheet is as it was; too few steps (1, where" in told.out
    assert re.search(r"give --minutes \d+ or so for those", told.out) and "minutes=" not in told.out
    told = cli(*asked, "-o", new)
    assert told.code == 0 and told.out.rstrip().endswith(f"; what was written is the sheet of {path}")
    assert file.load(new).manifest.digest == staff.sheet.manifest.digest


def test_a_forecast_counts_what_stays_of_a_batch_for_the_way_back(tiny):
    """But for what attention computes again, and the model's words."""
    kb = built(tiny, budget=120)
    few = exercises(kb, 16)
    trainer, held = trainer_of(kb, few), dict[int, int]()
    fixed = {weight.untyped_storage().data_ptr() for weight in tiny.model.parameters()}

    def seen(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with weights_fixed(tiny), torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
        loss = trainer._loss(few)
    saved, counted = sum(held.values()), peak_bytes(tiny, kb.sheet, max(len(each.ids) for each in few))
    assert loss > 0 and saved < counted - sum(weight.nbytes for weight in tiny.model.parameters())
    assert counted < 20 * saved


def test_a_build_that_cannot_study_is_a_build_with_a_warning(tiny, caplog):
    kb = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=tiny, budget=40, study_steps=1)
    assert "The sheet is as it was built: Of" in caplog.text and "study" not in kb.sheet.manifest.build
    for options, message in (
        ({"study": 0}, "minutes is 0"),
        ({"study_steps": 1, "check": True}, "leave check= and retain= out"),
        ({"study": 1, "retain": 0.9, "budget": None}, "leave check= and retain= out"),
    ):
        with pytest.raises(BudgetError, match=message):
            CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=tiny, **{"budget": 40, **options})


def test_commands_tell_of_a_study_and_what_one_would_take(cli, tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(each.text for each in STAFF[:3]))
    path = tmp_path / "a.sheet"
    asked = ("build", tmp_path / "a.txt", "-o", path, "--task", "Answer.", "--rate", 4)
    for options, words in (
        (("--study", 0), "it is 0; give a number above 0"),
        (("--study-steps", 0), "at least 1"),
        (("--study", 1, "--dry-run"), "--study is for a build here"),
        (("--study", 1, "--check"), "leave --check and --retain out, or --study and --study-steps"),
    ):
        refused = cli(*asked, *options)
        assert refused.code == 2 and words in refused.err, (options, refused)
    assert cli(*asked).code == 0
    before = path.read_bytes()
    told = cli("study", path, "--steps", 3, "--dry-run")
    assert told.code == 0 and "then 3 steps of" in told.out and path.read_bytes() == before
    assert cli("inspect", path, "--json").data["study"] is None and "studied" not in cli("inspect", path).out
    sheet = file.load(path)
    came = asdict(Study(30, 28, 4, 1, 90, 0.8, 0.4, 50, 25, 0.02, 0, 61.2))
    manifest = sheet.manifest.model_copy(update={"build": {**sheet.manifest.build, "study": came}})
    file.save(replace(sheet, manifest=manifest), path)
    assert cli("inspect", path, "--json").data["study"] == came
    line = "30 questions of 90 tried, 50 steps (best after 25), 61 s; divergence on held-out questions 0.800 -> 0.400"
    assert line in cli("inspect", path).out


def test_a_model_in_training_mode_gets_its_gradients_back(tiny):
    kb = built(tiny)
    trainer = trainer_of(kb, exercises(kb))
    wanted = [weight.requires_grad for weight in tiny.model.parameters()]
    trainer.run(trainer.begin(), Pace(2))
    assert [weight.requires_grad for weight in tiny.model.parameters()] == wanted
    assert all(weight.grad is None for weight in tiny.model.parameters())


@pytest.mark.slow
def test_a_real_sheet_learns_and_its_file_is_an_ordinary_one(tmp_path):
    """The pocket model; minutes on one core."""
    firsts, lasts = ("Ann", "Bob", "Clara", "Hugo", "Nina", "Ivan"), ("Moreno", "Smith", "Berg", "Ali", "Sato", "Lopez")
    towns = [
        "Lisbon",
        "Oslo",
        "Cairo",
        "Quito",
        "Kyoto",
        "Riga",
        "Madrid",
        "Tunis",
        "Prague",
        "Dublin",
        "Osaka",
        "Malmo",
    ]
    people = [(f"{first} {last}", 4000 + 37 * n) for n, (first, last) in enumerate(product(firsts, lasts))]
    more = [
        Document(text=f"{name} lives in {towns[number % 12]}. The extension of {name} is {number}. " * 2, id=name)
        for name, number in people
    ]
    kb = CompressedKnowledgeLLM.build(more, TASK, model="pocket", rate=8)
    before = kb.sheet
    came = kb.study(steps=50, seed=0)
    assert came.learnt and came.after < came.before
    assert kb.sheet.manifest.digest != before.manifest.digest and not kb.sheet.manifest.cuttable
    assert kb.sheet.nbytes == before.nbytes and torch.equal(kb.sheet.indices, before.indices)
    question = "Where does Hugo Ali live?"
    said = kb.ask(question, max_tokens=8).text
    with CompressedKnowledgeLLM.load(kb.save(tmp_path / "a.sheet")) as opened:
        assert opened.ask(question, max_tokens=8).text == said
        assert opened.sheet.manifest.build["study"]["steps"] == 50


def test_a_practice_that_is_killed_goes_on_to_the_same_end(staff, practice, tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "_SAVED_EVERY", 0.0)
    draft, left = tmp_path / "a.part", iter(range(1))

    def killed(what, share):
        if share > 0 and next(left, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        practise(staff.session, resume=draft, progress=killed)
    assert draft.exists()
    with pytest.raises(SheetError, match=r"The unfinished practice .* belongs to another practice"):
        practise(staff.session, seed=1, resume=draft)
    tried = []
    monkeypatch.setattr(practice_module._Maker, "_asked", counting(practice_module._Maker._asked, tried))
    whole = practise(staff.session, resume=draft)
    assert whole.digest == practice.digest and (whole.tried, whole.left_out) == (practice.tried, practice.left_out)
    stretches = len(practice_module._stretches(staff.sheet.documents))
    assert len(tried) == practice_module.ROUNDS * stretches - 2  # what was done is not done again
    held = bytearray(draft.read_bytes())
    held[-3] ^= 1
    draft.write_bytes(bytes(held))
    with pytest.raises(SheetError, match="damaged"):
        practise(staff.session, resume=draft)


def counting(function, calls):
    def called(*arguments):
        calls.append(arguments)
        return function(*arguments)

    return called


def test_a_killed_study_keeps_its_practice_and_leaves_nothing_when_it_ends(staff, tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "_SAVED_EVERY", 0.0)
    notebook = tmp_path / "a.study"

    def killed(what, share):
        if what == "practice" and share > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(staff.session, steps=1, resume=notebook, progress=killed)
    assert [path.name for path in tmp_path.iterdir()] == ["a.study.practice.part"]
    study(staff.session, steps=1, resume=notebook)
    assert not list(tmp_path.iterdir())
