"""Several sheets, one question: does the router find the right sheet, and what do two sheets behind one question lose?

    python -m cribsheet_bench.routing --worlds 6 --rate 4

One sheet for each held-out world of the quality bench, each with a task of its own. Every question is routed among all
sheets, and answered by its own sheet, by the routed one, and by its own combined with the next one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

from cribsheet.asking.router import Router
from cribsheet.compare.journal import write_rows
from cribsheet.compare.metrics import exact_match, set_f1
from cribsheet.corpus.documents import Document
from cribsheet.engine.pool import LoadedModel
from cribsheet.llm import CompressedKnowledgeLLM
from cribsheet_bench.command import begin, options
from cribsheet_bench.quality.run import Case, held_out_cases, setup

logger = logging.getLogger(__name__)


def measure(model: LoadedModel, cases: Sequence[Case], rate: float, scorer: str) -> dict[str, Any]:
    """Shares of all questions: routed to their own sheet, and answered right by each way."""
    sheets = [
        CompressedKnowledgeLLM.build(_renamed(case), case.task, model=model, rate=rate, scorer=scorer) for case in cases
    ]
    router = Router(sheets)
    found: dict[str, list[float]] = {"routed": [], "own sheet": [], "router": [], "combined": []}
    for number, case in enumerate(cases):
        combined = sheets[number - 1].combine(sheets[number])
        for question, gold in zip(case.questions, case.answers, strict=True):
            chosen = router.route(question)
            found["routed"].append(float(chosen is sheets[number]))
            for way, kb in (("own sheet", sheets[number]), ("router", chosen), ("combined", combined)):
                found[way].append(_right(kb.ask(question, max_tokens=64, evidence=False).text, gold))
        logger.info("world %s: %d questions", case.name, len(case.questions))
    return {"n": len(found["routed"]), **{way: round(sum(all_) / len(all_), 3) for way, all_ in found.items()}}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the bench from the command line."""
    parser = options(__doc__, written="write the result there")
    parser.add_argument("--worlds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--rate", type=float, default=4.0)
    parser.add_argument("--scorer", default="recall")
    arguments = parser.parse_args(argv)
    model = begin(arguments)
    cases = held_out_cases(arguments.worlds, arguments.tokens, arguments.seed)
    result = {"setup": setup(model, arguments), **measure(model, cases, arguments.rate, arguments.scorer)}
    logger.info("%s", json.dumps(result))
    if arguments.json:
        write_rows(arguments.json, result)


def _renamed(case: Case) -> list[Document]:
    """Documents of different worlds have the same ids."""
    return [Document(text=each.text, id=f"{case.name}/{each.id}") for each in case.documents]


def _right(text: str, gold: str) -> float:
    return exact_match(text, [gold]) if "," not in gold else float(set_f1(text, [gold]) == 1)


if __name__ == "__main__":
    main()
