"""Sheets for vLLM of several corpora, what our engine answers from them, and the prompts of both ways.

python -m cribsheet_bench.beside_vllm.prepare FOLDER SETTINGS
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from cribsheet.asking.outside.prompts import Prompts
from cribsheet.compare.compare import Corpus as Told
from cribsheet.compare.questions import Asked as Question
from cribsheet.engine.pool import LoadedModel
from cribsheet.forecast import kept_bytes
from cribsheet.llm import CompressedKnowledgeLLM
from cribsheet.model.backbone import Backbone
from cribsheet.prompt.chunks import TokenizedCorpus
from cribsheet.prompt.template import ChatLayout
from cribsheet.sheet.sheet import Sheet
from cribsheet.vocabulary import StorageDtype
from cribsheet_bench.beside_vllm.work import Asked, Corpus, Ours, Work
from cribsheet_bench.command import tell_progress
from cribsheet_bench.quality.several import Sheets
from cribsheet_bench.real.case import most_tokens
from cribsheet_bench.real.corpora import find_corpora, read_corpus

logger = logging.getLogger(__name__)


def prepare(folder: Path, settings: dict[str, Any]) -> None:
    """Build, export, ask, and leave the work in `folder`. `settings` are those of `run.py`."""
    told = [read_corpus(place, name) for name, place in _chosen(settings)]
    model = _loaded(settings, settings["dtypes"][0])
    held: StorageDtype = "float32" if model.backbone.dtype.itemsize == 4 else "float16"  # vLLM's caches
    corpora, sheets, asked = [], [], []
    for number, corpus in enumerate(told):
        began = time.perf_counter()
        sheet, whole = _sheet(model.backbone, corpus, settings)
        sheet.export(folder / f"{number}.vllm", to="vllm")
        prompts = Prompts(sheet, model.backbone.tokenizer)
        nbytes, whole_nbytes = (kept_bytes(model.backbone, len(ids), held) for ids in (prompts.ids, whole))
        corpora.append(Corpus(corpus.name, f"{number}.vllm", prompts.ids, whole, nbytes, whole_nbytes))
        asked += [
            _asked(number, each, prompts, model.backbone.tokenizer) for each in corpus.questions[: settings["each"]]
        ]
        sheets.append(sheet)
        seconds = time.perf_counter() - began
        logger.info("%s: %d tokens, %d in the sheet, %.1f s", corpus.name, len(whole), sheet.length, seconds)
    for dtype in settings["dtypes"]:
        model = _loaded(settings, dtype)
        for number, sheet in enumerate(sheets):
            _ask(model, sheet, [each for each in asked if each.corpus == number], dtype)
    ends, stops = sorted(model.backbone.eos_ids), list(ChatLayout(model.backbone.tokenizer).stop)
    Work(settings["model"], corpora, asked, ends, stops).write(folder)


def _loaded(settings: dict[str, Any], dtype: str) -> LoadedModel:
    return LoadedModel.get(settings["model"], device=settings["device"], dtype=dtype)


def _chosen(settings: dict[str, Any]) -> Iterator[tuple[str, Path]]:
    """Corpora by the beginnings of their names, as many as are wanted."""
    only = tuple(settings["only"]) or ("",)
    found = find_corpora(settings["corpora"]).items()
    return islice(((name, place) for name, place in found if name.startswith(only)), settings["count"])


def _sheet(backbone: Backbone, corpus: Told, settings: dict[str, Any]) -> tuple[Sheet, list[int]]:
    """A sheet for vLLM with the guide in it, and the tokens of everything with the guide behind."""
    layout, sheets = ChatLayout(backbone.tokenizer), Sheets(backbone, corpus.documents)
    whole = TokenizedCorpus.build(corpus.documents, layout.preamble(corpus.task.instruction), layout.encoder)
    budget = int(len(whole) / settings["rate"]) // settings["block"] * settings["block"]
    sheet = sheets.build(corpus.task, budget=budget, guide="resident", for_engines=True)
    return sheet, [*whole.ids.tolist(), *sheets.guide(corpus.task).tolist()]


def _asked(corpus: int, question: Question, prompts: Prompts, tokenizer: Any) -> Asked:
    turns = [{"role": "user", "content": question.text}]
    plain = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    longest, golds = most_tokens(question), list(question.golds)
    return Asked(
        corpus, question.text, question.type, golds, prompts.question(question.text), list(plain), longest, ours={}
    )


def _ask(model: LoadedModel, sheet: Sheet, asked: Sequence[Asked], dtype: str) -> None:
    """Ask our engine about a sheet, all questions at once."""
    began = time.perf_counter()
    with CompressedKnowledgeLLM(model, sheet) as kb, ThreadPoolExecutor(len(asked)) as pool:

        def ask(each: Asked) -> Ours:
            answer = kb.ask(each.text, max_tokens=each.longest, evidence=False, logprobs=2)
            tokens = answer.logprobs or ()
            margins = [token.top[0][1] - token.top[1][1] for token in tokens]
            return Ours(answer.text, [token.token_id for token in tokens], margins)

        for each, ours in zip(asked, pool.map(ask, asked), strict=True):
            each.ours[dtype] = ours
    logger.info("ours in %s: %d answers, %.1f s", dtype, len(asked), time.perf_counter() - began)


if __name__ == "__main__":
    tell_progress()
    prepare(Path(sys.argv[1]), json.loads(sys.argv[2]))
