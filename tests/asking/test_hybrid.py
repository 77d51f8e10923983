"""Sheet and retrieval together, as users ask for them: modes, budgets, streams, async, and who retrieves."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT, QUESTION

from cribsheet import CompressedKnowledgeLLM, Document, Task
from cribsheet.asking import modes
from cribsheet.asking.certainty import judge
from cribsheet.cli import run
from cribsheet.engine import prefill
from cribsheet.errors import EngineError, RequestError
from cribsheet.living.segments import assemble, cut
from cribsheet.retrieval.passages import with_passages
from cribsheet.retrieval.retriever import Passage
from cribsheet.testing import echo_backbone, save_tiny_model, tiny_backbone

NEWS = [
    Passage("Bob moved to Bergen in May, and nobody was told of it.", "news"),
    Passage("Clara stayed where she was.", "news"),
]


@pytest.fixture(scope="module")
def kb():
    return CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=tiny_backbone(), rate=3, guide="dropped")


@pytest.fixture(scope="module")
def resident(kb):
    return CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=kb.backbone, rate=1.5, guide="resident")


class Retriever:
    def __init__(self, found=NEWS, wait=0.0):
        self.found, self.wait, self.queries, self.threads = found, wait, [], set()

    def retrieve(self, query):
        time.sleep(self.wait)
        self.queries.append(query)
        self.threads.add(threading.current_thread())
        return self.found


def whole(documents, backbone):
    """A sheet that keeps everything of the documents."""
    return CompressedKnowledgeLLM.build(documents, FEW_SHOT, model=backbone, rate=1, guide="dropped")


def with_guide(kb):
    """The same with its guide, for which no budget would have room."""
    guide = kb.session.layout.encoder.after(kb.session.layout.guide(FEW_SHOT).resident, continues=True)
    return CompressedKnowledgeLLM(
        kb.backbone, assemble(kb.backbone, kb.sheet.manifest, *cut(kb.backbone, kb.sheet), guide)
    )


@pytest.mark.parametrize("guide", ["resident", "dropped"])
def test_passages_are_read_as_documents_that_stand_after_the_sheet_s(kb, guide):
    documents = [Document(each.text, f"news {number}") for number, each in enumerate(NEWS)]
    few, all_of_them = whole(DOCUMENTS, kb.backbone), whole([*DOCUMENTS, *documents], kb.backbone)
    if guide == "resident":
        few, all_of_them = with_guide(few), with_guide(all_of_them)
    retriever, settings = Retriever(), {"max_tokens": 12, "logprobs": 0}
    answer, same = few.ask(QUESTION, retriever=retriever, **settings), all_of_them.ask(QUESTION, **settings)
    assert answer.text == same.text != few.ask(QUESTION, **settings).text
    told, known = ([each.logprob for each in one.logprobs] for one in (answer, same))
    assert told == pytest.approx(known, abs=1e-3)
    assert (answer.mode, answer.passages) == ("hybrid", tuple(NEWS))
    assert retriever.queries == [QUESTION]
    assert answer.usage.prompt_tokens == same.usage.prompt_tokens
    assert answer.usage.cached_tokens == few.sheet.length - few.sheet.manifest.guide_tokens


@pytest.mark.parametrize("scorer", ["task", "recall"])  # all heads keep equally many tokens, or not
def test_questions_with_passages_share_one_prefix_without_the_guide(kb, scorer):
    resident = CompressedKnowledgeLLM.build(
        DOCUMENTS, FEW_SHOT, model=kb.backbone, rate=1.5, guide="resident", scorer=scorer, mode="independent"
    )
    resident.sources(QUESTION, resident.ask(QUESTION, max_tokens=2, mode="retrieval", retriever=Retriever()))
    assert resident.session._unguided is None  # passages alone need none of it
    prefix, guide = resident.session.prefix_for(NEWS), resident.sheet.manifest.guide_tokens
    assert resident.session.prefix_for(NEWS[:1]) is prefix is not resident.prefix and guide > 0
    for shorter, layer in zip(prefix.layers, resident.prefix.layers, strict=True):
        for own, kept in zip(shorter.each, layer.each, strict=True):
            assert all(torch.equal(one, other[:-guide]) for one, other in zip(own, kept, strict=True))
        assert bool(shorter.counts) or shorter.keys.data_ptr() == layer.keys.data_ptr()
    assert resident.session.prefix_for(()) is resident.prefix
    resident.extend([Document("Eve Lund lives in Turin, where she was born and where she works.", "eve")])
    longer = resident.session.prefix_for(NEWS)
    assert longer.tokens == resident.sheet.length - resident.sheet.manifest.guide_tokens > prefix.tokens
    resident.close()
    assert resident.session._unguided is None
    assert kb.session.prefix_for(NEWS) is kb.prefix  # nothing is to be taken off


def test_where_layers_have_windows_passages_stand_behind_the_guide_in_the_question_s_turn():
    gemma = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=tiny_backbone("gemma2"), rate=1.5, guide="resident")
    answer = gemma.ask(QUESTION, max_tokens=12, retriever=Retriever())
    told = gemma.ask(with_passages([{"role": "user", "content": QUESTION}], NEWS), max_tokens=12)
    assert answer.text == told.text != gemma.ask(QUESTION, max_tokens=12).text
    assert (answer.mode, answer.passages, told.mode, told.passages) == ("hybrid", tuple(NEWS), "sheet", ())
    assert answer.usage == told.usage and answer.usage.cached_tokens == gemma.sheet.length
    dropped = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=gemma.backbone, rate=3, guide="dropped")
    assert not dropped.session.tells_in_turn and dropped.session.render(QUESTION, passages=NEWS).lead > 0


@pytest.mark.parametrize("guide", ["resident", "dropped"])
def test_sheet_passages_guide_question_and_answer_fill_the_window_and_no_more(guide):
    small = tiny_backbone(max_position_embeddings=400)
    kb = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=small, rate=1.5, guide=guide, scorer="task")
    long = [Passage(f"Bob moved to house number {number}.") for number in range(80)]
    settings = {"max_tokens": 30, "retriever": Retriever(long), "passage_tokens": 4000}
    answer = kb.ask(QUESTION, **settings)
    assert 400 - 12 < answer.usage.total_tokens <= 400 and answer.usage.completion_tokens == 30
    assert 3 < len(answer.passages) < 80
    assert {each.text for each in answer.sources if each.retrieved} == {each.text for each in answer.passages}


def test_the_built_in_retriever_searches_the_sheet_s_own_documents_and_is_made_once(kb):
    answer = kb.ask(QUESTION, max_tokens=3, retriever="bm25", top_k=2)
    assert 0 < len(answer.passages) <= 2
    texts = {document.id: document.text for document in kb.sheet.documents}
    assert all(texts[each.document_id][each.start : each.stop] == each.text for each in answer.passages)
    assert kb.bm25 is kb.bm25
    assert kb.ask(QUESTION, max_tokens=3, mode="hybrid", top_k=2).passages == answer.passages


@pytest.mark.parametrize("tokens", [12, 30, 60])
def test_passages_keep_within_their_tokens(kb, tokens):
    alone = kb.count_tokens(QUESTION)
    answer = kb.ask(QUESTION, max_tokens=1, retriever="bm25", passage_tokens=tokens)
    assert answer.usage.prompt_tokens - kb.sheet.length - alone <= tokens
    assert answer.usage.cached_tokens == kb.sheet.length


@pytest.mark.parametrize("which", ["kb", "resident"])
def test_retrieval_alone_reads_passages_as_documents_within_the_tokens_of_both(which, request):
    kb = request.getfixturevalue(which)
    answer = kb.ask(QUESTION, max_tokens=8, mode="retrieval", passage_tokens=20)
    assert answer.mode == "retrieval" and answer.passages and answer.usage.cached_tokens == 0
    assert answer.usage.prompt_tokens <= kb.sheet.tokens + 20 + kb.count_tokens(QUESTION)
    documents = [Document(each.text, f"p{n}") for n, each in enumerate(answer.passages)]
    guide = kb.sheet.manifest.guide
    same = CompressedKnowledgeLLM.build(documents, FEW_SHOT, model=kb.backbone, rate=1, guide="dropped")
    if guide == "dropped":  # a sheet that keeps everything of these passages answers the same
        assert same.ask(QUESTION, max_tokens=8).text == answer.text
    assert answer.usage.prompt_tokens == same.sheet.tokens + kb.sheet.manifest.guide_tokens + kb.count_tokens(QUESTION)


@pytest.mark.parametrize("mode", ["hybrid", "retrieval"])
def test_passages_that_were_told_are_sources_beside_the_sheet_s_documents(kb, mode):
    answer = kb.ask(QUESTION, max_tokens=5, mode=mode, retriever=Retriever())
    told = [each for each in answer.sources if each.retrieved]
    assert {(each.document_id, each.text) for each in told} == {(each.document_id, each.text) for each in NEWS}
    kept = [each for each in answer.sources if not each.retrieved]
    assert len(kept) == (3 if mode == "hybrid" else 0) and not {each.document_id for each in kept} & {"news"}
    weights = [each.weight for each in answer.sources]
    assert weights == sorted(weights, reverse=True) and min(weights) > 0 and sum(weights) <= 1 + 1e-6
    again = kb.sources(QUESTION, answer, limit=9)  # reads question and answer once more
    assert {each.text for each in again if each.retrieved} == {each.text for each in told}
    assert sum(not each.retrieved for each in again) == (len(kb.sheet.documents) if mode == "hybrid" else 0)
    assert kb.ask(QUESTION, max_tokens=5, mode=mode, retriever=Retriever(), evidence=False).sources == ()


def test_what_a_retriever_knows_of_a_passage_stays_with_it(kb):
    found = {"text": NEWS[0].text, "metadata": {"source": "news", "page": 7}}
    answer = kb.ask(QUESTION, max_tokens=2, retriever=lambda query: [(found, 0.5)])
    (told,) = [each for each in answer.sources if each.retrieved]
    assert told.document_id == "news" and told.metadata == answer.passages[0].metadata == found["metadata"]


def test_a_passage_that_is_looked_up_in_the_sheet_has_its_place_there(kb):
    text = next(document.text for document in kb.sheet.documents if document.id == "hugo")
    foreign, own = Passage("Nobody knows of it.", "elsewhere"), Passage(text[10:60].strip(), "hugo")
    answer = kb.ask(QUESTION, max_tokens=2, retriever=lambda query: [foreign, own])
    places = {each.document_id: (each.start, each.stop) for each in answer.sources if each.retrieved}
    assert places["elsewhere"] == (0, len(foreign.text))
    assert text[slice(*places["hugo"])] == own.text and places["hugo"][0] > 0


@pytest.mark.parametrize("mode", ["hybrid", "retrieval"])
def test_a_passage_that_is_read_in_several_pieces_is_traced(kb, mode, monkeypatch):
    long = [Passage("Hugo went to Lima. " * 40, "long"), Passage("Bob stayed.", "short")]
    settings = {"max_tokens": 3, "mode": mode, "passage_tokens": 2000, "retriever": Retriever(long)}
    whole = kb.ask(QUESTION, **settings)
    monkeypatch.setattr(prefill, "PIECE", 64)
    pieces = kb.ask(QUESTION, **settings)
    assert pieces.text == whole.text and {"long", "short"} <= {each.document_id for each in pieces.sources}
    assert [each.weight for each in pieces.sources] == pytest.approx([each.weight for each in whole.sources], abs=2e-3)


def test_everybody_s_passages_are_traced_also_in_one_batch_and_after_long_questions(kb, monkeypatch):
    found = {name: [Passage(f"{name} moved on.", name)] for name in ("Ada", "Bo", "Cleo")}
    asked = {name: {"max_tokens": 9, "retriever": Retriever(found[name])} for name in found}
    alone = {name: kb.ask(f"{name}?", **settings) for name, settings in asked.items()}
    streams = {name: kb.stream(f"{name}?", **settings) for name, settings in asked.items()}
    monkeypatch.setattr(prefill, "PIECE", 16)
    streams["long"] = kb.stream("Ada?", **asked["Ada"])
    for name, stream in streams.items():
        text, known = "".join(stream), alone.get(name, alone["Ada"])
        assert text == known.text
        assert [each.document_id for each in stream.answer.sources] == [each.document_id for each in known.sources]
        weights = [each.weight for each in known.sources]
        assert [each.weight for each in stream.answer.sources] == pytest.approx(weights, abs=2e-3)


def test_nothing_found_means_the_sheet_alone_answers(kb):
    answer = kb.ask(QUESTION, max_tokens=9, retriever=lambda query: [])
    assert answer.text == kb.ask(QUESTION, max_tokens=9).text and answer.passages == () and answer.mode == "sheet"


def test_mode_sheet_never_retrieves(kb):
    retriever = Retriever()
    assert kb.ask(QUESTION, max_tokens=5, retriever=retriever, mode="sheet", top_k=4).mode == "sheet"
    assert retriever.queries == []


def test_auto_takes_a_certain_draft_and_retrieves_for_any_other(kb):
    retriever = Retriever()
    answer = kb.ask(QUESTION, max_tokens=6, mode="auto", retriever=retriever, sure=1.0)
    assert (answer.mode, len(retriever.queries)) == ("hybrid", 1)
    assert answer.text == kb.ask(QUESTION, max_tokens=6, retriever=Retriever()).text
    plain = kb.ask(QUESTION, max_tokens=6, logprobs=1)
    seen = judge(kb.session, kb.question_tokens(QUESTION), plain)
    assert answer.certainty == seen.certainty == 0 < seen.probability  # noise looks everywhere alike
    for logprobs in (None, 1):
        answer = kb.ask(QUESTION, max_tokens=6, mode="auto", retriever=retriever, sure=0.0, logprobs=logprobs)
        assert (answer.text, answer.mode, answer.finish_reason, answer.usage) == (
            plain.text, "sheet", "length", plain.usage
        )  # fmt: skip
        assert answer.logprobs == (plain.logprobs if logprobs else None)
    assert len(retriever.queries) == 1
    assert plain.certainty is None


def test_an_answer_that_needs_no_documents_is_never_certain():
    parrot = CompressedKnowledgeLLM.build(DOCUMENTS, "Who?", model=echo_backbone("No idea."), rate=2, scorer="task")
    answer = parrot.ask(QUESTION, mode="auto", retriever=Retriever(), sure=0.01)
    assert (answer.text, answer.mode, answer.certainty) == ("No idea.", "hybrid", 0)
    assert parrot.ask(QUESTION, mode="auto", sure=0.0).mode == "sheet"


def test_passages_in_the_question_are_not_fetched_again_and_the_user_is_told(kb, caplog):
    retriever = Retriever()
    asked = with_passages([{"role": "user", "content": QUESTION}], NEWS)
    with caplog.at_level(logging.WARNING, "cribsheet"):
        answer = kb.ask(asked, max_tokens=9, retriever=retriever)
    assert retriever.queries == [] and "leave out one of them" in caplog.text
    assert answer.text == kb.ask(asked, max_tokens=9).text and answer.mode == "sheet"


def test_what_a_chain_s_own_retriever_found_elsewhere_is_not_told_twice_and_the_user_is_told(kb, caplog):
    retriever = Retriever()
    asked = [{"role": "system", "content": f"Answer from the context.\n\n{NEWS[0].text}"},
             {"role": "user", "content": QUESTION}]  # fmt: skip
    with caplog.at_level(logging.WARNING, "cribsheet"):
        answer = kb.ask(asked, max_tokens=9, retriever=retriever)
    assert answer.passages == (NEWS[1],) and "leave out one of them" in caplog.text


def test_what_was_told_is_looked_for_in_the_caller_s_thread_and_in_texts_prepared_once(kb, monkeypatch):
    threads, look, prepared = [], modes.is_told_already, []

    def looking(turns, known):
        threads.append(threading.current_thread().name)
        prepared.append(known)
        return look(turns, known)

    monkeypatch.setattr(modes, "is_told_already", looking)

    async def ask():
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, "desk") as desk:  # as the server's lanes
            begun = desk.submit(lambda: kb.astream_many(QUESTION, 2, loop=loop, mode="hybrid", max_tokens=2))
            for stream in await asyncio.wrap_future(begun):
                async for _ in stream:
                    pass

    asyncio.run(ask())
    assert threads == ["desk_0"]
    kb.ask(QUESTION, mode="auto", max_tokens=2)
    assert prepared[0] is prepared[1] is kb.session.known


def test_streamed_equals_whole_and_async_equals_sync(kb):
    settings = {"max_tokens": 10, "retriever": Retriever(), "passage_tokens": 40}
    for mode in ("hybrid", "retrieval", "auto"):
        whole = kb.ask(QUESTION, mode=mode, **settings)
        with kb.stream(QUESTION, mode=mode, **settings) as stream:
            assert "".join(stream) == whole.text
        assert (stream.answer.mode, stream.answer.passages) == (whole.mode, whole.passages)
        later = asyncio.run(kb.aask(QUESTION, mode=mode, **settings))
        assert (later.text, later.mode, later.passages) == (whole.text, whole.mode, whole.passages)


def test_many_answers_share_one_search(kb):
    retriever = Retriever()
    answers = kb.ask_many(QUESTION, 3, max_tokens=8, temperature=1.0, seed=3, retriever=retriever)
    assert len(retriever.queries) == 1 and all(answer.mode == "hybrid" for answer in answers)
    assert answers[0].text == kb.ask(QUESTION, max_tokens=8, temperature=1.0, seed=3, retriever=retriever).text
    assert len({answer.text for answer in answers}) > 1
    settings = {"max_tokens": 8, "temperature": 1.0, "seed": 3, "retriever": retriever}
    retriever.queries.clear()
    assert [each.text for each in asyncio.run(kb.aask_many(QUESTION, 3, **settings))] == [each.text for each in answers]

    async def streamed():
        streams = kb.astream_many(QUESTION, 3, **settings)
        return ["".join([piece async for piece in stream]) for stream in streams]

    assert asyncio.run(streamed()) == [each.text for each in answers]
    assert len(retriever.queries) == 2
    drafted = kb.ask_many(QUESTION, 2, max_tokens=8, mode="auto", sure=0.0, regex="[a-z]{4}")
    assert [answer.mode for answer in drafted] == ["sheet"] * 2 and all(len(answer.text) == 4 for answer in drafted)


@pytest.mark.parametrize("found", ["Bob moved on.", {"text": "Bob moved on."}, iter(["Bob moved on."])])
def test_one_text_and_any_iterable_are_as_good_as_a_list(kb, found):
    assert [each.text for each in kb.ask(QUESTION, max_tokens=1, retriever=lambda query: found).passages] == [
        "Bob moved on."
    ]


def test_a_passage_with_half_a_character_is_told_without_it(kb):
    answer = kb.ask(QUESTION, max_tokens=1, retriever=lambda query: ["Bob \ud800 moved on to the north."])
    assert answer.passages[0].text == "Bob \ufffd moved on to the north."


def test_a_slow_retriever_does_not_block_the_event_loop(kb):
    retriever = Retriever(wait=0.2)

    async def both():
        ticks, task = 0, asyncio.gather(*(kb.aask(QUESTION, max_tokens=2, retriever=retriever) for _ in range(3)))
        while not task.done():
            await asyncio.sleep(0.005)
            ticks += 1
        return ticks

    assert asyncio.run(both()) > 10
    assert threading.main_thread() not in retriever.threads


def test_what_goes_wrong_in_a_retriever_reaches_the_one_who_asked(kb):
    def broken(query):
        raise LookupError("the index is gone")

    with pytest.raises(LookupError, match="the index is gone"):
        kb.ask(QUESTION, retriever=broken)
    with pytest.raises(LookupError, match="the index is gone"):
        asyncio.run(kb.aask(QUESTION, retriever=broken))


def test_a_cancelled_question_ends_although_its_retriever_is_slow(kb):
    async def leave():
        stream = kb.astream(QUESTION, max_tokens=3000, retriever=Retriever(wait=0.1))
        await stream.aclose()
        async for _ in stream:
            pass
        return stream.answer.finish_reason

    assert asyncio.run(leave()) == "cancelled"
    with pytest.raises(EngineError, match="timeout"):
        kb.ask(QUESTION, max_tokens=3000, retriever=Retriever(wait=0.05), timeout=0.01)


def test_a_form_holds_in_every_mode(kb):
    for mode in ("hybrid", "retrieval", "auto"):
        assert kb.ask(QUESTION, mode=mode, choices=["Oslo", "Rome"], sure=1.0).text in ("Oslo", "Rome")


def test_a_conversation_searches_for_its_last_question(kb):
    retriever = Retriever()
    conversation = kb.conversation()
    conversation.ask("Where does Bob live?", max_tokens=4, retriever=retriever)
    conversation.ask("And Clara?", max_tokens=4, retriever=retriever)
    assert retriever.queries == ["Where does Bob live?", "And Clara?"]
    assert all("Passages:" not in turn["content"] for turn in conversation.messages)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "hybird"}, "The mode is 'hybird'; use one of sheet, retrieval, hybrid, auto"),
        ({"retriever": "bm26"}, "no built-in retriever 'bm26'; use 'bm25'"),
        ({"retriever": object()}, r"neither retrieve\(\) nor invoke\(\)"),
        ({"retriever": "bm25", "top_k": 0}, "top_k is 0"),
        ({"mode": "hybrid", "passage_tokens": 1.5}, "passage_tokens is 1.5"),
        ({"mode": "auto", "sure": 2}, "sure is 2"),
        ({"passage_tokens": 100}, "passage_tokens is about passages; pass a retriever or a mode"),
    ],
)
def test_settings_that_make_no_sense_are_refused(kb, settings, message):
    with pytest.raises(RequestError, match=message):
        kb.ask(QUESTION, **settings)


def test_a_sheet_without_texts_needs_a_retriever_of_its_own(kb, tmp_path):
    path = kb.save(tmp_path / "bare.sheet", texts=False)
    bare = CompressedKnowledgeLLM.load(path, model=kb.backbone)
    with pytest.raises(RequestError, match="saved without its documents' texts"):
        bare.ask(QUESTION, mode="hybrid")
    assert bare.ask(QUESTION, max_tokens=3, retriever=Retriever()).mode == "hybrid"


def test_retrieval_finds_what_the_sheet_has_lost():
    staff = [Document(f"Person {name} keeps {animal}s in house {n}.", f"doc{n}")
             for n, (name, animal) in enumerate([("Ana", "goat"), ("Bo", "duck"), ("Cy", "parrot"), ("Di", "turtle"),
                                                 ("Ed", "rabbit"), ("Flo", "horse"), ("Gus", "snake")])]  # fmt: skip
    kb = CompressedKnowledgeLLM.build(staff, Task("Who keeps what?"), rate=6, scorer="recent")
    assert "turtle" not in kb.ask("What does Person Di keep?", max_tokens=8).text
    for mode in ("retrieval", "hybrid"):
        answer = kb.ask("What does Person Di keep?", max_tokens=8, mode=mode, passage_tokens=40)
        assert "turtle" in answer.text and "doc3" in {each.document_id for each in answer.passages}


def test_the_command_line_retrieves_and_says_what_was_told(tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model")
    kb = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=model, rate=3, guide="dropped", scorer="task")
    sheet = str(kb.save(tmp_path / "staff.sheet"))
    asking = ["ask", sheet, QUESTION, "--max-tokens", "3"]
    assert run([*asking, "--retriever", "bm25", "--top-k", "1", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["mode"] == "hybrid" and [each["document_id"] for each in data["passages"]] == ["hugo"]
    assert run([*asking, "--mode", "retrieval", "--passage-tokens", "9", "--sources"]) == 0
    assert re.search(r"^100%  hugo \[0:\d+\]  retrieved  Hugo Ali", capsys.readouterr().out, re.M)
    assert run([*asking, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mode"] == "sheet"
    assert run([*asking, "--passage-tokens", "9"]) == 2
    assert "pass a retriever or a mode" in capsys.readouterr().err
