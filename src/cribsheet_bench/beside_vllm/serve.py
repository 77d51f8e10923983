"""One vLLM, asked in both ways: how fast, how soon, with how much memory, and whether the words are ours.

    python -m cribsheet_bench.beside_vllm.serve FOLDER SETTINGS

In whole contexts the tokens of all documents stand before each question, and vLLM's prefix caching keeps them as long
as it has blocks. It is one server, so both ways have the same memory; its cache is emptied between them.
"""

from __future__ import annotations

import json
import logging
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cribsheet.compare.questions import Asked as Question
from cribsheet.engines.vllm.scheduling import KEY
from cribsheet_bench.beside_vllm.work import PLAIN, SHEETS, WHOLE, Asked, Work, add_rows
from cribsheet_bench.command import tell_progress

logger = logging.getLogger(__name__)

_CLOSE = 0.1  # nats: what other kernels may turn around


@dataclass
class Came:
    """What came of questions that were asked at once: answers, seconds, blocks that were in use at most."""

    texts: list[str]
    tokens: list[list[int]]
    first: list[float]
    cached: list[int]
    seconds: float
    used: float = 0.0
    failed: list[int] = field(default_factory=list)


class Server:
    """vLLM in this process, with the sheets of a work."""

    def __init__(self, folder: Path, work: Work, settings: dict[str, Any]) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that its blocks can be counted
        from vllm import LLM, SamplingParams
        from vllm.config import KVTransferConfig

        self.work, self._params = work, SamplingParams
        sheets = {str(number): str(folder / corpus.file) for number, corpus in enumerate(work.corpora)}
        began = time.perf_counter()
        self._llm = LLM(
            model=work.model,
            dtype=settings["dtype"],
            max_model_len=max(len(each.whole) for each in work.corpora) + 256,
            block_size=settings["block"],
            num_gpu_blocks_override=settings["blocks"],
            max_num_seqs=settings["at_once"],
            enable_prefix_caching=True,
            generation_config="vllm",
            seed=0,
            kv_transfer_config=KVTransferConfig(
                kv_connector="CribsheetConnector",
                kv_role="kv_both",
                kv_connector_module_path="cribsheet.engines.vllm",
                kv_connector_extra_config={"sheets": sheets},
            ),
            **settings["vllm"],
        )
        self.seconds = time.perf_counter() - began
        self._core = self._llm.llm_engine
        self._caches = self._core.engine_core.engine_core.scheduler.kv_cache_manager
        self.blocks = self._caches.block_pool.num_gpu_blocks
        self._asked = 0

    def forget(self) -> None:
        """Empty the prefix cache."""
        self._llm.reset_prefix_cache()

    def ask(self, asked: Sequence[tuple[Asked, str]]) -> Came:
        """Ask questions, each in its way, all at once."""
        numbers = {}
        came = Came([], [], [0.0] * len(asked), [0] * len(asked), 0.0)
        outputs: dict[int, Any] = {}
        began = time.perf_counter()
        for number, (question, way) in enumerate(asked):
            self._asked += 1
            numbers[str(self._asked)] = number
            self._core.add_request(
                str(self._asked), {"prompt_token_ids": self._prompt(question, way)}, self._how(question, way)
            )
        while self._core.has_unfinished_requests():
            for output in self._core.step():
                number = numbers[output.request_id]
                if number not in outputs and output.outputs[0].token_ids:
                    came.first[number] = time.perf_counter() - began
                outputs[number] = output
            came.used = max(came.used, self._caches.usage)
        came.seconds = time.perf_counter() - began
        for number in range(len(asked)):
            answer = outputs[number].outputs[0]
            came.texts.append(answer.text)
            came.tokens.append(list(answer.token_ids))
            came.cached[number] = outputs[number].num_cached_tokens or 0
            if answer.finish_reason not in ("stop", "length"):
                came.failed.append(number)
        return came

    def _prompt(self, question: Asked, way: str) -> list[int]:
        corpus = self.work.corpora[question.corpus]
        before = {SHEETS: corpus.ids, WHOLE: corpus.whole}.get(way)
        return question.plain if before is None else [*before, *question.ids]

    def _how(self, question: Asked, way: str) -> Any:
        named = {"kv_transfer_params": {KEY: str(question.corpus)}} if way == SHEETS else None
        return self._params(
            temperature=0.0,
            max_tokens=question.longest,
            stop_token_ids=self.work.ends,
            stop=self.work.stops or None,
            extra_args=named,
        )


def serve(folder: Path, settings: dict[str, Any]) -> None:
    """Ask in the ways of `settings["parts"]`, and add a row of each to the folder's rows."""
    work = Work.read(folder)
    server = Server(folder, work, settings)
    import vllm

    about = {
        "dtype": settings["dtype"],
        "vllm": vllm.__version__,
        "blocks": server.blocks,
        "limited": settings["blocks"] is not None,
        "started": round(server.seconds, 1),
    }
    logger.info("vLLM %(vllm)s in %(dtype)s: %(blocks)d blocks, started in %(started)s s", about)
    file = folder / "rows.jsonl"
    for part in settings["parts"]:
        for row in PARTS[part](server, settings):
            row = {"part": part, **about, **row}
            logger.info("%s", json.dumps(row, ensure_ascii=False))
            add_rows(file, [row])


def same_words(server: Server, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Whether the words are ours, where they are not how near the call was, and how often either is right."""
    dtype = settings["dtype"]
    asked = [each for each in server.work.asked if dtype in each.ours]
    rows = []
    for again in (False, True):
        came = server.ask([(each, SHEETS) for each in asked])
        pairs = [(each.ours[dtype], tokens) for each, tokens in zip(asked, came.tokens, strict=True)]
        partings = [margin for ours, tokens in pairs if (margin := server.work.parting(ours, tokens)) is not None]
        rows.append(
            {
                "again": again,
                "questions": len(asked),
                "corpora": len({each.corpus for each in asked}),
                "same": len(asked) - len(partings),
                "close": sum(margin < _CLOSE for margin in partings),
                "widest": round(max(partings, default=0.0), 3),
                "ours_score": _score(asked, [each.ours[dtype].text for each in asked]),
                "score": _score(asked, came.texts),
                "failed": len(came.failed),
            }
        )
    return rows


def _score(asked: Sequence[Asked], texts: Sequence[str]) -> float:
    """Mean score in points."""
    marks = [
        Question(each.text, tuple(each.golds), each.type).marks(text)[1]
        for each, text in zip(asked, texts, strict=True)
    ]
    return round(100 * statistics.fmean(marks), 1)


def speed(server: Server, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Many questions at once, about one corpus and about all, if more, in turns: nothing cached, then again."""
    rows = []
    for corpora in sorted({1, len(server.work.corpora)}):
        asked = _many(server.work, corpora, settings["questions"])
        for way in (SHEETS, WHOLE):
            server.ask([(each, way) for each in asked[:2]])  # kernels of these lengths are compiled
            server.forget()
            for warm in (False, True):
                came = server.ask([(each, way) for each in asked])
                rows.append({"corpora": corpora, "way": way, "warm": warm, **_measured(server, asked, came, way)})
    return rows


def _many(work: Work, corpora: int, count: int) -> list[Asked]:
    """Different questions, in turns about so many corpora; where these have too few, others' are put to them too."""
    own = [[each for each in work.asked if each.corpus == corpus] for corpus in range(corpora)]
    turns = [each for row in zip(*own, strict=False) for each in row]
    others = [each for each in work.asked if each.corpus >= corpora]
    return [*turns, *(replace(each, corpus=n % corpora, golds=[]) for n, each in enumerate(others))][:count]


def _measured(server: Server, asked: Sequence[Asked], came: Came, way: str) -> dict[str, Any]:
    """A row: seconds, questions a second, first tokens, and what of vLLM's blocks was in use at most."""
    own = [(each, text) for each, text in zip(asked, came.texts, strict=True) if each.golds]
    first = sorted(came.first)
    corpora = [server.work.corpora[number] for number in sorted({each.corpus for each in asked})]
    return {
        "questions": len(asked),
        "seconds": round(came.seconds, 3),
        "questions_a_second": round(len(asked) / came.seconds, 1),
        "first_median": round(statistics.median(first), 3),
        "first_last": round(first[-1], 3),
        "tokens": sum(map(len, came.tokens)),
        "cached": sum(came.cached),
        "used_blocks": round(came.used * server.blocks),
        "kept_bytes": sum(each.nbytes if way == SHEETS else each.whole_nbytes for each in corpora),
        "before": round(statistics.fmean(len(each.ids if way == SHEETS else each.whole) for each in corpora)),
        "score": _score(*zip(*own, strict=True)),
        "failed": len(came.failed),
    }


def mixed(server: Server, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The same questions put to two sheets and to none, a hundred at once, against those of each kind asked alone."""
    by_kind = _kinds(server.work, settings["mixed"])
    alone = [server.ask(kind).texts for kind in by_kind]
    places = [(kind, place) for kind, asked in enumerate(by_kind) for place in range(len(asked))][: settings["mixed"]]
    random.Random(0).shuffle(places)
    came = server.ask([by_kind[kind][place] for kind, place in places])
    sheets = len(by_kind) - 1
    row = {"sheets": sheets, "requests": len(places), "same": 0, "crossed": 0, "differ_alone": 0}
    for (kind, place), text in zip(places, came.texts, strict=True):
        own, others = alone[kind][place], {alone[other][place] for other in range(len(alone)) if other != kind}
        row["same"] += text == own
        row["crossed"] += text != own and text in others
        row["differ_alone"] += own not in others
    return [{**row, "failed": len(came.failed), "seconds": round(came.seconds, 3)}]


def _kinds(work: Work, count: int) -> list[list[tuple[Asked, str]]]:
    """Questions put to two sheets, or to the only one, and to none: of each kind a list, `count` or more together."""
    ways = [*((corpus, SHEETS) for corpus in range(min(2, len(work.corpora)))), (0, PLAIN)]
    asked = sorted(work.asked, key=lambda each: each.corpus > 0)[: -(-count // len(ways))]
    return [[(replace(each, corpus=corpus), way) for each in asked] for corpus, way in ways]


PARTS: dict[str, Callable[[Server, dict[str, Any]], list[dict[str, Any]]]] = {
    "same words": same_words,
    "speed": speed,
    "mixed": mixed,
}

if __name__ == "__main__":
    tell_progress()
    serve(Path(sys.argv[1]), json.loads(sys.argv[2]))
