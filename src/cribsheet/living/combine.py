"""Several sheets, one question: two sheets behind one question, or the one sheet that fits it best.

Combining puts what the sheets keep into one prefix, at positions of its own, under one head and one guide. Routing asks
the model itself: a question is most likely where its names and words stand.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack

import torch
from torch import Tensor

from cribsheet.asking.answer import Answer
from cribsheet.attention.cache import prefix_cache
from cribsheet.corpus.task import Task
from cribsheet.errors import DocumentError, RequestError, SheetError
from cribsheet.living.cutting import cut
from cribsheet.living.independent import changed, least_most
from cribsheet.living.segments import assemble
from cribsheet.model.backbone import Backbone
from cribsheet.model.fingerprint import fingerprint
from cribsheet.prompt.template import ChatLayout
from cribsheet.sheet.sheet import Sheet
from cribsheet.vocabulary import Allocation

if TYPE_CHECKING:
    from cribsheet.asking.options import AskOptions
    from cribsheet.llm import CompressedKnowledgeLLM


def combine(backbone: Backbone, sheets: Sequence[Sheet], task: Task | str | None = None) -> Sheet:
    """One sheet with everything that several sheets of one model keep; reads nothing but a resident guide.

    Sequential and independent sheets may be mixed. `task` is by default that of all sheets together. The result is an
    independent sheet; what came from a sequential one can only leave it as a whole. Raises `SheetError` if models,
    heads or storage types differ, and `DocumentError` for one id with two texts.
    """
    if not sheets:
        raise SheetError("No sheets were given; combine at least one.")
    began, first = time.perf_counter(), sheets[0].manifest
    layout = ChatLayout(backbone.tokenizer, system=first.system, options=first.template_options)
    loaded = fingerprint(backbone, layout)
    for sheet in sheets:
        sheet.manifest.fingerprint.check(loaded)
        for field, what in (("head", "instruction"), ("dtype", "storage type")):
            mine, other = getattr(first, field), getattr(sheet.manifest, field)
            if mine != other:
                raise SheetError(f"The sheets differ in their {what}: {mine!r} and {other!r}; build one of them again.")
    if any(sheet.manifest.correction != "none" for sheet in sheets):
        raise SheetError(
            "A corrected sheet stands for its corpus alone; build it with correction='none' to combine it."
        )
    _refuse_two_texts(sheets)
    purpose = _joined(sheets) if task is None else Task.of(task)
    parts = [cut(backbone, sheet) for sheet in sheets]
    # examples stay if any sheet shows some; their form does if it is all that any shows
    shown = any(sheet.resident and sheet.shown_task.few_shot for sheet in sheets)
    form = purpose.form if not shown and any(sheet.manifest.form for sheet in sheets) else ""
    guide = layout.encoder.after(layout.guide(purpose.shown(form)).resident, continues=True)
    if not any(sheet.resident for sheet in sheets):
        guide = guide[:0]
    rates = {sheet.manifest.document_rate for sheet in sheets}
    adaptive = any(sheet.manifest.allocation != "uniform" for sheet in sheets)
    allocation: Allocation = "adaptive" if adaptive else "uniform"
    manifest = first.model_copy(
        update={
            "task": purpose.to_dict(),
            "form": form,
            "document_rate": first.document_rate if len(rates) == 1 else None,
            "document_most": least_most([sheet.manifest for sheet in sheets]),
            "allocation": allocation,
            "history": [entry for sheet in sheets for entry in sheet.manifest.history],
        }
    )
    made = changed(backbone, manifest, "combined", sum(len(sheet.manifest.documents) for sheet in sheets), began)
    segments = [segment for _, own in parts for segment in own]
    return assemble(backbone, made, parts[0][0], segments, guide, with_texts=all(sheet.texts for sheet in sheets))


class Router:
    """Several sheets of which one answers: the one after which the model finds the question most likely."""

    def __init__(self, knowledge: Sequence[CompressedKnowledgeLLM]) -> None:
        """Raises `RequestError` without sheets, or for sheets of several models, whose likelihoods do not compare."""
        self.knowledge = list(knowledge)
        if not self.knowledge:
            raise RequestError("No sheets were given; a router needs at least one.")
        if len({id(each.backbone) for each in self.knowledge}) > 1:
            raise RequestError("The sheets are on several models, whose likelihoods do not compare; load them on one.")

    def scores(self, question: str) -> list[float]:
        """Mean log-likelihood of the question's tokens after each sheet."""
        return [likelihood(each, question) for each in self.knowledge]

    def route(self, question: str) -> CompressedKnowledgeLLM:
        """The sheet that fits the question best."""
        scores = self.scores(question)
        return self.knowledge[scores.index(max(scores))]

    def ask(self, question: str, **sampling: Unpack[AskOptions]) -> Answer:
        """Answer from the sheet that fits best; `sampling` is that of `CompressedKnowledgeLLM.ask`."""
        return self.route(question).ask(question, **sampling)


def likelihood(knowledge: CompressedKnowledgeLLM, question: str) -> float:
    """Mean log-likelihood of a question's tokens after a sheet, in nats; the template around it does not count.

    Nor does a token with which all that is new begins: its likelihood is known only where the sheet ends.
    """
    ids, prefix = knowledge.question_tokens(question), knowledge.prefix
    around = knowledge.question_tokens("?")
    positions = torch.arange(prefix.tokens, prefix.tokens + len(ids)).unsqueeze(0)
    cache = prefix_cache(prefix.layers, prefix.tokens)
    logits = knowledge.backbone.step(ids.unsqueeze(0), positions, cache, keep=len(ids))[0]
    scores = logits[:-1].float().log_softmax(-1).cpu().gather(1, ids[1:, None])[:, 0]
    return float(_inner(scores, ids, around).mean())


def _inner(scores: Tensor, ids: Tensor, around: Tensor) -> Tensor:
    """The scores of tokens that are the question's own: those before and behind it are the same for every question."""
    before, behind = _shared(ids, around), _shared(ids.flip(0), around.flip(0))
    inner = scores[max(0, before - 1) : len(scores) - behind]
    return inner if len(inner) else scores


def _shared(first: Tensor, second: Tensor) -> int:
    """How many tokens two sequences have in common from their beginnings."""
    size = min(len(first), len(second))
    different = (first[:size] != second[:size]).nonzero()
    return int(different[0]) if len(different) else size


def _joined(sheets: Sequence[Sheet]) -> Task:
    tasks = list(dict.fromkeys(sheet.task for sheet in sheets))
    examples = tuple(dict.fromkeys(pair for task in tasks for pair in task.examples))
    return Task(" ".join(dict.fromkeys(task.description for task in tasks)), examples, tasks[0].instruction)


def _refuse_two_texts(sheets: Sequence[Sheet]) -> None:
    seen: dict[str, str] = {}
    for entry in (entry for sheet in sheets for entry in sheet.manifest.documents):
        if seen.setdefault(entry.id, entry.digest) != entry.digest:
            raise DocumentError(f"two sheets have different documents with the id {entry.id!r}; rename one and rebuild")
