"""What `auto` can know of a sheet's own answer, and what its choice between sheet and passages is worth.

    python -m cribsheet_bench.certainty --seed 1 --json certainty.json
    python -m cribsheet_bench.certainty --model MODEL --data FOLDER --rates 4 8 --questions 10

Corpora of `cribsheet_bench.connectivity`, held-out worlds of the pocket model and the demo's paragraphs, at budgets as
in `compare`: the full sheet, passages alone, and half a sheet with and without as many passages, which is what `auto`
chooses from. Everything is asked once; what `auto` makes of it at any threshold is then arithmetic. Reported: how good
each way is, how often each signal ranks a question better retrieved for above another (0.5 is chance), and what
thresholds do. About ten minutes on one core.

With `--data`, a folder of corpora (`corpora.py`), the sheets are the library's own at these rates, in int4 and with
their guide, and `hybrid` adds the passages that it adds by default: there are no halves, and sheet and draft are one.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table

from cribsheet.asking.certainty import FAITHFUL, NEAR, Judged, gain, nearness, probability, told
from cribsheet.asking.modes import is_cut
from cribsheet.asking.settings import PASSAGE_TOKENS, SURE
from cribsheet.compare.compare import Corpus
from cribsheet.compare.journal import write_rows
from cribsheet.compare.questions import Asked
from cribsheet.corpus.documents import Document
from cribsheet.corpus.task import Task
from cribsheet.engine.pool import LoadedModel
from cribsheet.errors import BudgetError
from cribsheet.llm import CompressedKnowledgeLLM
from cribsheet.prompt.chunks import TokenizedCorpus
from cribsheet.prompt.template import ChatLayout
from cribsheet_bench.command import tell_progress
from cribsheet_bench.connectivity import DIRECT, make_corpus
from cribsheet_bench.quality.prose import reading
from cribsheet_bench.real.case import most_tokens
from cribsheet_bench.real.corpora import find_corpora, group_of, read_corpus

logger = logging.getLogger(__name__)

NARROW = (DIRECT, "fill", "needle", "inverse", "read")  # one document answers
BROAD = ("join", "join2", "join3", "list", "count")  # several do
_EXAMPLES, _OF_A_KIND = 3, 3  # of a world
_MAX_TOKENS = 48
_SHEET: Final = "sheet"
_HYBRID: Final = "hybrid"
_RETRIEVAL: Final = "retrieval"


@dataclass(frozen=True, slots=True)
class Measured:
    """A question: set F1 of each way to answer it, and what was measured of the draft of half the budget's sheet.

    `full` is the sheet of the whole budget; `draft`, `hybrid` and `retrieval` are what `auto` chooses from. `cut` says
    whether a hybrid's passages hold not even the first that was found, `margin` by how much of its score that one is
    ahead of the next, `found` which share of the draft's sources its passages come from, `told` which share of what the
    draft says the best of them say.
    """

    family: str
    corpus: str
    rate: float
    kind: str
    question: str
    full: float
    draft: float
    hybrid: float
    retrieval: float
    probability: float
    gain: float
    nearness: float
    margin: float
    found: float
    told: float
    cut: bool

    def chosen(self, near: float = NEAR, sure: float = SURE) -> str:
        """What `auto` does at these thresholds, as `modes.begin` does."""
        judged = Judged(self.probability, self.nearness, near)
        is_told = self.told if self.rate <= FAITHFUL else 0.0
        if sure <= max(is_told, judged.certainty) and sure < 1:
            return _SHEET
        return _RETRIEVAL if judged.is_lost(sure) and self.cut else _HYBRID

    def score(self, way: str) -> float:
        """Set F1 of the sheet's draft, the hybrid, or passages alone."""
        return {_SHEET: self.draft, _HYBRID: self.hybrid, _RETRIEVAL: self.retrieval}[way]


SIGNALS: dict[str, Callable[[Measured], float]] = {
    "nearness": lambda each: each.nearness,
    "improbability": lambda each: -each.probability,
    "no gain": lambda each: -each.gain,
    "not told by the best passages": lambda each: -each.told,
    "sources among the passages": lambda each: each.found,
    "margin of the best passage": lambda each: each.margin,
}


def corpora(levels: Sequence[int], questions: int, worlds: int, seed: int) -> Iterator[tuple[str, Corpus]]:
    """Corpora of each family, other ones for each seed."""
    from cribsheet_pocket_training.worlds import make_world

    for level in levels:
        yield "connectivity", make_corpus(level, seed=seed, people=8, questions=questions, characters=8000)
    for number in range(worlds):
        world = make_world(f"auto/{seed}/{number}", tokens=1200, questions=90)
        shown = [q for q in world.questions if q.kind != "absent"][:_EXAMPLES]
        asked: dict[str, list[Asked]] = {}
        for q in world.questions:
            if q not in shown and len(asked.setdefault(q.kind, [])) < _OF_A_KIND:
                asked[q.kind].append(Asked(q.text, (q.answer,), q.kind))
        task = Task("Answer questions about the documents.", tuple((q.text, q.answer) for q in shown))
        documents = [Document(each.text, each.id) for each in world.documents]
        yield "worlds", Corpus(f"world {number}", documents, task, [q for own in asked.values() for q in own])
    for case, _ in zip(reading(1200, seed), range(worlds // 2), strict=False):
        asked_here = [Asked(q, (gold,), "read") for q, gold in zip(case.questions, case.answers, strict=True)]
        yield "demo", Corpus(f"demo {case.name}", case.documents, case.task, asked_here)


def measure(model: LoadedModel, family: str, corpus: Corpus, rates: Sequence[float]) -> Iterator[Measured]:
    """All questions of a corpus at each rate."""
    layout = ChatLayout(model.backbone.tokenizer)
    preamble = layout.preamble(corpus.task.instruction)
    tokens = len(TokenizedCorpus.build(corpus.documents, preamble, layout.encoder))
    full: dict[float, list[float]] = {}
    for rate in sorted({*rates, *(2 * rate for rate in rates)}):  # half of one budget is all of another
        try:
            kb = CompressedKnowledgeLLM.build(
                list(corpus.documents), corpus.task, model=model, budget=int(tokens / rate)
            )
        except BudgetError as error:
            logger.warning("%s at %gx is left out: %s", corpus.name, rate, error)
            continue
        logger.info("%s at %gx", corpus.name, rate)
        drafts = [kb.ask(q.text, max_tokens=_MAX_TOKENS, logprobs=0) for q in corpus.questions]
        full[rate] = [q.judge(draft.text)[2] for q, draft in zip(corpus.questions, drafts, strict=True)]
        if rate / 2 in full and rate / 2 in rates:
            passages = int(tokens / (rate / 2)) - kb.sheet.tokens
            for number, (q, draft) in enumerate(zip(corpus.questions, drafts, strict=True)):
                yield Measured(
                    family, corpus.name, rate / 2, q.type, q.text, full[rate / 2][number], full[rate][number],
                    **_measured(kb, q, draft, passages),
                )  # fmt: skip
        kb.close()


def measure_real(model: LoadedModel, corpus: Corpus, rates: Sequence[float], questions: int) -> Iterator[Measured]:
    """The first questions of a corpus, as a user would ask them, of a sheet of each rate."""

    def score(q: Asked, text: str) -> float:
        return q.marks(text)[1]

    for rate in rates:
        kb = CompressedKnowledgeLLM.build(
            list(corpus.documents), corpus.task, model=model, rate=rate, dtype="int4", guide="resident"
        )
        logger.info("%s at %gx", corpus.name, rate)
        for q in corpus.questions[:questions]:
            draft = kb.ask(q.text, max_tokens=most_tokens(q), logprobs=0)
            mark = score(q, draft.text)
            measured = _measured(kb, q, draft, PASSAGE_TOKENS, score=score, most=most_tokens(q))
            yield Measured(group_of(corpus.name), corpus.name, rate, "read", q.text, mark, mark, **measured)
        kb.close()


def _set_score(q: Asked, text: str) -> float:
    return q.judge(text)[2]


def _measured(
    kb: CompressedKnowledgeLLM,
    q: Asked,
    draft: Any,
    passages: int,
    *,
    score: Callable[[Asked, str], float] = _set_score,
    most: int = _MAX_TOKENS,
) -> dict[str, Any]:
    """The other ways to answer, and the signals of the draft."""
    ways = {mode: kb.ask(q.text, max_tokens=most, mode=mode, passage_tokens=passages) for mode in (_HYBRID, _RETRIEVAL)}
    asked, found = kb.question_tokens(q.text), kb.bm25.retrieve(q.text)
    ahead = [each.score or 0.0 for each in found[:2]]
    whole = kb.sources(q.text, draft, limit=len(kb.sheet.documents))
    names = {each.document_id for each in ways[_HYBRID].passages}
    return {
        **{mode: score(q, answer.text) for mode, answer in ways.items()},
        "probability": probability(kb.session, asked, draft),
        "gain": gain(kb.session, asked, draft),
        "nearness": nearness(kb.session, asked, draft),
        "margin": 1 - ahead[1] / ahead[0] if len(ahead) == 2 else 1.0,
        "found": sum(each.weight for each in whole if each.document_id in names),
        "told": told(q.text, draft, found),
        "cut": is_cut(found, ways[_HYBRID].passages),
    }


def ranking(above: Sequence[float], below: Sequence[float]) -> float:
    """How often a value of the first is larger than one of the second; ties count half."""
    pairs = [(a > b) + 0.5 * (a == b) for a in above for b in below]
    return sum(pairs) / len(pairs) if pairs else 0.5


def tables(rows: Sequence[Measured]) -> list[Table]:
    """How good each way is, what the signals know, and what thresholds do."""
    groups = _groups(rows)
    ways = Table("family", "rate", "questions", "n", "sheet", "retrieval", "hybrid", "draft", "auto", "retrieves", "best of draft and hybrid")  # fmt: skip # noqa: E501
    for (family, rate, name), group in groups.items():
        choice = [each.chosen() for each in group]
        numbers = [
            _mean([each.full for each in group]), _mean([each.retrieval for each in group]),
            _mean([each.hybrid for each in group]), _mean([each.draft for each in group]),
            _mean([each.score(way) for each, way in zip(group, choice, strict=True)]),
        ]  # fmt: skip
        oracle = _mean([max(each.draft, each.hybrid) for each in group])
        retrieves = f"{_mean([float(way != _SHEET) for way in choice]):.0%}"
        ways.add_row(family, f"{rate:g}", name, str(len(group)), *(f"{each:.2f}" for each in numbers), retrieves,
                     f"{oracle:.2f}")  # fmt: skip
    families = list(dict.fromkeys(each.family for each in rows if each.family != "demo"))
    known = Table("signal", *(f"narrow above broad, {family}" for family in families), "better by hybrid above others")
    for title, signal in SIGNALS.items():
        cells = [
            ranking(*([signal(r) for r in rows if r.family == family and r.kind in kinds] for kinds in (NARROW, BROAD)))
            for family in families
        ]
        better = [[signal(r) for r in rows if (r.hybrid > r.draft) is is_better] for is_better in (True, False)]
        known.add_row(title, *(f"{cell:.2f}" for cell in [*cells, ranking(*better)]))
    sweep = Table(
        "near from", "sure from", *(f"{family}, {name}" for family in families for name in ("narrow", "broad"))
    )
    for near in (0.5, 0.6, 0.7, 2.0):
        for sure in (0.5, 0.7, 0.9):
            done = [_against(groups, family, name, near, sure) for family in families for name in ("narrow", "broad")]
            sweep.add_row(f"{near:g}" if near <= 1 else "never", f"{sure:g}", *done)
    return [ways, known, sweep]


def _against(groups: _Groups, family: str, name: str, near: float, sure: float) -> str:
    """Points of `auto` less the best single way, and how often it retrieves, the mean over rates."""
    points, shares = [], []
    for (own, _, kind), group in groups.items():
        if own == family and kind == name:
            ways = [each.chosen(near, sure) for each in group]
            best = max(_mean([getattr(each, way) for each in group]) for way in ("full", _HYBRID, _RETRIEVAL))
            points.append(_mean([each.score(way) for each, way in zip(group, ways, strict=True)]) - best)
            shares.append(_mean([float(way != _SHEET) for way in ways]))
    return f"{100 * _mean(points):+.1f} ({_mean(shares):.0%})"


_Groups = dict[tuple[str, float, str], list[Measured]]


def _groups(rows: Sequence[Measured]) -> _Groups:
    found: _Groups = {}
    for row in sorted(rows, key=lambda each: (each.family, each.rate)):
        name = "narrow" if row.kind in NARROW else "broad" if row.kind in BROAD else "others"
        found.setdefault((row.family, row.rate, name), []).append(row)
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the bench from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 2, 4], help="of connectivity")
    parser.add_argument("--questions", type=int, default=9, help="of each kind at each level, or about each corpus")
    parser.add_argument("--worlds", type=int, default=4, help="and half as many corpora of the demo")
    parser.add_argument("--rates", type=float, nargs="+", default=[8.0, 16.0, 32.0])
    parser.add_argument("--data", type=Path, help="a folder of corpora, instead of those of the pocket model")
    parser.add_argument("--corpora", nargs="+", help="of these names alone, such as xquad/4000/0")
    parser.add_argument("--dtype", help="of the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    tell_progress()
    torch.set_num_threads(1)
    model = LoadedModel.get(arguments.model, **({"dtype": arguments.dtype} if arguments.dtype else {}))
    rows: list[Measured] = []
    if arguments.data:
        for name, folder in find_corpora(arguments.data).items():
            if not arguments.corpora or name in arguments.corpora:
                rows += measure_real(model, read_corpus(folder, name), arguments.rates, arguments.questions)
        _report(rows, arguments)
        return
    for family, corpus in corpora(arguments.levels, arguments.questions, arguments.worlds, arguments.seed):
        rates = arguments.rates if family == "connectivity" else arguments.rates[:2]  # the others are small
        rows += list(measure(model, family, corpus, rates))
    _report(rows, arguments)


def _report(rows: Sequence[Measured], arguments: argparse.Namespace) -> None:
    """Tables, and the rows in a file if one is wanted."""
    console = Console(file=sys.stdout, width=160)
    for table in tables(rows):
        console.print(table)
    if arguments.json:
        setup = {**{k: v for k, v in vars(arguments).items() if k not in ("json", "data")}, "torch": torch.__version__}
        write_rows(arguments.json, {"setup": setup, "rows": [*rows]})


if __name__ == "__main__":
    main()
