"""Sheet and retrieval together: a sheet knows the whole corpus roughly, a retriever knows a passage exactly.

Modes:

    sheet       the sheet alone
    retrieval   passages alone, where the documents would stand, within the tokens of sheet and passages together
    hybrid      passages after the sheet's documents, as further documents, before the guide and the question
    auto        the sheet's own answer if it is certain that passages add nothing to it, else hybrid
    recall      stretches of the documents from the sheet's archive, as they were read when it was built, where `hybrid`
                has passages: nothing is read but the question

`auto` asks the sheet first, searches, and measures the draft (`asking/certainty.py`): it stands if the best passages
tell it, as they would say the same again; or if it is probable, and was read elsewhere than where the question looks,
so that a search for the question would not find it.

`recall` fetches what a search finds, or what the sheet itself points to: the question is read over it once, to see
where it looks.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from cribsheet.asking.answer import Answer
from cribsheet.asking.certainty import FAITHFUL, Judged, judge, told
from cribsheet.asking.prepared import Lookup, Prepared
from cribsheet.asking.session import Session
from cribsheet.asking.settings import Retrieval
from cribsheet.asking.sources import find_sources, pointed
from cribsheet.asking.streams import AnswerStream, AsyncAnswerStream, Stream, Trace
from cribsheet.engine.request import tell
from cribsheet.errors import RequestError, SheetError
from cribsheet.prompt.template import Message
from cribsheet.prompt.turns import as_turns
from cribsheet.recall.stretches import Stretch, as_passages, choose_stretches, located, named
from cribsheet.retrieval.passages import choose, is_told_already, query_of, says
from cribsheet.retrieval.retriever import Passage, Search

logger = logging.getLogger(__name__)

_BOTH = "the chain and the sheet both have a retriever; leave out one of them"
_POINTED = 3  # stretches that a sheet points to: among so many stood the answer (decisions/0030), and more mislead
_ANSWER_TOKENS = 256  # kept free for an answer that may be longer than the window leaves anyway


class Draft(NamedTuple):
    """A step that waits for the sheet's own answer; `trace` finds its sources, by default as in all answers."""

    session: Session
    question: Prepared
    trace: Trace | None = None

    def now(self) -> Answer:
        """The answer, blocking."""
        stream = AnswerStream(self.question)
        submit(self.session, stream, trace=self.trace)
        for _ in stream:
            pass
        return stream.answer

    async def later(self) -> Answer:
        """The answer, without blocking the event loop."""
        stream = AsyncAnswerStream(self.question, asyncio.get_running_loop())
        await asyncio.to_thread(partial(submit, self.session, stream, trace=self.trace))
        async for _ in stream:
            pass
        return stream.answer


class Fetch(NamedTuple):
    """A step that waits for a retriever."""

    search: Search
    query: str

    def now(self) -> list[Passage]:
        """Passages, blocking."""
        return self.search.fetch(self.query)

    async def later(self) -> list[Passage]:
        """Passages, without blocking the event loop."""
        return await self.search.afetch(self.query)


Steps = Generator[Draft | Fetch, Any, None]  # is sent what it waits for


def begin(session: Session, asked: Sequence[Prepared]) -> list[AnswerStream]:
    """One question's answers, from now on being written.

    Blocks while passages are searched and, in `auto`, while the draft is written; raises whatever goes wrong.
    """
    for question in asked:
        question.claim()
    streams = [AnswerStream(question) for question in asked]
    if asked[0].lookup is None:
        submit(session, *streams)
        return streams
    steps = _steps(session, streams, asked[0].lookup)
    wait = _go_on(steps)
    while wait is not None:
        wait = _go_on(steps, wait.now())
    return streams


def begin_later(
    session: Session, asked: Sequence[Prepared], loop: asyncio.AbstractEventLoop | None
) -> list[AsyncAnswerStream]:
    """`begin` without blocking the event loop, the running one or `loop` for callers from other threads.

    What goes wrong later is raised by the streams.
    """
    for question in asked:
        question.claim()
    reading, lookup = loop or asyncio.get_running_loop(), asked[0].lookup
    streams = [AsyncAnswerStream(question, reading) for question in asked]
    if lookup is not None:
        # a caller in another thread may be busy for a while; the event loop has few threads
        is_told = _is_told(session, lookup) if loop else None
        beginning = _begun(streams, _steps(session, streams, lookup, is_told))
        work = asyncio.run_coroutine_threadsafe(beginning, loop) if loop else asyncio.create_task(beginning)
        for stream in streams:
            stream.work = work
    elif loop is not None or session.is_placed:
        submit(session, *streams)
    else:
        reading.run_in_executor(None, _submit_later, session, streams)
    return streams


def submit(session: Session, *streams: Stream, trace: Trace | None = None) -> None:
    """Hand one question's streams to the engine. Raises `EngineError` if it takes no more, or once it is closed.

    `trace` finds sources in what was looked at, by default as all answers have them.
    """
    question = streams[0].question
    prefix = session.prefix_for(question.passages, alone=question.alone)
    trace = trace or partial(find_sources, session.sheet, passages=question.passages, places=question.told.places)
    requests = [stream.request(prefix, trace) for stream in streams]
    session.running.add(streams)
    session.loaded.engine.submit(*requests)


def answers_of(streams: Sequence[AnswerStream]) -> list[Answer]:
    """The answers of streams, once they are there; one that fails, or an interrupt, ends the others too."""
    try:
        for stream in streams:
            for _ in stream:
                pass
    finally:
        for stream in streams:
            stream.close()
    return [stream.answer for stream in streams]


async def answers_later(streams: Sequence[AsyncAnswerStream]) -> list[Answer]:
    """`answers_of` without blocking the event loop."""
    try:
        for stream in streams:
            async for _ in stream:
                pass
    finally:
        for stream in streams:
            await stream.aclose()
    return [stream.answer for stream in streams]


def _submit_later(session: Session, streams: Sequence[Stream]) -> None:
    try:
        submit(session, *streams)
    except Exception as error:
        _fail(streams, error)


async def _begun(streams: Sequence[Stream], steps: Steps) -> None:
    """Go through the steps, each in a thread; what goes wrong is raised by the streams."""
    try:
        wait = await asyncio.to_thread(_go_on, steps)
        while wait is not None:
            wait = await asyncio.to_thread(_go_on, steps, await wait.later())
    except Exception as error:
        _fail(streams, error)


def _fail(streams: Sequence[Stream], error: Exception) -> None:
    for stream in streams:
        tell(stream, error)


def _go_on(steps: Steps, value: Any = None) -> Draft | Fetch | None:
    """What the next step waits for, given what the last one did; none after the last."""
    try:
        return steps.send(value)
    except StopIteration:
        return None


def _steps(session: Session, streams: Sequence[Stream], lookup: Lookup, is_told: bool | None = None) -> Steps:
    """Have one question's streams answered with passages, whether its caller can wait or not.

    `is_told` says whether the question holds passages already, once somebody has looked.
    """
    turns, retrieval = as_turns(lookup.question), lookup.retrieval
    if _is_told(session, lookup) if is_told is None else is_told:
        return submit(session, *streams)  # the caller's chain has a retriever of its own; nothing is fetched twice
    if retrieval.mode == "recall":
        return (yield from _recall(session, streams, lookup))
    draft: Answer | None = None
    judged: Judged | None = None
    if retrieval.mode == "auto":
        question = _draft(session, streams[0], lookup)
        draft = yield Draft(session, question)
    passages: list[Passage] = []
    if not retrieval.takes_all:
        passages = yield Fetch(session.search(retrieval.retriever), query_of(turns))
    if draft is not None:
        judged = _judge(session, streams, draft, lookup, passages)
        if judged is None:
            return _take(session, streams, draft)
    _tell(session, streams, lookup, turns, passages, judged)


def _is_told(session: Session, lookup: Lookup) -> bool:
    """Whether a question holds passages already; warns if it does."""
    is_told = is_told_already(as_turns(lookup.question), session.known)
    if is_told:
        logger.warning("the question holds passages already, so nothing is retrieved again: %s", _BOTH)
    return is_told


def _draft(session: Session, stream: Stream, lookup: Lookup) -> Prepared:
    """The stream's question with log-probabilities, calls as text; cancelling the stream cancels it too."""
    question = session.prepare_told(lookup.question, lookup.sampling)
    params = replace(question.params, logprobs=question.params.logprobs or 0)
    return replace(
        question, params=params, toolbox=None, cancelled=stream.question.cancelled, asked=stream.question.asked
    )


def _judge(
    session: Session, streams: Sequence[Stream], draft: Answer, lookup: Lookup, passages: Sequence[Passage]
) -> Judged | None:
    """What a draft looks like that does not stand; none if it does. Its streams report how certain it is.

    One that the passages tell is not measured any further, as that reads it twice more. Of a sheet that keeps little,
    drafts pick wrong words of the right passages, so that they are measured always.
    """
    retrieval, judged, certainty = lookup.retrieval, None, 0.0
    if session.sheet.rate <= FAITHFUL:
        certainty = told(query_of(as_turns(lookup.question)), draft, passages[: retrieval.top_k])
    if retrieval.takes_all or not retrieval.takes(certainty):
        judged = judge(session, streams[0].question.told.ids, draft)
        certainty = max(certainty, judged.certainty)
    for stream in streams:
        stream.certainty = certainty
    return None if retrieval.takes(certainty) else judged


def _take(session: Session, streams: Sequence[Stream], draft: Answer) -> None:
    """Let the draft be the answer; of several answers each is written anew."""
    if len(streams) > 1:
        return submit(session, *streams)
    streams[0].take_over(draft)


def _tell(
    session: Session,
    streams: Sequence[Stream],
    lookup: Lookup,
    turns: Sequence[Message],
    found: Sequence[Passage],
    judged: Judged | None,
) -> None:
    """Put passages that were found into the question and hand it to the engine.

    Passages stand alone too where the sheet's draft was `judged` to be of something that it has lost, if their share of
    a hybrid holds not even the first of them whole: then the sheet only takes the room.
    """
    alone = lookup.retrieval.mode == "retrieval"
    tokens, chosen = _chosen(session, streams[0].question, lookup, turns, found, alone=alone)
    if judged and judged.is_lost(lookup.retrieval.sure) and is_cut(found, chosen):
        without = _chosen(session, streams[0].question, lookup, turns, found, alone=True)
        if without[1]:  # nothing if the question says it all
            alone, (tokens, chosen) = True, without
    if any(says(turns, passage) for passage in found):
        logger.warning("the question holds what was retrieved, which is not told again: %s", _BOTH)
    elif found and not chosen:
        logger.warning("of %d retrieved passages none is told: all are said already, or %d tokens hold none of them",
                       len(found), tokens)  # fmt: skip
    question = session.prepare_told(turns, lookup.sampling, chosen, alone=alone)  # once for all answers
    for stream in streams:
        stream.ask_instead(question)
    submit(session, *streams)


def _chosen(
    session: Session,
    question: Prepared,
    lookup: Lookup,
    turns: Sequence[Message],
    found: Sequence[Passage],
    *,
    alone: bool,
) -> tuple[int, list[Passage]]:
    """How many tokens there are for passages beside the sheet, or `alone`, and those that fill them."""
    made, retrieval = session.sheet.manifest, lookup.retrieval
    asked, longest = len(question.told.ids), min(question.params.max_tokens, _ANSWER_TOKENS)
    tokens, fixed = retrieval.passage_tokens, made.head_tokens + made.guide_tokens
    if alone:
        tokens = min(tokens + session.sheet.tokens - fixed, session.backbone.window - fixed - asked - longest)
    else:
        tokens = min(tokens, session.room - asked - longest)
    order, encoder = [document.id for document in made.documents], session.layout.encoder
    heading = session.tells_in_turn and not alone
    return tokens, choose(found, turns, order, encoder, tokens=tokens, top_k=retrieval.top_k, heading=heading)


def _recall(session: Session, streams: Sequence[Stream], lookup: Lookup) -> Steps:
    """Have one question answered behind stretches that are fetched; where that cannot be, by choice without them."""
    retrieval = lookup.retrieval
    try:
        _ = session.desk
    except (RequestError, SheetError) as error:
        _give_up(retrieval, error)
        return submit(session, *streams)
    turns = as_turns(lookup.question)
    said = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    now = [turn for number, turn in enumerate(turns) if number > max(said, default=-1) or turn["role"] == "system"]
    places = [place for turn in reversed(now) for place in named(session.sheet, str(turn["content"]))]
    if not places:  # which a retriever of the chain may have named
        if retrieval.points:
            trace = partial(pointed, session.sheet, limit=retrieval.top_k or _POINTED)
            draft = yield Draft(session, _pointing(session, streams[0], lookup), trace)
            found = [Passage(each.text, each.document_id, each.start, each.stop) for each in draft.sources]
        else:
            found = yield Fetch(session.search(retrieval.retriever), query_of(turns))
        places = _located(session, found)
    try:
        question = _recalled(session, streams[0].question, lookup, places)
    except SheetError as error:
        _give_up(retrieval, error)
        question = None
    if question is not None:
        for stream in streams:
            stream.ask_instead(question)
    submit(session, *streams)


def _give_up(retrieval: Retrieval, error: Exception) -> None:
    """Raise what is wrong with the archive, unless the sheet alone will do."""
    if retrieval.no_archive == "error":
        raise error
    logger.warning("nothing is recalled, and the sheet alone is asked: %s", error)


def _pointing(session: Session, stream: Stream, lookup: Lookup) -> Prepared:
    """The stream's question, to be read and hardly answered: what counts is where it looks."""
    settings = {"max_tokens": 1, "evidence": True, "timeout": lookup.sampling.get("timeout")}
    question = session.prepare_told(lookup.question, settings)
    return replace(question, cancelled=stream.question.cancelled, asked=stream.question.asked)


def _located(session: Session, found: Sequence[Passage]) -> list[Stretch]:
    """Where passages stand in the sheet's documents; tells of those that are not in them."""
    places = [place for each in found if (place := located(session.sheet, lambda: session.known, each))]
    if len(places) < len(found):
        logger.warning("%d of %d retrieved passages are not in the sheet's documents and cannot be recalled; the mode "
                       "'hybrid' tells any passages", len(found) - len(places), len(found))  # fmt: skip
    return places


def _recalled(session: Session, question: Prepared, lookup: Lookup, places: Sequence[Stretch]) -> Prepared | None:
    """The question behind those of the stretches that fit; none if there are none."""
    sheet, retrieval = session.sheet, lookup.retrieval
    longest = min(question.params.max_tokens, _ANSWER_TOKENS)
    tokens = min(retrieval.passage_tokens, session.room - len(question.told.ids) - longest)
    chosen = choose_stretches(session.desk.archive, places, sheet.texts, tokens=tokens, top_k=retrieval.top_k)
    if not chosen:
        if places:
            logger.warning("of %d stretches none is recalled: %d tokens hold none of them", len(places), tokens)
        return None
    recalled = session.recall([(each.first, each.last) for each in chosen])
    return session.prepare_told(
        as_turns(lookup.question), lookup.sampling, as_passages(sheet, chosen), recalled=recalled
    )


def is_cut(found: Sequence[Passage], chosen: Sequence[Passage]) -> bool:
    """Whether passages that were found are told, but not even the first of them whole."""
    return bool(found) and len(chosen) < 2 and found[0].text not in [each.text for each in chosen]
