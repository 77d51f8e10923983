"""A sheet on a loaded model, ready to be asked: its prefix, its retrievers, and questions in tokens."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self, TypeVar

from cribsheet.asking.prepared import Lookup, Prepared
from cribsheet.asking.settings import Retrieval, check_settings, with_form
from cribsheet.asking.streams import Running
from cribsheet.attention.prefix import Prefix
from cribsheet.compress.loop import nothing_read
from cribsheet.engine.pool import LoadedModel
from cribsheet.engine.sampling import SamplingParams
from cribsheet.errors import RequestError, WindowError
from cribsheet.living.opened import is_out_of_place, opened
from cribsheet.model.backbone import Backbone
from cribsheet.model.fingerprint import fingerprint
from cribsheet.prompt.encoder import LONG
from cribsheet.prompt.template import ChatLayout
from cribsheet.prompt.turns import Question, as_turns
from cribsheet.recall.desk import Desk
from cribsheet.recall.placing import Piece, Recalled, taken_off
from cribsheet.recall.stretches import located
from cribsheet.retrieval.dense import DenseRetriever
from cribsheet.retrieval.passages import known_of
from cribsheet.retrieval.placing import Told, after_sheet, behind_recalled, beside_documents, instead_of_documents
from cribsheet.retrieval.quoted import Known
from cribsheet.retrieval.retriever import BM25Retriever, Passage, Search, as_retriever
from cribsheet.sheet.sheet import Sheet
from cribsheet.structured.grammar import Constraint
from cribsheet.structured.grammar_tokens import GrammarTokens
from cribsheet.structured.tools import Toolbox

BuiltIn = TypeVar("BuiltIn", BM25Retriever, DenseRetriever)


class Session:
    """A sheet on a loaded model: what all ways of asking share. Thread-safe; the sheet is never written to.

    Make one with `open`; `over` puts another sheet in its place.
    """

    def __init__(self, running: Running, layout: ChatLayout, sheet: Sheet) -> None:
        self.running, self.layout, self.sheet = running, layout, sheet
        self.task = sheet.shown_task
        self._prefix: Prefix | None = None
        self._unguided: Prefix | None = None
        self._nothing: Prefix | None = None
        self._retrievers: dict[type, Any] = {}
        self._known: Known | None = None
        self._desk: Desk | None = None
        self._guide: Piece | None = None
        self._lock, self._indexing = threading.Lock(), threading.Lock()

    @classmethod
    def open(cls, model: Backbone | LoadedModel, sheet: Sheet) -> Self:
        """Attach a sheet to a loaded model. Raises `MismatchError` if it was made with another one."""
        loaded, made = LoadedModel.get(model), sheet.manifest
        layout = ChatLayout(loaded.backbone.tokenizer, system=made.system, options=made.template_options)
        made.fingerprint.check(fingerprint(loaded.backbone, layout))
        list(sheet.layers)  # read now: who writes to the file later changes nothing that is answered
        return cls(Running(loaded), layout, sheet)

    def over(self, sheet: Sheet) -> Session:
        """The same over another sheet of the same terms; answers that are running end on this one."""
        following = Session(self.running, self.layout, sheet)
        with self._lock:
            bound = self._desk.max_bytes if self._desk else None
        if bound is not None and sheet.archive is not None:
            following.desk.max_bytes = bound
        return following

    def close(self) -> None:
        """Cancel running answers and let go of keys and values; safe to call twice."""
        self.running.close()
        with self._lock:  # not the other one: an index may take a while
            self._prefix = self._unguided = self._nothing = self._known = self._desk = self._guide = None
            self._retrievers = {}

    @property
    def loaded(self) -> LoadedModel:
        """The model with its engine."""
        return self.running.loaded

    @property
    def backbone(self) -> Backbone:
        """The model underneath."""
        return self.loaded.backbone

    @property
    def room(self) -> int:
        """Tokens of the model's window that the sheet leaves for question and answer."""
        return self.backbone.window - self.sheet.length

    # ---- prefixes

    @property
    def is_placed(self) -> bool:
        """Whether the sheet is on the model's device already."""
        return self._prefix is not None

    @property
    def prefix(self) -> Prefix:
        """The sheet on the model's device and in its dtype; made on first use and shared by all questions."""
        return self.prefix_for(())

    @property
    def nothing(self) -> Prefix:
        """A prefix of no tokens, for questions that bring their own documents; one for all of them, to be a batch."""
        with self._lock:
            if self._nothing is None:
                self._nothing = Prefix(nothing_read(self.backbone), 0)
            return self._nothing

    def prefix_for(self, passages: Sequence[Passage], *, alone: bool = False) -> Prefix:
        """What a question stands on that is told `passages`: the sheet up to its resident guide, or nothing."""
        self.running.check_open()
        if alone:
            return self.nothing
        with self._lock:
            self.running.check_open()  # whoever closes it comes for the prefix next
            if self._prefix is None or is_out_of_place(self.backbone, self._prefix):
                self._prefix, self._unguided = opened(self.backbone, self.sheet), None
            if not (guide := self._guide_after(passages)):
                return self._prefix
            if self._unguided is None:
                self._unguided = self._prefix.without_last(guide)
            return self._unguided

    @property
    def tells_in_turn(self) -> bool:
        """Whether passages stand in the question's turn, behind the guide, because it cannot be taken off.

        Layers with sliding windows hold what stands before the question; that is the guide, and not what it hides.
        """
        return self.sheet.resident and any(window is not None for window in self.backbone.windows)

    @property
    def _movable_guide(self) -> int:
        """Tokens of the resident guide, if it may be taken off; else 0."""
        return 0 if self.tells_in_turn else self.sheet.manifest.guide_tokens

    def _guide_after(self, passages: Sequence[Passage]) -> int:
        """Tokens of the resident guide if it stands behind passages, and not at the sheet's end; else 0."""
        return self._movable_guide if passages else 0

    # ---- retrievers of the sheet's own documents

    @property
    def bm25(self) -> BM25Retriever:
        """The built-in retriever over the sheet's own documents; indexed on first use."""
        return self._retriever(BM25Retriever)

    @property
    def dense(self) -> DenseRetriever:
        """The same by an embedding model (`retrieval/dense.py`); its passages are placed on first use."""
        return self._retriever(DenseRetriever)

    @property
    def known(self) -> Known:
        """The sheet's texts, to be looked in for what a question quotes; made on first use, once for a sheet."""
        with self._indexing:
            known = self._known
            if known is None:
                known = self._known = known_of(self.sheet.texts)
            return known

    def search(self, retriever: Any) -> Search:
        """A built-in retriever by its name, or anybody's, in our form."""
        return as_retriever(getattr(self, retriever) if isinstance(retriever, str) else retriever)

    def _retriever(self, kind: type[BuiltIn]) -> BuiltIn:
        with self._indexing:  # not the other lock: whoever only asks need not wait for an index
            retrievers = self._retrievers
            if kind not in retrievers:
                retrievers[kind] = kind(self.sheet.documents)
            retriever: BuiltIn = retrievers[kind]
            return retriever

    @property
    def desk(self) -> Desk:
        """What of the sheet's archive lies on the device. Raises `RequestError` for a sheet without one.

        And `EngineError` once it is closed.
        """
        archive = self.sheet.archive
        if archive is None:
            raise RequestError(
                "This sheet has no archive to recall from; build it with build(..., archive=True), or ask with another "
                'mode or no_archive="sheet".'
            )
        with self._lock:
            self.running.check_open()  # what is closed lets go of its desk once
            if self._desk is None:
                self._desk = Desk(archive, self.backbone)
            return self._desk

    def recall(self, stretches: Sequence[tuple[int, int]]) -> Recalled:
        """Tokens [first, stop) of the corpus, and a resident guide behind them, all as they were read.

        Raises as `desk`, and `SheetError` if the archive cannot be read.
        """
        recalled = self.desk.take(stretches)
        if not self._movable_guide:
            return recalled
        prefix = self.prefix
        with self._lock:
            if self._guide is None:
                self._guide = taken_off(prefix, self._movable_guide, self.backbone.inv_freqs)
            return replace(recalled, pieces=[*recalled.pieces, self._guide])

    def recall_again(self, passages: Sequence[Passage]) -> Recalled:
        """What was recalled of an answer's passages. Raises as `recall`."""
        archive = self.desk.archive
        places = [place for each in passages if (place := located(self.sheet, lambda: self.known, each))]
        return self.recall([archive.places(each.document, each.start, each.stop) for each in places])

    # ---- questions

    def prepare(self, question: Question, sampling: Mapping[str, Any], n: int = 1) -> list[Prepared]:
        """A question for `n` answers, checked, in tokens, and with its form compiled; passages are not searched yet.

        `sampling` are the settings of `CompressedKnowledgeLLM.ask`. Raises as it does.
        """
        if not isinstance(n, int) or n < 1:
            raise RequestError(f"n is {n!r}; ask for at least 1 answer.")
        retrieval, rest = Retrieval.taken_from(sampling)
        if retrieval and retrieval.mode == "recall" and retrieval.no_archive == "error":
            _ = self.desk
        lookup = Lookup(question, retrieval, rest) if retrieval else None
        first = self.prepare_told(question, rest, lookup=lookup)
        return [first, *(first.again(choice) for choice in range(1, n))]

    def prepare_told(
        self,
        question: Question,
        sampling: Mapping[str, Any],
        passages: Sequence[Passage] = (),
        *,
        alone: bool = False,
        recalled: Recalled | None = None,
        lookup: Lookup | None = None,
    ) -> Prepared:
        """A question over the sheet that is told passages, or over these `alone`; settings are those of an answer.

        Of passages that are `recalled` nothing is read.
        """
        check_settings(sampling)
        toolbox = Toolbox.of(sampling.get("tools"), sampling.get("tool_choice"))
        given = with_form(sampling, toolbox)
        before = 0 if alone else self.sheet.length - self._guide_after(passages)
        before += recalled.tokens if recalled else 0
        self.check_long(question, toolbox, before)
        told = self.render(question, toolbox, passages, alone=alone, recalled=recalled)
        left = self.check_room(len(told.ids), before)
        params = SamplingParams(**given)
        if params.max_tokens > left:
            params = SamplingParams(**{**given, "max_tokens": left})
        constraint = self._constraint(params)
        return Prepared(
            told,
            before,
            params,
            ends=() if constraint else self.layout.stop,  # a form knows its own end
            constraint=constraint,
            toolbox=toolbox,
            timeout=sampling.get("timeout"),
            evidence=sampling.get("evidence") is None or bool(sampling["evidence"]),
            passages=tuple(passages),
            alone=alone,
            recalled=recalled,
            lookup=lookup,
        )

    def render(
        self,
        question: Question,
        toolbox: Toolbox | None = None,
        passages: Sequence[Passage] = (),
        *,
        alone: bool = False,
        recalled: Recalled | None = None,
    ) -> Told:
        """A question in tokens, with passages beside the sheet's documents, or `alone` where those would stand.

        What is `recalled` stands before these tokens.
        """
        turns = as_turns(question, toolbox)
        if recalled:
            return behind_recalled(self.layout, self.task, self.sheet.resident, turns, recalled.sizes)
        if passages and not alone and not self.tells_in_turn:
            return beside_documents(self.layout, self.task, self.sheet, turns, passages)
        if alone:
            return instead_of_documents(self.layout, self.task, self.sheet, turns, passages)
        return after_sheet(self.layout, self.task, self.sheet.resident, turns, passages)

    def check_long(self, question: Question, toolbox: Toolbox | None, before: int) -> None:
        """Refuse what cannot fit behind so many tokens by far, before all of it is read."""
        turns = as_turns(question, toolbox)
        if sum(len(str(turn["content"])) for turn in turns) > LONG:
            text, room = self.layout.question(turns, self.task, self.sheet.resident), self.backbone.window - before
            if self.layout.encoder.exceeds(text, room):
                self.check_room(room + 1, before, least="at least ")

    def check_room(self, tokens: int, before: int, least: str = "") -> int:
        """What a question of so many tokens, after the sheet or what else stands `before` it, leaves of the window.

        At least 1, or it is refused with `WindowError`.
        """
        left = self.backbone.window - before - tokens
        if left < 1:
            raise WindowError(
                f"The question takes {least}{tokens} tokens, but the model's window of {self.backbone.window} leaves "
                f"{self.room} for question and answer beside the sheet of {self.sheet.length}; ask a shorter question "
                "or raise the rate."
            )
        return left

    def _constraint(self, params: SamplingParams) -> Constraint | None:
        if params.grammar is None:
            return None
        backbone = self.backbone
        tokens = GrammarTokens.of(backbone.tokenizer, backbone.eos_ids, backbone.config.vocab_size)
        return Constraint(params.grammar, tokens, params.max_tokens)
