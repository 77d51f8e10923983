"""Sheet and retrieval together: a sheet knows the whole corpus roughly, a retriever knows a passage exactly.

Modes:

    sheet       the sheet alone
    retrieval   passages alone, where the documents would stand, within the tokens of sheet and passages together
    hybrid      passages after the sheet's documents, as further documents, before the guide and the question
    auto        the sheet's own answer if it is certain that passages add nothing to it, else hybrid

`auto` asks the sheet first, searches, and measures the draft (`asking/certainty.py`): it stands if the best passages
tell it, as they would say the same again; or if it is probable, and was read elsewhere than where the question looks,
so that a search for the question would not find it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from cribsheet.asking.answer import Answer
from cribsheet.asking.certainty import Judged, judge, told
from cribsheet.asking.streams import AnswerStream, AsyncAnswerStream, Stream
from cribsheet.engine.request import Delta, Finished, Request, tell
from cribsheet.errors import RequestError
from cribsheet.prompt.template import Message
from cribsheet.prompt.turns import Question, as_turns
from cribsheet.retrieval.dense import require_dense
from cribsheet.retrieval.passages import choose, is_told_already, query_of, says
from cribsheet.retrieval.retriever import Passage, Search, as_retriever
from cribsheet.vocabulary import Mode

if TYPE_CHECKING:
    from cribsheet.llm import CompressedKnowledgeLLM

logger = logging.getLogger(__name__)


BUILT_IN = ("bm25", "dense")  # each a property of the LLM; the first is the default
PASSAGE_TOKENS = 512
SURE = 0.7  # decisions/0018 and 0026 have the measurements behind this
SETTINGS = ("retriever", "mode", "passage_tokens", "sure")
_BOTH = "the chain and the sheet both have a retriever; leave out one of them"
_ANSWER_TOKENS = 256  # kept free for an answer that may be longer than the window leaves anyway


@dataclass(frozen=True, slots=True)
class Retrieval:
    """How passages help with a question: settings that were checked.

    `top_k` bounds how many passages are told, `passage_tokens` how many tokens they take, gaps included.
    `sure` is how certain `auto` must be, 0 to 1, that passages add nothing to a draft: 0 takes every draft, 1 none.
    """

    mode: Mode
    retriever: Any = BUILT_IN[0]
    top_k: int | None = None
    passage_tokens: int = PASSAGE_TOKENS
    sure: float = SURE

    def __post_init__(self) -> None:
        """Refuse settings that make no sense, with `RequestError`."""
        if self.mode not in get_args(Mode):
            raise RequestError(f"The mode is {self.mode!r}; use one of {', '.join(get_args(Mode))}.")
        for name, value in (("top_k", self.top_k), ("passage_tokens", self.passage_tokens)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise RequestError(f"{name} is {value!r}; use a whole number of at least 1.")
        if isinstance(self.sure, bool) or not isinstance(self.sure, int | float) or not 0 <= self.sure <= 1:
            raise RequestError(f"sure is {self.sure!r}; give a probability from 0 to 1.")
        if isinstance(self.retriever, str) and self.retriever not in BUILT_IN:
            names = ", ".join(map(repr, BUILT_IN))
            raise RequestError(f"There is no built-in retriever {self.retriever!r}; use {names}, or pass your own.")
        if self.retriever == "dense":
            require_dense()

    @classmethod
    def taken_from(cls, settings: Mapping[str, Any]) -> tuple[Retrieval | None, dict[str, Any]]:
        """The retrieval that settings ask for, or none, and the settings that remain.

        A retriever alone means `hybrid`; a mode alone means the built-in BM25. Where something is retrieved, `top_k`
        counts passages; with a `Retrieval` as the mode, which has its own, it is that of `SamplingParams`.
        """
        rest = dict(settings)
        if isinstance(made := rest.get("mode"), cls):
            del rest["mode"]
            return (None if made.mode == "sheet" else made), rest
        given = {name: value for name in SETTINGS if (value := rest.pop(name, None)) is not None}
        if not given.keys() & {"retriever", "mode"}:
            if given:
                raise RequestError(f"{', '.join(given)} is about passages; pass a retriever or a mode with it.")
            return None, rest
        given.setdefault("mode", "hybrid")
        if given["mode"] != "sheet":
            given["top_k"] = rest.pop("top_k", None)
        found = cls(**given)
        return (None if found.mode == "sheet" else found), rest

    def search(self, llm: CompressedKnowledgeLLM) -> Search:
        """The retriever in our form."""
        return as_retriever(getattr(llm, self.retriever) if isinstance(self.retriever, str) else self.retriever)

    @property
    def takes_all(self) -> bool:
        """Whether `auto` takes every draft, so that nothing need be searched."""
        return self.mode == "auto" and self.sure == 0

    def takes(self, certainty: float) -> bool:
        """Whether `auto` takes a draft that is so certain."""
        return self.sure <= certainty and self.sure < 1


class Asking(NamedTuple):
    """A question that passages help with: what is asked, how, and the settings of its answer.

    `is_told` says whether it holds passages already, once somebody has looked.
    """

    question: Question
    retrieval: Retrieval
    sampling: Mapping[str, Any]
    is_told: bool | None = None

    def looked_at(self, llm: CompressedKnowledgeLLM) -> Asking:
        """The same with `is_told`, as looked for in this thread; warns if it is."""
        if self.is_told is not None:
            return self
        is_told = is_told_already(as_turns(self.question), llm.known)
        if is_told:
            logger.warning("the question holds passages already, so nothing is retrieved again: %s", _BOTH)
        return self._replace(is_told=is_told)


def begin(llm: CompressedKnowledgeLLM, streams: Sequence[Stream], asking: Asking) -> None:
    """Have streams answered with passages; blocks while it searches and, in `auto`, while the draft is written."""
    turns, retrieval = as_turns(asking.question), asking.retrieval
    draft: AnswerStream | None = None
    judged: Judged | None = None
    if asking.looked_at(llm).is_told:  # the caller's chain has a retriever of its own; nothing is fetched twice
        return llm._submit(*streams)
    if retrieval.mode == "auto":
        draft = AnswerStream(_draft(llm, streams[0], asking))
        llm._submit(draft)
        for _ in draft:
            pass
    found = [] if retrieval.takes_all else retrieval.search(llm).fetch(query_of(turns))
    if draft is not None and (judged := _judge(llm, streams, draft, asking, found)) is None:
        return _take(llm, streams, draft.answer)
    _tell(llm, streams, asking, turns, found, judged)


async def begin_later(llm: CompressedKnowledgeLLM, streams: Sequence[Stream], asking: Asking) -> None:
    """`begin` without blocking the event loop; what goes wrong is raised by the streams."""
    retrieval = asking.retrieval
    draft: AsyncAnswerStream | None = None
    judged: Judged | None = None
    try:
        turns = as_turns(asking.question)
        if asking.is_told is None:
            asking = await asyncio.to_thread(asking.looked_at, llm)
        if asking.is_told:
            return await asyncio.to_thread(llm._submit, *streams)
        if retrieval.mode == "auto":
            made = await asyncio.to_thread(_draft, llm, streams[0], asking)
            draft = AsyncAnswerStream(made, None, asyncio.get_running_loop())
            await asyncio.to_thread(llm._submit, draft)
            async for _ in draft:
                pass
        found = []
        if not retrieval.takes_all:
            found = await (await asyncio.to_thread(retrieval.search, llm)).afetch(query_of(turns))
        if draft is not None:
            judged = await asyncio.to_thread(_judge, llm, streams, draft, asking, found)
            if judged is None:
                return await asyncio.to_thread(_take, llm, streams, draft.answer)
        await asyncio.to_thread(_tell, llm, streams, asking, turns, found, judged)
    except Exception as error:
        for stream in streams:
            tell(stream.request, error)


def _judge(
    llm: CompressedKnowledgeLLM, streams: Sequence[Stream], draft: Stream, asking: Asking, found: Sequence[Passage]
) -> Judged | None:
    """What a draft looks like that does not stand; none if it does. Its streams report how certain it is.

    One that the passages tell is not measured any further, as that reads it twice more.
    """
    retrieval, judged = asking.retrieval, None
    certainty = told(query_of(as_turns(asking.question)), draft.answer, found[: retrieval.top_k])
    if retrieval.takes_all or not retrieval.takes(certainty):
        judged = judge(llm, draft.request.question, draft.answer)
        certainty = max(certainty, judged.certainty)
    for stream in streams:
        stream.certainty = certainty
    return None if retrieval.takes(certainty) else judged


def _draft(llm: CompressedKnowledgeLLM, stream: Stream, asking: Asking) -> Request:
    """The stream's question with log-probabilities; cancelling the stream cancels it too."""
    request = llm._ask_request(asking.question, asking.sampling).request
    params = replace(request.params, logprobs=request.params.logprobs or 0)
    return replace(request, params=params, cancelled=stream.request.cancelled, asked=stream.request.asked)


def _take(llm: CompressedKnowledgeLLM, streams: Sequence[Stream], draft: Answer) -> None:
    """Let the draft be the answer; of several answers each is written anew."""
    if len(streams) > 1:
        return llm._submit(*streams)
    request = streams[0].request
    request.sink(Delta(draft.text, draft.logprobs or ()))
    assert draft.finish_reason != "tool_calls"  # a draft has no toolbox that would read it
    streams[0].sources = draft.sources
    request.sink(Finished(draft.finish_reason, draft.usage.completion_tokens))


def _tell(
    llm: CompressedKnowledgeLLM,
    streams: Sequence[Stream],
    asking: Asking,
    turns: Sequence[Message],
    found: Sequence[Passage],
    judged: Judged | None = None,
) -> None:
    """Put passages into the question and hand it to the engine.

    Passages stand alone too where the sheet's draft was `judged` to be of something that it has lost, if their share of
    a hybrid holds not even the first of them whole: then the sheet only takes the room.
    """
    retrieval, sampling = asking.retrieval, asking.sampling
    asked, longest = len(streams[0].request.question), min(streams[0].request.params.max_tokens, _ANSWER_TOKENS)
    made = llm.sheet.manifest

    def choice(alone: bool) -> tuple[int, list[Passage]]:
        tokens, fixed = retrieval.passage_tokens, made.head_tokens + made.guide_tokens
        if alone:
            tokens = min(tokens + llm.sheet.tokens - fixed, llm.backbone.window - fixed - asked - longest)
        else:
            tokens = min(tokens, llm.room - asked - longest)
        order, encoder = [document.id for document in made.documents], llm._layout.encoder
        heading = llm._tells_in_turn and not alone
        return tokens, choose(found, turns, order, encoder, tokens=tokens, top_k=retrieval.top_k, heading=heading)

    alone = retrieval.mode == "retrieval"
    tokens, chosen = choice(alone)
    if judged and judged.is_lost(retrieval.sure) and is_cut(found, chosen):
        without = choice(True)
        if without[1]:  # nothing if the question says it all
            alone, (tokens, chosen) = True, without
    if any(says(turns, each) for each in found):
        logger.warning("the question holds what was retrieved, which is not told again: %s", _BOTH)
    elif found and not chosen:
        logger.warning("of %d retrieved passages none is told: all are said already, or %d tokens hold none of them",
                       len(found), tokens)  # fmt: skip
    mode: Literal["sheet", "retrieval", "hybrid"] = "retrieval" if alone else "hybrid" if chosen else "sheet"
    told = llm._ask_request(turns, sampling, chosen, alone=alone).request  # once for all answers
    for stream in streams:
        before = stream.request
        request = told.again(before.choice)
        stream.request = replace(request, sink=before.sink, cancelled=before.cancelled, asked=before.asked)
        stream.mode, stream.passages = mode, tuple(chosen)
    llm._submit(*streams)


def is_cut(found: Sequence[Passage], chosen: Sequence[Passage]) -> bool:
    """Whether passages that were found are told, but not even the first of them whole."""
    return bool(found) and len(chosen) < 2 and found[0].text not in [each.text for each in chosen]
