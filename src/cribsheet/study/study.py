"""Study: an ordinary sheet becomes a better one of the same size, in the time that is given for it.

    practice    the model makes questions of the documents and answers them stretch by stretch (`study/practice.py`)
    training    keys and values are refined until the sheet answers as the stretches do (`study/trainer.py`)
    the sheet   with what was learnt, in its own storage type, if that is better on exercises that were held out

What it is worth, and where it is worth nothing: docs, "study".
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypedDict

from cribsheet.asking.session import Session
from cribsheet.compress.remembered import identity_digest
from cribsheet.errors import BudgetError, DocumentError, ModelError, RequestError, SheetError
from cribsheet.model.backbone import Backbone
from cribsheet.sheet.sheet import Sheet
from cribsheet.study.exercises import Draft, Exercise, Practice, practice_of
from cribsheet.study.learner import trainer_of, with_layers
from cribsheet.study.notebook import Notebook, read_draft, read_practice, write_draft, write_practice
from cribsheet.study.practice import make_practice
from cribsheet.study.trainer import Pace, State
from cribsheet.vocabulary import MOST_MINUTES

logger = logging.getLogger(__name__)

LEAST_QUESTIONS = 16  # of fewer, nothing can be learnt and held out
_MOST_HELD, _HELD = 48, 0.1
PRACTICE, _LATEST = 0.35, 0.6  # shares of the time in which practice is made, and if there is too little of it
_TOKENS = 16  # of the corpus for a question: where there are fewer questions, there is too little practice
MOST_STEPS = 1000  # more than that only repeats
USUAL_STEPS, FEW_STEPS = 150, 75  # in which hundreds of questions are learnt (decisions/0028), and too few for much
_TIMED = 3  # steps after which it is known what one takes: the first are slow
_BETTER = 0.02  # share of its divergence before by which a sheet must become better to be taken
_SAVED_EVERY = 30.0  # seconds

Told = Callable[[str, float], None]  # is told what is done now, and how much of it, 0 to 1


@dataclass(frozen=True, slots=True)
class Study:
    """What came of a study; it stands in the sheet's manifest, under `build`, if the sheet was changed.

    questions, texts
        exercises that were practised on, and `held_out` those that were not; about so many `documents`. So many
        others are `asides`, about other things.
    tried
        questions that the model wrote.
    usual_minutes
        those that a study of `USUAL_STEPS` steps would take, if they took as long as these did; 0 if none was made.
    before, after
        divergence on what was held out, in nats a token, of the sheet as it was and as it is now.
    steps
        of training, and `best_step` after which the sheet was at its best: 0 if it was not changed.
    """

    questions: int
    texts: int
    held_out: int
    documents: int
    tried: int
    before: float
    after: float
    steps: int
    best_step: int
    learning_rate: float
    seed: int
    seconds: float
    asides: int = 0
    usual_minutes: float = 0.0

    @property
    def learnt(self) -> bool:
        """Whether the sheet is better than before."""
        return self.best_step > 0

    def __str__(self) -> str:
        """In a line."""
        came = f"{self.questions} questions, {self.steps} steps, {self.seconds:.0f} s"
        if not self.learnt:
            few = f"; {few_steps(self.steps, self.usual_minutes)}" if self.steps < FEW_STEPS else ""
            return (
                f"nothing learnt ({came}): divergence on held-out questions stayed at {self.before:.3f}, and the sheet "
                f"is as it was{few}"
            )
        return f"divergence on {self.held_out} held-out questions {self.before:.3f} -> {self.after:.3f} ({came})"


def few_steps(steps: int, minutes: float) -> str:
    """What to say of so few, where the usual number takes so many minutes, or it is not known how many."""
    way = f"minutes={math.ceil(minutes)} or so" if minutes else "more minutes"
    return f"too few steps ({steps}, where some {USUAL_STEPS} are usual): give {way} for those"


def practice_seconds(seconds: float, enough: float) -> float:
    """Those of a study's `seconds` that practice takes, if it has questions enough after so many."""
    return min(max(enough, seconds * PRACTICE), seconds * _LATEST)


def usual_seconds(step: float, enough: float) -> float:
    """Those in which a study has time for the usual steps, of so many seconds each, beside its practice."""
    steps = USUAL_STEPS * step
    return min(steps / (1 - _LATEST), max(steps + enough, steps / (1 - PRACTICE)))


def questions_wanted(sheet: Sheet, documents: Sequence[str] = ()) -> int:
    """How many questions are enough for a sheet's documents, or for some of them: for fewer, practice takes longer."""
    sizes = [each.tokens for each in sheet.manifest.documents if not documents or each.id in documents]
    return max(LEAST_QUESTIONS, sum(sizes) // _TOKENS)


class StudyOptions(TypedDict, total=False):
    """Those of `study`."""

    minutes: float | None
    steps: int | None
    learning_rate: float
    seed: int
    resume: str | Path | None
    practice: Practice | str | Path | None
    documents: Sequence[str]
    progress: Told | None


def study(
    session: Session,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    learning_rate: float = 0.02,
    seed: int = 0,
    resume: str | Path | None = None,
    practice: Practice | str | Path | None = None,
    documents: Sequence[str] = (),
    progress: Told | None = None,
) -> tuple[Sheet, Study]:
    """A sheet that answers more of what its documents say, of the size of the one given, and what came of it.

    `minutes` are those of all of it, `steps` those of training; at least one is needed. `learning_rate` is in units
    of the spread of keys and values. With `steps` alone it comes to the same sheet every time. `resume` is a file
    in which it is remembered how far it is; an interrupted study goes on from there, and the file goes at the end.
    `practice` is what is practised on, made before (`practise`) for any sheet of the same documents, task, guide and
    model, or a file of it: one that exists is read, and takes none of the minutes; else it is written.
    `documents` are the ids of those that are studied, if not all, or the id of one: of an independent sheet all others
    stay as they are. `progress` is told "practice" or "training", and how much of it is done, 0 to 1.

    If what was held out is not answered better, the sheet given comes back. Raises `RequestError` for a sheet without
    texts or with too few questions in them, `SheetError` for a practice or notebook that belongs to others or could
    not be written, `DocumentError` for a document that is not in the sheet, `BudgetError` for settings out of range,
    and `ModelError` for a divided model.
    """
    check(minutes, steps, session.backbone)
    if not 0 < learning_rate <= 1:
        raise BudgetError(f"learning_rate is {learning_rate!r}; give a number above 0 and at most 1, such as 0.02.")
    told = progress or (lambda what, share: None)
    sheet, backbone = session.sheet, session.backbone
    documents = _ids(documents)
    _check_documents(sheet, documents)
    _check_folders(resume, None if isinstance(practice, Practice) else practice)
    exercises, spent = _exercises(session, practice, resume, minutes, seed, documents, told)
    _check_enough(exercises)
    identity = {"sheet": sheet.manifest.digest, "seed": seed, "learning_rate": learning_rate, "steps": steps}
    notebook = Notebook(resume, {**identity, "practice": exercises.digest}) if resume is not None else None
    held, questions = _parted(exercises.questions, seed)
    others = [*exercises.texts, *exercises.asides]
    trainer = trainer_of(backbone, sheet, questions, others, held, seed, documents)
    state = (notebook.state(trainer.shifts) if notebook else None) or trainer.begin()
    seconds = math.inf if minutes is None else max(1.0, 60 * minutes - spent)
    pace = Pace(MOST_STEPS if steps is None else steps, seconds, learning_rate)
    enough = spent * questions_wanted(sheet, documents) / len(exercises.questions)
    trainer.run(state, pace, _teller(pace, told, notebook, enough))
    before = state.curve[0][1]  # of the best continuations alone, so where a sheet holds all it may be below zero
    learnt = state.best_step > 0 and state.lowest < before - _BETTER * abs(before)
    came = Study(
        questions=len(questions),
        texts=len(exercises.texts),
        asides=len(exercises.asides),
        held_out=len(held),
        documents=len(documents) or len(sheet.manifest.documents),
        tried=exercises.tried,
        before=before,
        after=state.lowest if learnt else before,
        steps=state.step,
        best_step=state.best_step if learnt else 0,
        learning_rate=learning_rate,
        seed=seed,
        seconds=spent + state.seconds,
        usual_minutes=_usual_minutes(state.seconds / state.step, enough) if state.step else 0.0,
    )
    logger.info("%s", came)
    if notebook:
        notebook.remove()
        _beside(notebook.path).unlink(missing_ok=True)
    if not learnt:
        return sheet, came
    return _noted(with_layers(backbone, sheet, trainer.best_layers(state), documents), came), came


def practise(
    session: Session,
    *,
    minutes: float | None = None,
    seed: int = 0,
    documents: Sequence[str] = (),
    resume: str | Path | None = None,
    progress: Told | None = None,
) -> Practice:
    """What sheets of these documents, of whatever size, may practise on; `documents` are the ids of some alone.

    `minutes` are those of a whole study, of which it takes its share; without them it is the same every time. `resume`
    is a file in which it is remembered how far it is; if it was interrupted, it goes on from there. Raises `SheetError`
    for one of another practice.
    """
    told = progress or (lambda what, share: None)
    documents = _ids(documents)
    path, of = resume and Path(resume), identity_digest({"of": practice_of(session.sheet, documents), "seed": seed})
    draft = read_draft(path, of) if path else None
    began = time.monotonic() - (draft.seconds if draft else 0.0)
    ends = [None if minutes is None else began + 60 * minutes * share for share in (PRACTICE, _LATEST)]
    told("practice", 0.0)
    return make_practice(
        session.loaded,
        session.layout,
        session.sheet,
        seed=seed,
        until=ends[0],
        latest=ends[1],
        least=questions_wanted(session.sheet, documents),
        documents=documents,
        tell=lambda share: told("practice", share),
        draft=draft,
        keep=_keeper(path, of) if path else lambda draft: None,
    )


def _exercises(
    session: Session,
    practice: Practice | str | Path | None,
    resume: str | Path | None,
    minutes: float | None,
    seed: int,
    documents: Sequence[str],
    told: Told,
) -> tuple[Practice, float]:
    """What is practised on: as given, or as a file has it, or new; and the seconds of it that are this study's."""
    if isinstance(practice, Practice):
        _check_of(practice, session.sheet, documents, "The practice")
        return practice, 0.0
    own = practice is None
    path = Path(practice) if practice is not None else None if resume is None else _beside(Path(resume))
    found = None if path is None else read_practice(path)
    if found is not None:
        _check_of(found, session.sheet, documents, f"The practice in {str(path)!r}")
        return found, found.seconds if own else 0.0
    draft = path and path.with_name(f"{path.name}.part")
    made = practise(session, minutes=minutes, seed=seed, documents=documents, resume=draft, progress=told)
    if path is not None and len(made.questions) >= LEAST_QUESTIONS:
        write_practice(path, made)
    if draft:
        draft.unlink(missing_ok=True)
    return made, made.seconds


def _keeper(path: Path, of: str) -> Callable[[Draft], None]:
    """Writes a draft of a practice, now and then."""
    saved = time.monotonic()

    def keep(draft: Draft) -> None:
        nonlocal saved
        if time.monotonic() - saved >= _SAVED_EVERY:
            write_draft(path, draft, of)
            saved = time.monotonic()

    return keep


def _beside(notebook: Path) -> Path:
    """Where a study that can be resumed remembers its practice."""
    return notebook.with_name(f"{notebook.name}.practice")


def _noted(sheet: Sheet, came: Study) -> Sheet:
    """The sheet with what came of its study in the manifest; what a check found is true of it no more."""
    made = sheet.manifest
    told = {"build": {**made.build, "study": asdict(came)}, "retention": None}
    return replace(sheet, manifest=made.model_copy(update=told))


def _parted(questions: Sequence[Exercise], seed: int) -> tuple[list[Exercise], list[Exercise]]:
    """Questions that are held out, and those to practise on."""
    mixed = list(questions)
    random.Random(seed).shuffle(mixed)
    held = max(4, min(_MOST_HELD, round(_HELD * len(mixed))))
    return mixed[:held], mixed[held:]


def _usual_minutes(step: float, enough: float) -> float:
    """Those of the usual steps of so many seconds; what is practised on is there already if it took nothing."""
    return (usual_seconds(step, enough) if enough else USUAL_STEPS * step) / 60


def _teller(pace: Pace, told: Told, notebook: Notebook | None, enough: float) -> Callable[[State], None]:
    """Hears of each step; warns once if too few will be made in the time that is left."""
    saved = time.monotonic()
    taken: list[float] = []  # seconds when the last steps ended

    def tell(state: State) -> None:
        nonlocal saved
        told("training", pace.progress(state))
        taken.append(state.seconds)
        if len(taken) == _TIMED:
            _warn_of_few(state, pace, taken[-1] - taken[-2], enough)
        if notebook and time.monotonic() - saved >= _SAVED_EVERY:
            notebook.write_state(state)
            saved = time.monotonic()

    return tell


def _warn_of_few(state: State, pace: Pace, step: float, enough: float) -> None:
    """Log a warning if time ends a study, of steps of so many seconds, before it can have learnt much."""
    if math.isinf(pace.seconds):
        return
    steps = state.step + int((pace.seconds - state.seconds) / max(step, 1e-9))
    if steps < min(FEW_STEPS, pace.steps):
        logger.warning("a step takes %.1f s: %s", step, few_steps(steps, _usual_minutes(step, enough)))


def check(minutes: float | None, steps: int | None, backbone: Backbone) -> None:
    """Raise `BudgetError` for a time that is none, and `ModelError` for a model that cannot study."""
    if minutes is None and steps is None:
        raise BudgetError("Nothing says how long to study; give minutes=, or steps= of training.")
    if minutes is not None and not 0 < minutes <= MOST_MINUTES:
        raise BudgetError(f"minutes is {minutes!r}; give a number above 0 and at most {MOST_MINUTES}, a year.")
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise BudgetError(f"steps is {steps!r}; give a whole number of at least 1.")
    if any(hasattr(weight, "full_tensor") for weight in backbone.model.parameters()):
        raise ModelError("The model is divided among processes, and a study needs it whole; load it in one.")


def _ids(documents: Sequence[str]) -> list[str]:
    """Each id once; one alone is no sequence of its letters."""
    return sorted({documents} if isinstance(documents, str) else set(documents))


def _check_folders(*paths: str | Path | None) -> None:
    """Raise `SheetError` before any work for files that could not be written after it."""
    for path in paths:
        if path is not None and not Path(path).parent.is_dir():
            raise SheetError(f"The folder {str(Path(path).parent)!r} does not exist; create it first.")


def _check_documents(sheet: Sheet, documents: Sequence[str]) -> None:
    for missing in set(documents) - {entry.id for entry in sheet.manifest.documents}:
        raise DocumentError(f"There is no document {missing!r} in the sheet; `kb.sheet.documents` lists them.")


def _check_of(practice: Practice, sheet: Sheet, documents: Sequence[str], what: str) -> None:
    if practice.of != practice_of(sheet, documents):
        raise SheetError(
            f"{what} is of other documents than the sheet's, or of another task, guide or model; give one of the same, "
            "or a file that does not exist yet, and it is written."
        )


def _check_enough(practice: Practice) -> None:
    if len(practice.questions) < LEAST_QUESTIONS:
        why = ", ".join(f"{count} {what}" for what, count in practice.left_out.most_common())
        raise RequestError(
            f"Of {practice.tried} questions that the model wrote about the documents {len(practice.questions)} may "
            f"serve, and a study needs {LEAST_QUESTIONS} ({why or 'no more were written'}). Give more minutes, more "
            "text, or a model that is better at it; the sheet stays as it is."
        )
