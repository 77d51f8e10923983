"""The bench of vLLM over sheets beside vLLM over whole contexts: what it prepares, and what it calls the same words."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec

import pytest

from cribsheet import CompressedKnowledgeLLM
from cribsheet.compare.compare import Corpus
from cribsheet.compare.questions import Asked as Question
from cribsheet.corpus.documents import Document
from cribsheet.corpus.task import Task
from cribsheet.engines.vllm.file import ExportedSheet
from cribsheet.testing import tiny_backbone
from cribsheet_bench.beside_vllm.prepare import prepare
from cribsheet_bench.beside_vllm.run import _child, main
from cribsheet_bench.beside_vllm.serve import Came, Server, _many, mixed
from cribsheet_bench.beside_vllm.work import Ours, Work, add_rows, read_rows
from cribsheet_bench.real.corpora import write_corpus

NAMES = ("Alice Moreno", "Bob Smith", "Clara Berg", "Hugo Ali", "Nina Sato", "Ivan Petrov", "Maria Lopez", "Omar Ali")
TASK = Task("Answer questions about people.", examples=(("Where does Eva Stone live?", "Paris"),))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A tiny model in a folder, and two corpora."""
    folder = tmp_path_factory.mktemp("beside")
    whole = {"layer_types": ["full_attention"] * 3, "use_sliding_window": False}
    backbone = tiny_backbone("qwen2", **whole, head_dim=64, hidden_size=128, num_attention_heads=2)
    for part in ("model", "tokenizer"):
        getattr(backbone, part).save_pretrained(folder / "model")
    for number, town in enumerate(("Oslo", "Quito")):
        text = " ".join(f"{name} lives in {town}, house {place}, and works there." for place, name in enumerate(NAMES))
        asked = [Question(f"Where does {name} live?", (town,)) for name in NAMES[: 4 + number]]
        write_corpus(folder / "corpora" / "towns" / str(number), Corpus(town, [Document(text, "a")], TASK, asked))
    return folder


@pytest.fixture(scope="module")
def settings(data):
    told = {"model": str(data / "model"), "corpora": str(data / "corpora"), "device": None, "only": ["towns"]}
    return {**told, "count": 6, "each": 24, "rate": 3.0, "block": 32, "dtypes": ["float32"]}


@pytest.fixture(scope="module")
def work(data, settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    prepare(folder, settings)
    return folder, Work.read(folder)


def test_both_ways_end_in_the_same_tokens_and_whole_contexts_are_what_full_context_reads(work, data, settings):
    folder, told = work
    assert [corpus.name for corpus in told.corpora] == ["towns/0", "towns/1"] and len(told.asked) == 9
    for corpus in told.corpora:
        sheet = ExportedSheet.open(folder / corpus.file)
        assert list(sheet.ids) == corpus.ids and len(corpus.ids) % 32 == 0
        assert corpus.nbytes * len(corpus.whole) == corpus.whole_nbytes * len(corpus.ids)
    documents = [Document(json.loads(data.joinpath("corpora/towns/0/documents.jsonl").read_text())["text"], "a")]
    full = CompressedKnowledgeLLM.build(documents, TASK, model=settings["model"], rate=1, guide="resident")
    corpus, asked = told.corpora[0], told.asked[0]
    assert full.sheet.tokens == len(corpus.whole) and full.question_tokens(asked.text).tolist() == asked.ids
    assert full.backbone.tokenizer.decode(corpus.whole).count("lives in Oslo") == 8
    assert asked.ours["float32"].tokens and len(asked.ours["float32"].margins) == len(asked.ours["float32"].tokens)
    assert asked.plain != asked.ids and asked.golds == ["Oslo"]


def test_answers_part_where_the_first_token_differs_but_for_what_ends_them(work):
    told = replace(work[1], ends=[2])
    ours = Ours("a b", [7, 8, 9, 2], [0.5, 0.4, 0.3, 0.2])
    assert told.parting(ours, [7, 8, 9]) is None and told.parting(ours, [7, 8, 9, 2]) is None
    assert told.parting(ours, [7, 4, 9]) == 0.4
    assert told.parting(ours, [7, 8]) == 0.3 and told.parting(ours, [7, 8, 9, 5]) == 0.2


def test_questions_go_round_the_corpora_and_those_of_others_fill_up(work):
    told = work[1]
    assert [each.corpus for each in _many(told, 2, 5)] == [0, 1, 0, 1, 0]
    one = _many(told, 1, 64)
    assert [each.corpus for each in one] == [0] * 9 and sum(bool(each.golds) for each in one) == 4
    assert len({each.text for each in one}) == 5


class Repeating(Server):
    """Answers with what it is asked, at once."""

    def __init__(self, work):
        self.work = work

    def ask(self, asked):
        texts = [str(self._prompt(question, way)) for question, way in asked]
        return Came(texts, [], [], [], 1.0)


@pytest.mark.parametrize(("count", "sheets"), [(1, 1), (6, 2)])
def test_plain_questions_are_mixed_with_two_sheets_or_the_only_one(data, settings, tmp_path, count, sheets):
    prepare(tmp_path, {**settings, "count": count})
    work = Work.read(tmp_path)
    assert len(work.corpora) == sheets
    (row,) = mixed(Repeating(work), {"mixed": 8})
    assert row["sheets"] == sheets and row["requests"] == row["same"] == row["differ_alone"] == 8
    assert row["crossed"] == 0


@pytest.mark.parametrize("flag", ["--count", "--each", "--questions", "--mixed", "--at-once", "--block"])
def test_counts_of_nothing_are_refused_before_sheets_are_built(data, capfd, flag):
    with pytest.raises(SystemExit, match="2"):
        main([str(data / "corpora"), "--model", str(data / "model"), flag, "0"])
    assert f"{flag} is 0; give at least 1" in capfd.readouterr().err


def test_rows_are_there_as_soon_as_they_are_written(tmp_path):
    assert read_rows(tmp_path / "rows") == []
    for number in range(2):
        add_rows(tmp_path / "rows", [{"part": "a", "number": number}])
    assert [row["number"] for row in read_rows(tmp_path / "rows")] == [0, 1]


def test_a_part_that_fails_is_told(settings, tmp_path, caplog):
    assert not _child("prepare", tmp_path, {**settings, "model": str(tmp_path)}, 60)
    assert "prepare ended with 1" in caplog.text


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_where_there_is_no_vllm_that_is_told_before_sheets_are_built(data, tmp_path, capfd):
    with pytest.raises(SystemExit, match="2"):
        main([str(data / "corpora"), "--model", str(data / "model"), "--folder", str(tmp_path / "left")])
    assert "vLLM is not in this Python" in capfd.readouterr().err and not (tmp_path / "left").exists()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_says_what_we_say_and_mixes_nothing_up(data, tmp_path):
    asked = ["--rate", "3", "--block", "32", "--dtypes", "float32", "--questions", "9", "--mixed", "20"]
    flags = ["--vllm", '{"enforce_eager": true}', "--folder", str(tmp_path), "--json", str(tmp_path / "a.json")]
    assert main([str(data / "corpora"), "--model", str(data / "model"), *asked, *flags]) == 0
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    same, mixed = ([row for row in rows if row["part"] == part] for part in ("same words", "mixed"))
    assert all(row["same"] == row["questions"] == 9 for row in same) and len(same) == 2
    assert [(row["same"], row["crossed"], row["failed"]) for row in mixed] == [(20, 0, 0)]
    assert len([row for row in rows if row["part"] == "speed"]) == 8
