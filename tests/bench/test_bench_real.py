"""The bench on real models: its corpora and their making, runs that go on, shards, what is claimed and what is not."""

from __future__ import annotations

import json
import sys
import tarfile
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
from corpus import DOCUMENTS, FEW_SHOT
from rich.console import Console

from cribsheet import CompressedKnowledgeLLM, Document, Task
from cribsheet.build import build_sheet
from cribsheet.cli import run as cli
from cribsheet.compare.compare import CLOSED, FULL, Corpus
from cribsheet.compare.journal import Journal, unfinished
from cribsheet.compare.metrics import included, normalise, rouge_l, same_letter
from cribsheet.compare.questions import CHOICE, SUMMARY, Asked
from cribsheet.engine.pool import LoadedModel
from cribsheet.errors import CribsheetError, DocumentError, RequestError
from cribsheet_bench.quality.families import Wanted, make_cases
from cribsheet_bench.quality.several import Sheets
from cribsheet_bench.real import sets as real_sets
from cribsheet_bench.real.case import Case, Means
from cribsheet_bench.real.corpora import find_corpora, read_corpus, write_corpus
from cribsheet_bench.real.page import Result, Row, View, merged, page, read_result, result_of
from cribsheet_bench.real.run import Options, merge, run, shard_file, write
from cribsheet_bench.real.ways import BY_NAME, NAMES

QUIET = Console(quiet=True)
SENTENCES = (
    "The mill of {0} was built by {0} the {1}. It stood by the river, and {2} people worked there in those days. "
)


# What a model says, judged


def test_words_letters_and_summaries_are_judged_each_in_its_way():
    asked = Asked("?", ("the old miller", "a miller"))
    assert asked.marks("The old miller.\nQuestion: who?") == (1, 1, 1)
    exact, score, inclusion = asked.marks("It was the old miller who came")
    assert exact == 0 and 0 < score < 1 and inclusion == 1
    assert asked.marks("") == (0, 0, 0)
    choice = Asked("?", ("B",), CHOICE)
    assert choice.marks("B. neutrons") == (1, 1, 1) and choice.marks("The answer is (B)") == (1, 1, 1)
    assert choice.marks("C, not B") == (0, 0, 0) and choice.marks("Both") == (0, 0, 0)
    exact, score, inclusion = Asked("?", ("they agreed on two microphones",), SUMMARY).marks("They bought microphones")
    assert (exact, inclusion) == (0, 0) and score == pytest.approx(2 * 2 / (5 + 3))


def test_inclusion_is_of_whole_words_and_rouge_of_their_order():
    assert included("in the Oslo fjord", ["Oslo"]) and not included("Oslofjord", ["Oslo"])
    assert same_letter("answer: D", ["D"]) and not same_letter("Do", ["D"])
    assert rouge_l("a b c d", ["b d"]) == pytest.approx(2 * 2 / (3 + 2))  # `a` is an article
    assert rouge_l("d b", ["b d"]) == pytest.approx(2 * 1 / 4) and rouge_l("", ["x"]) == 0


# Corpora


def test_a_corpus_is_read_back_as_it_was_written_whatever_its_texts_hold(tmp_path):
    task = Task('Say "where".\n\tAlways \x7f \\ é 😀', [("Who?\nA. I\nB. you", 'the "\\n" one')], instruction="")
    corpus = Corpus("odd/40/0", [Document('One " text\n\nof \\ two', "a/b #1"), Document("Two", "ü")], task,
                    [Asked("Where?", ("Oslo", "at home"), "place", ("a/b #1",))])  # fmt: skip
    write_corpus(tmp_path / "odd", corpus)
    again = read_corpus(tmp_path / "odd", "odd/40/0")
    assert again.task == task and again.questions == corpus.questions
    assert [(each.id, each.text) for each in again.documents] == [(each.id, each.text) for each in corpus.documents]


def test_a_folder_of_files_is_a_corpus_too_and_what_is_missing_is_named(tmp_path):
    (tmp_path / "mine" / "documents").mkdir(parents=True)
    (tmp_path / "mine" / "documents" / "bob.txt").write_text("Bob lives in Oslo.")
    (tmp_path / "mine" / "questions.jsonl").write_text('{"question": "Where does Bob live?", "answers": ["Oslo"]}')
    (tmp_path / "mine" / "task.toml").write_text('description = "Answer questions about people."')
    assert find_corpora(tmp_path) == {"mine": tmp_path / "mine"}
    assert find_corpora(tmp_path / "mine") == {"mine": tmp_path / "mine"}
    assert [each.id for each in read_corpus(tmp_path / "mine", "mine").documents] == ["bob.txt"]
    with pytest.raises(DocumentError, match="has no documents; put documents"):
        (tmp_path / "bare").mkdir()
        read_corpus(tmp_path / "bare", "bare")
    with pytest.raises(DocumentError, match="holds no corpora"):
        find_corpora(tmp_path / "bare")


def test_all_groups_come_before_the_second_corpus_of_any(tmp_path):
    for name in ("b/16000/0", "b/4000/1", "b/4000/0", "a/4000/10", "a/4000/2"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "questions.jsonl").touch()
    assert list(find_corpora(tmp_path)) == ["a/4000/2", "b/4000/0", "b/16000/0", "a/4000/10", "b/4000/1"]


# The converter


def data_sets(folder: Path) -> Path:
    """Every set in its own form, each with pieces of about 500 characters."""

    def write(path, rows, *, by_line=True):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows) if by_line else json.dumps(rows)
        (folder / path).write_text(text)

    names = [f"{a}{b}" for a in "BDFGKLMN" for b in ("ador", "elin", "irsa", "ossum", "ulbek", "yarn", "entis")]
    texts = {name: SENTENCES.format(name, f"{name}son", 100 + n) * 4 for n, name in enumerate(names)}
    for chosen in ("xquad", "covidqa", "fairytale", "nq"):
        rows = [{"id": name, "title": f"On {name}", "text": texts[name], "questions": [
            {"question": f"Who built the mill of {name}?", "answers": [f"{name} the {name}son"], "kind": ""},
            {"question": "What is not said?", "answers": [], "kind": "none"}]} for name in names]  # fmt: skip
        write(f"reading/{chosen}.jsonl", rows)
    pairs = list(pairwise(names))
    write("multihop_train100/hotpotqa_qa_train.json", [
        {"question": f"Whose mills, {a} and {b}?", "answer": f"{a}son", "type": "bridge",
         "context": [[a, [texts[a]]], [b, [texts[b]]]], "supporting_facts": [[a, 0], [a, 1], [b, 0]]}
        for a, b in pairs], by_line=False)  # fmt: skip
    write("multihop_train100/musique_qa_train.json", [
        {"id": f"2hop__{n}", "question": f"Whose is {a}?", "answer": f"{a}son", "answer_aliases": [f"the {a}son"],
         "paragraphs": [{"title": "Mill", "paragraph_text": texts[x], "is_supporting": x == a} for x in (a, b)]}
        for n, (a, b) in enumerate(pairs)], by_line=False)  # fmt: skip
    write("openstax_anatomy/modules.jsonl", [{"module": n, "title": n, "text": texts[n]} for n in names])
    write("openstax_anatomy/exercises.jsonl", [
        {"module": name, "kind": "multiple-choice", "question": "Who built it?", "options": ["Nobody", f"{name}son"],
         "answer": "B"} for name in names] + [{"module": names[0], "kind": "free-response", "question": "Why?"}]
    )  # fmt: skip
    write("qmsum/val.jsonl", [
        {"meeting_id": name, "meeting_transcripts": [{"speaker": "A", "content": texts[name]}],
         "specific_query_list": [{"query": f"What of {name}?", "answer": f"They spoke of a mill by {name}."}]}
        for name in names])  # fmt: skip
    (folder / "peps" / "peps").mkdir(parents=True)
    headers = []
    with tarfile.open(folder / "peps" / "peps_public_domain.tar.gz", "w:gz") as archive:
        for number, name in enumerate(names):
            file = folder / "peps" / "peps" / f"pep-{number:04d}.rst"
            file.write_text(f"PEP: {number}\nAuthor: {name} Doe <a@b.c>\n\n{texts[name]}")
            archive.add(file, f"peps/{file.name}")
            headers.append({"PEP": str(number), "Author": f"{name} Doe <a@b.c>", "Replaces": "3, 4", "Created": ""})
    write("peps/headers.jsonl", headers)
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    data = data_sets(tmp_path_factory.mktemp("data"))
    out = tmp_path_factory.mktemp("corpora")
    real_sets.main([str(data), str(out), "--tokens", "600", "1200", "--cases", "2", "--questions", "3"])
    return data, out


def test_every_set_becomes_corpora_of_the_wanted_lengths(converted):
    _, out = converted
    found = find_corpora(out)
    assert {name.rpartition("/")[0] for name in found} == {
        f"{chosen.name}/{tokens}" for chosen in real_sets.SETS for tokens in (600, 1200)
    }
    for name, folder in found.items():
        corpus = read_corpus(folder, name)
        length = sum(len(each.text) for each in corpus.documents) / 4
        wanted = int(name.split("/")[1])
        assert wanted / 2 <= length <= wanted and 1 <= len(corpus.questions) <= 3 and corpus.task.few_shot
        known = {each.id for each in corpus.documents}
        assert all(set(each.documents) <= known for each in corpus.questions)


def test_nothing_of_an_example_stands_in_a_tested_corpus(converted):
    _, out = converted
    for name, folder in find_corpora(out).items():
        corpus = read_corpus(folder, name)
        words = normalise(" ".join(each.text for each in corpus.documents))
        for question, answer in corpus.task.examples:
            right = question.split("\nB. ")[1].split("\n")[0] if answer == "B" else answer
            assert normalise(right) not in words and question not in {each.text for each in corpus.questions}


def test_types_say_how_answers_are_judged_and_headers_of_several_values_are_not_asked(converted):
    _, out = converted
    types = {}
    for name, folder in find_corpora(out).items():
        types.setdefault(name.split("/")[0], set()).update(q.type for q in read_corpus(folder, name).questions)
    assert types["anatomy"] == {CHOICE} and types["qmsum"] == {SUMMARY} and types["nq"] == {"nq"}
    assert types["hotpot"] == {"bridge"} and types["musique"] == {"2hop"} and types["peps"] == {"author"}


def test_corpora_are_the_same_every_time_and_missing_sets_are_left_out(converted, tmp_path, caplog):
    data, out = converted
    (tmp_path / "part" / "reading").mkdir(parents=True)
    (tmp_path / "part" / "reading" / "nq.jsonl").write_bytes((data / "reading" / "nq.jsonl").read_bytes())
    real_sets.main(
        [str(tmp_path / "part"), str(tmp_path / "out"), "--tokens", "600", "--cases", "2", "--questions", "3"]
    )
    assert list(find_corpora(tmp_path / "out")) == ["nq/600/0", "nq/600/1"] and "xquad is left out" in caplog.text
    for file in ("documents.jsonl", "questions.jsonl", "task.toml"):
        assert (tmp_path / "out/nq/600/1" / file).read_text() == (out / "nq/600/1" / file).read_text()
    with pytest.raises(DocumentError, match="No corpus could be made"):
        real_sets.main([str(tmp_path), str(tmp_path / "none")])


def test_an_example_whose_answer_the_corpus_holds_is_not_used(converted, caplog):
    data, _ = converted
    chosen = next(each for each in real_sets.SETS if each.name == "nq")
    told = real_sets.Piece({"x": "all"}, [Asked("Who?", ("people worked there",)), Asked("What?", ("nobody knew",))])
    read = replace(chosen, read=lambda path, name: [told, *chosen.read(path, name)], held_back=1)
    (corpus,) = real_sets.make_corpora(data, read, 600, cases=1)
    assert corpus.task.examples == (("What?", "nobody knew"),)
    (bare,) = real_sets.make_corpora(data, replace(read, held_back=0), 600, cases=1)
    assert not bare.task.few_shot and "each answer of an example stands in the corpus" in caplog.text


# Runs


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds")
    for number, case in enumerate(make_cases(["worlds"], 3, Wanted(tokens=700, seed=1, questions=2))):
        asked = [Asked(q, (a,), kind) for q, a, kind in zip(case.questions, case.answers, case.kinds, strict=True)]
        name = f"worlds/700/{number}" if number < 2 else "people"
        write_corpus(folder / name, Corpus(name, case.documents, case.task, asked))
    return folder


METHODS = (FULL, CLOSED, "bm25", "default", "int4", "random", "hybrid-bm25", "auto-bm25", "recall-bm25", "recall-sheet")


@pytest.fixture(scope="module")
def options(corpora):
    return Options(corpora, ("pocket",), methods=METHODS, rates=(2.0,))


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    file = tmp_path_factory.mktemp("whole") / "real.json"
    return run(options, file=file, console=QUIET), file


def test_every_method_is_asked_every_question_within_its_budget(whole, options):
    result, _ = whole
    seen = {(row.method, row.rate) for row in result.rows}
    assert seen == {(FULL, 1), (CLOSED, 1)} | {(name, 2) for name in METHODS[2:]}
    assert len(result.rows) == 3 * 2 * len(METHODS) and {row.model for row in result.rows} == {"pocket"}
    full = {row.case: row.tokens for row in result.rows if row.method == FULL}
    for row in result.rows:
        most = {FULL: 1.0, "int4": 1.0, CLOSED: 0.4}.get(row.method, 0.5)
        assert 0 < row.tokens <= most * full[row.case], row
    assert {row.mode for row in result.rows if row.method == "bm25"} == {"retrieval"}
    assert {row.mode for row in result.rows if row.method.startswith("recall")} == {"recall"}
    assert sum(row.score for row in result.rows if row.method == FULL) > 3  # of 6
    assert result.setup["seed"] == 0 and set(result.models["pocket"]) == {"weights", "dtype", "device"}


def test_a_result_has_a_row_a_line_and_a_page_beside_it(whole):
    result, file = whole
    lines = file.read_text().splitlines()
    assert sum(line.startswith('{"model": "pocket", "case": ') for line in lines) == len(result.rows)
    assert read_result(file) == Result(json.loads(json.dumps(result.setup)), result.models, result.rows)
    assert file.with_suffix(".md").read_text() == page(result) and not unfinished(file).exists()


def test_full_context_is_the_prompt_of_all_documents_and_the_examples():
    model = LoadedModel.get("pocket")
    kb = CompressedKnowledgeLLM(model, Sheets(model.backbone, DOCUMENTS).whole(FEW_SHOT))
    dropped = CompressedKnowledgeLLM(
        model, build_sheet(model.backbone, DOCUMENTS, FEW_SHOT, rate=1, scorer="recent", guide="dropped")
    )
    assert kb.sheet.resident and kb.sheet.tokens == dropped.sheet.tokens + kb.sheet.manifest.guide_tokens
    turns = []
    for number, (question, answer) in enumerate(FEW_SHOT.examples):
        told = question if number else f"Task: {FEW_SHOT.description}\n\n{question}"
        turns += [{"role": "user", "content": told}, {"role": "assistant", "content": answer}]
    for question in ("Where does Hugo Ali live?", "What does Clara speak?"):
        asked = [*turns, {"role": "user", "content": question}]
        here, there = (each.logprobs for each in (kb.ask(question, max_tokens=6, logprobs=0),
                                                  dropped.ask(asked, max_tokens=6, logprobs=0)))  # fmt: skip
        assert [each.token_id for each in here] == [each.token_id for each in there]
        assert [each.logprob for each in here] == pytest.approx([each.logprob for each in there], abs=1e-3)
    kb.close(), dropped.close()


def test_a_killed_run_goes_on_and_asks_nothing_twice(whole, options, tmp_path, caplog):
    result, _ = whole
    caplog.set_level("INFO")
    file = tmp_path / "real.json"
    journal = Journal(file, options.terms, Row)
    journal.add([replace(row, answer="from before") for row in result.rows[::2]])
    with unfinished(file).open("a") as left:
        left.write('{"model": "pocket", "cas')
    again = run(options, file=file, console=QUIET)
    assert f"going on after {len(result.rows[::2])} answers" in caplog.text
    assert again.rows[1::2] == result.rows[1::2]
    assert {row.answer for row in again.rows[::2]} == {"from before"}
    assert not unfinished(file).exists() and again.models == result.models
    assert run(options, file=file, console=QUIET).rows == again.rows


def test_what_is_asked_for_later_is_added_and_other_terms_are_refused(corpora, options, whole, tmp_path):
    file = tmp_path / "real.json"
    few = replace(options, methods=(FULL, "random"), only=("people",), questions=1)
    first = run(few, file=file, console=QUIET)
    assert [(row.case, row.method, row.number) for row in first.rows] == [("people", FULL, 0), ("people", "random", 0)]
    more = run(replace(few, rates=(2.0, 3.0), questions=None), file=file, console=QUIET)
    assert len(more.rows) == 6 and set(map(str, first.rows)) < set(map(str, more.rows))
    on_a_card = Result(first.setup, {"pocket": {**first.models["pocket"], "device": "H200"}}, first.rows)
    write(on_a_card, file)
    assert run(replace(few, questions=None), file=file, console=QUIET).models["pocket"]["device"] == "H200 and cpu"
    with pytest.raises(RequestError, match="was made on other terms"):
        run(replace(few, seed=1), file=file, console=QUIET)
    unfinished(file).write_text("{}\n")
    with pytest.raises(RequestError, match="of another comparison"):
        run(few, file=file, console=QUIET)


def test_shards_write_files_of_their_own_and_together_are_the_whole(whole, options, tmp_path):
    file, few = tmp_path / "real.json", replace(options, methods=(FULL, "random", "bm25"))
    rows = [row for row in whole[0].rows if row.method in few.methods]
    for part in (1, 2):
        own = run(replace(few, shard=(part, 2)), file=file, console=QUIET)
        assert 0 < len(own.rows) < len(rows)
    shards = [shard_file(file, (part, 2)) for part in (1, 2)]
    assert sorted(tmp_path.glob("*.json")) == shards and shards[0].name == "real.1-of-2.json"
    together = merge(shards, file=file, console=QUIET)
    assert together.rows == rows and file.with_suffix(".md").read_text() == page(together)


def test_nothing_is_begun_after_the_limit(options, tmp_path):
    with pytest.raises(RequestError, match="Nothing could be asked"):
        run(replace(options, limit=0), file=tmp_path / "real.json", console=QUIET)


def test_what_cannot_be_asked_is_left_out_with_a_reason(options, tmp_path, caplog):
    asked = replace(options, methods=(FULL, "default", "bm25"), rates=(60.0,), only=("people",), questions=1)
    assert {row.method for row in run(asked, console=QUIET).rows} == {FULL}
    assert "default at 60x is left out: The budget is" in caplog.text
    assert "are not more than the" in caplog.text
    missing = Options(Path("x"), ("pocket",)).missing()
    assert "no --peers was given" in missing["kvzip"]
    assert {name for name in NAMES if "dense" in name} <= missing.keys() or find_spec(
        "sentence_transformers"
    ) is not None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"methods": ("magic",)}, "no method 'magic'; use full context"),
        ({"rates": (0.5,)}, "The rate is 0.5"),
        ({"shard": (3, 2)}, "The shard is 3/2"),
        ({"models": ()}, "No model was given"),
        ({"only": ("nothing",)}, "no corpus whose name begins with nothing"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, changed, message):
    with pytest.raises(RequestError, match=message):
        run(replace(options, **changed), console=QUIET)


def test_passages_are_searched_once_for_each_question(corpora):
    corpus = read_corpus(corpora / "people", "people")
    case = Case("pocket", LoadedModel.get("pocket"), corpus, Means())
    query = corpus.questions[0].text
    first = case._finder("bm25")(query)
    assert first and case._finder("bm25")(query) is first
    case.close()


@pytest.mark.slow
def test_all_studies_of_a_corpus_practise_on_the_same(corpora, caplog):
    """The pocket model; three minutes of one core."""
    corpus = read_corpus(corpora / "people", "people")
    case = Case("pocket", LoadedModel.get("pocket"), corpus, Means())
    with caplog.at_level("INFO", "cribsheet.study"):
        for rate in (4.0, 8.0):
            assert case.answers(replace(BY_NAME["study"], minutes=1.5), rate, [0])
    case.close()
    told = [record.message for record in caplog.records]
    assert sum(message.endswith("questions after round 1") for message in told) == 1
    assert sum("held out is" in message for message in told) >= 2


def test_the_uniform_sheet_that_studies_is_one_that_other_engines_read(corpora, tmp_path):
    case = Case("pocket", LoadedModel.get("pocket"), read_corpus(corpora / "people", "people"), Means())
    rows = case.answers(replace(BY_NAME["study-uniform"], minutes=0.0), 3.0, [0])
    asked = case._last[1].sheet
    assert asked.length == asked.tokens == rows[0].tokens and asked.tokens % 16 == 0
    assert asked.tokens <= len(case.whole) / 3 < asked.tokens + 16
    assert asked.export(tmp_path / "people.vllm", to="vllm").stat().st_size > asked.nbytes
    case.close()


def test_an_example_s_answer_given_for_the_document_s_is_told(corpora):
    corpus = read_corpus(corpora / "people", "people")
    case = Case("pocket", LoadedModel.get("pocket"), corpus, Means())
    leak = corpus.task.examples[0][1]
    rows = [case._row("default", 8.0, 0, text, (1, 1)) for text in (f"{leak}.\nMore", corpus.questions[0].golds[0])]
    assert [row.leaked for row in rows] == [True, False]
    case.close()


def test_kvzip_is_asked_in_another_interpreter_with_our_prompt(corpora, caplog):
    corpus = read_corpus(corpora / "people", "people")
    case = Case("pocket", LoadedModel.get("pocket"), corpus, Means(peers=Path(sys.executable)))
    assert case.kvzip([(4.0, [0, 1])]) == []
    assert "kvzip at 4x failed: ModuleNotFoundError: No module named 'kvpress'" in caplog.text
    with pytest.raises(CribsheetError, match="There is no python"):
        Case("pocket", case.model, corpus, Means(peers=Path("/none"))).kvzip([(4.0, [0])])


# What is claimed


def answers(method, scores, *, rate=8.0, group="a/4000", cases=1):
    """Rows of one method, question by question over so many cases."""
    rate = 1.0 if method in (FULL, CLOSED) else rate
    return [
        Row("m", f"{group}/{n % cases}", method, rate, n, "q", 0, score, float(score >= 1), False, 100, 1024, "", "x")
        for n, score in enumerate(scores)
    ]


def test_differences_are_of_the_questions_that_both_were_asked():
    view = View([*answers("default", [1, 1, 0, 1, 1, 1]), *answers("random", [0, 1, 0, 0])])
    found = view.difference(("default", 8.0), ("random", 8.0), ["a/4000"])
    assert (found.points, found.n) == (50, 4) and found.low <= 50 <= found.high
    assert view.difference(("default", 8.0), ("finch", 8.0), ["a/4000"]) is None
    assert view.difference(("default", 8.0), ("default", 8.0), ["a/4000"]) is None
    assert view.difference(("default", 8.0), ("random", 8.0), ["b"]) is None


def test_intervals_pair_questions_and_are_drawn_by_case_where_there_are_many():
    hard = [n % 5 == 0 for n in range(100)]  # that every method fails on: pairing takes it out
    mine, theirs = ([0.0 if h else s for h in hard] for s in (0.9, 0.8))
    view = View([*answers("default", mine), *answers("random", theirs)])
    found = view.difference(("default", 8.0), ("random", 8.0), ["a/4000"])
    assert found.points == pytest.approx(8) and 0 < found.high - found.low < 4 and found.is_beyond
    gains = [float(n % 20 < 10) for n in range(200)]  # all questions of a case alike
    apart = View([*answers("default", gains), *answers("random", [0] * 200)])
    together = View([*answers("default", gains, cases=20), *answers("random", [0] * 200, cases=20)])
    narrow, wide = (each.difference(("default", 8.0), ("random", 8.0), ["a/4000"]) for each in (apart, together))
    assert narrow.points == wide.points == 50 and wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_retained_counts_what_full_context_answers_only():
    rows = [*answers(FULL, [1, 1, 0, 0]), *answers("default", [1, 0, 1, 1])]
    assert View(rows).retained("default", 8.0, ["a/4000"]) == (50, 2)
    assert View(answers("default", [1])).retained("default", 8.0, ["a/4000"]) is None


def test_nothing_is_claimed_where_full_context_is_near_the_floor():
    good = [*answers(FULL, [1] * 8), *answers(CLOSED, [0] * 8), *answers("default", [1] * 6 + [0] * 2)]
    poor = [*answers(FULL, [1, 0] * 4, group="b"), *answers(CLOSED, [0, 1] * 4, group="b")]
    poor += answers("default", [1] * 8, group="b")
    half = answers("default", [1], group="c")
    result = result_of(Result({"seed": 0}, {"m": {"weights": "w", "device": "cpu"}}, [*good, *poor, *half]))
    shown = page(result)
    assert "| a/4000 | 8 | 100.0 | 0.0 | **+100.0 [100.0, 100.0]** |" in shown
    assert "| b | 8 | 50.0 | 50.0 | +0.0 [" in shown
    assert "nothing is claimed: b. Full context is not better there" in shown
    assert "Not asked both with full context and without documents, so nothing is claimed: c." in shown
    (line,) = (each for each in shown.splitlines() if each.startswith("| default |"))
    assert line.startswith("| default | 75.0 | 8 | **-25.0 [") or line.startswith("| default | 75.0 | 8 | -25.0 [")
    assert "| 75 % of 8 | 100 | 1 | 0 % | 0.0 % |" in line
    only_poor = page(Result({}, {}, poor))
    assert "### 8×" not in only_poor and "nothing is claimed: b." in only_poor


def test_groups_stand_in_the_order_of_their_lengths_and_methods_in_ours():
    rows = [row for group in ("a/16000", "a/4000", "people") for method in ("random", "default", CLOSED, FULL)
            for row in answers(method, [float(method != CLOSED)] * 6, group=group)]  # fmt: skip
    shown = page(result_of(Result({}, {}, rows)))
    view = View(rows)
    assert view.groups == ["a/4000", "a/16000", "people"] and view.methods(8.0) == [FULL, CLOSED, "default", "random"]
    assert "|  | full context | closed book | default | random |" in shown and "− random" in shown


def test_results_of_several_machines_are_one_unless_models_differ():
    one = Result({"torch": "1", "seed": 0}, {"m": {"weights": "w"}}, answers("default", [1]))
    other = Result({"torch": "2", "seed": 0}, {"n": {"weights": "v"}}, answers("default", [0], group="b"))
    assert merged([one, other]).setup == {"torch": "1 and 2", "seed": 0}
    assert len(merged([one, other]).rows) == 2 and set(merged([one, other]).models) == {"m", "n"}
    card, processor = ({"m": {"weights": "w", "dtype": "bfloat16", "device": name}} for name in ("H200", "cpu"))
    both = merged([replace(one, models=card), replace(other, models=processor)])
    assert both.models == {"m": {"weights": "w", "dtype": "bfloat16", "device": "H200 and cpu"}}
    assert "m (w, bfloat16, H200 and cpu)" in page(both)
    again = merged([both, replace(other, models=processor)])
    assert again.models == both.models and again.setup == both.setup
    with pytest.raises(RequestError, match="Two models are called 'm'"):
        merged([one, replace(other, models={"m": {"weights": "v"}})])


# The command line


def test_the_command_line_asks_and_joins_shards(corpora, whole, tmp_path, capsys):
    out = tmp_path / "out.json"
    command = ["bench", "real", str(corpora), "--model", "pocket", "--method", "default", "--method", FULL]
    command += ["--method", CLOSED, "--rate", "2", "--cases", "1", "--asking", "2", "--json", str(out)]
    for part in ("1/2", "2/2"):
        assert cli([*command, "--shard", part]) == 0
    assert cli(["bench", "real-page", *map(str, sorted(tmp_path.glob("out.*.json"))), "--json", str(out)]) == 0
    assert "pocket" in capsys.readouterr().out
    own = [row for row in whole[0].rows if row.method in ("default", FULL, CLOSED) and row.case != "worlds/700/1"]
    assert read_result(out).rows == own and out.with_suffix(".md").read_text().startswith("# Real models")


def test_the_command_line_says_what_is_wrong(corpora, tmp_path, capsys):
    for words, message in (
        ([str(corpora), "--shard", "1"], "--shard '1' is no part of a whole"),
        ([str(corpora), "--method", "magic"], "no method 'magic'"),
        ([str(tmp_path)], "holds no corpora"),
    ):
        assert cli(["bench", "real", *words, "--model", "pocket"]) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")
    (tmp_path / "bad.json").write_text("{]")
    for name in ("bad.json", "none.json"):
        assert cli(["bench", "real-page", str(tmp_path / name)]) == 2
        assert "holds no result of `cribsheet bench real`" in capsys.readouterr().err
