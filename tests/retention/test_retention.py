"""What a sheet still answers: sheets of several rates from one reading, the smallest that will do, and checks."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT, ZERO_SHOT
from reference import stock_cache
from test_probes import STAFF, TASK

from cribsheet import CompressedKnowledgeLLM, build_sheet, load_sheet, save_sheet
from cribsheet.cli import run
from cribsheet.compress.loop import cut, read_through
from cribsheet.corpus.documents import Document
from cribsheet.engine.pool import LoadedModel
from cribsheet.errors import BudgetError
from cribsheet.plan.assemble import finish
from cribsheet.plan.options import BuildOptions
from cribsheet.plan.plan import plan
from cribsheet.prompt.template import ChatLayout
from cribsheet.retention.exam import Exam
from cribsheet.retention.probes import Probe
from cribsheet.retention.retention import LADDER, Reference, full_context, make_checker, reference, remarks, retained
from cribsheet.sheet.manifest import Manifest, Retention, Rung
from cribsheet.testing import tiny_backbone


@pytest.fixture(scope="module")
def pocket():
    return LoadedModel.get("pocket")


@pytest.fixture(scope="module")
def retaining(pocket):
    """A sheet that was built to retain a share."""
    return build_sheet(pocket.backbone, STAFF, TASK, retain=0.9)


def planned(backbone, rate, scorer="task", allocation="uniform", **options):
    settings = {"guide": "dropped", "chunk_tokens": 0, "scorer": scorer, "allocation": allocation, **options}
    how = BuildOptions(rate=rate, **settings)
    return plan(backbone, ChatLayout(backbone.tokenizer), DOCUMENTS, FEW_SHOT, how)


def read_of(backbone, made):
    return read_through(backbone, made.corpus, made.reading)


@pytest.mark.parametrize(("scorer", "allocation"), [("task", "uniform"), ("random", "uniform"), ("recall", "adaptive")])
def test_a_sheet_cut_from_a_reading_in_one_chunk_is_that_of_a_reading_of_its_own(family, scorer, allocation):
    wide, narrow = (planned(family, rate, scorer, allocation) for rate in (1.5, 4))
    whole, alone = read_of(family, wide), read_of(family, narrow)
    for own, theirs in zip(cut(family, whole, narrow.reading).kept, alone.kept, strict=True):
        for name in ("keys", "values", "indices", "scores"):
            mine, wanted = getattr(own, name), getattr(theirs, name)
            there = theirs.indices >= 0  # what stands in front of heads that keep fewer means nothing
            if name in ("keys", "values"):
                mine, wanted = mine[there], wanted[there]
            torch.testing.assert_close(mine, wanted, atol=0, rtol=0)


def test_a_cut_to_the_same_budget_changes_nothing_and_several_chunks_lose_nothing_that_is_better(tiny):
    wide, narrow = (planned(tiny, rate, chunk_tokens=20) for rate in (1.5, 4))
    state = read_of(tiny, wide)
    for own, theirs in zip(cut(tiny, state, wide.reading).kept, state.kept, strict=True):
        torch.testing.assert_close(own.keys, theirs.keys, atol=0, rtol=0)
        assert own.indices.equal(theirs.indices)
    for own, theirs in zip(cut(tiny, state, narrow.reading).kept, state.kept, strict=True):
        assert own.indices.shape[1] == narrow.reading.budget
        for head, wider, scores in zip(own.indices, theirs.indices, theirs.scores, strict=True):
            left_out = ~torch.isin(wider, head)
            pinned = head < narrow.reading.pinned
            assert scores[left_out].max() <= own.scores[0].new_tensor(
                min(s for s in scores[torch.isin(wider, head[~pinned])].tolist())
            )


@pytest.mark.parametrize("resident", [False, True])
def test_full_context_is_everything_plainly_read(family, resident):
    layout = ChatLayout(family.tokenizer)
    exam = Exam(family, layout, FEW_SHOT, resident=resident)
    prefix = full_context(exam, DOCUMENTS)
    left = layout.preamble(FEW_SHOT.instruction) + "\n\n".join(d.text for d in DOCUMENTS) + "\n\n"
    ids = torch.cat([layout.encoder.left(left)[0], exam.guide])
    assert prefix.tokens == len(ids) and bool(len(exam.guide)) is resident
    stock = stock_cache(family, ids)
    for number in family.full:
        mine, theirs = prefix.layers[number], stock.layers[number]
        torch.testing.assert_close(mine.keys, theirs.keys[0], atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(mine.values, theirs.values[0], atol=2e-3, rtol=2e-3)


def test_probes_are_asked_behind_the_guide_that_a_sheet_has(tiny):
    layout = ChatLayout(tiny.tokenizer)
    guides = []
    for guide in ("resident", "form", "dropped"):
        options = BuildOptions(rate=1.2, guide=guide, scorer="recent")
        made = plan(tiny, layout, DOCUMENTS, FEW_SHOT, options)
        checker = make_checker(tiny, layout, DOCUMENTS, FEW_SHOT, options)
        exams = [checker.exam(made), checker.exam(finish(tiny, made, read_of(tiny, made), 0.0))]
        assert all(exam.guide.equal(made.resident) for exam in exams)
        guides.append(len(made.resident))
    assert guides[0] > 0 and guides[1] > 0 and guides[2] == 0


def test_a_corpus_that_outgrows_the_window_is_held_against_its_stretches():
    small = tiny_backbone(max_position_embeddings=256)
    exam = Exam(small, ChatLayout(small.tokenizer), FEW_SHOT)
    probes = [Probe("Where does Hugo live?", "Quito"), Probe("Where does Bob live?", "Oslo", closed="Oslo")]
    found = reference(exam, probes, DOCUMENTS)
    assert (found.kind, list(found.answers)) == ("stretches", ["Quito", "Oslo"])
    assert found.counts == [True, False] and found.confirmed == [True, True]
    assert retained(found, ["in Quito", "Oslo"]) == [True, None]
    assert retained(found, ["Rome", "Oslo"]) == [False, None]


def test_what_full_context_answers_as_closed_book_or_not_at_all_does_not_count():
    probes = [Probe("Where is Al?", "Rome", closed=closed) for closed in ("Oslo", "Oslo", "Rome")]
    found = Reference("full context", probes, ["Oslo", "", "Paris"])
    assert found.counts == [False, False, False] and found.confirmed == [False, False, False]


def test_the_highest_rate_that_retains_enough_is_kept(retaining):
    made = retaining.manifest
    found, rates = made.retention, [rung.rate for rung in made.retention.rungs]
    chosen = next(rung for rung in found.rungs if rung.budget == made.budget)
    assert chosen.rate in LADDER and rates == sorted(set(rates))
    assert (found.counted, found.retained) == (chosen.counted, chosen.retained) and found.share >= 0.9
    assert all(rung.share < 0.9 for rung in found.rungs if rung.rate > chosen.rate)
    assert made.budget == made.corpus_tokens // chosen.rate
    assert made.cut_from is None if chosen.rate == LADDER[0] else made.cut_from > made.budget
    assert found.reference == "full context" and found.bound == 0.9 and not found.why


def test_retaining_twice_gives_the_same_sheet(pocket, retaining):
    again = build_sheet(pocket.backbone, STAFF, TASK, retain=0.9)
    assert again.manifest.retention == retaining.manifest.retention and again.indices.equal(retaining.indices)
    for mine, theirs in zip(again.layers, retaining.layers, strict=True):
        assert mine.keys.equal(theirs.keys) and mine.values.equal(theirs.values)


def test_in_one_chunk_it_is_the_sheet_of_a_build_at_that_budget(pocket, retaining):
    alone = build_sheet(pocket.backbone, STAFF, TASK, budget=retaining.manifest.budget)
    assert alone.indices.equal(retaining.indices)
    for mine, theirs in zip(alone.layers, retaining.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-4, rtol=1e-4)


def test_what_was_found_is_saved_and_shown_and_older_manifests_load(retaining, tmp_path, capsys):
    file = save_sheet(retaining, tmp_path / "a.sheet")
    opened = load_sheet(file)
    assert opened.manifest.retention == retaining.manifest.retention
    assert run(["inspect", str(file)]) == 0
    shown = capsys.readouterr().out
    found = retaining.manifest.retention
    assert f"answers {found.retained} of {found.counted} probes as full context does" in shown
    assert "wanted 90%" in shown and f"{found.asked} asked" in shown
    assert run(["inspect", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["manifest"]["retention"] == found.model_dump()
    old = retaining.manifest.model_dump(exclude={"retention", "cut_from"})
    assert Manifest.model_validate(old).retention is None


def test_a_check_warns_of_a_sheet_that_has_lost_much_and_names_a_better_rate(pocket, caplog):
    sheet = build_sheet(pocket.backbone, STAFF, TASK, rate=7, scorer="random", check=True)
    found = sheet.manifest.retention
    assert sheet.manifest.cut_from is None and found.share < 0.9
    (warned,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"of {found.counted} probes the sheet answers {found.retained} as the full context does" in warned
    assert all(rung.rate < 7 for rung in found.rungs) and found.rungs
    assert all(rung.gained - rung.lost == rung.retained - found.retained for rung in found.rungs)
    assert any(rung.gained for rung in found.rungs)
    plain = build_sheet(pocket.backbone, STAFF, TASK, rate=7, scorer="random")
    assert plain.indices.equal(sheet.indices) and plain.manifest.digest == sheet.manifest.digest


def test_a_check_of_an_independent_sheet_ends_with_the_next_change(pocket):
    kb = CompressedKnowledgeLLM.build(STAFF, TASK, model=pocket, rate=1.5, mode="independent", check=True, dtype="int4")
    found = kb.sheet.manifest.retention
    assert found.counted >= 8 and found.rungs == []
    more = Document(text="Omar Haddad lives in Tunis.", id="omar")
    assert kb.extend([more]).sheet.manifest.retention is None


def test_examples_to_spare_are_held_back_from_the_sheet_and_asked(pocket):
    pairs = [(f"Where does {name} live?", city) for name, city in (
        ("Alice Moreno", "Lisbon"), ("Bob Smith", "Oslo"), ("Clara Berg", "Cairo"), ("Hugo Ali", "Quito"),
        ("Nina Sato", "Kyoto"), ("Eve Doe", "Not in the documents."), ("Al Roe", "Not in the documents."),
        ("Ida Poe", "Not in the documents."))]  # fmt: skip
    sheet = build_sheet(pocket.backbone, STAFF, replace(TASK, examples=tuple(pairs)), rate=1.2, check=True)
    assert sheet.manifest.retention.held_back == 2
    assert len(sheet.task.examples) == 6 and pairs[3] not in sheet.task.examples


def test_where_nothing_can_be_checked_the_build_goes_on_and_says_so(tiny, caplog):
    sheet = build_sheet(tiny, DOCUMENTS, FEW_SHOT, rate=2, scorer="task", check=True)
    assert "the model wrote 0 questions that may serve, and 8 are needed" in sheet.manifest.retention.why
    assert str(sheet.manifest.retention).startswith("not checked: ") and sheet.manifest.retention.share is None
    fallen = build_sheet(tiny, DOCUMENTS, ZERO_SHOT, retain=0.9, scorer="task")
    assert fallen.manifest.retention.why.endswith("so the rate is 4") and fallen.manifest.cut_from is None
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 2 and all(each.startswith("not checked: ") for each in told)


REFUSALS = {
    "nothing": ({"retain": 0}, r"retain is 0; pass a share above 0 and at most 1"),
    "per cent": ({"retain": 95}, r"retain is 95; pass a share"),
    "negative": ({"retain": -0.5}, r"retain is -0\.5"),
    "nan": ({"retain": float("nan")}, r"retain is nan"),
    "text": ({"retain": "95%"}, r"retain is '95%'"),
    "bool": ({"retain": True}, r"retain is True"),
    "rate": ({"retain": 0.9, "rate": 4}, r"Both retain 0\.9 and rate 4 were given; pass one of them"),
    "budget": ({"retain": 0.9, "budget": 40}, r"Both retain 0\.9 and budget 40 were given"),
    "independent": ({"retain": 0.9, "mode": "independent"}, r"pass a rate, with check=True .* or mode='sequential'"),
    "correction": ({"retain": 0.9, "correction": "refit"}, r"a correction holds for one budget only; find the rate"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_makes_no_sense_is_refused_before_any_work(tiny, monkeypatch, name):
    options, message = REFUSALS[name]
    monkeypatch.setattr(tiny.model, "forward", lambda *a, **k: pytest.fail("the model ran"))
    with pytest.raises(BudgetError, match=message):
        build_sheet(tiny, DOCUMENTS, FEW_SHOT, **options)


def test_what_a_user_must_hear():
    rungs = [
        Rung(rate=2, budget=90, counted=24, retained=24, gained=9),
        Rung(rate=4, budget=45, counted=24, retained=23, gained=9, lost=1),
    ]
    found = Retention(bound=0.9, asked=26, known=2, confirmed=20, counted=24, retained=15, rungs=rungs)
    said = "of 24 probes the sheet answers 15 as the full context does"
    assert remarks(found, "int4") == [
        f"{said}; with rate=4, dtype='int4' it answers 23 of 24, 9 of them new and 1 lost (p = 0.011)"
    ]
    assert "; with rate=4 it answers" in remarks(found, "bfloat16")[0]
    assert remarks(found.model_copy(update={"retained": 22}), "int4") == []
    weak = remarks(found.model_copy(update={"retained": 23, "known": 5, "confirmed": 3}), "int4")
    assert len(weak) == 1 and "answers 3 as their stretches alone do, and 5 are answered closed book" in weak[0]
    none = found.model_copy(update={"rungs": [], "retained": 0})
    assert remarks(none, "int4") == ["of 24 probes the sheet answers 0 as the full context does"]


def test_a_rate_is_advised_only_where_more_than_chance_speaks_for_it():
    same = Rung(rate=2, budget=90, counted=24, retained=15, gained=4, lost=4)
    for gained, lost, chance in ((0, 0, 1.0), (3, 0, 1 / 8), (4, 0, 1 / 16), (6, 3, 130 / 512), (7, 2, 46 / 512)):
        rung = Rung(rate=3, budget=60, counted=24, retained=15 + gained - lost, gained=gained, lost=lost)
        assert rung.chance == pytest.approx(chance)
        found = Retention(bound=0.9, asked=26, confirmed=24, counted=24, retained=15, rungs=[same, rung])
        (told,) = remarks(found, "int4")
        if chance < 0.1:
            assert "; with rate=3, dtype='int4' it answers" in told
        else:
            tried = f"15 of 24 at 2, {rung.retained} of 24 at 3"
            assert told.endswith(f"; no other rate that was tried is better by more than chance ({tried})")


def test_rungs_that_were_saved_without_what_they_gained_still_open(retaining):
    found = retaining.manifest.retention.model_dump()
    for rung in found["rungs"]:
        del rung["gained"], rung["lost"]
    assert [rung.retained for rung in Retention(**found).rungs] == [
        rung.retained for rung in retaining.manifest.retention.rungs
    ]


def test_the_command_line_retains_checks_and_tells(tmp_path, capsys, caplog):
    for document in STAFF:
        (tmp_path / f"{document.id}.txt").write_text(document.text)
    task = ["--task", TASK.description, "--example", "Where does Bob Smith live? => Oslo"]
    file = tmp_path / "a.sheet"
    assert run(["build", str(tmp_path), *task, "--retain", "0.9", "-o", str(file)]) == 0
    told = capsys.readouterr()
    found = load_sheet(file).manifest.retention
    assert f"; answers {found.retained} of {found.counted} probes as full context does" in told.out
    assert "the model writes questions" in caplog.text and "probes are retained" in caplog.text
    arguments = ["build", str(tmp_path), *task, "--rate", "1.5", "--check", "--json", "--force", "-o", str(file)]
    assert run(arguments) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["retention"]["counted"] == load_sheet(file).manifest.retention.counted
