"""Everything cribsheet raises on purpose.

    CribsheetError
    ├── DocumentError      an input document cannot be read or makes no sense
    ├── TaskError          a task description or example is missing or malformed
    ├── ModelError         the model cannot be used: unknown family, unsupported attention, no such folder
    ├── TemplateError      the chat template rewrites the text before the question, so no sheet can fit it
    ├── BudgetError        budget, rate or chunk size do not fit the corpus or the model's window
    ├── SheetError         a sheet file is damaged, foreign, or of an unknown format version
    │   └── MismatchError  a sound sheet that belongs to another model, tokenizer, template or rotary setting
    ├── RequestError       a question or its sampling settings cannot be served
    │   └── WindowError    a question that leaves no room for an answer in the model's window
    ├── EngineError        the engine is closed, full, or died
    └── IntegrationError   a framework's integration is not installed

Each message gives the value, the limit and the way out. All but the last two are also `ValueError`, so that code which
does not know cribsheet still catches bad input as bad input.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class CribsheetError(Exception):
    """Base class of every error that cribsheet raises on purpose."""


class DocumentError(CribsheetError, ValueError):
    """An input document cannot be read or makes no sense."""


class TaskError(CribsheetError, ValueError):
    """A task description or example is missing or malformed."""


class ModelError(CribsheetError, ValueError):
    """The model cannot be used: unknown family, unsupported attention, missing files."""


class TemplateError(CribsheetError, ValueError):
    """The chat template rewrites the text before the question, so no sheet can fit it."""


class BudgetError(CribsheetError, ValueError):
    """Budget, rate or chunk size do not fit the corpus or the model's window."""


class SheetError(CribsheetError, ValueError):
    """A sheet file is damaged, foreign, or of an unknown format version."""


class MismatchError(SheetError):
    """A sound sheet that belongs to another model, tokenizer, template or rotary setting."""


class RequestError(CribsheetError, ValueError):
    """A question or its sampling settings cannot be served."""


class WindowError(RequestError):
    """A question that leaves no room for an answer in the model's window."""


class EngineError(CribsheetError, RuntimeError):
    """The engine is closed, its queue is full, or it died."""


class IntegrationError(CribsheetError, ImportError):
    """The distribution that connects cribsheet with a framework is not installed."""


def integration(module: str, distribution: str) -> ModuleType:
    """The module of an integration. Raises `IntegrationError` with the command that installs it if it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # it is there, and something that it needs is not
        raise IntegrationError(f"This needs the distribution {distribution}: pip install {distribution}") from error
