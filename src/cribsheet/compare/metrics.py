"""How an answer is judged against the gold, and how sure the mean of many judgements is.

Normalisation and word F1 are those of SQuAD (Rajpurkar et al., arXiv 1606.05250, section 6); set F1 splits answers
at commas, semicolons and "and" as the CacheNotes evaluation does, since the order of a list does not matter.
ROUGE-L is that of Lin (2004), F1 of the longest common subsequence of words.
"""

from __future__ import annotations

import random
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SEPARATORS = re.compile(r"\s*(?:[,;/\n]|\band\b)\s*")
_LETTER = re.compile(r"\b[A-F]\b")


def normalise(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """1 if the answer equals any gold after normalisation."""
    return float(any(normalise(answer) == normalise(gold) for gold in golds))


def word_f1(answer: str, golds: Sequence[str]) -> float:
    """Best F1 of the answer's words against those of a gold."""
    return max(_f1(Counter(normalise(answer).split()), Counter(normalise(gold).split())) for gold in golds)


def set_f1(answer: str, golds: Sequence[str]) -> float:
    """Best F1 of the answer's items against those of a gold; for lists."""
    return max(_f1(Counter(_items(answer)), Counter(_items(gold))) for gold in golds)


def included(answer: str, golds: Sequence[str]) -> float:
    """1 if the words of a gold stand in the answer, in their order and without others between them."""
    said = f" {normalise(answer)} "
    return float(any(f" {normalise(gold)} " in said for gold in golds))


def same_letter(answer: str, golds: Sequence[str]) -> float:
    """1 if the first letter from A to F that stands alone in the answer is a gold; for multiple choice."""
    found = _LETTER.search(answer)
    return float(found is not None and found[0] in golds)


def rouge_l(answer: str, golds: Sequence[str]) -> float:
    """Best ROUGE-L of the answer against a gold; for summaries."""
    return max(_rouge(normalise(answer).split(), normalise(gold).split()) for gold in golds)


def clustered_interval(
    scores: Sequence[float], clusters: Sequence[object], *, seed: int = 0, draws: int = 1000
) -> tuple[float, float]:
    """95 % bootstrap interval of the mean; whole clusters are drawn, as their members stand or fall together."""
    groups: dict[object, list[float]] = {}
    for score, cluster in zip(scores, clusters, strict=True):
        groups.setdefault(cluster, []).append(score)
    sums = [(sum(group), len(group)) for group in groups.values()]
    draw = random.Random(seed)
    means = sorted(_pooled([draw.choice(sums) for _ in sums]) for _ in range(draws))
    return means[int(0.025 * draws)], means[min(draws - 1, int(0.975 * draws))]


Metric = Callable[[str, Sequence[str]], float]


def _items(text: str) -> set[str]:
    return {item for part in _SEPARATORS.split(text) if (item := normalise(part))}


def _rouge(answer: Sequence[str], gold: Sequence[str]) -> float:
    longest = [0] * (len(gold) + 1)  # common subsequence of the answer so far with each beginning of the gold
    for word in answer:
        before = 0
        for at, other in enumerate(gold, 1):
            before, longest[at] = longest[at], before + 1 if word == other else max(longest[at], longest[at - 1])
    total = len(answer) + len(gold)
    return 2 * longest[-1] / total if total else 1.0


def _f1(answer: Counter[str], gold: Counter[str]) -> float:
    shared = sum((answer & gold).values())
    total = sum(answer.values()) + sum(gold.values())
    return 2 * shared / total if total else 1.0


def _pooled(groups: Sequence[tuple[float, int]]) -> float:
    return sum(total for total, _ in groups) / sum(count for _, count in groups)
