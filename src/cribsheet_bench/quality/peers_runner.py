"""Run by another interpreter, one that has kvpress: `python peers_runner.py JOB RESULTS`. It imports nothing of ours.

JOB is JSON that `peers.py` writes, prompts as token ids; RESULTS gets one JSON object a line. What fails is a line too.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

FULL = "full cache"
Answered = dict[str, Any]
Read = tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor, Any, dict[str, Any]]


@dataclass(frozen=True)
class Way:
    """How a press is made from kvpress and the guide's length, whether it reads the guide, and whether that stays."""

    make: Callable[[Any, int], Any]
    guided: bool = False
    kept: bool = False


def _finch(kv: Any, window: int) -> Any:
    press = kv.FinchPress()
    press.delimiter_token_id, press.window_size = -1, window  # the window's size is known: no delimiter is searched for
    return press


WAYS: dict[str, Way] = {
    "FinchPress": Way(_finch, guided=True, kept=True),
    "FinchPress, guide dropped": Way(_finch, guided=True),
    "SnapKV, guide dropped": Way(lambda kv, window: kv.SnapKVPress(window_size=window), guided=True),
    "AdaKV(SnapKV), guide dropped": Way(
        lambda kv, window: kv.AdaKVPress(kv.SnapKVPress(window_size=window)), guided=True
    ),
    "CriticalKV(SnapKV), guide dropped": Way(
        lambda kv, window: kv.CriticalKVPress(kv.SnapKVPress(window_size=window)), guided=True
    ),
    "ExpectedAttention": Way(lambda kv, window: kv.ExpectedAttentionPress()),
    "AdaKV(ExpectedAttention)": Way(lambda kv, window: kv.AdaKVPress(kv.ExpectedAttentionPress())),
    "KVzip": Way(lambda kv, window: kv.KVzipPress()),
    "KeyDiff": Way(lambda kv, window: kv.KeyDiffPress()),
    "Compactor": Way(lambda kv, window: kv.CompactorPress()),
    "StreamingLLM": Way(lambda kv, window: kv.StreamingLLMPress()),
}


class Peer:
    """The model, with what every press needs to condense a case and to answer from what it left."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        torch.set_num_threads(job["threads"])
        torch.set_grad_enabled(False)
        dtype = getattr(torch, job["dtype"])
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, attn_implementation="sdpa")
        self.model = model.eval().to(job["device"])
        self.stop = set(job["stop"])

    def ids(self, ids: Sequence[int]) -> torch.Tensor:
        """Token ids (1, T) where the model is."""
        return torch.tensor([list(ids)], device=self.model.device)

    def prefill(self, ids: Sequence[int], press: Any = None) -> DynamicCache:
        """The cache that a press leaves of a prompt."""
        cache = DynamicCache()
        inputs = {"input_ids": self.ids(ids), "past_key_values": cache}
        if press is None:
            self.model.model(**inputs)
        else:
            with press(self.model):
                self.model.model(**inputs)
        return cache

    def read(self, ids: Sequence[int]) -> list[Read]:
        """What every attention layer reads and writes in a plain prefill: all that a press is told."""
        found: list[Read] = []

        def note(module: Any, _: Any, given: dict[str, Any], output: Any) -> None:
            layer = given["past_key_values"].layers[module.layer_idx]
            found.append((module, given["hidden_states"], layer.keys, layer.values, output[1], given))

        blocks = self.model.model.layers
        for block in blocks:
            block.self_attn.rotary_emb = self.model.model.rotary_emb  # presses look for it there
        hooks = [block.self_attn.register_forward_hook(note, with_kwargs=True) for block in blocks]
        try:
            self.prefill(ids)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def condensed(self, press: Any, read: Sequence[Read]) -> DynamicCache:
        """The cache that a press leaves of what was read; it acts after each layer and changes no later one."""
        press.post_init_from_model(self.model)
        cache = DynamicCache()
        for module, *told in read:
            module.masked_key_indices = None
            cache.update(*press.compress(module, *told), module.layer_idx)
        return cache

    def answers(
        self, cache: DynamicCache, start: int, questions: Sequence[Sequence[int]], most: int
    ) -> list[list[int]]:
        """Greedy answers of at most `most` tokens to questions at position `start`; the cache is left as it was."""
        lengths = [layer.keys.shape[2] for layer in cache.layers]
        found = []
        for question in questions:
            found.append(list(self._answer(cache, start, question, most)))
            for layer, length in zip(cache.layers, lengths, strict=True):
                layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        return found

    def _answer(self, cache: DynamicCache, start: int, question: Sequence[int], most: int) -> Iterator[int]:
        ids = self.ids(question)
        for _ in range(most):
            positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
            logits = self.model(ids, past_key_values=cache, position_ids=positions, logits_to_keep=1).logits
            start += ids.shape[1]
            token = int(logits[0, -1].argmax())
            if token in self.stop:
                return
            yield token
            ids = self.ids([token])

    def size(self, cache: DynamicCache) -> tuple[float, int, int]:
        """Kept tokens per layer and head, the bytes of these, and the bytes that the cache holds."""
        kept, heads, held, per_token = 0, 0, 0, 0
        for layer, block in zip(cache.layers, self.model.model.layers, strict=True):
            hidden = getattr(block.self_attn, "masked_key_indices", None)
            kept += layer.keys.shape[1] * layer.keys.shape[2] - (len(hidden[0]) if hidden is not None else 0)
            heads += layer.keys.shape[1]
            held += layer.keys.nbytes + layer.values.nbytes
            per_token = 2 * layer.keys.shape[3] * layer.keys.element_size()
        return kept / heads, kept * per_token, held


def answer(
    peer: Peer, kv: Any, name: str, case: Mapping[str, Any], budget: int, read: dict[int, list[Read]]
) -> Answered:
    """A press at one budget, which counts what is kept of the guide; `read` is what was read, by length of guide."""
    way, guide = WAYS[name], len(case["guide"])
    window = guide if way.guided else 0
    total, kept = len(case["context"]) + window, budget
    if way.kept and budget <= window:
        raise ValueError("its guide is as long as the budget")
    press = way.make(kv, window)
    if window and not way.kept:
        _forget(getattr(press, "press", press), window)
    press.compression_ratio = 1 - (kept + 0.5) / total  # presses keep the integral part of what is left
    torch.manual_seed(0)
    if name == "KVzip":  # reads the context again, so it has to be there
        cache = peer.prefill(case["context"], press)
    else:
        if window not in read:
            read[window] = peer.read([*case["context"], *(case["guide"] if window else ())])
        cache = peer.condensed(press, read[window])
    tokens, nbytes, held = peer.size(cache)
    rotated = name.startswith("FinchPress")
    start = cache.get_seq_length() if rotated else len(case["context"]) + (window if way.kept else 0)
    found = peer.answers(cache, start, case["after_guide" if way.kept else "questions"], case["most"])
    return {"tokens": tokens, "bytes": nbytes, "held": held, "answers": found}


def _forget(press: Any, window: int) -> None:
    """Presses give their window the best score; give it the worst, so that the guide is dropped."""
    plain = press.score

    def score(*args: Any, **kwargs: Any) -> torch.Tensor:
        scores: torch.Tensor = plain(*args, **kwargs)
        scores[..., -window:] = scores.min() - 1
        return scores

    press.score = score


def finch_keeps(peer: Peer, case: Mapping[str, Any], budget: int) -> dict[str, Any]:
    """The context's tokens (layers, heads, budget) that FinchPress keeps beside its window.

    As it is; without its weights by visible tokens; and so with one set of tokens for all heads of a layer.
    """
    import kvpress
    from kvpress.presses import finch_press

    found: dict[str, list[list[list[int]]]] = {}
    plain = finch_press.KeyRerotationPress
    window, length = len(case["guide"]), len(case["context"])
    forms = {"as it is": False, "without weights": False, "without weights, one set per layer": True}
    for name, one_set in forms.items():
        press = _finch(kvpress, window)
        layers: list[list[list[int]]] = []
        press.normalize_scores = name == "as it is"
        press.compression_ratio = 1 - (budget + window + 0.5) / (length + window)
        if one_set:
            _pool(press)

        def turn(module: Any, indices: torch.Tensor, keys: torch.Tensor, to: list[Any] = layers) -> torch.Tensor:
            to.append([[i for i in head if i < length] for head in indices[0].tolist()])
            turned: torch.Tensor = plain.rerotate_keys(module, indices, keys)
            return turned

        finch_press.KeyRerotationPress = SimpleNamespace(rerotate_keys=turn)
        try:
            peer.prefill([*case["context"], *case["guide"]], press)
        finally:
            finch_press.KeyRerotationPress = plain
        found[name] = layers
    return {"kept": found}


def _pool(press: Any) -> None:
    plain = press.score

    def score(*args: Any, **kwargs: Any) -> torch.Tensor:
        scores: torch.Tensor = plain(*args, **kwargs)
        return scores.mean(1, keepdim=True).expand_as(scores).contiguous()

    press.score = score


def build_times(peer: Peer, job: Mapping[str, Any]) -> dict[str, Any]:
    """Median processor seconds of a plain prefill and of FinchPress, in turn."""
    import kvpress

    context, guide = job["context"], job["guide"]
    times: dict[str, list[float]] = {"plain prefill": [], "FinchPress": []}
    for _ in range(job["rounds"]):
        for name, ids in (("plain prefill", context), ("FinchPress", [*context, *guide])):
            press = _finch(kvpress, len(guide)) if name == "FinchPress" else None
            if press:
                press.compression_ratio = 1 - (job["budget"] + len(guide) + 0.5) / len(ids)
            began = time.process_time()
            peer.prefill(ids, press)
            times[name].append(time.process_time() - began)
    return {"seconds": {name: median(each) for name, each in times.items()}}


def work(job: Mapping[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
    """Everything that a job asks for, told line by line."""
    peer = Peer(job)
    tell({"versions": {"transformers": transformers.__version__, "torch": torch.__version__, "kvpress": _version()}})
    for case in job["cases"]:
        if job["full"]:
            tell({"case": case["name"], "press": FULL, "rate": 1.0, **_full(peer, case)})
        read: dict[int, list[Read]] = {}
        for name in job["presses"]:
            for rate, budget in case["budgets"]:
                where = {"case": case["name"], "press": name, "rate": rate}
                _try(tell, where, partial(_answer, peer, name, case, budget, read))
    for case in job["finch"]:
        for rate, budget in case["budgets"]:
            where = {"finch": case["name"], "rate": rate}
            _try(tell, where, partial(finch_keeps, peer, case, budget))
    if job["timing"]:
        _try(tell, {"build": True}, partial(build_times, peer, job["timing"]))


def _full(peer: Peer, case: Mapping[str, Any]) -> Answered:
    cache = peer.prefill(case["context"])
    tokens, nbytes, held = peer.size(cache)
    found = peer.answers(cache, len(case["context"]), case["questions"], case["most"])
    return {"tokens": tokens, "bytes": nbytes, "held": held, "answers": found}


def _answer(peer: Peer, name: str, case: Mapping[str, Any], budget: int, read: dict[int, list[Read]]) -> Answered:
    import kvpress  # a run without it says so for each press, and still compares full caches

    return answer(peer, kvpress, name, case, budget, read)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("kvpress")
    except PackageNotFoundError:
        return "not installed"


def _try(tell: Callable[[dict[str, Any]], None], where: dict[str, Any], what: Callable[[], dict[str, Any]]) -> None:
    try:
        tell({**where, **what()})
    except Exception as error:  # whatever a press raises is its result
        tell({**where, "error": f"{type(error).__name__}: {error}"[:300]})


def main() -> None:
    """Read the job, write the results."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with open(sys.argv[2], "w", encoding="utf-8") as out:

        def tell(line: dict[str, Any]) -> None:
            out.write(json.dumps(line) + "\n")
            out.flush()

        work(job, tell)


if __name__ == "__main__":
    main()
