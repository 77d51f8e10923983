"""Mode recall, as users ask for it: what stands before the question, what is told of it, and what may go wrong."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT, QUESTION

from cribsheet import CompressedKnowledgeLLM, Document, Task
from cribsheet.cli import run
from cribsheet.engine import prefill
from cribsheet.errors import EngineError, RequestError, SheetError
from cribsheet.prompt.turns import as_turns
from cribsheet.recall import placing
from cribsheet.recall.placing import Recalled
from cribsheet.recall.stretches import Stretch, mark, named
from cribsheet.retrieval.passages import with_passages
from cribsheet.retrieval.retriever import Passage
from cribsheet.testing import save_tiny_model, tiny_backbone

HUGO = DOCUMENTS[3].text
FOUND = [Passage(HUGO, "hugo", 0, len(HUGO)), Passage(DOCUMENTS[0].text[:20], "alice", 0, 20)]


@pytest.fixture(scope="module")
def kb(tiny):
    return CompressedKnowledgeLLM.build(
        DOCUMENTS, FEW_SHOT, model=tiny, rate=3, guide="dropped", archive="float32", scorer="task"
    )


@pytest.fixture(scope="module")
def resident(tiny):
    return CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=tiny, rate=1.5, guide="resident", archive="float32")


def finds(*passages):
    return lambda query: list(passages)


def weights(answer):
    return [each.weight for each in answer.sources]


@pytest.mark.parametrize("which", ["kb", "resident"])
def test_stretches_stand_between_the_documents_and_the_question_and_nothing_of_them_is_read(which, request):
    kb = request.getfixturevalue(which)
    answer = kb.ask(QUESTION, max_tokens=9, mode="recall", retriever=finds(*FOUND))
    recalled = sum(
        stop - first for first, stop in (kb.sheet.archive.places(3, 0, len(HUGO)), kb.sheet.archive.places(0, 0, 20))
    )
    assert answer.mode == "recall" and answer.text != kb.ask(QUESTION, max_tokens=9).text
    assert answer.usage.cached_tokens == kb.sheet.length + recalled  # the guide is not read again either
    assert answer.usage.prompt_tokens == answer.usage.cached_tokens + kb.count_tokens(QUESTION)
    assert [(each.document_id, each.start, each.stop, each.text) for each in answer.passages] == [
        ("alice", 0, 20, DOCUMENTS[0].text[:20]), ("hugo", 0, len(HUGO), HUGO)  # in reading order
    ]  # fmt: skip


@pytest.mark.parametrize("guide", ["dropped", "resident"])
def test_they_change_the_answer_as_tokens_at_these_positions_do(tiny, guide):
    """By hand: the documents, what is in the archive, and the guide, keys turned to where they stand; the question."""
    kb = CompressedKnowledgeLLM.build(
        DOCUMENTS, FEW_SHOT, model=tiny, rate=1.5, guide=guide, archive="float32", scorer="task", dtype="float32"
    )
    whole = kb.ask(QUESTION, max_tokens=6, mode="recall", retriever=finds(FOUND[0]), logprobs=0)
    first, stop = kb.sheet.archive.places(3, 0, len(HUGO))
    end, layers = kb.prefix.tokens - kb.sheet.manifest.guide_tokens, []
    for prefix, (keys, values), inv_freq in zip(
        kb.prefix.layers, kb.sheet.archive.stretch(first, stop), kb.backbone.inv_freqs, strict=True
    ):
        turned = torch.stack([_turned(keys[:, n], end + n, inv_freq) for n in range(stop - first)], 1)
        moved = [_turned(prefix.keys[:, n], stop - first, inv_freq) for n in range(end, kb.prefix.tokens)]
        keys = [prefix.keys[:, :end], turned, *(each.unsqueeze(1) for each in moved)]
        layers.append((torch.cat(keys, 1), torch.cat([prefix.values[:, :end], values, prefix.values[:, end:]], 1)))
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys.unsqueeze(0), values.unsqueeze(0), number)
    ids, start, said = kb.question_tokens(QUESTION), kb.prefix.tokens + stop - first, []
    with torch.no_grad():
        for _ in range(6):
            positions = torch.arange(start, start + len(ids)).unsqueeze(0)
            given = kb.backbone.cached(cache)
            logits = kb.backbone.model(input_ids=ids.unsqueeze(0), position_ids=positions, use_cache=True, **given)
            start, logprobs = start + len(ids), logits.logits[0, -1].log_softmax(-1)
            ids = logprobs.argmax().unsqueeze(0)
            said.append(float(logprobs.max()))
    assert [each.logprob for each in whole.logprobs] == pytest.approx(said, abs=1e-3)


def _turned(keys, position, inv_freq):
    half = len(inv_freq)
    cos, sin = (position * inv_freq).cos(), (position * inv_freq).sin()
    a, b = keys[..., :half], keys[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@pytest.mark.parametrize("shift", [1, -3])
def test_a_wrong_rotation_would_be_seen(kb, monkeypatch, shift):
    settings = {"max_tokens": 4, "mode": "recall", "retriever": finds(FOUND[0]), "logprobs": 0}
    right = kb.ask(QUESTION, **settings)
    turn = placing.rotate
    monkeypatch.setattr(placing, "rotate", lambda keys, positions, freq: turn(keys, positions + shift, freq))
    wrong = kb.ask(QUESTION, **settings)
    assert abs(right.logprobs[0].logprob - wrong.logprobs[0].logprob) > 1e-3


def test_nothing_recalled_is_the_sheet_s_own_answer(kb, caplog):
    plain = kb.ask(QUESTION, max_tokens=9, logprobs=0)
    with caplog.at_level(logging.WARNING, "cribsheet"):
        for found in ((), (Passage("Bob moved to Bergen.", "news"),)):
            answer = kb.ask(QUESTION, max_tokens=9, logprobs=0, mode="recall", retriever=finds(*found))
            assert (answer.text, answer.logprobs, answer.mode, answer.passages) == (
                plain.text, plain.logprobs, "sheet", ()
            )  # fmt: skip
    assert "1 of 1 retrieved passages are not in the sheet's documents" in caplog.text
    kb.ask(QUESTION, max_tokens=1, mode="recall", retriever=finds(*FOUND), passage_tokens=2)
    assert "2 tokens hold none" in caplog.text


@pytest.mark.parametrize("which", ["kb", "resident"])
def test_what_was_recalled_is_a_source_beside_the_sheet_s_documents(which, request):
    kb = request.getfixturevalue(which)
    answer = kb.ask(QUESTION, max_tokens=5, mode="recall", retriever=finds(*FOUND))
    told = [each for each in answer.sources if each.retrieved]
    assert {(each.document_id, each.start, each.stop, each.text) for each in told} == {
        (each.document_id, each.start, each.stop, each.text) for each in answer.passages
    }
    assert sum(not each.retrieved for each in answer.sources) == 3
    assert weights(answer) == sorted(weights(answer), reverse=True) and min(weights(answer)) > 0
    assert sum(weights(answer)) <= 1 + 1e-6
    again = kb.sources(QUESTION, answer)
    assert {each.text for each in again if each.retrieved} == {each.text for each in told}
    assert kb.ask(QUESTION, max_tokens=5, mode="recall", retriever=finds(*FOUND), evidence=False).sources == ()


def test_sources_found_by_reading_again_are_those_of_the_answer():
    """Of a form, so that the answer's text has the tokens that were written."""
    kb = CompressedKnowledgeLLM.build(
        DOCUMENTS, FEW_SHOT, model=tiny_backbone(), rate=2, guide="resident", archive="float32"
    )
    answer = kb.ask(QUESTION, mode="recall", retriever=finds(*FOUND), choices=["Quito"])
    again = {(each.document_id, each.retrieved): each.weight for each in kb.sources(QUESTION, answer, limit=9)}
    for each in answer.sources:
        assert again[each.document_id, each.retrieved] == pytest.approx(each.weight, abs=0.01)


@pytest.mark.parametrize("retriever", ["bm25", "sheet"])
def test_streamed_equals_whole_async_equals_sync_and_many_share_one_search(kb, retriever):
    settings = {"max_tokens": 10, "mode": "recall", "retriever": retriever, "passage_tokens": 40}
    whole = kb.ask(QUESTION, **settings)
    assert whole.mode == "recall"
    with kb.stream(QUESTION, **settings) as stream:
        assert "".join(stream) == whole.text
    later = asyncio.run(kb.aask(QUESTION, **settings))
    for answer in (stream.answer, later, *kb.ask_many(QUESTION, 2, **settings)):
        assert (answer.text, answer.mode, answer.passages) == (whole.text, whole.mode, whole.passages)
        assert weights(answer) == pytest.approx(weights(whole), abs=1e-4)
    assert len({answer.text for answer in kb.ask_many(QUESTION, 4, temperature=1.0, seed=3, **settings)}) > 1


def test_a_question_that_is_read_in_several_pieces_is_read_as_in_one(kb, monkeypatch):
    settings = {"max_tokens": 5, "mode": "recall", "retriever": finds(*FOUND), "logprobs": 0}
    whole = kb.ask(QUESTION, **settings)
    monkeypatch.setattr(prefill, "PIECE", 8)
    pieces = kb.ask(QUESTION, **settings)
    assert pieces.text == whole.text and weights(pieces) == pytest.approx(weights(whole), abs=1e-4)
    assert [each.logprob for each in pieces.logprobs] == pytest.approx(
        [each.logprob for each in whole.logprobs], abs=1e-4
    )


@pytest.fixture(scope="module")
def town():
    """A hundred people, of whom each has a number that stands nowhere else."""
    people = [Document(f"Person number {n} has the key {n * 7919 % 100003}.", f"p{n}") for n in range(100)]
    return CompressedKnowledgeLLM.build(
        people, Task("Who has which key?"), model=tiny_backbone(max_position_embeddings=8192), rate=20,
        guide="dropped", archive="float32", scorer="task",
    )  # fmt: skip


def test_a_hundred_at_once_get_what_is_theirs_and_as_if_each_were_alone(town):
    questions = [f"Which key has person number {n}?" for n in range(100)]
    asked = {
        question: {"max_tokens": 6, "mode": "recall", "logprobs": 0, "passage_tokens": 40 + n % 30,
                   "retriever": finds(Passage(town.sheet.texts[n], f"p{n}", 0)),
                   "evidence": n % 3 > 0}
        for n, question in enumerate(questions)
    }  # fmt: skip
    alone = {question: town.ask(question, **settings) for question, settings in asked.items()}
    town.desk.max_bytes = town.desk.nbytes // 3  # what is let go meanwhile is fetched again
    with ThreadPoolExecutor(100) as pool:
        both = dict(
            zip(questions, pool.map(lambda question: town.ask(question, **asked[question]), questions), strict=True)
        )
    for n, question in enumerate(questions):
        one, other = alone[question], both[question]
        assert (other.mode, [each.document_id for each in other.passages]) == ("recall", [f"p{n}"])
        assert str(n * 7919 % 100003) in other.passages[0].text
        assert other.text == one.text and other.usage == one.usage
        assert [x.logprob for x in other.logprobs] == pytest.approx([x.logprob for x in one.logprobs], abs=1e-3)
    assert len({round(answer.logprobs[0].logprob, 3) for answer in both.values()}) > 50  # nobody's are another one's
    assert town.desk.nbytes <= town.desk.max_bytes


def test_concurrent_questions_share_what_lies_on_the_desk(town):
    town.desk.max_bytes = 2**30
    settings = {"max_tokens": 2, "mode": "recall", "retriever": finds(Passage(town.sheet.texts[5], "p5", 0))}
    town.ask("Who?", **settings)
    hits, reads = town.desk.hits, town.desk.reads
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: town.ask("Who?", **settings), range(8)))
    assert town.desk.reads == reads and town.desk.hits >= hits + 8


# ---- what points to it


def test_the_sheet_itself_points_to_what_its_question_looks_at(kb):
    answer = kb.ask(QUESTION, max_tokens=4, retriever="sheet", top_k=2)  # which means recall
    assert answer.mode == "recall" and 0 < len(answer.passages) <= 2
    one = kb.ask(QUESTION, max_tokens=4, mode="recall", retriever="sheet", top_k=1)
    (most,) = one.passages
    looked = kb.passages(QUESTION, limit=1, characters=10**6)[0]
    per_document = kb.sources(QUESTION, "", limit=1)[0]
    assert most.document_id in (looked.document_id, per_document.document_id)


def test_the_sheet_points_without_texts_too_and_a_search_without_them_is_refused(kb, tmp_path):
    bare = CompressedKnowledgeLLM.load(kb.save(tmp_path / "bare.sheet", texts=False), model=kb.backbone)
    settings = {"max_tokens": 6, "mode": "recall", "passage_tokens": 64, "top_k": 1}
    answer, same = (each.ask(QUESTION, retriever="sheet", **settings) for each in (bare, kb))
    assert answer.text == same.text and answer.passages[0].text == "" and same.passages[0].text
    assert [each.start for each in answer.passages] == [each.start for each in same.passages]
    with pytest.raises(RequestError, match="saved without its documents' texts"):
        bare.ask(QUESTION, **settings)


def test_marks_in_a_prompt_say_what_is_recalled_and_nothing_is_searched(kb):
    def search(query):
        raise AssertionError(query)

    entries = kb.sheet.manifest.documents
    prompt = f"Context:\n(Read.) {mark(entries[3], 0, len(HUGO))}\n\n{QUESTION}"
    answer = kb.ask(prompt, max_tokens=6, mode="recall", retriever=search)
    assert [(each.document_id, each.text) for each in answer.passages] == [("hugo", HUGO)]
    turns = [{"role": "user", "content": f"{mark(entries[0], 0, 20)} Who?"}, {"role": "assistant", "content": "Ann."},
             {"role": "user", "content": f"{mark(entries[1], 0, 20)} Where?"}]  # fmt: skip
    assert [each.document_id for each in kb.ask(turns, max_tokens=1, mode="recall").passages] == ["bob"]
    later = [*turns[:2], {"role": "user", "content": QUESTION}]  # marks of an earlier turn are no answer to this one
    found = kb.ask(later, max_tokens=1, mode="recall", retriever=lambda query: [HUGO]).passages
    assert [each.document_id for each in found] == ["hugo"]
    assert kb.ask(prompt, max_tokens=1).mode == "sheet"


def test_a_mark_names_the_same_document_whatever_goes_before_it_and_none_once_it_is_gone():
    with CompressedKnowledgeLLM.build(
        DOCUMENTS, FEW_SHOT, model=tiny_backbone(), rate=2, mode="independent", archive=True
    ) as living:
        first, second = living.sheet.manifest.documents[:2]
        assert named(living.sheet, mark(second, 0, 9)) == [Stretch(1, 0, 9)]
        living.remove(first.id)
        assert named(living.sheet, mark(second, 0, 9)) == [Stretch(0, 0, 9)]
        assert named(living.sheet, mark(first, 0, 9)) == []


def test_passages_that_are_in_the_question_already_are_not_recalled(kb, caplog):
    asked = with_passages(as_turns(QUESTION), FOUND)
    with caplog.at_level(logging.WARNING, "cribsheet"):
        assert kb.ask(asked, max_tokens=3, mode="recall").mode == "sheet"
    assert "leave out one of them" in caplog.text


# ---- what all modes keep


def test_a_form_holds_and_a_conversation_searches_for_its_last_question(kb):
    assert kb.ask(QUESTION, mode="recall", choices=["Oslo", "Rome"]).text in ("Oslo", "Rome")
    queries = []
    conversation = kb.conversation()
    for question in ("Where does Bob live?", "And Clara?"):
        conversation.ask(question, max_tokens=4, mode="recall", retriever=lambda query: queries.append(query) or FOUND)
    assert queries == ["Where does Bob live?", "And Clara?"]
    assert all("recall" not in turn["content"] for turn in conversation.messages)


@pytest.mark.parametrize("guide", ["resident", "dropped"])
def test_sheet_stretches_guide_question_and_answer_fill_the_window_and_no_more(guide):
    small = tiny_backbone(max_position_embeddings=400)
    many = [Document(f"Bob moved to house number {number}.", f"n{number}") for number in range(30)]
    kb = CompressedKnowledgeLLM.build(
        many, FEW_SHOT, model=small, rate=5, guide=guide, scorer="task", archive="float32", chunk_tokens=100
    )
    found = [Passage(each.text, each.id, 0) for each in many]
    answer = kb.ask(QUESTION, max_tokens=30, mode="recall", retriever=finds(*found), passage_tokens=4000)
    assert 400 - 12 < answer.usage.total_tokens <= 400 and answer.usage.completion_tokens == 30
    assert 1 < len(answer.passages) < 30


def test_where_layers_have_windows_stretches_stand_behind_the_guide(caplog):
    gemma = CompressedKnowledgeLLM.build(
        DOCUMENTS, FEW_SHOT, model=tiny_backbone("gemma2"), rate=1.5, guide="resident", archive="float32"
    )
    answer = gemma.ask(QUESTION, max_tokens=6, mode="recall", retriever=finds(*FOUND))
    recalled = answer.usage.cached_tokens - gemma.sheet.length
    assert answer.mode == "recall" and recalled > 10
    assert answer.usage.prompt_tokens == gemma.sheet.length + recalled + gemma.count_tokens(QUESTION)


def test_a_slow_archive_does_not_block_the_event_loop_and_a_cancelled_question_ends(kb, monkeypatch):
    kb.desk.max_bytes, threads = 0, set()
    layers = kb.sheet.archive.layers

    def slow(first, stop):
        threads.add(threading.current_thread())
        time.sleep(0.5)
        return layers(first, stop)

    monkeypatch.setattr(kb.sheet.archive, "layers", slow)
    settings = {"max_tokens": 3, "mode": "recall", "retriever": finds(*FOUND)}

    async def both():
        ticks, task = 0, asyncio.ensure_future(kb.aask(QUESTION, **settings))
        while not task.done():
            await asyncio.sleep(0.005)
            ticks += 1
        return ticks

    assert asyncio.run(both()) > 10 and threading.main_thread() not in threads

    async def leave():
        stream = kb.astream(QUESTION, **{**settings, "max_tokens": 3000})
        await stream.aclose()
        async for _ in stream:
            pass
        return stream.answer.finish_reason

    assert asyncio.run(leave()) == "cancelled"
    with pytest.raises(EngineError, match="timeout"):
        kb.ask(QUESTION, **{**settings, "max_tokens": 3000}, timeout=0.1)
    kb.desk.max_bytes = 2**30


@pytest.mark.parametrize("retriever", ["bm25", "sheet"])
def test_time_that_is_up_is_told_whatever_points(kb, retriever):
    with pytest.raises(EngineError, match="timeout"):
        kb.ask(QUESTION, mode="recall", retriever=retriever, max_tokens=3000, timeout=0.001)


# ---- what may go wrong


def test_a_sheet_without_an_archive_says_how_to_build_one_or_answers_alone(tiny, caplog):
    bare = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=tiny, rate=3, guide="dropped")
    for asked in (lambda: bare.ask(QUESTION, mode="recall"), lambda: bare.prepare(QUESTION, mode="recall")):
        with pytest.raises(RequestError, match=re.escape("build(..., archive=True)")):
            asked()
    with caplog.at_level(logging.WARNING, "cribsheet"):
        answer = bare.ask(QUESTION, mode="recall", retriever="sheet", no_archive="sheet", max_tokens=5)
    assert (answer.mode, answer.text) == ("sheet", bare.ask(QUESTION, max_tokens=5).text)
    assert "the sheet alone is asked" in caplog.text


@pytest.mark.parametrize("trouble", ["missing", "cut", "damaged"])
def test_an_archive_that_cannot_be_read_is_told_or_the_sheet_answers_alone(kb, tmp_path, trouble, caplog):
    saved = kb.save(tmp_path / "staff.sheet")
    path = Path(shutil.copytree(tmp_path, tmp_path / "served")) / saved.name  # of its own: what is saved may be linked
    (beside,) = [each for each in path.parent.iterdir() if each != path]
    if trouble == "missing":
        beside.unlink()
    served = CompressedKnowledgeLLM.load(path, model=kb.backbone)
    if trouble == "cut":  # while it is served
        with beside.open("r+b") as file:
            file.truncate(beside.stat().st_size // 2)
    elif trouble == "damaged":
        data = bytearray(beside.read_bytes())
        data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
        beside.write_bytes(data)
    settings = {"max_tokens": 5, "mode": "recall", "retriever": finds(*FOUND)}
    with pytest.raises(SheetError, match="archive"):
        served.ask(QUESTION, **settings)
    with pytest.raises(SheetError, match="archive"):
        asyncio.run(served.aask(QUESTION, **settings))
    caplog.clear()
    with caplog.at_level(logging.WARNING, "cribsheet"):
        answer = served.ask(QUESTION, no_archive="sheet", **settings)
    assert (answer.mode, answer.text) == ("sheet", served.ask(QUESTION, max_tokens=5).text)
    assert caplog.text.count("the sheet alone is asked") == 1


def test_what_goes_wrong_in_a_retriever_reaches_the_one_who_asked_whatever_is_chosen(kb):
    def broken(query):
        raise SheetError("another one's")

    with pytest.raises(SheetError, match="another one's"):
        kb.ask(QUESTION, mode="recall", retriever=broken, no_archive="sheet")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "hybrid", "retriever": "sheet"}, "points to what is recalled, and the mode is 'hybrid'"),
        ({"mode": "recall", "no_archive": "guess"}, "no_archive is 'guess'; use one of error, sheet"),
        ({"no_archive": "sheet"}, "no_archive is about passages"),
        ({"mode": "recall", "retriever": "bm26"}, "use 'bm25', 'dense', 'sheet'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(kb, settings, message):
    with pytest.raises(RequestError, match=message):
        kb.ask(QUESTION, **settings)


def test_a_sheet_that_is_closed_lets_go_of_its_desk(kb):
    other = CompressedKnowledgeLLM(kb.backbone, replace(kb.sheet))
    other.ask(QUESTION, max_tokens=1, mode="recall", retriever=finds(*FOUND))
    assert other.session._desk.nbytes > 0
    other.close()
    assert other.session._desk is None
    with pytest.raises(EngineError, match="closed"):
        other.ask(QUESTION, max_tokens=1, mode="recall", retriever=finds(*FOUND))
    assert other.session._desk is None


def test_the_bound_of_a_desk_outlives_a_change_of_documents(tiny):
    kb = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=tiny, rate=3, mode="independent", archive=True)
    kb.desk.max_bytes = 12345
    assert kb.remove("bob").desk.max_bytes == 12345


def test_recall_finds_what_the_sheet_has_lost():
    staff = [Document(f"Person {name} keeps {animal}s in house {n}.", f"doc{n}")
             for n, (name, animal) in enumerate([("Ana", "goat"), ("Bo", "duck"), ("Cy", "parrot"), ("Di", "turtle"),
                                                 ("Ed", "rabbit"), ("Flo", "horse"), ("Gus", "snake")])]  # fmt: skip
    kb = CompressedKnowledgeLLM.build(staff, Task("Who keeps what?"), rate=6, scorer="recent", archive=True)
    assert "turtle" not in kb.ask("What does Person Di keep?", max_tokens=8).text
    assert "turtle" in kb.ask("What does Person Di keep?", max_tokens=8, mode="recall", top_k=1).text


def test_the_command_line_recalls_and_says_what(tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model")
    options = {"rate": 3, "guide": "dropped", "scorer": "task"}
    kept = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=model, archive=True, **options)
    bare = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=model, **options)
    sheets = [str(kb.save(tmp_path / f"{name}.sheet")) for name, kb in (("kept", kept), ("bare", bare))]
    asking = [["ask", sheet, QUESTION, "--max-tokens", "3", "--mode", "recall"] for sheet in sheets]
    assert run([*asking[0], "--top-k", "1", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["mode"] == "recall" and [each["document_id"] for each in data["passages"]] == ["hugo"]
    assert run([*asking[0], "--retriever", "sheet", "--top-k", "1", "--sources"]) == 0
    assert "  retrieved  " in capsys.readouterr().out
    assert run(asking[1]) == 2
    assert "--archive" in capsys.readouterr().err
    assert run([*asking[1], "--no-archive", "sheet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mode"] == "sheet"


def test_documents_that_come_and_go_are_recalled_or_not(tiny):
    kb = CompressedKnowledgeLLM.build(
        DOCUMENTS, FEW_SHOT, model=tiny, rate=1.5, guide="resident", mode="independent", archive="float32"
    )
    eve = Document("Eve Lund lives in Turin, where she was born and where she works.", "eve")
    settings = {"max_tokens": 3, "mode": "recall", "top_k": 1}
    before = kb.desk
    kb.extend([eve])
    answer = kb.ask("Where does Eve Lund live?", **settings)
    assert answer.mode == "recall" and [each.text for each in answer.passages] == [eve.text]
    assert kb.desk is not before
    kb.remove("eve")
    assert "eve" not in [each.document_id for each in kb.ask("Where does Eve Lund live?", **settings).passages]
    gone = kb.ask("Where?", max_tokens=3, mode="recall", retriever=finds(Passage(eve.text, "eve", 0)))
    assert gone.mode == "sheet"


def test_asking_again_and_again_holds_no_more_than_before(town):
    town.desk.max_bytes = 2**20
    settings = {"max_tokens": 2, "mode": "recall", "retriever": "bm25", "passage_tokens": 60}
    for n in range(30):
        town.ask(f"Which key has person number {n * 3}?", **settings)
        assert town.desk.nbytes <= 2**20
    end = time.monotonic() + 10
    while (held := _recalled()) and time.monotonic() < end:  # the engine's step may not be over when its answer is
        time.sleep(0.01)
    assert held == 0  # answers keep nothing of what was recalled for them


def _recalled():
    """How many that were recalled are held by anybody."""
    gc.collect()
    return sum(type(each) is Recalled for each in gc.get_objects())
