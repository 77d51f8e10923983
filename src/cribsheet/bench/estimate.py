"""What a sheet would keep, told from a sample of the corpus before the whole is built.

A sample of documents is condensed at each rate and asked questions; an answer is kept if it is the one that the sample
in full gives. Questions are the examples' asked about other names in the model's own notes, as in a build, and those
that the user gives; no gold answers are needed. A question that is answered alike without documents tells nothing and
is not counted.

    estimate(LoadedModel.get("pocket"), documents, task, rates=[4, 8, 16])
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cribsheet.backbone import Backbone
from cribsheet.bench.metrics import clustered_interval, normalise
from cribsheet.bench.questions import Asked
from cribsheet.bench.several import Sheets
from cribsheet.chunks import TokenizedCorpus
from cribsheet.compress import as_prefix, nothing_kept
from cribsheet.documents import Document
from cribsheet.errors import RequestError
from cribsheet.llm import CompressedKnowledgeLLM
from cribsheet.loaded import LoadedModel
from cribsheet.notes import NOTES_TOKENS, self_asked, write_notes
from cribsheet.sheet import Sheet
from cribsheet.task import Task
from cribsheet.template import ChatLayout

SAMPLE_TOKENS = 1000
_NOTHING = [Document("There are no documents.", "none")]


@dataclass(frozen=True, slots=True)
class Predicted:
    """The share of answers kept at a rate, with its 95 % interval; tokens and bytes of a sheet of the whole corpus."""

    rate: float
    retained: float
    low: float
    high: float
    tokens: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """What was sampled, what was asked and counted, and what each rate would keep."""

    documents: int
    sample_tokens: int
    corpus_tokens: int
    questions: list[str]
    rates: list[Predicted]


def estimate(
    model: LoadedModel,
    documents: Sequence[Document],
    task: Task,
    *,
    rates: Sequence[float],
    questions: Sequence[str] = (),
    sample_tokens: int = SAMPLE_TOKENS,
    max_tokens: int = 64,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Estimate:
    """Predict what sheets of the default form would keep at `rates`; the guide is dropped.

    `questions` are asked beside the self-asked ones. Raises `RequestError` if there is no question that the sample
    answers, and `BudgetError` for a rate at which the sample's budget is too small.
    """
    backbone = model.backbone
    layout = ChatLayout(backbone.tokenizer)
    chosen = sample(documents, task, sample_tokens, layout, seed)
    progress(f"{len(chosen)} of {len(documents)} documents are the sample")
    asked = list(dict.fromkeys([*questions, *self_questions(backbone, layout, chosen, task)]))
    sheets = Sheets(backbone, chosen)
    whole = sheets.build(task, 1.0, scorer="recent") if asked else None
    full = _ask(model, whole, asked, max_tokens) if whole else []
    bare = _ask(model, Sheets(backbone, _NOTHING).build(task, 1.0, scorer="recent"), asked, max_tokens) if asked else []
    told = [(q, a) for q, a, b in zip(asked, full, bare, strict=True) if normalise(a) not in ("", normalise(b))]
    if whole is None or not told:
        raise RequestError(
            f"None of {len(asked)} questions is answered from the sample of {len(chosen)} documents; give examples "
            "about names in the documents, questions of your own, or a larger sample."
        )
    total = len(TokenizedCorpus.build(documents, layout.head(task.instruction), layout.encoder))
    predicted = []
    for rate in rates:
        progress(f"rate {rate:g}, {len(told)} questions")
        answers = _ask(model, sheets.build(task, rate, guide="dropped"), [q for q, _ in told], max_tokens)
        kept = [Asked(q, (gold,)).judge(answer)[0] for (q, gold), answer in zip(told, answers, strict=True)]
        low, high = clustered_interval(kept, range(len(kept)), seed=seed)
        tokens = int(total / rate)
        predicted.append(
            Predicted(rate, sum(kept) / len(kept), low, high, tokens, round(tokens * whole.nbytes / whole.tokens))
        )
    return Estimate(len(chosen), whole.manifest.corpus_tokens, total, [q for q, _ in told], predicted)


def sample(documents: Sequence[Document], task: Task, tokens: int, layout: ChatLayout, seed: int = 0) -> list[Document]:
    """Documents of about so many tokens, in the corpus's order: those that hold an example's answer, then any.

    The last one is cut where the room ends. Without what the examples are about, nothing could be asked like them.
    """
    order = list(range(len(documents)))
    random.Random(f"sample:{seed}").shuffle(order)
    shown = [answer for _, answer in task.examples]
    order.sort(key=lambda n: not any(answer in documents[n].text for answer in shown))
    taken: dict[int, Document] = {}
    for number in order:
        room = tokens - layout.encoder.count([d.text for d in taken.values()])
        text = layout.encoder.first(documents[number].text, room) if room > 0 else ""
        if not text:
            break
        taken[number] = Document(text, documents[number].id)
    return [taken[number] for number in sorted(taken)]


def self_questions(backbone: Backbone, layout: ChatLayout, documents: Sequence[Document], task: Task) -> list[str]:
    """The examples' questions about the other names in notes on these documents."""
    if not documents or not task.few_shot:
        return []
    corpus = TokenizedCorpus.build(documents, layout.head(task.instruction), layout.encoder)
    request = layout.encoder.after(layout.request(task))
    prefix = as_prefix(backbone, nothing_kept(backbone))
    notes, _ = write_notes(backbone, prefix, 0, corpus.ids, request, NOTES_TOKENS)
    return [question for question, _ in self_asked(notes, task.examples)]


def _ask(model: LoadedModel, sheet: Sheet, questions: Sequence[str], max_tokens: int) -> list[str]:
    kb = CompressedKnowledgeLLM(model, sheet)
    try:
        streams = [kb.stream(question, max_tokens=max_tokens, evidence=False) for question in questions]
        return ["".join(stream) for stream in streams]
    finally:
        kb.close()
