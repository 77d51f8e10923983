"""The quality bench: its families, its shared reads, its peers in another process, and what it shows."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT

from cribsheet.build import build_sheet
from cribsheet.cli import run
from cribsheet.engine.pool import LoadedModel
from cribsheet.errors import BudgetError, CribsheetError, RequestError
from cribsheet_bench.quality import peers, peers_runner, prose
from cribsheet_bench.quality.case import Case, Row, divided
from cribsheet_bench.quality.families import FAMILIES, Wanted, make_cases
from cribsheet_bench.quality.page import page, summary
from cribsheet_bench.quality.run import FULL, measure
from cribsheet_bench.quality.several import Sheets

WANTED = Wanted(tokens=500, seed=3)


@pytest.fixture(scope="module")
def pocket():
    return LoadedModel.get("pocket")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_s_cases_have_examples_that_no_question_repeats_and_are_the_same_every_time(family):
    cases = make_cases([family], 2, WANTED)
    assert [case.name for case in cases] == [f"{family}/500/3/{n}" for n in range(2)] and cases == make_cases(
        [family], 2, WANTED
    )
    for case in cases:
        text = "\n".join(document.text for document in case.documents)
        assert case.task.few_shot and 2 <= len(case.questions) <= 4 and case.family == family
        assert {q for q, _ in case.task.examples}.isdisjoint(case.questions)
        if family != "worlds":  # whose counts and answers of yes and no stand nowhere
            assert all(part in text for gold in case.answers for part in ([gold], gold.split(", "))[", " in gold])


@pytest.mark.parametrize("family", ["needle", "multi-key", "multi-value", "variables"])
def test_examples_are_about_other_keys_than_the_questions(family):
    (case,) = make_cases([family], 1, WANTED)
    keys = [_key(question) for question in case.questions]
    shown = " ".join(f"{question} {answer}" for question, answer in case.task.examples)
    assert len(set(keys)) == len(keys) and not any(re.search(rf"\b{re.escape(key)}\b", shown) for key in keys)


def _key(question: str) -> str:
    found = re.search(r"(?:for|belongs to|value of|does|have the value) (\w+(?: \w+)?)", question)
    assert found, question
    return found[1].removesuffix(" have")


@pytest.mark.parametrize("family", ["common words", "frequent words"])
def test_the_words_asked_for_are_those_that_stand_there_most_often(family):
    (case,) = make_cases([family], 1, Wanted(tokens=900, seed=1))
    lists = {d.id.removeprefix("list-"): re.findall(r"[a-z]+", d.text.partition(": ")[2]) for d in case.documents}
    for question, gold in zip(case.questions, case.answers, strict=True):
        words = lists[question.rstrip("?").split()[-1]]
        counts = {word: words.count(word) for word in words}
        least = min(counts[word] for word in gold.split(", "))
        assert len(gold.split(", ")) == 3 and all(counts[w] < least for w in counts if w not in gold.split(", "))
    own = [set(words) for words in lists.values()]
    assert all(a.isdisjoint(b) for n, a in enumerate(own) for b in own[:n])


def test_a_text_of_the_user_s_is_asked_about_by_rule():
    towns = {"Nonan": 1411, "Barel": 1522, "Lurin": 1633, "Gestal": 1744, "Ossin": 1855, "Wimmel": 1966, "Tarn": 1277}
    about = "The castle of {} was built in {} by the duke, who lived there with all of his family for many years."
    cases = list(prose.reading(400, 0, "\n\n".join(about.format(*each) for each in towns.items())))
    when = next(case for case in cases if case.kinds[0] == "when")
    assert {int(gold) for gold in when.answers} < set(towns.values())


@pytest.mark.parametrize("family", ["needle", "variables", "multi-key"])
def test_long_cases_are_as_long_as_asked_for(family):
    (case,) = make_cases([family], 1, Wanted(tokens=8000, seed=5))
    assert sum(len(document.text) for document in case.documents) > 2 * 8000 and len(case.questions) == 4


def test_a_text_that_is_far_too_short_for_a_case_gives_none(caplog):
    assert make_cases(["reading"], 1, Wanted(tokens=8000, seed=5)) == []
    assert "reading has 0 of 1 cases at 8000 tokens, seed 5" in caplog.text


def test_unknown_families_and_methods_are_named(capsys):
    with pytest.raises(RequestError, match=r"no family 'word'; use worlds, needle"):
        make_cases(["word"], 1, WANTED)
    assert run(["bench", "quality", "--method", "magic"]) == 2 and "no method 'magic'" in capsys.readouterr().err


def test_entities_of_examples_are_not_asked_about():
    asked = [("Ada", "Where is Ada?"), ("Bob", "Who met Cleo?"), ("Cleo", "Where is Cleo?"), ("Dan", "Where is Dan?")]
    shown, left = divided(asked, 2, lambda q: q[0], lambda q: q[1])
    assert shown == asked[:2] and left == asked[3:]


@pytest.mark.parametrize("scorer", [None, "task", "finch"])
def test_sheets_that_share_what_was_read_are_those_of_a_build_each(tiny, scorer):
    sheets = Sheets(tiny, DOCUMENTS)
    for rate in (2.0, 3.0):
        shared = sheets.build(FEW_SHOT, rate=rate, scorer=scorer, guide="dropped")
        alone = build_sheet(tiny, DOCUMENTS, FEW_SHOT, rate=rate, scorer=scorer, guide="dropped")
        assert torch.equal(shared.indices, alone.indices) and shared.manifest.budget == alone.manifest.budget
        for a, b in zip(shared.layers, alone.layers, strict=True):
            assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values) and a.counts == b.counts
    assert len(sheets._found) == 1


def test_the_other_process_answers_as_we_do_and_a_press_that_fails_is_told(pocket):
    (case,) = make_cases(["multi-key"], 1, Wanted(tokens=250, seed=0))
    full = [row for row in measure(pocket, [case], [], [8.0]) if row.method == FULL]
    assert any(row.retained for row in full)
    found = peers.ask(Path(sys.executable), pocket, case, [8.0], full, ["KVzip", "FinchPress"])
    assert found.same == [True] * len(case.questions) and found.rows == []
    assert [(each["press"], each["rate"]) for each in found.failed] == [("KVzip", 8.0), ("FinchPress", 8.0)]
    assert all("No module named 'kvpress'" in each["error"] for each in found.failed)


def test_what_the_other_process_reads_is_our_prompt(pocket):
    (case,) = make_cases(["needle"], 1, WANTED)
    told = peers.prompts(pocket, case, [4.0])
    text = pocket.backbone.tokenizer.decode(told["context"] + told["questions"][0])
    assert text.startswith("<|bos|><|user|>Answer from the documents.") and text.endswith("<|end|><|assistant|>")
    whole = pocket.backbone.tokenizer.decode(told["context"] + told["guide"] + told["after_guide"][0])
    assert all(f"{q}<|end|><|assistant|>{a}<|end|>" in whole for q, a in case.task.examples)
    assert whole.count("<|user|>") == len(case.task.examples) + 1 and told["budgets"] == [
        [4.0, len(told["context"]) // 4]
    ]


def test_a_python_that_is_not_there_and_one_that_fails_are_told(tmp_path):
    with pytest.raises(CribsheetError, match="no python at"):
        peers.run(tmp_path / "python", {})
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no torch >&2\nexit 3\n")
    broken.chmod(0o700)
    with pytest.raises(CribsheetError, match="ended with 3: no torch"):
        peers.run(broken, {})


def test_kept_tokens_are_compared_head_by_head(tiny):
    model = LoadedModel.get(tiny)
    case = Case("c", DOCUMENTS, FEW_SHOT, ["?"], ["x"], ["k"])
    sheet = build_sheet(tiny, DOCUMENTS, FEW_SHOT, rate=4.0, scorer="finch", guide="dropped", chunk_tokens=0)
    kept = sheet.indices.tolist()
    other = [[[index + 1 for index in kept[0][0]], *kept[0][1:]], *kept[1:]]
    lines = [{"finch": "c", "rate": 4.0, "kept": {"ours": kept, "one head moved": other}}]
    found = peers.finch_against(model, [case], lines)
    heads = sheet.indices.shape[0] * sheet.indices.shape[1]
    assert found["ours"] == {"same": 1.0, "shared": 1.0}
    assert found["one head moved"]["same"] == pytest.approx(1 - 1 / heads)
    assert 1 - 1 / heads <= found["one head moved"]["shared"] < 1


def test_a_dropped_guide_has_the_worst_scores_and_pooled_heads_have_one_set():
    scores = torch.tensor([[[0.3, 0.1, 9.0], [0.5, 0.9, 9.0]]])
    dropped = SimpleNamespace(score=lambda: scores.clone())
    peers_runner._forget(dropped, 1)
    assert dropped.score().argmin(-1).tolist() == [[2, 2]] and torch.equal(dropped.score()[..., :2], scores[..., :2])
    pooled = SimpleNamespace(score=lambda: scores.clone())
    peers_runner._pool(pooled)
    assert torch.equal(pooled.score()[0, 0], pooled.score()[0, 1])
    assert pooled.score()[0, 0].tolist() == pytest.approx([0.4, 0.5, 9.0])


def test_lines_count_what_full_context_answers_by_family_and_together():
    row = Row(FULL, 1.0, 100, 800, 800, "needle", "needle/0", "needle", 1.0, 1.0, True)
    hidden = replace(row, method="kvpress KVzip", rate=8.0, tokens=12.5, nbytes=100, held=800)
    rows = [row, replace(row, exact=0.0, retained=False), replace(row, family="worlds", case="worlds/0")]
    rows += [hidden, replace(hidden, exact=0.0, retained=False), replace(hidden, family="worlds", exact=0.0)]
    lines = {(line["method"], line["family"]): line for line in summary(rows)}
    assert lines["kvpress KVzip", "all"]["retained"] == 0.5 and lines["kvpress KVzip", "all"]["retained_n"] == 2
    assert lines["kvpress KVzip", "needle"]["retained"] == 1.0 and lines["kvpress KVzip", "needle"]["em"] == 0.5
    assert lines[FULL, "needle"]["em"] == 0.5 and lines["kvpress KVzip", "worlds"]["held"] == 800


def test_a_run_writes_rows_and_a_page_and_goes_on_with_more_cases(tmp_path, capsys):
    file = tmp_path / "quality.json"
    given = ["bench", "quality", "--family", "needle", "--family", "common words", "--seed", "0", "--rate", "4"]
    given += ["--tokens", "300", "--questions", "2", "--method", "random", "--json", str(file)]
    assert run(given) == 0
    result = json.loads(file.read_text())
    shown = file.with_suffix(".md").read_text()
    assert shown == page(result) and "| common words | 2 |" in shown and "## At 4×" in shown
    methods = {row["method"] for row in result["rows"] if row["family"] == "needle"}
    assert methods == {FULL, "closed book", "random"} and "random" in capsys.readouterr().out
    assert {row["method"] for row in result["rows"] if row["family"] == "common words"} == {FULL, "closed book"}
    result["rows"] = [row | {"kind": "from before"} for row in result["rows"]]
    file.write_text(json.dumps(result))
    assert run([*given, "--family", "frequent words"]) == 0
    more = json.loads(file.read_text())
    assert more["done"] == ["needle/300/0/0", "common words/300/0/0", "frequent words/300/0/0"]
    kinds = {row["kind"] for row in more["rows"] if row["family"] != "frequent words"}
    assert kinds == {"from before"} and {"frequent"} == {row["kind"] for row in more["rows"]} - kinds


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_sheet_is_fitted_to_the_bytes_of_sixteen_bits(pocket, dtype):
    (case,) = make_cases(["needle"], 1, WANTED)
    sheets = Sheets(pocket.backbone, case.documents)
    half = sheets.build(case.task, rate=8.0, dtype="bfloat16")
    fitted = sheets.fitted(case.task, 8.0, dtype=dtype)
    assert 0.97 * half.nbytes < fitted.nbytes <= half.nbytes
    assert fitted.tokens > {"int8": 1.8, "int4": 3.3}[dtype] * half.tokens
    with pytest.raises(BudgetError, match="No token fits"):
        sheets.fitted(case.task, 10_000.0, dtype=dtype)


def test_bytes_of_thirty_two_bits_count_as_sixteen_beside_those_that_are_stored_so():
    row = Row(FULL, 1.0, 400, 8 << 20, 8 << 20, "needle", "needle/0", "needle", 1.0, 1.0, True)
    stored = {"default": 2 << 20, "default, 16-bit": 1 << 20, "default, int4": 1 << 20, "kvpress KVzip": 2 << 20}
    rows = [row, replace(row, method="closed book", exact=0.0)]
    rows += [
        replace(row, method=name, rate=8.0, tokens=175 if "int4" in name else 50, nbytes=size, held=size)
        for name, size in stored.items()
    ]
    rows += [replace(rows[-1], method="kvpress SnapKV", exact=0.0)]
    made = {"tokens": [400], "cases": 1, "seeds": [0], "dtype": "torch.float32"}
    shown = page({"setup": made, "lines": summary(rows), "command": "", "seconds": 1.0, "peers": {"failed": []}})
    for name in ("default", "default, 16-bit", "kvpress KVzip"):
        assert f"| {name} | 50 | 1,024 | 1.00 |" in shown
    assert "| default, int4 | 175 | 1,024 | 1.00 |" in shown
    assert "| 8×, 16-bit | 50: 1.00 | 175: 1.00 | 50: 1.00 (KVzip) |" in shown
