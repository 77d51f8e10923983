"""What `auto` can know: how well measured signals tell right answers of a sheet from wrong ones.

    python -m cribsheet.bench.certainty --worlds 8 --json certainty.json

Held-out worlds of the pocket model, a sheet for each world and rate, every kind of question, also such as the documents
do not answer. Reported: how often each signal ranks a right answer above a wrong one (0.5 is chance), and, for some
thresholds, how many drafts are taken and how many of those are right.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cribsheet.attention import column_mass
from cribsheet.bench.questions import Asked
from cribsheet.documents import Document
from cribsheet.hybrid import gain
from cribsheet.llm import CompressedKnowledgeLLM
from cribsheet.loaded import LoadedModel
from cribsheet.task import Task

_EXAMPLES, _QUESTIONS = 3, 12


@dataclass(frozen=True, slots=True)
class Signals:
    """A draft of the sheet: whether it is right, and what was measured of it. Logarithms are natural.

    `least` and `mean` are the log-probabilities of its tokens; `gain` is how much of the mean the sheet adds to that
    without documents; `attention` is the share of the answer's attention that falls on kept tokens of the corpus.
    """

    world: int
    rate: float
    kind: str
    right: bool
    least: float
    mean: float
    gain: float
    attention: float


SIGNALS: dict[str, Callable[[Signals], float]] = {
    "least probability": lambda each: each.least,
    "mean log-probability": lambda each: each.mean,
    "gain": lambda each: each.gain,
    "attention on the sheet": lambda each: each.attention,
    "least probability, if the sheet gains": lambda each: each.least if each.gain >= 0.1 else -math.inf,
}


def measure(model: LoadedModel, worlds: int, tokens: int, rates: Sequence[float], scorer: str) -> Iterator[Signals]:
    """The signals of every draft."""
    from cribsheet_pocket.worlds import make_world

    for number in range(worlds):
        world = make_world(f"signals/{number}", tokens=tokens, questions=60)
        shown = [q for q in world.questions if q.kind != "absent"][:_EXAMPLES]
        asked = [q for q in world.questions if q not in shown][:_QUESTIONS]
        task = Task("Answer questions about the documents.", tuple((q.text, q.answer) for q in shown))
        documents = [Document(each.text, each.id) for each in world.documents]
        for rate in rates:
            kb = CompressedKnowledgeLLM.build(
                documents, task, rate=rate, scorer=scorer, allocation="uniform", model=model
            )
            for q in asked:
                yield _signals(kb, Asked(q.text, (q.answer,), q.kind), number, rate)
            kb.close()


def _share_on_documents(kb: CompressedKnowledgeLLM, asked: Tensor, said: Tensor) -> float:
    """Share of the attention of an answer's tokens (A,), after those of its question (T,), that documents get."""
    backbone, prefix = kb.backbone, kb.prefix
    read = backbone.read(prefix.layers, prefix.tokens, asked, said)
    inside = (kb.sheet.origins[:, 1] >= 0)[kb.sheet.places] & (kb.sheet.indices >= 0)  # (F, K, P)
    found = 0.0
    for number, at in enumerate(backbone.full):
        layer = read[at]
        mass = column_mass(
            layer.guide_queries, prefix.layers[at].keys, layer.guide_lse, scale=backbone.scale, softcap=backbone.softcap
        )
        found += float(mass.reshape(backbone.kv_heads, -1, mass.shape[1]).sum(1)[inside[number]].sum())
    return found / (backbone.num_heads * len(backbone.full) * max(1, len(said)))


def _signals(kb: CompressedKnowledgeLLM, question: Asked, world: int, rate: float) -> Signals:
    draft = kb.ask(question.text, max_tokens=40, logprobs=0)
    said = [each.logprob for each in draft.logprobs or ()] or [-math.inf]
    ids = torch.tensor([each.token_id for each in draft.logprobs or ()])
    asked = kb._question_ids(question.text)
    em, _, _ = question.judge(draft.text)
    mean = sum(said) / len(said)
    return Signals(
        world, rate, question.type, em == 1, min(said), mean, gain(kb, asked, draft),
        _share_on_documents(kb, asked, ids),
    )  # fmt: skip


def ranking(rows: Sequence[Signals], signal: Callable[[Signals], float]) -> float:
    """How often a right answer has a higher signal than a wrong one; ties count half."""
    right = [signal(each) for each in rows if each.right]
    wrong = [signal(each) for each in rows if not each.right]
    pairs = [(a > b) + 0.5 * (a == b) for a in right for b in wrong]
    return sum(pairs) / len(pairs) if pairs else 0.5


def main(argv: Sequence[str] | None = None) -> None:
    """Run the bench from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--worlds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--rates", type=float, nargs="+", default=[3.0, 8.0])
    parser.add_argument("--scorer", default="task")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = LoadedModel.get(arguments.model)
    rows = list(measure(model, arguments.worlds, arguments.tokens, arguments.rates, arguments.scorer))
    answered = [each for each in rows if each.kind != "absent"]
    table = Table("signal", f"all {len(rows)}", f"answerable {len(answered)}")
    for name, signal in SIGNALS.items():
        table.add_row(name, f"{ranking(rows, signal):.2f}", f"{ranking(answered, signal):.2f}")
    chosen = Table("least probability", "gain", "taken", "right of these", "of all right ones")
    for least in (0.3, 0.5, 0.7, 0.9):
        for least_gain in (-math.inf, 0.1, 0.5):
            taken = [each for each in rows if each.least >= math.log(least) and each.gain >= least_gain]
            right = sum(each.right for each in taken)
            chosen.add_row(
                f"{least:g}", f"{least_gain:g}", str(len(taken)), f"{right / max(1, len(taken)):.2f}",
                f"{right / max(1, sum(each.right for each in rows)):.2f}",
            )  # fmt: skip
    console = Console(file=sys.stdout)
    console.print(table)
    console.print(chosen)
    if arguments.json:
        setup = {**{k: v for k, v in vars(arguments).items() if k != "json"}, "torch": torch.__version__}
        lines = [json.dumps(asdict(each)) for each in rows]
        arguments.json.write_text(json.dumps({"setup": setup})[:-1] + ', "rows": [\n' + ",\n".join(lines) + "\n]}\n")


if __name__ == "__main__":
    main()
