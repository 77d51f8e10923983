"""What a study will take, before it begins: its sizes by arithmetic, its time from a few questions and exercises here.

The time of a step is that of a few exercises, as far as more of them take longer. Accelerators are quicker with many
than with few, so there the figures are rather too high.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from cribsheet.asking.session import Session
from cribsheet.errors import RequestError
from cribsheet.model.backbone import Backbone
from cribsheet.sheet.sheet import Sheet
from cribsheet.study.exercises import Exercise
from cribsheet.study.learner import trainer_of
from cribsheet.study.practice import ROUNDS, try_out
from cribsheet.study.study import (
    FEW_STEPS,
    MOST_STEPS,
    USUAL_STEPS,
    check,
    few_steps,
    practice_seconds,
    questions_wanted,
    usual_seconds,
)
from cribsheet.study.trainer import Trainer, batch_size, weights_fixed

_FEW = 4  # exercises that are timed together
_LEARNT = 6  # tensors in float32: what there was, the shift, its gradient, two moments, and the best
_SCORES = 4  # copies of a layer's scores on the way back


@dataclass(frozen=True, slots=True)
class StudyForecast:
    """Estimates: counts, seconds and bytes; `peak_bytes` counts tensors, not Python and its libraries.

    tried
        questions that the model will write in `practice_seconds`; how many of them may serve, only practice shows.
    steps
        of training, of `step_seconds` each, if it does not end before, as nothing comes of more.
    usual_seconds
        what a study would take in which there is time for `USUAL_STEPS`.
    measured_seconds
        what the measurement took that all of this rests on.
    """

    tried: int
    practice_seconds: float
    steps: int
    step_seconds: float
    seconds: float
    usual_seconds: float
    peak_bytes: int
    measured_seconds: float

    @property
    def is_short(self) -> bool:
        """Whether there are too few steps to learn much."""
        return self.steps < FEW_STEPS

    def __str__(self) -> str:
        """In two lines, and a third where the steps are too few."""
        few = f"\n{few_steps(self.steps, self.usual_seconds / 60)}" if self.is_short else ""
        return (
            f"about {self.seconds:.0f} s: some {self.tried:,} questions in {self.practice_seconds:.0f} s, then "
            f"{self.steps:,} steps of {self.step_seconds:.2f} s; memory at most about {self.peak_bytes / 1e6:,.0f} MB "
            "besides Python and its libraries\n"
            f"estimated from a few questions and exercises, which took {self.measured_seconds:.1f} s here; it may be "
            f"half as many steps, or half as many again{few}"
        )


def forecast_study(session: Session, *, minutes: float | None = None, steps: int | None = None) -> StudyForecast:
    """What `study` with the same minutes or steps would take; raises what it would before it begins.

    Raises `RequestError` too if the documents give no exercise at all.
    """
    check(minutes, steps, session.backbone)
    began = time.monotonic()
    tried = try_out(session.loaded, session.layout, session.sheet)
    if not tried.exercises:
        raise RequestError("The documents are too short for a single exercise; nothing can be studied in them.")
    step = _step_seconds(session, tried.exercises)
    question, rest = tried.seconds / max(1, tried.tried), tried.rest / max(1, tried.tried)
    if minutes is None:
        count = ROUNDS * tried.each_round
        most, usual = steps or MOST_STEPS, count * (question + rest) + USUAL_STEPS * step
    else:
        enough = questions_wanted(session.sheet) * tried.seconds / max(1, tried.questions)
        count = round(practice_seconds(60 * minutes, enough) / question) if question else 0
        left = 60 * minutes - count * (question + rest)
        most, usual = min(steps or MOST_STEPS, max(1, int(left / step))), usual_seconds(step, enough)
    practice = count * (question + rest)
    return StudyForecast(
        tried=count,
        practice_seconds=practice,
        steps=most,
        step_seconds=step,
        seconds=practice + most * step,
        usual_seconds=usual,
        peak_bytes=peak_bytes(session.backbone, session.sheet, max(len(each.ids) for each in tried.exercises)),
        measured_seconds=time.monotonic() - began,
    )


def _step_seconds(session: Session, exercises: list[Exercise]) -> float:
    """Those of a step, from one exercise and from a few: the longest, as all of a batch take as long as these."""
    few = (sorted(exercises, key=lambda each: len(each.ids), reverse=True) * _FEW)[:_FEW]
    trainer = trainer_of(session.backbone, session.sheet, few, [], few)
    with weights_fixed(session.backbone):
        _seconds(session, trainer, few[:1])  # whatever is made at a first use
        one, all_of_them = _seconds(session, trainer, few[:1]), _seconds(session, trainer, few)
    return all_of_them + (batch_size(session.backbone) - _FEW) * max(0.0, all_of_them - one) / (_FEW - 1)


def _seconds(session: Session, trainer: Trainer, exercises: list[Exercise]) -> float:
    session.backbone.wait()
    began = time.monotonic()
    trainer.gradients(exercises)
    session.backbone.wait()
    return time.monotonic() - began


def peak_bytes(backbone: Backbone, sheet: Sheet, longest: int) -> int:
    """Bytes of tensors at once, where an exercise has so many tokens: weights, what is learnt, and a batch on its way.

    Of a batch there stay what each layer's products need on the way back, and the scores of one layer, of which the
    others are computed again.
    """
    config, size, rows = backbone.config, backbone.dtype.itemsize, batch_size(backbone) * longest
    held = math.prod(sheet.indices.shape[:2]) * sheet.tokens
    learnt = 2 * _LEARNT * held * backbone.head_size * torch.float32.itemsize
    wide: int = getattr(config, "intermediate_size", 4 * config.hidden_size)
    heads = (backbone.num_heads + 2 * backbone.kv_heads) * backbone.head_size
    each = size * (3 * wide + config.hidden_size + heads) + 8 * config.hidden_size  # norms are in float32
    passing = rows * backbone.num_layers * each
    scores = 4 * _SCORES * rows * backbone.num_heads * (sheet.length + longest)
    logits = rows * config.vocab_size * (size + 12)
    return int(backbone.weight_bytes + learnt + passing + max(scores, logits))
