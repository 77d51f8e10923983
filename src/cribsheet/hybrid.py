"""Sheet and retrieval together: a sheet knows the whole corpus roughly, a retriever knows a passage exactly.

Modes:

    sheet       the sheet alone
    retrieval   passages alone, where the documents would stand, within the tokens of sheet and passages together
    hybrid      passages after the sheet, before the question
    auto        the sheet's own answer if it is certain, else hybrid

`auto` asks the sheet first and measures how certain the draft is: the least probability of its tokens, if the sheet
makes the draft more probable than no documents would (docs: decisions/0014). The question's words do not matter.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from cribsheet.answer import Answer
from cribsheet.answering import Delta, Finished, Request, tell
from cribsheet.errors import RequestError
from cribsheet.passages import choose, is_told_already, query_of, says
from cribsheet.prefix import prefix_cache
from cribsheet.retrieval import Passage, Search, as_retriever
from cribsheet.streams import AnswerStream, AsyncAnswerStream, Stream
from cribsheet.telling import opening
from cribsheet.template import Message
from cribsheet.turns import Question, as_turns

if TYPE_CHECKING:
    from cribsheet.llm import CompressedKnowledgeLLM

logger = logging.getLogger(__name__)

Mode = Literal["sheet", "retrieval", "hybrid", "auto"]

BUILT_IN = "bm25"
PASSAGE_TOKENS = 512
SURE = 0.5  # decisions/0014 has the measurements behind this and the next
_GAIN = 0.1  # nats a token by which a sheet that knows the answer makes it more probable
SETTINGS = ("retriever", "mode", "passage_tokens", "sure")
_BOTH = "the chain and the sheet both have a retriever; leave out one of them"
_ANSWER_TOKENS = 256  # kept free for an answer that may be longer than the window leaves anyway


@dataclass(frozen=True, slots=True)
class Retrieval:
    """How passages help with a question: settings that were checked.

    `top_k` bounds how many passages are told, `passage_tokens` how many tokens they take, heading and gaps included.
    `sure` is how certain a draft must be, 0 to 1, for `auto` to take it.
    """

    mode: Mode
    retriever: Any = BUILT_IN
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
        if isinstance(self.retriever, str) and self.retriever != BUILT_IN:
            raise RequestError(
                f"There is no built-in retriever {self.retriever!r}; use {BUILT_IN!r}, or pass your own."
            )

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
        return as_retriever(llm.bm25 if isinstance(self.retriever, str) else self.retriever)


class Asking(NamedTuple):
    """A question that passages help with: what is asked, how, and the settings of its answer."""

    question: Question
    retrieval: Retrieval
    sampling: Mapping[str, Any]


def begin(llm: CompressedKnowledgeLLM, streams: Sequence[Stream], asking: Asking) -> None:
    """Have streams answered with passages; blocks while it searches and, in `auto`, while the draft is written."""
    turns, retrieval = as_turns(asking.question), asking.retrieval
    if _is_retrieved(llm, turns):
        return llm._submit(*streams)
    if retrieval.mode == "auto":
        draft = AnswerStream(_draft(llm, streams[0], asking))
        llm._submit(draft)
        for _ in draft:
            pass
        if _judge(llm, streams, draft) >= retrieval.sure:
            return _take(llm, streams, draft.answer)
    _tell(llm, streams, asking, turns, retrieval.search(llm).fetch(query_of(turns)))


async def begin_later(llm: CompressedKnowledgeLLM, streams: Sequence[Stream], asking: Asking) -> None:
    """`begin` without blocking the event loop; what goes wrong is raised by the streams."""
    retrieval = asking.retrieval
    try:
        turns = as_turns(asking.question)
        if await asyncio.to_thread(_is_retrieved, llm, turns):
            return await asyncio.to_thread(llm._submit, *streams)
        if retrieval.mode == "auto":
            made = await asyncio.to_thread(_draft, llm, streams[0], asking)
            draft = AsyncAnswerStream(made, None, asyncio.get_running_loop())
            await asyncio.to_thread(llm._submit, draft)
            async for _ in draft:
                pass
            if await asyncio.to_thread(_judge, llm, streams, draft) >= retrieval.sure:
                return await asyncio.to_thread(_take, llm, streams, draft.answer)
        search = await asyncio.to_thread(retrieval.search, llm)
        found = await search.afetch(query_of(turns))
        await asyncio.to_thread(_tell, llm, streams, asking, turns, found)
    except Exception as error:
        for stream in streams:
            tell(stream.request, error)


def certainty(llm: CompressedKnowledgeLLM, asked: Tensor, draft: Answer) -> float:
    """How certain the sheet is of an answer with log-probabilities to a question in tokens (T,), 0 to 1.

    The least probability of a token; but 0 if the answer is as probable without any documents, as "I do not know" is
    when the sheet has lost what was asked for.
    """
    if not draft.logprobs or gain(llm, asked, draft) < _GAIN:
        return 0.0
    return math.exp(min(each.logprob for each in draft.logprobs))


def gain(llm: CompressedKnowledgeLLM, asked: Tensor, draft: Answer) -> float:
    """Nats a token by which the sheet makes an answer with log-probabilities more probable than no documents do."""
    said = draft.logprobs or ()
    ids, bare = torch.tensor([each.token_id for each in said], dtype=torch.int64), llm._nothing()
    bare_opening, _ = opening(llm._layout, llm._task, llm.sheet, ())
    prompt = torch.cat([bare_opening, asked, ids]).unsqueeze(0)
    cache = prefix_cache(bare.layers, 0)
    logits = llm.backbone.step(prompt, torch.arange(prompt.shape[1]).unsqueeze(0), cache, keep=len(ids) + 1)
    without = logits[0, :-1].float().log_softmax(-1).cpu()[torch.arange(len(ids)), ids]
    return (sum(each.logprob for each in said) - float(without.sum())) / max(1, len(said))


def _judge(llm: CompressedKnowledgeLLM, streams: Sequence[Stream], draft: Stream) -> float:
    """How certain the draft is; its streams report it."""
    found = certainty(llm, draft.request.question, draft.answer)
    for stream in streams:
        stream.certainty = found
    return found


def _is_retrieved(llm: CompressedKnowledgeLLM, turns: Sequence[Message]) -> bool:
    """Whether the caller's chain has a retriever of its own; then nothing is fetched twice."""
    told = is_told_already(turns, llm.sheet.texts)
    if told:
        logger.warning("the question holds passages already, so nothing is retrieved again: %s", _BOTH)
    return told


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
) -> None:
    """Put passages into the question and hand it to the engine."""
    retrieval, sampling = asking.retrieval, asking.sampling
    alone = retrieval.mode == "retrieval"
    asked, longest = len(streams[0].request.question), min(streams[0].request.params.max_tokens, _ANSWER_TOKENS)
    made, tokens = llm.sheet.manifest, retrieval.passage_tokens
    if alone:
        fixed = made.head_tokens + made.guide_tokens
        tokens = min(tokens + llm.sheet.tokens - fixed, llm.backbone.window - fixed - asked - longest)
    else:
        tokens = min(tokens, llm.room - asked - longest)
    encoder = llm._layout.encoder
    order = [document.id for document in made.documents]
    chosen = choose(found, turns, order, encoder, tokens=tokens, top_k=retrieval.top_k, heading=not alone)
    if any(says(turns, each) for each in found):
        logger.warning("the question holds what was retrieved, which is not told again: %s", _BOTH)
    elif found and not chosen:
        logger.warning("of %d retrieved passages none is told: all are said already, or %d tokens hold none of them",
                       len(found), tokens)  # fmt: skip
    mode: Literal["sheet", "retrieval", "hybrid"] = "retrieval" if alone else "hybrid" if chosen else "sheet"
    for stream in streams:
        before = stream.request
        request = llm._ask_request(turns, sampling, chosen, alone=alone).request
        stream.request = replace(
            request, sink=before.sink, cancelled=before.cancelled, asked=before.asked, choice=before.choice
        )
        stream.mode, stream.passages = mode, tuple(chosen)
    llm._submit(*streams)
