"""The speed bench times what is right, and loses nothing when a part of it fails."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console

from cribsheet.attention import backends
from cribsheet.model.backbone import Backbone
from cribsheet.testing import save_tiny_model
from cribsheet_bench.minute import parts as minute
from cribsheet_bench.speed import checks, parts, sides
from cribsheet_bench.speed.page import page
from cribsheet_bench.speed.parts import Report
from cribsheet_bench.speed.run import Run
from cribsheet_bench.speed.setting import make_setting


@pytest.fixture(scope="module")
def setting():
    return make_setting("tiny", "cpu", torch.float32, 1)


def test_both_sides_give_the_same_answers_over_the_same_prefix(setting):
    prefix, questions = setting.prefix(64), [setting.ids(9) for _ in range(3)]
    asker = sides.Asker(setting)
    ours = asker.ask(prefix, questions, 12)
    asker.close()
    stock = sides.stock(setting, sides.copied(setting, prefix, 3), questions, 12)
    decode = setting.backbone.tokenizer.decode
    assert ours == [decode(tokens, skip_special_tokens=True).lstrip(" ") for tokens in stock]


def test_a_stock_cache_is_afterwards_as_it_was(setting):
    cache, question = sides.copied(setting, setting.prefix(64)), [setting.ids(9)]
    assert sides.stock(setting, cache, question, 5) == sides.stock(setting, cache, question, 5)
    assert cache.get_seq_length() == 64


@pytest.mark.parametrize(("scorer", "allocation"), [("task", "uniform"), ("recall", "adaptive")])
def test_a_timed_build_keeps_its_budget(setting, scorer, allocation):
    corpus = setting.corpus(400)
    state = sides.build(setting, corpus, 4, scorer=scorer, allocation=allocation, chunk_tokens=150)
    heads = setting.backbone.kv_heads * setting.backbone.num_layers
    assert state.done == 400 and sum(int((kept.indices >= 0).sum()) for kept in state.kept) == 100 * heads


def test_a_sheet_of_any_size_is_opened(setting):
    report = Report()
    parts.opening(setting, report, 2)
    assert report.rows[0]["name"] == "open a sheet of 2 MiB" and report.rows[0]["ours"] > 0


def test_what_is_measured_on_a_cpu_is_what_a_user_gets_who_says_no_type(setting):
    assert not setting.backbone.may_copy
    unsaid = make_setting("tiny", "cpu", None, 1)
    assert unsaid.backbone.may_copy and unsaid.backbone.dtype == torch.float32


def test_a_wrong_kernel_is_found(monkeypatch):
    right = backends.flash_cpu
    monkeypatch.setattr(backends, "flash_cpu", lambda *given: (right(*given)[0] * 1.01, right(*given)[1]))
    errors = checks.attention_errors("cpu", torch.float32)
    assert min(errors.values()) > checks.BOUND[torch.float32]


def test_a_part_that_fails_is_reported_and_what_was_measured_is_written(tmp_path):
    run = Run(tmp_path / "speed.json", 60, Console(quiet=True))
    run.report.model = "tiny"
    run.part("broken", lambda: 1 / 0)
    run.part("good", lambda: run.report.row("a thing", 1.0, 3.0, target=2.0))
    late = Run(None, -1, Console(quiet=True))
    late.part("late", lambda: late.report.row("never", 1.0, 1.0))
    written = json.loads((tmp_path / "speed.json").read_text())
    assert "ZeroDivisionError" in written["errors"]["broken"] and not late.report.rows
    assert written["rows"][0]["ratio"] == 3.0
    assert "| a thing | 1.00 s | 3.00 s | 3.00× |  | 2.00 |" in page(written, command="x")


def test_a_page_of_several_models_names_them_all(setting):
    run = Run(None, 60, Console(quiet=True))
    run.on(setting)
    run.on(setting)
    name, layers = setting.backbone.name, setting.backbone.num_layers
    assert f"| model | {name}, {name} |\n| layers | {layers}, {layers} |" in page(run.result(), command="x")
    assert run.report.model == name


def test_a_model_of_a_folder_answers_to_the_last_token_that_is_timed(tmp_path):
    folder = str(save_tiny_model(tmp_path))
    assert Backbone.load(folder).eos_ids and not make_setting(folder, "cpu", torch.float32, 1).backbone.eos_ids


def test_parts_that_are_not_wanted_are_left_out_but_checks_never_are():
    run, ran = Run(None, 60, Console(quiet=True), ["50m: decode", "build"]), []
    for name in ("50m: build", "50m: decode", "50m: batch"):
        run.part(name, lambda name=name: ran.append(name))
    run.part("attention, float32", lambda: ran.append("check"), always=True)
    assert ran == ["50m: build", "check"] and not run.errors


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_a_ragged_prefix_holds_as_many_tokens_as_a_uniform_one(setting, heads, monkeypatch):
    monkeypatch.setattr(setting.backbone, "kv_heads", heads)
    layer = setting.prefix(240, ragged=True).layers[0]
    assert sum(layer.counts) == pytest.approx(240 * heads, abs=heads) and len(layer.counts) == heads


def test_a_prompt_that_is_read_whole_is_answered_as_over_a_cache(setting):
    prompt = setting.ids(40)
    cache = sides.stock(setting, sides.DynamicCache(config=setting.backbone.config), [prompt], 6)
    assert sides.fresh(setting, prompt, 6) == cache[0]


def test_a_static_cache_answers_as_one_that_grows(setting, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)  # compiling takes a minute
    prefix = setting.prefix(48)
    step = sides.Compiled(setting, prefix, 64)
    grown = sides.stock(setting, sides.copied(setting, prefix), [step.ids[0]], 1)
    assert step() == grown[0]


def test_padded_questions_agree_with_those_that_are_alone(setting):
    report = Report()
    checks.steps_agree(setting, report)
    assert len(report.facts) == 2 and max(report.facts.values()) < 1e-4


def test_the_first_minute_whole_builds_and_the_promise_are_rows(setting):
    report = Report()
    report.model = "tiny"
    minute.builds(setting, report, {200: 3.0})
    minute.promise(setting, report, 300)
    minute.first_minute(setting, report, 200)
    names = [row["name"] for row in report.rows]
    assert sum(name.startswith("whole build") for name in names) == 2
    assert sum(name.startswith("question to answer") for name in names) == 2
    for kind in ("load to first answer", "second answer, other length", "hybrid with 1000 tokens", "32 at once"):
        assert sum(name.startswith(kind) and "first," in name for name in names) == 2  # cold, and kernels on disk
    assert all(row["ours"] > 0 and row["peer"] > 0 for row in report.rows)
